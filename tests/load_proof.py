"""`python -m tests.load_proof`: thousands of uploads and questions at once, and an account of every one.

    python -m tests.load_proof --uploads 10000 --searches 50000 --clients 32
    python -m tests.load_proof --model mini --uploads 500 --searches 2000

Starts a service of its own, with keys, on short clips that differ; by default with the stand-in model, whose
encoders cost nothing, so that what is loaded is HTTP, the catalogue, decoding, the queue and the index.
Answers are counted by status; 429, 503 and 507 are asked again after their Retry-After. It fails where

- a server error other than 503 and 507 was answered, or an upload was refused otherwise,
- an acknowledged id is not listed exactly once, or not ready in the end,
- one of a sample is not its own best hit, or comes back with other bytes,
- a worker died, or the log tells of an unexpected error,
- memory of the API or of the workers is not flat: the median of the last quarter of the time exceeds that of
  the third by more than 3 % and 2 MiB. What has to grow (vectors, and a few hundred bytes of index for each
  recording) is well below that.

Prints a line every ten seconds and a JSON summary, which also goes to --out.
"""

import argparse
import json
import math
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tests.audio_files import encode
from tests.memory import MIB, PARTS, MemoryWatch, trend
from tests.service import RunningService, clasp, eventually

RATE = 16_000
FLAT_SHARE, FLAT_SLACK_MIB = 0.03, 2.0
STATED = frozenset({429, 503, 507})
"""Answers that ask for patience."""
TRIES = 60
WORDS = ["bees", "honey", "winter", "train", "tree", "village", "bread", "fishing", "luggage", "power", "cut"]


def clip(seed: int, number: int) -> bytes:
    """0.3 to 0.7 s of noise whose 32 bands are as loud as no other's; 16-bit WAV."""
    rng = np.random.default_rng((seed, number))
    length = int(rng.integers(3, 8)) * RATE // 10
    spectrum = np.fft.rfft(rng.normal(size=length))
    loudness = np.repeat(10 ** rng.uniform(-2, 0, 32), math.ceil(len(spectrum) / 32))[: len(spectrum)]
    samples = np.fft.irfft(spectrum * loudness, length)
    return encode((0.5 * samples / np.abs(samples).max()).astype(np.float32), RATE)


class Load:
    """What the clients do, and what came of it."""

    def __init__(self, service: RunningService, key: str, seed: int) -> None:
        self.service = service
        self.seed = seed
        self.acknowledged: dict[str, int] = {}
        """Ids, and the numbers of their clips."""
        self.statuses: Counter[str] = Counter()
        self.seconds: dict[str, list[float]] = {}
        self.complaints: list[str] = []
        self._headers = {"Authorization": f"Bearer {key}"}
        self._local = threading.local()
        self._lock = threading.Lock()

    def ask(self, kind: str, method: str, path: str, **more: Any) -> httpx.Response:
        """One request, patiently; counted under `kind`, and complained of where it is not a success."""
        client = getattr(self._local, "client", None)
        if client is None:
            base = self.service.client.base_url
            client = self._local.client = httpx.Client(base_url=base, timeout=120, headers=self._headers)
        for _ in range(TRIES):
            began = time.perf_counter()
            answer = client.request(method, path, **more)
            took = time.perf_counter() - began
            with self._lock:
                self.statuses[f"{kind} {answer.status_code}"] += 1
                self.seconds.setdefault(kind, []).append(took)
            if answer.status_code not in STATED:
                break
            time.sleep(float(answer.headers["Retry-After"]))
        if not answer.is_success:
            with self._lock:
                self.complaints.append(f"{kind}: {answer.status_code} {answer.text[:200]}")
        return answer

    def upload(self, number: int) -> None:
        files = {"file": clip(self.seed, number)}
        answer = self.ask("upload", "POST", "/audio", files=files, data={"metadata": f'{{"n": {number}}}'})
        if answer.is_success:
            with self._lock:
                self.acknowledged[answer.json()["id"]] = number

    def search(self, number: int) -> None:
        """By a text mostly; now and then as JSON with a filter, or by sound."""
        rng = random.Random(number)
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))
        if number % 20 == 0:
            sound = {"file": clip(self.seed, rng.randrange(1 + len(self.acknowledged)))}
            self.ask("search by sound", "POST", "/search/audio", files=sound)
        elif number % 10 == 1:
            body = {"q": text, "filter": {"metadata": {"n": rng.randrange(1 + len(self.acknowledged))}}}
            self.ask("search JSON", "POST", "/search", json=body)
        else:
            self.ask("search", "GET", "/search", params={"q": text})

    def listed(self) -> list[dict[str, Any]]:
        items, cursor = [], {}
        while True:
            page = self.ask("list", "GET", "/audio", params={"limit": 1000} | cursor).json()
            items += page["items"]
            if page["next_cursor"] is None:
                return items
            cursor = {"cursor": page["next_cursor"]}

    def check(self, recording_id: str) -> None:
        """Its own sound finds it first, and its bytes are those that were sent."""
        sent = clip(self.seed, self.acknowledged[recording_id])
        hits = self.ask("check", "POST", "/search/audio", files={"file": sent}).json().get("hits", [])
        best = {hit["id"] for hit in hits if hit["score"] > hits[0]["score"] - 1e-6}
        if recording_id not in best:
            self.complaints.append(f"{recording_id} is not found by its own sound")
        if self.ask("check", "GET", f"/audio/{recording_id}/content").content != sent:
            self.complaints.append(f"{recording_id} comes back with other bytes")


def steps(uploads: int, searches: int) -> Iterator[tuple[str, int]]:
    """All that is to be asked, uploads spread evenly among searches."""
    total = uploads + searches
    for place in range(total):
        done = place * uploads // total
        if (place + 1) * uploads // total > done:
            yield "upload", done
        else:
            yield "search", place - done


def prove(
    folder: Path, *, uploads: int, searches: int, clients: int, seed: int, program: str, sampled: int = 500
) -> dict[str, Any]:
    """The summary; `complaints` is empty where all is well."""
    made = clasp("keys", "create", "load", "--scope", "admin", "--json", cwd=folder)
    assert made.returncode == 0, made.stderr
    key = json.loads(made.stdout)["key"]
    work, turn = steps(uploads, searches), threading.Lock()
    began = time.monotonic()
    with RunningService(folder, program=program, log_level="warning") as service:
        service.client.headers["Authorization"] = f"Bearer {key}"
        service.start()
        load = Load(service, key, seed)

        def client() -> None:
            while True:
                with turn:
                    step = next(work, None)
                if step is None:
                    return
                kind, number = step
                (load.upload if kind == "upload" else load.search)(number)

        def drained() -> bool:
            waiting = sum(service.metric("clasp_recordings", status=s) for s in ("pending", "processing"))
            return waiting == 0

        memory = MemoryWatch(service, 1.0)
        with memory, _Reported(load, memory, began), ThreadPoolExecutor(clients) as pool:
            for done in [pool.submit(client) for _ in range(clients)]:
                done.result()
            asked_s = time.monotonic() - began
            eventually(drained, within_s=3600)
            drained_s = time.monotonic() - began
            items = load.listed()
            ids = random.Random(seed).sample(sorted(load.acknowledged), min(sampled, uploads))
            list(pool.map(load.check, ids))
        status_of = {item["id"]: item["status"] for item in items}
        missing = [i for i in load.acknowledged if status_of.get(i) != "ready"]
        if missing or len(items) != len(status_of) or len(items) != uploads:
            load.complaints.append(
                f"{len(load.acknowledged)} acknowledged, {len(items)} listed, {len(missing)} not ready"
            )
        trends = {part: trend(memory.samples, part) for part in PARTS}
        for part in ("api", "workers"):
            if not trends[part].is_flat(FLAT_SHARE, FLAT_SLACK_MIB):
                load.complaints.append(f"memory of {part} grows: {trends[part]}")
        if deaths := service.metric("clasp_worker_restarts_total"):
            load.complaints.append(f"{deaths:g} workers died")
        if service.stop() != 0 or "unexpected error" in service.log():
            load.complaints.append("the log tells of an unexpected error")
        if bad := [status for status in load.statuses if status.split()[-1] in ("500", "501", "502", "504")]:
            load.complaints.append(f"server errors: {bad}")
    return {
        "uploads": uploads,
        "searches": searches,
        "clients": clients,
        "seed": seed,
        "program": program,
        "asked_s": round(asked_s),
        "drained_s": round(drained_s),
        "answers": dict(sorted(load.statuses.items())),
        "milliseconds": {kind: percentiles(seconds) for kind, seconds in sorted(load.seconds.items())},
        "acknowledged": len(load.acknowledged),
        "listed": len(items),
        "ready": sum(status == "ready" for status in status_of.values()),
        "found_by_own_sound": len(ids),
        "memory_mib": {
            part: {
                "peak": round(memory.peak(part) / MIB, 1),
                "third_quarter": round(trends[part].third, 1),
                "last_quarter": round(trends[part].last, 1),
                "slope_a_minute": round(trends[part].slope, 3),
            }
            for part in PARTS
        },
        "memory_curve_mib": [
            [round(s.at_s)] + [round(s.resident[part] / MIB, 1) for part in PARTS]
            for s in memory.samples[:: max(1, len(memory.samples) // 40)]
        ],
        "complaints": load.complaints[:50],
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """In milliseconds."""
    ordered = sorted(seconds)
    return {
        f"p{percent}": round(1000 * ordered[min(len(ordered) - 1, len(ordered) * percent // 100)], 1)
        for percent in (50, 95, 99, 100)
    }


class _Reported:
    """Tells how far it is every ten seconds."""

    def __init__(self, load: Load, memory: MemoryWatch, began: float) -> None:
        self._load, self._memory, self._began = load, memory, began
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._ending.wait(10):
            resident = {part: size // MIB for part, size in self._memory.samples[-1].resident.items()}
            print(
                f"{time.monotonic() - self._began:6.0f} s  {sum(self._load.statuses.values())} answers, "
                f"{len(self._load.acknowledged)} acknowledged, {len(self._load.complaints)} complaints, "
                f"{resident} MiB",
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--uploads", type=int, default=10_000)
    parser.add_argument("--searches", type=int, default=50_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", choices=("stand-in", "mini"), default="stand-in")
    parser.add_argument("--out", type=Path, help="where the summary goes, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        summary = prove(
            Path(folder),
            uploads=options.uploads,
            searches=options.searches,
            clients=options.clients,
            seed=options.seed,
            program="app.cli" if options.model == "mini" else "tests.stand_in",
        )
    text = json.dumps(summary, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)
    return 1 if summary["complaints"] else 0


if __name__ == "__main__":
    sys.exit(main())
