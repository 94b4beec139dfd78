"""How loud a recording is along its length, in few bytes: what its waveform is drawn from.

Kept are the peaks of 20 steps a second or, of recordings longer than an hour, of steps twice, four times ...
as long, so that there are never more than MOST. A step's peak, the largest magnitude in it, is kept as the
byte `ceil(255 * sqrt(peak))`: so what is quiet can still be told from silence.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clasp_core.types import SAMPLING_RATE, Seconds, Waveform

STEP_S: Seconds = 0.05
MOST = 72_000
"""An hour of the shortest steps."""
_STEP_SAMPLES = round(STEP_S * SAMPLING_RATE)


@dataclass(frozen=True, slots=True)
class Peaks:
    """Those of a whole recording: `levels[n]` (uint8) is the peak from `n * step_s` on."""

    step_s: Seconds
    levels: NDArray[np.uint8]

    def between(
        self, start_s: Seconds, end_s: Seconds, points: int
    ) -> tuple[Seconds, Seconds, NDArray[np.float64]]:
        """The peaks in [0, 1] of the steps that a span of the recording touches, or of `points` groups of
        them where there are more steps; and the span that they are of, from one step's border to another's.
        """
        whole_s = len(self.levels) * self.step_s  # a time far beyond it is no number of steps
        first = min(math.floor(min(start_s, whole_s) / self.step_s), len(self.levels))
        last = max(first, min(math.ceil(min(end_s, whole_s) / self.step_s), len(self.levels)))
        levels = self.levels[first:last]
        if len(levels) > points:
            groups = np.linspace(0, len(levels), points, endpoint=False).astype(np.int64)
            levels = np.maximum.reduceat(levels, groups)
        return first * self.step_s, last * self.step_s, (levels / 255.0) ** 2


class PeakMeter:
    """Takes a recording's samples as they are decoded, and keeps a byte for each 50 ms of them."""

    def __init__(self) -> None:
        self._levels = bytearray()
        self._rest = np.empty(0, np.float32)

    def add(self, block: Waveform) -> None:
        """The next samples, of any number, at SAMPLING_RATE."""
        samples = np.concatenate((self._rest, block)) if len(self._rest) else block
        whole = len(samples) // _STEP_SAMPLES * _STEP_SAMPLES
        self._levels += _levels(samples[:whole].reshape(-1, _STEP_SAMPLES))
        self._rest = samples[whole:].copy()

    def peaks(self) -> Peaks:
        """Of all that was added."""
        last = _levels(self._rest[None]) if len(self._rest) else b""
        levels, step_s = np.frombuffer(bytes(self._levels) + last, np.uint8), STEP_S
        while len(levels) > MOST:
            levels = np.maximum.reduceat(levels, np.arange(0, len(levels), 2))
            step_s *= 2
        return Peaks(step_s, levels)


def _levels(steps: NDArray[np.float32]) -> bytes:
    """One byte of each row."""
    loudest = np.maximum(steps.max(axis=1), -steps.min(axis=1))
    levels: NDArray[np.uint8] = np.ceil(255 * np.sqrt(np.minimum(loudest, 1))).astype(np.uint8)
    return levels.tobytes()
