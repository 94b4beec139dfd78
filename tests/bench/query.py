"""Questions: `GET /search` of the real service beside the bare calls it is made of, and beside infinity-emb.

The service runs as `clasp serve` does, with the samples indexed and one ingest worker, all on THREADS
threads; its clients are a process of their own (`tests.bench.load`). Each number of clients asks as fast as
it is answered, which is throughput, and then with half of that as arrivals of a Poisson process, which is
latency; the same rate idle, while the worker embeds hours of speech, and for infinity. The questions are 256
different ones of 8 to 12 words in all languages of the samples, the same for all.

infinity-emb serves the same text encoder and searches nothing (`tests.bench.infinity`). Of its engines torch
is measured, since ONNX Runtime, which `full` measures as well, pads every text to the longest of its batch.
"""

import json
import os
import random
import signal
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from urllib.parse import quote

import numpy as np

from app.samples import SAMPLES
from clasp_core.encoders.e5 import E5_SMALL, E5Encoder
from clasp_core.library import Library, Question
from clasp_core.models import open_model, use_threads
from tests.audio_files import encode
from tests.bench import infinity
from tests.bench.infinity import Infinity
from tests.bench.ingest import RATE, speech
from tests.bench.load import Asked, ask
from tests.bench.measuring import ROUNDS, Curve, Result, Row, in_turn, seconds
from tests.service import RunningService, eventually

THREADS = 1
"""Of each process's models: half of two cores, as by default."""
CLIENTS = (1, 8, 32, 128)
BATCH = 32
QUESTIONS = 256
HOURS = 2
"""Of speech for the worker, in each recording: it is not to come to their end."""
SAME = 0.999
"""Least cosine of a vector of ours and of theirs."""


def measure(full: bool) -> Iterator[Result]:
    use_threads(THREADS)
    asked = questions()
    under_ingest = CLIENTS if full else (BATCH,)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        service = running.enter_context(RunningService(Path(folder), threads=THREADS))
        service.start()
        _index_samples(service)
        rivals = dict(_rivals(Path(folder), asked, running, full=full))
        bare = _Bare(service, asked)
        yield bare.batching()
        requests = {"ours": (service.port, [_search(text) for text in asked])} | rivals
        length = 10.0 if full else 2.5
        runs = _Runs(requests, length)
        with _ingesting(service) as at_work:
            for number in range(ROUNDS):
                bare.run()
                for clients in CLIENTS:
                    runs.closed(clients)
                for clients in CLIENTS:
                    runs.opened(clients)
                with at_work():
                    for clients in under_ingest:
                        runs.closed(clients, "ours", "ingest")
                        runs.opened(clients, "ours", "ingest")
                print(f"round {number + 1} of {ROUNDS}", file=sys.stderr, flush=True)
        yield from _rows(runs, bare, list(rivals), under_ingest)
        yield from _curves(runs, bare, list(rivals), under_ingest)


def questions() -> list[str]:
    """Spans of 8 to 12 words of what the samples say and are asked, of each language as many."""
    said: dict[str, list[str]] = defaultdict(list)
    for name, member in (("questions.jsonl", "q"), ("manifest.jsonl", "text")):
        for line in (SAMPLES / name).read_text().splitlines():
            entry = json.loads(line)
            said[entry["lang"].partition("-")[0]].append(entry[member])
    chance = random.Random(0)
    found: dict[str, None] = {}
    while len(found) < QUESTIONS:
        for _, texts in sorted(said.items()):
            words, between, characters = " ".join(texts).split(), " ", 1
            if max(map(len, words)) > 30:  # it is written without spaces
                words, between, characters = list("".join(texts)), "", 2
            length = characters * chance.randint(8, 12)
            start = chance.randrange(max(1, len(words) - length))
            found[between.join(words[start : start + length])] = None
    texts = list(found)[:QUESTIONS]
    chance.shuffle(texts)
    return texts


def _search(text: str) -> bytes:
    return f"GET /search?q={quote(text)} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def _index_samples(service: RunningService) -> None:
    paths = sorted((SAMPLES / "audio").glob("*.opus"))
    for path in paths:
        service.upload(path.read_bytes(), id=path.stem).raise_for_status()
    for path in paths:
        assert service.settled(path.stem, within_s=300)["status"] == "ready"


def _rivals(
    folder: Path, asked: Sequence[str], running: ExitStack, *, full: bool
) -> Iterator[tuple[str, tuple[int, list[bytes]]]]:
    if not infinity.is_installed():
        print("infinity-emb is not installed (make infinity): its rows are left out", file=sys.stderr)
        return
    infinity.write_encoder(folder / "e5")
    ours = E5Encoder.load(E5_SMALL.locate(None))
    prepared = [ours.prepared(f"query: {text}") for text in asked]
    vectors = ours(asked[:BATCH]).numpy()
    engines: tuple[infinity.Engine, ...] = ("torch", "optimum") if full else ("torch",)
    for engine in engines:
        rival = running.enter_context(Infinity(folder / "e5", engine, THREADS))
        cosines = (vectors * rival.vectors(prepared[:BATCH])).sum(axis=1)
        assert cosines.min() > SAME, f"infinity serves another encoder: cosine {cosines.min():.4f}"
        yield f"infinity-emb, {engine}", (rival.port, [Infinity.request(text) for text in prepared])


class _Bare:
    """What the service is made of, without it: the text encoder and the library, on the same catalogue."""

    def __init__(self, service: RunningService, asked: Sequence[str]) -> None:
        model = open_model("mini")
        self._encoder = model.text_encoder()
        self._library = Library(
            Path(str(service.settings["data_dir"])), model=model.fingerprint, dim=model.dim
        )
        self._asked = asked
        self._answer(asked[:BATCH])
        self.per_second: list[float] = []

    def run(self) -> None:
        took = seconds(lambda: [self._answer(batch) for batch in self._batches(BATCH)])
        self.per_second.append(len(self._asked) / took)

    def batching(self) -> Row:
        def rate(together: int) -> Callable[[], float]:
            batches = self._batches(together)[: BATCH if together == 1 else 4]
            count = sum(map(len, batches))
            return lambda: count / seconds(lambda: [self._encoder.encode(batch) for batch in batches])

        rates = in_turn({"together": rate(BATCH), "alone": rate(1)})
        return Row(
            part="query",
            what=f"text encoder, {BATCH} questions together",
            unit="questions/s",
            better="higher",
            ours=rates["together"],
            against="one by one",
            theirs=rates["alone"],
            target=2.0,
        )

    def _answer(self, batch: Sequence[str]) -> None:
        self._library.search(self._encoder.encode(batch), [Question()] * len(batch))

    def _batches(self, size: int) -> list[Sequence[str]]:
        return [self._asked[start : start + size] for start in range(0, len(self._asked), size)]


class _Runs:
    """What clients saw, by who answered, what else went on, and how many clients there were."""

    def __init__(self, requests: dict[str, tuple[int, list[bytes]]], length: float) -> None:
        self._requests = requests
        self._length = length
        self.throughput: dict[tuple[str, str, int], list[Asked]] = defaultdict(list)
        self.latency: dict[tuple[str, str, int], list[Asked]] = defaultdict(list)
        self._rates: dict[int, float] = {}

    def closed(self, clients: int, who: str | None = None, meanwhile: str = "idle") -> None:
        for name, (port, requests) in self._chosen(who):
            seen = ask(port, requests, clients=clients, seconds=self._length)
            self.throughput[name, meanwhile, clients].append(seen)

    def opened(self, clients: int, who: str | None = None, meanwhile: str = "idle") -> None:
        """At half of what the slowest of all that answered anything did in the first round, so that nobody's
        queue grows."""
        if clients not in self._rates:
            first = [self.throughput[name, "idle", clients][0].per_second for name in self._requests]
            self._rates[clients] = min(filter(None, first)) / 2
        for name, (port, requests) in self._chosen(who):
            seen = ask(port, requests, clients=clients, seconds=self._length, rate=self._rates[clients])
            self.latency[name, meanwhile, clients].append(seen)

    def _chosen(self, who: str | None) -> list[tuple[str, tuple[int, list[bytes]]]]:
        return [(name, asked) for name, asked in self._requests.items() if who in (None, name)]

    def per_second(self, name: str, meanwhile: str, clients: int) -> list[float]:
        return [seen.per_second for seen in self.throughput[name, meanwhile, clients]]

    def percentiles(self, name: str, meanwhile: str, clients: int, percent: float) -> list[float]:
        return [seen.percentile(percent) for seen in self.latency[name, meanwhile, clients]]

    def note(self, name: str, meanwhile: str, clients: int) -> str:
        """The rate, and what asking took of the processors that are measured."""
        cpu = statistics.median(seen.client_cpu for seen in self.latency[name, meanwhile, clients])
        return f"{self._rates[clients]:.3g} questions/s; the clients take {100 * cpu:.0f} % of a core"


@contextmanager
def _ingesting(service: RunningService) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """While the block within runs, the worker embeds; between such it is held, with what decodes for it."""
    sound = np.tile(speech(), 1 + HOURS * 3600 * RATE // len(speech()))
    for number in range(2):
        service.upload(encode(sound[number * RATE :], RATE, "flac"), id=f"long-{number}").raise_for_status()
    eventually(lambda: service.client.get("/audio/long-0").json()["status"] == "processing", within_s=60)

    def signalled(number: signal.Signals) -> None:
        assert service.process is not None
        for pid in service.processes():
            if pid != service.process.pid:
                os.kill(pid, number)

    @contextmanager
    def at_work() -> Iterator[None]:
        signalled(signal.SIGCONT)
        try:
            yield
            assert service.client.get("/audio/long-1").json()["status"] != "ready", (
                "the worker ran out of work"
            )
        finally:
            signalled(signal.SIGSTOP)

    signalled(signal.SIGSTOP)
    try:
        yield at_work
    finally:
        signalled(signal.SIGCONT)


def _rows(runs: _Runs, bare: _Bare, rivals: Sequence[str], under_ingest: Sequence[int]) -> Iterator[Row]:
    for clients in CLIENTS:
        what = f"GET /search, {clients} clients"
        ours = runs.per_second("ours", "idle", clients)
        yield Row(
            part="query",
            what=what,
            unit="questions/s",
            better="higher",
            ours=ours,
            against=f"encode and search, {BATCH} at a time",
            theirs=bare.per_second,
            target=0.85 if clients == BATCH else None,
            limit="bare batched calls",
            limits=bare.per_second,
        )
        for rival in rivals:
            theirs = runs.per_second(rival, "idle", clients)
            yield Row(
                part="query",
                what=what,
                unit="questions/s",
                better="higher",
                ours=ours,
                against=rival,
                theirs=theirs,
                target=1.0,
            )
        for percent in (50, 99):
            for rival in rivals or [""]:
                yield Row(
                    part="query",
                    what=f"{what}, p{percent}",
                    unit="ms",
                    better="lower",
                    ours=runs.percentiles("ours", "idle", clients, percent),
                    against=rival,
                    theirs=runs.percentiles(rival, "idle", clients, percent) if rival else [],
                    target=1.0 if rival and percent == 99 else None,
                    note=runs.note("ours", "idle", clients),
                )
    for clients in under_ingest:
        what = f"GET /search during ingest, {clients} clients"
        yield Row(
            part="query",
            what=what,
            unit="questions/s",
            better="higher",
            ours=runs.per_second("ours", "ingest", clients),
            against="idle",
            theirs=runs.per_second("ours", "idle", clients),
        )
        for percent in (50, 99):
            yield Row(
                part="query",
                what=f"{what}, p{percent}",
                unit="ms",
                better="lower",
                ours=runs.percentiles("ours", "ingest", clients, percent),
                against="idle",
                theirs=runs.percentiles("ours", "idle", clients, percent),
                target=2.0 if percent == 99 else None,
                note=runs.note("ours", "ingest", clients),
            )


def _curves(runs: _Runs, bare: _Bare, rivals: Sequence[str], under_ingest: Sequence[int]) -> Iterator[Curve]:
    def line(
        values: Callable[[int], list[float]], clients: Sequence[int] = CLIENTS
    ) -> list[tuple[float, float]]:
        return [(count, statistics.median(values(count))) for count in clients]

    throughput = {
        name: line(lambda n, name=name: runs.per_second(name, "idle", n)) for name in ("ours", *rivals)
    }
    throughput["encode and search, bare"] = line(lambda _: bare.per_second)
    tail = {
        name: line(lambda n, name=name: runs.percentiles(name, "idle", n, 99)) for name in ("ours", *rivals)
    }
    tail["ours, during ingest"] = line(lambda n: runs.percentiles("ours", "ingest", n, 99), under_ingest)
    yield Curve(
        part="query",
        name="query-throughput",
        title="Questions answered, by clients that ask back to back",
        x="clients",
        y="questions/s",
        series=throughput,
        log=True,
        note="Few clients fill no batch; from a full batch on, the text encoder is the bound.",
    )
    yield Curve(
        part="query",
        name="query-latency",
        title="p99 at half of that rate, from the arrival that was due",
        x="clients",
        y="ms",
        series=tail,
        log=True,
        note="A single client's questions wait for each other; those of many, for the batch before.",
    )
