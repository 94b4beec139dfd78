"""The spectrogram picture equals what the paper's own code draws, whatever it is drawn of."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from app.samples import SAMPLES
from clasp_core.encoders.efficientnet import EFFICIENTNET_LITE0, EfficientNetLite0
from clasp_core.spectrogram import HEIGHT, PICTURE_RATE, WIDTH, SpectrogramPictures, reference_width, render
from tests import pictures

BEES = pictures.load(SAMPLES / "audio" / "en-bees.opus")
EDGE_CASES = pictures.edge_cases(BEES)
NOISE = EDGE_CASES["noise"]


def recordings() -> dict[str, Path]:
    """Two dozen recordings of real speech, or the bundled synthetic ones."""
    folder = Path(os.environ.get("CLASP_SPEECH_DEV", ""))
    return pictures.speech(folder if (folder / "manifest.jsonl").is_file() else SAMPLES, 24)


@pytest.fixture(scope="module")
def reference_picture():
    """The paper's drawing, by librosa and the last matplotlib that draws as in the paper."""
    oracle = pytest.importorskip("tests.spectrogram_oracle", exc_type=ImportError)
    return oracle.reference_picture


def held_to(reference: NDArray[np.uint8], waveform: NDArray[np.float32]) -> None:
    picture = render(waveform)
    assert picture.shape == (HEIGHT, WIDTH, 3)
    assert picture.dtype == np.uint8
    assert reference.shape == (HEIGHT, reference_width(len(waveform)), 3)
    found = pictures.compare(reference, picture)
    assert found.shift == (0, 0)
    assert found.outside_mesh_differing == 0
    # Decibels are computed by another library: a value on the border between two colours may fall to either.
    assert found.largest_difference <= 4
    assert found.pixels_differing <= 0.002 * HEIGHT * WIDTH
    assert found.mean_difference <= 0.005


@pytest.mark.parametrize("name", EDGE_CASES)
def test_edge_cases_look_as_in_the_paper(reference_picture, name: str) -> None:
    """Silence, one sample, minutes on the axis, labels over the edge: no input may be drawn by guesswork."""
    held_to(reference_picture(EDGE_CASES[name]), EDGE_CASES[name])


@pytest.mark.parametrize("name", recordings())
def test_speech_looks_as_in_the_paper(reference_picture, name: str) -> None:
    """The network's features are only comparable with the paper's if its input is the paper's."""
    waveform = pictures.load(recordings()[name])
    held_to(reference_picture(waveform), waveform)


def test_a_comparison_sees_what_it_should(reference_picture) -> None:
    """The comparison the other tests rest on notices a shift, a moved tick and other colours."""
    picture = render(NOISE)
    width = reference_width(len(NOISE))
    reference = reference_picture(NOISE)
    assert pictures.compare(reference, np.roll(picture, 1, axis=1)).shift == (0, 1)
    assert pictures.compare(reference, np.roll(picture, -2, axis=0)).shift == (-2, 0)
    assert pictures.compare(reference, 255 - picture).mean_difference > 20
    ticks_moved = picture.copy()
    ticks_moved[428:432] = np.roll(picture[428:432], 1, axis=1)
    assert pictures.compare(reference[:, :width], ticks_moved).outside_mesh_differing > 0


@pytest.mark.parametrize(("percent", "sign"), [(2, -1), (2, 1), (98, -1), (98, 1)])
def test_colour_map_at_the_turn(reference_picture, percent: int, sign: int) -> None:
    """Where the deciding percentile lies between a negative and a positive value, their interpolation counts.

    The two maps share no colours, so a wrong choice is another picture altogether.
    """
    import librosa

    waveform = NOISE[: 5 * 512]
    decibels = np.sort(librosa.amplitude_to_db(np.abs(librosa.stft(waveform))), axis=None)
    place = percent / 100 * (len(decibels) - 1)
    lower, upper = decibels[int(place)], decibels[int(place) + 1]
    turn = lower + (upper - lower) * (place - int(place))
    towards = (upper if sign > 0 else lower) - turn
    gain_db = -turn + (np.sign(towards) * min(abs(towards) / 2, 0.01))
    scaled = (waveform * 10 ** (gain_db / 20)).astype(np.float32)
    held_to(reference_picture(scaled), scaled)


def test_loudness_decides_the_colours() -> None:
    """The reference's colours depend on the level of the recording: nobody may normalise it on the way."""
    loud, quiet = render(BEES), render(BEES * 1e-4)
    assert np.array_equal(loud[426:], quiet[426:])
    assert np.abs(loud[:426].astype(int) - quiet[:426]).mean() > 20
    assert np.array_equal(render(BEES * 0.5)[:, :46], loud[:, :46])


def test_batches_hold_the_same_pictures() -> None:
    """Pictures depend on nothing but their own waveform, whatever is drawn with them, and in which order."""
    names = [
        "70 s, minutes",
        "one sample",
        "tone",
        "silence",
        "impulse",
        "0.3 s",
        "noise",
        "quiet speech",
        "12 s",
    ]
    waveforms = [EDGE_CASES[name] for name in names] * 2
    drawn = SpectrogramPictures()(waveforms)
    assert drawn.shape == (len(waveforms), 3, HEIGHT, WIDTH)
    assert drawn.dtype == torch.uint8
    for waveform, picture in zip(waveforms, drawn, strict=True):
        assert np.array_equal(picture.permute(1, 2, 0).numpy(), render(waveform))


def test_lower_precision_leaves_the_pictures_alone() -> None:
    """A model is often moved to half precision as a whole; the picture is computed the same."""
    assert torch.equal(SpectrogramPictures().half()([BEES]), SpectrogramPictures()([BEES]))


def test_no_waveforms_no_pictures() -> None:
    """An empty batch is a batch."""
    assert SpectrogramPictures()([]).shape == (0, 3, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("waveform", "says"),
    [
        (np.zeros(0, np.float32), r"shape \(n,\)"),
        (np.zeros((2, 100), np.float32), r"shape \(n,\)"),
        (np.float32(0.5), r"shape \(n,\)"),
        (np.array([0, np.nan], np.float32), "NaN"),
        (np.array([0, -np.inf], np.float32), "NaN or infinity"),
        (np.full(3000, 1e30, np.float32), "overflows"),
    ],
    ids=["empty", "two channels", "a number", "NaN", "infinity", "overflow"],
)
def test_refusals(waveform, says: str) -> None:
    """What has no spectrogram gets an error, never a plausible picture."""
    with pytest.raises(ValueError, match=says):
        render(waveform)
    with pytest.raises(ValueError, match=says):
        SpectrogramPictures()([NOISE, waveform])


def test_reference_width_needs_a_sample() -> None:
    """Nothing has no picture, hence no width."""
    with pytest.raises(ValueError, match="at least one sample"):
        reference_width(0)


def test_long_recordings_take_bounded_memory_and_no_plotting_library() -> None:
    """Twenty minutes as one waveform: the whole spectrum alone, in float64, would be 850 MB."""
    script = """
import resource, sys
import numpy as np
from clasp_core.spectrogram import render
render(np.ones(30_000, np.float32))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
waveform = np.random.default_rng(0).standard_normal(20 * 60 * 22_050, dtype=np.float32)
before = peak()
render(waveform)
print(peak() - before, *(name for name in ("matplotlib", "librosa", "scipy") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    grown_mb, *libraries = done.stdout.split()
    assert float(grown_mb) < 300  # of which two copies of the waveform are 212
    assert not libraries


def test_data_file_is_what_its_maker_makes(reference_picture) -> None:
    """Letters and colour maps in the package came out of matplotlib, not out of somebody's hands."""
    from tests import make_spectrogram_data

    made = make_spectrogram_data.made()
    with np.load(make_spectrogram_data.DATA, allow_pickle=False) as shipped:
        assert set(shipped) == set(made)
        for name in shipped:
            assert np.array_equal(shipped[name], made[name])


@pytest.mark.weights
def test_the_network_sees_no_difference(reference_picture) -> None:
    """What the picture is for: the logits of a network that looks at it, on both scales it might be fed."""
    network = EfficientNetLite0.load(EFFICIENTNET_LITE0.locate(None))
    for waveform in (BEES, EDGE_CASES["0.3 s"], EDGE_CASES["quiet speech"]):
        reference = reference_picture(waveform)
        pair = np.stack((reference, render(waveform)[:, : reference.shape[1]]))
        raw = torch.from_numpy(pair).permute(0, 3, 1, 2).float()
        with torch.inference_mode():
            for fed in (raw, raw / 127.5 - 1):
                ours, theirs = network.classify(fed)
                assert torch.cosine_similarity(ours, theirs, dim=0) >= 0.9995


def test_rate_is_librosas() -> None:
    """The axes are in seconds and Hz of this rate; who resamples has to know it."""
    assert PICTURE_RATE == 22_050
