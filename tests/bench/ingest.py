"""`make bench`: what the service costs, against the bare calls it is made of, in one run.

Writes bench-results/bench.json and bench-results/bench.md. Times are medians of five, with the spread; the
ratios are what to compare between machines. Uses the bundled samples only.
"""

import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from app.samples import SAMPLES
from clasp_core.ingest import embed_recording
from clasp_core.models import open_model
from tests.bench.measuring import OUT
from tests.service import RunningService

REPEATS = 5
LONG_S = 3 * 3600
RATE = 16_000


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = [*bare_calls(), *service_costs(Path(folder))]
    OUT.mkdir(exist_ok=True)
    (OUT / "bench.json").write_text(json.dumps(rows, indent=1) + "\n")
    table = ["| what | value | unit | spread |", "| --- | --- | --- | --- |"]
    table += [f"| {row['what']} | {row['value']:.4g} | {row['unit']} | {row['spread']} |" for row in rows]
    (OUT / "bench.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


def row(what: str, values: list[float], unit: str) -> dict[str, Any]:
    spread = f"{min(values):.4g} to {max(values):.4g}" if len(values) > 1 else ""
    return {"what": what, "value": statistics.median(values), "unit": unit, "spread": spread}


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def speech() -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """All samples one after the other, with a second of silence between them."""
    parts = []
    for path in sorted((SAMPLES / "audio").glob("*.opus")):
        samples, rate = soundfile.read(path, dtype="float32")
        parts += [soxr.resample(samples, rate, RATE).astype(np.float32), np.zeros(RATE, np.float32)]
    return np.concatenate(parts)


def bare_calls() -> list[dict[str, Any]]:
    """The engine without the service, on one thread."""
    import torch

    torch.set_num_threads(1)
    model = open_model("mini")
    encoder, text = model.speech_encoder(), model.text_encoder()
    with tempfile.NamedTemporaryFile(suffix=".flac") as file:
        sound = speech()
        soundfile.write(file.name, sound, RATE)
        seconds = len(sound) / RATE
        path = Path(file.name)
        embed_recording(encoder, path, max_duration_s=LONG_S)
        whole = [
            seconds / timed(lambda: embed_recording(encoder, path, max_duration_s=LONG_S))
            for _ in range(REPEATS)
        ]
    questions = [json.loads(line)["q"] for line in (SAMPLES / "questions.jsonl").read_text().splitlines()]
    one = [
        1000 * timed(lambda: [text.encode([q]) for q in questions]) / len(questions) for _ in range(REPEATS)
    ]
    batch = [1000 * timed(lambda: text.encode(questions)) / len(questions) for _ in range(REPEATS)]
    return [
        row("decode, segment and embed, one thread", whole, "x real time"),
        row("encode one question", one, "ms"),
        row(f"encode questions, batch of {len(questions)}", batch, "ms each"),
    ]


def service_costs(folder: Path) -> list[dict[str, Any]]:
    """The service with one worker: three hours of recording, its memory, and the latency of questions."""
    service = RunningService(folder).start()
    try:
        before = _resident(service)
        sound = speech()
        path = folder / "long.flac"
        with soundfile.SoundFile(path, "w", RATE, 1) as file:
            for _ in range(LONG_S * RATE // len(sound)):
                file.write(sound)
        peak = _Peak(service)
        started = time.perf_counter()
        uploaded = service.upload(path.read_bytes(), id="long").raise_for_status()
        idle = [1000 * timed(lambda: service.found("the train is late", lang="en")) for _ in range(50)]
        record = service.settled(uploaded.json()["id"], within_s=3600)
        took = time.perf_counter() - started
        after = peak.stop()
        quiet = [1000 * timed(lambda: service.found("the train is late", lang="en")) for _ in range(100)]
        return [
            row("three hours in one recording", [record["duration_s"] / took], "x real time"),
            row("API and worker, resident at rest", [before], "MB"),
            row("added at most by the three-hour recording", [after - before], "MB"),
            row("GET /search", quiet, "ms"),
            row("GET /search while a worker is busy", idle, "ms"),
        ]
    finally:
        service.stop()


def _resident(service: RunningService) -> float:
    """MB of the API process, its workers and their decoders."""
    pids = service.processes()
    total = 0
    for pid in pids:
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            continue
        total += pages * 4096
    return total / 1e6


class _Peak:
    """The largest resident size seen while it runs."""

    def __init__(self, service: RunningService) -> None:
        self._service = service
        self._most = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.25):
            self._most = max(self._most, _resident(self._service))

    def stop(self) -> float:
        self._over.set()
        self._thread.join()
        return self._most


if __name__ == "__main__":
    main()
