"""What pictures are compared on, and how: shared by the tests and by tests.picture_gate."""

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

RATE = 22_050
SHIFTS = range(-2, 3)


def load(path: Path) -> NDArray[np.float32]:
    """A recording as librosa.load gives it: mono, 22,050 Hz, soxr's HQ resampling, its length rounded up."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    resampled: NDArray[np.float32] = soxr.resample(samples.mean(axis=1), rate, RATE, quality="HQ")
    return np.pad(resampled, (0, max(0, math.ceil(len(samples) * RATE / rate) - len(resampled))))


def speech(folder: Path, n: int) -> dict[str, Path]:
    """At most n recordings of a folder with manifest.jsonl, evenly over languages and then over durations."""
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text("utf-8").splitlines()]
    of_language: dict[str, list[dict[str, str]]] = defaultdict(list)
    for line in sorted(lines, key=lambda line: (line.get("duration_s", 0), line["id"])):
        of_language[line["lang"]].append(line)
    chosen: dict[str, Path] = {}
    for done, (language, own) in enumerate(sorted(of_language.items(), key=lambda item: len(item[1]))):
        share = -(-(n - len(chosen)) // (len(of_language) - done))
        for place in np.unique(np.linspace(0, len(own) - 1, share).astype(int)):
            chosen[f"{language} {own[place]['id']}"] = folder / own[place]["audio"]
    return chosen


def edge_cases(speech: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Waveforms at the borders of what the drawing has to get right; some made of a recording."""
    random = np.random.default_rng(0)
    time = np.arange(70 * RATE) / RATE
    noise = random.standard_normal(70 * RATE) * 0.1
    impulse = np.zeros(2 * RATE)
    impulse[RATE] = 1
    cases = {
        "silence": np.zeros(3 * RATE),
        "silence, then speech": np.concatenate((np.zeros(5 * RATE), speech)),
        "constant": np.full(RATE, 0.25),
        "quiet speech": speech * 1e-4,
        "all but silent speech": speech * 1e-8,
        "very loud speech": speech * 1e3,
        "absurdly loud speech": speech * 1e9,
        "one sample": np.full(1, 0.5),
        "one frame": noise[:511],
        "two frames": noise[:512],
        "0.3 s": speech[RATE // 2 :][: int(0.3 * RATE)],
        "0.99 s, milliseconds": noise[: int(0.98 * RATE)],
        "89 frames, an edge on half a pixel": noise[: 88 * 512],
        "712 frames, an edge on half a pixel": noise[: 711 * 512],
        "12 s": noise[: 12 * RATE],
        "608 columns": noise[: 21 * 512],
        "59.9 s": noise[: int(59.9 * RATE)],
        "70 s, minutes": noise * (1 + np.sin(time)),
        "tone": 0.5 * np.sin(2 * np.pi * 440 * time[: 4 * RATE]),
        "chirp": 0.5 * np.sin(2 * np.pi * 500 * time[: 8 * RATE] ** 2),
        "noise": noise[: 6 * RATE],
        "impulse": impulse,
    }
    return {name: samples.astype(np.float32) for name, samples in cases.items()}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two pictures' common area. Differences are of one colour of one pixel, in 0 to 255."""

    mean_difference: float
    largest_difference: int
    pixels_differing: int
    outside_mesh_differing: int
    shift: tuple[int, int]


def compare(reference: NDArray[np.uint8], picture: NDArray[np.uint8]) -> Comparison:
    """`shift`: the displacement (rows, columns) of up to two pixels that fits best, (0, 0) only if alone."""
    common = picture[:, : reference.shape[1]].astype(np.int16)
    difference = np.abs(reference.astype(np.int16) - common)
    # The rows and columns of frame, ticks and labels; but the right line of the frame, which moves.
    outside = np.ones(difference.shape[:2], bool)
    outside[1:426, 46:] = False
    height, width = common.shape[:2]
    inner = reference[2 : height - 2, 2 : width - 2].astype(np.int16)
    misfits = {
        (y, x): float(np.abs(inner - common[2 + y : height - 2 + y, 2 + x : width - 2 + x]).mean())
        for y in SHIFTS
        for x in SHIFTS
    }
    own = misfits.pop((0, 0))
    best = min(misfits, key=misfits.__getitem__)
    return Comparison(
        float(difference.mean()),
        int(difference.max()),
        int(difference.any(axis=2).sum()),
        int(difference.any(axis=2)[outside].sum()),
        (0, 0) if own < misfits[best] else best,
    )
