"""What waveforms are drawn from: true to the sound, however it comes, and small."""

import numpy as np
import pytest

from clasp_core.peaks import MOST, STEP_S, PeakMeter, Peaks
from clasp_core.types import SAMPLING_RATE


def peaks_of(samples: np.ndarray, *sizes: int) -> Peaks:
    meter, start = PeakMeter(), 0
    for size in (*sizes, len(samples)):
        meter.add(samples[start : start + size])
        start += size
    return meter.peaks()


def test_a_peak_is_the_largest_magnitude_of_its_step() -> None:
    """However the decoder cuts the samples; a last step that is not whole counts, too."""
    samples = np.random.default_rng(1).uniform(-1, 1, 16_001).astype(np.float32) * np.float32(0.01)
    samples[[0, 1599, 1600, 16_000]] = [-0.9, 1.2, 0.3, 0.0]
    found = peaks_of(samples)
    assert (found.step_s, len(found.levels)) == (STEP_S, 21)
    start_s, end_s, values = found.between(0, 1e9, 1000)
    assert (start_s, end_s) == (0, pytest.approx(1.05))
    assert values[[0, 1, 2, 20]] == pytest.approx([0.9, 1.0, 0.3, 0], abs=0.01)
    assert values[3:20] == pytest.approx(0.01, abs=0.001)
    for sizes in ((1, 799, 800), (100,) * 20, (15_999, 1)):
        assert peaks_of(samples, *sizes).levels.tobytes() == found.levels.tobytes()


def test_hours_take_no_more_than_an_hour() -> None:
    """A day of radio is one row of the catalogue as well."""
    meter = PeakMeter()
    minute = np.full(60 * SAMPLING_RATE, 0.25, np.float32)
    for at in range(150):
        meter.add(minute * (4 if at == 149 else 1))
    found = meter.peaks()
    assert (found.step_s, len(found.levels)) == (4 * STEP_S, 45_000)
    assert len(found.levels) <= MOST
    assert found.between(7e307, 1e308, 4)[2].size == 0, "a time that is no number of steps is beyond the end"
    start_s, end_s, values = found.between(148 * 60, 150 * 60, 4)
    assert (start_s, end_s) == (148 * 60, 150 * 60)
    assert values == pytest.approx([0.25, 0.25, 1, 1], abs=0.01)
