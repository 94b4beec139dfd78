"""How cost grows: with the duration of a recording, with recordings, clients and collections.

Duration is `mini`'s, through the service. All else is the service's, with the stand-in encoders of the tests
(`tests.stand_in`), whose cost is nothing and whose vectors are short; the part `index` has the index.
"""

import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import soundfile

from clasp_core.library import Library
from clasp_core.types import Seconds
from tests.audio_files import encode
from tests.bench.ingest import MAX_DURATION_S, RATE, speech
from tests.bench.measuring import ROUNDS, Curve, Result, Row, in_turn, seconds
from tests.core.doubles import DIM, store_ready, unit
from tests.memory import MIB, MemoryWatch
from tests.service import RunningService, eventually, sql
from tests.stand_in import StandIn

SEGMENTS = 10
"""Of each recording that is there before."""
AT_ONCE = 2000
SEARCHES = 40
"""In a round."""
COLLECTIONS = (1, 10, 100, 1000)
CLIENTS = (1, 4, 16)


def measure(full: bool) -> Iterator[Result]:
    yield from _duration((1, 5, 20, 60, 180) if full else (1, 3, 8))
    yield from _recordings((100, 1000, 10_000, 100_000) if full else (100, 1000, 10_000))
    yield from _collections(10_000)


# --- duration


def _duration(minutes: tuple[int, ...]) -> Iterator[Result]:
    sound = speech()
    took: list[tuple[float, float]] = []
    added: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = {"workers": 1, "threads": 0, "max_duration_s": MAX_DURATION_S, "max_upload_bytes": 1 << 31}
        with RunningService(Path(folder), **settings) as service:
            service.start()
            service.ready(_flac(sound, 30))  # what is there once and for all: the decoder's process, buffers
            for length in minutes:
                content = _flac(sound, 60 * length)
                with MemoryWatch(service, 0.5) as before:
                    eventually(lambda watch=before: len(watch.samples) > 1, within_s=30)  # type: ignore[misc]
                with MemoryWatch(service, 0.25) as watch:
                    began = time.perf_counter()
                    uploaded = service.upload(content).raise_for_status()
                    service.settled(uploaded.json()["id"], within_s=7200)
                    took.append((length, time.perf_counter() - began))
                added.append((length, max(0.0, (watch.peak() - before.peak()) / MIB)))
            service.stop()
    shortest, longest = minutes[0], minutes[-1]
    per_hour = {length: value * 60 / length for length, value in took}
    yield Row(
        part="growth",
        what=f"a recording of {longest} min, from upload to ready",
        unit="s an hour of sound",
        better="lower",
        ours=[per_hour[longest]],
        against=f"one of {shortest} min",
        theirs=[per_hour[shortest]],
    )
    yield Row(
        part="growth",
        what=f"memory added while a recording of {longest} min is embedded",
        unit="MiB",
        better="lower",
        ours=[added[-1][1]],
    )
    yield Curve(
        part="growth",
        name="growth-duration",
        title="Ingestion of one recording",
        x="minutes of sound",
        y="s from upload to ready",
        series={"mini": took},
        log=True,
        note="Straight: nothing but the vectors and the upload is held until the end. What a recording costs"
        " by itself (an upload, a process that decodes, one commit) shows in the shortest.",
    )
    yield Curve(
        part="growth",
        name="growth-duration-memory",
        title="Memory added while one recording is embedded",
        x="minutes of sound",
        y="MiB, all processes, at most",
        series={"mini": added},
        note="Two batches of segments, whatever the length; the network's buffers are as large as the largest"
        " batch so far, which the first recordings have not had.",
    )


def _flac(sound: np.ndarray[tuple[int], np.dtype[np.float32]], length: Seconds) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.resize(sound, round(length * RATE)), RATE, format="FLAC")
    return file.getvalue()


# --- recordings, clients


def _recordings(sizes: tuple[int, ...]) -> Iterator[Result]:
    searches: dict[int, list[float]] = {}
    arrivals: dict[int, list[float]] = {}
    starts: list[tuple[float, float]] = []
    clients: list[tuple[float, float]] = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            fill(Path(folder), size)
            with RunningService(Path(folder), program="tests.stand_in") as service:
                starts.append((size, seconds(service.start)))
                found = in_turn(
                    {"search": lambda s=service: searched(s), "arrival": lambda s=service: arrived(s)}  # type: ignore[misc]
                )
                searches[size], arrivals[size] = found["search"], found["arrival"]
                if size == 1000:
                    clients = [(count, _throughput(service, count)) for count in CLIENTS]
                service.stop()
    least, most = sizes[0], sizes[-1]
    for what, values in ("GET /search", searches), ("an upload until it is found", arrivals):
        yield Row(
            part="growth",
            what=f"{what}, among {most:,} recordings",
            unit="ms",
            better="lower",
            ours=values[most],
            against=f"among {least:,}",
            theirs=values[least],
        )
    yield Curve(
        part="growth",
        name="growth-recordings",
        title=f"A library of recordings of {SEGMENTS} segments",
        x="recordings",
        y="ms, median",
        series={
            "GET /search": [(size, statistics.median(line)) for size, line in searches.items()],
            "an upload until it is found": [
                (size, statistics.median(line)) for size, line in arrivals.items()
            ],
        },
        log=True,
        note="A search compares every vector, here of 16 numbers: by a profile among 10,000 recordings, that"
        " is less than reading hits from the catalogue. An arrival costs the same in each library: much of"
        " it is the wait for the next look at the queue, up to 0.2 s.",
    )
    yield Curve(
        part="growth",
        name="growth-start",
        title="From the start until the service is ready",
        x="recordings",
        y="s",
        series={"without a snapshot of the index": starts},
        log=True,
        note="Below some thousand recordings it is Python and its packages; above, vectors that are read from"
        " the catalogue.",
    )
    yield Curve(
        part="growth",
        name="growth-clients",
        title="Clients that ask again as soon as they have an answer, 1,000 recordings",
        x="clients",
        y="answers a second",
        series={"GET /search": clients},
        note="The clients, on the same cores, help to bend it; the part `query` has them in detail.",
    )


def fill(folder: Path, recordings: int) -> None:
    """A data directory as if a service with the stand-in had embedded so many recordings."""
    model = StandIn("stand-in")
    chance = np.random.default_rng(0)
    library = Library(folder / "index_data", model=model.fingerprint, dim=model.dim, name=model.name)
    with closing(library):
        for start in range(1, recordings + 1, AT_ONCE):
            some = range(start, min(start + AT_ONCE, recordings + 1))
            vectors = unit(chance.normal(size=(len(some), SEGMENTS, DIM)))
            store_ready(library.catalog, model.fingerprint, dict(zip(some, vectors, strict=True)))


def searched(service: RunningService, **parameters: object) -> float:
    """Milliseconds of one question, the median of some that differ."""
    asked = [f"question {number}" for number in range(SEARCHES)]
    return 1000 * statistics.median(seconds(lambda q=q: service.found(q, **parameters)) for q in asked)


_chance = np.random.default_rng(1)


def arrived(service: RunningService) -> float:
    """Milliseconds until a recording that is uploaded now is found."""
    content = encode(_chance.normal(0, 0.1, RATE // 2).astype(np.float32), RATE)
    return 1000 * seconds(lambda: service.ready(content))


def _throughput(service: RunningService, clients: int, lasting_s: Seconds = 3.0) -> float:
    """Answers a second."""
    end = time.monotonic() + lasting_s

    def ask(number: int) -> int:
        answered = 0
        while time.monotonic() < end:
            service.found(f"question {number} {answered}")
            answered += 1
        return answered

    with ThreadPoolExecutor(clients) as pool:
        return sum(pool.map(ask, range(clients))) / lasting_s


# --- collections


def _collections(recordings: int) -> Iterator[Result]:
    points: list[tuple[float, float]] = []
    rounds: dict[int, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), recordings)
        for count in COLLECTIONS:
            sql(
                Path(folder) / "index_data",
                "UPDATE recordings SET collection = 'c' || (key % :count)",
                count=count,
            )
            with RunningService(Path(folder), program="tests.stand_in") as service:
                service.start()
                searched(service, collection="c0")
                rounds[count] = [searched(service, collection="c0") for _ in range(ROUNDS)]
                everywhere = statistics.median([searched(service) for _ in range(ROUNDS)])
                points.append((count, statistics.median(rounds[count])))
                service.stop()
    most = COLLECTIONS[-1]
    yield Row(
        part="growth",
        what=f"GET /search in one of {most:,} collections of {recordings:,} recordings",
        unit="ms",
        better="lower",
        ours=rounds[most],
        against="in all of them",
        theirs=[everywhere],
    )
    yield Curve(
        part="growth",
        name="growth-collections",
        title=f"A search in one of the collections of {recordings:,} recordings",
        x="collections",
        y="ms, median",
        series={"GET /search?collection=": points},
        log=True,
        note="Which recordings are meant is asked of the catalogue, and only their vectors are compared: the"
        " more collections, the less there is to do.",
    )
