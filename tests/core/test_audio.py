"""Decoding: every format to the same samples, and every harmful file to a sentence its sender understands."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clasp_core import audio
from clasp_core.errors import AudioTooLong, InvalidAudio, SilentAudio, UndecodableAudio
from clasp_core.types import SAMPLING_RATE
from tests import audio_files
from tests.audio_files import encode, tone, wav

ROOT = Path(__file__).parents[2]
HOSTILE = audio_files.hostile()
# Encoders fill up their last block, by up to this many samples of the source.
PADDING = {"wav-ima-adpcm": 4096, "wav-ms-adpcm": 4096, "m4a": 1024, "aac": 3072, "wma": 4096}


def decoded(file: bytes, max_duration_s: float = 60) -> np.ndarray:
    return np.concatenate(list(audio.decode(io.BytesIO(file), max_duration_s=max_duration_s)))


def peak_frequency(samples: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.argmax(spectrum)) * SAMPLING_RATE / len(samples)


def assert_is_tone(samples: np.ndarray, seconds: float, slack_s: float = 0.0) -> None:
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert -0.02 <= len(samples) / SAMPLING_RATE - seconds <= 0.02 + slack_s
    assert peak_frequency(samples) == pytest.approx(440, abs=2)
    assert np.percentile(np.abs(samples), 99) == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("form", audio_files.FORMATS)
def test_every_format_gives_the_sound_that_was_put_in(form: str, channels: int) -> None:
    """Whatever a phone or a studio saves, pitch, length and level must reach the encoder unchanged."""
    rate = 48_000 if "opus" in form or form == "webm" else 44_100
    stream = audio.decode(io.BytesIO(encode(tone(1.5, rate, channels), rate, form)), max_duration_s=60)
    samples = np.concatenate(list(stream))
    assert_is_tone(samples, 1.5, PADDING.get(form, 0) / rate)
    assert stream.info.duration_s == len(samples) / SAMPLING_RATE
    assert (stream.info.sampling_rate, stream.info.channels) == (rate, channels)
    assert stream.info.codec
    assert stream.info.warnings == ()


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 32_000, 48_000, 96_000])
@pytest.mark.parametrize("channels", [1, 8])
@pytest.mark.parametrize("form", ["wav-16", "wav-24", "flac"])
def test_every_rate_is_resampled(form: str, channels: int, rate: int) -> None:
    """Telephone, tape and film rates must keep their pitch and their length to the sample."""
    samples = decoded(encode(tone(1.5, rate, channels), rate, form))
    assert_is_tone(samples, 1.5)
    assert abs(len(samples) - 1.5 * SAMPLING_RATE) <= 1


@pytest.mark.parametrize("rate", [1_000, 768_000])
def test_the_outermost_rates_are_accepted(rate: int) -> None:
    """A limit is where it says it is."""
    samples = decoded(wav((tone(12.0, rate, frequency=100) * 32_767).astype("<i2").tobytes(), rate=rate))
    assert len(samples) == 12 * SAMPLING_RATE
    assert peak_frequency(samples) == pytest.approx(100, abs=1)


def test_another_rate_comes_from_the_original() -> None:
    """The paper's picture is made at 22,050 Hz: what lies above 8 kHz must still be in it, at its pitch."""
    rate = 22_050
    file = encode(tone(1.5, 44_100, frequency=9_500), 44_100)
    stream = audio.decode(io.BytesIO(file), max_duration_s=60, sampling_rate=rate)
    samples = np.concatenate(list(stream))
    spectrum = np.abs(np.fft.rfft(samples))
    assert np.argmax(spectrum) * rate / len(samples) == pytest.approx(9_500, abs=1)
    assert stream.info.duration_s == pytest.approx(1.5, abs=1e-4)
    assert np.abs(samples).max() > 0.3


def test_16_khz_mono_is_left_alone() -> None:
    """The native rate needs no arithmetic, so the samples must come out bit for bit."""
    samples = tone(1.0)[:, 0]
    np.testing.assert_array_equal(decoded(encode(samples, 16_000, "wav-float")), samples)


def test_channels_are_averaged() -> None:
    """A speaker recorded on one side only must still be heard, and two sides must not clip."""
    left = np.stack([tone(1.0)[:, 0], np.zeros(16_000, np.float32)], axis=1)
    np.testing.assert_allclose(decoded(encode(left, 16_000, "wav-float")), left[:, 0] / 2, atol=1e-7)


def test_loud_floats_are_neither_clipped_nor_scaled() -> None:
    """Floating-point recordings may exceed full scale; the encoder's own normalisation handles that."""
    samples = tone(1.0)[:, 0] * 6
    np.testing.assert_array_equal(decoded(encode(samples, 16_000, "wav-float")), samples)


def test_a_film_gives_its_sound() -> None:
    """People upload videos; only the first audio track is of interest."""
    assert_is_tone(decoded(audio_files.film(tone(2.0), 16_000)), 2.0, 0.1)


def test_blocks_are_ten_seconds_and_join_up() -> None:
    """Consumers size their buffers by the block length."""
    file = encode(tone(25.0), 16_000)
    blocks = list(audio.decode(io.BytesIO(file), max_duration_s=60))
    assert [len(block) for block in blocks] == [160_000, 160_000, 80_000]
    np.testing.assert_allclose(np.concatenate(blocks), tone(25.0)[:, 0], atol=1e-4)


@pytest.mark.parametrize("name", ["x.raw", "x.mp3", "x.m3u8", "x.txt", "http:", "x"])
def test_the_name_says_nothing(tmp_path: Path, name: str) -> None:
    """Names are the uploader's words: '.raw' makes soundfile demand parameters, '.m3u8' wakes a playlist."""
    for form in ("wav-16", "m4a"):
        path = tmp_path / name
        path.write_bytes(encode(tone(1.0), 16_000, form))
        assert_is_tone(np.concatenate(list(audio.decode(path, max_duration_s=9))), 1.0, 0.1)
        with path.open("rb") as file:
            file.seek(100)
            assert_is_tone(np.concatenate(list(audio.decode(file, max_duration_s=9))), 1.0, 0.1)
            assert not file.closed


@pytest.mark.parametrize("name", HOSTILE)
def test_harmful_files_are_refused_in_words(name: str) -> None:
    """Each bad file must end in its own class of error and one sentence without the innards of a decoder."""
    file, code = HOSTILE[name]
    with pytest.raises(InvalidAudio) as refusal:
        decoded(file)
    assert refusal.value.code == code
    assert refusal.value.detail.endswith(".")
    assert "<_io" not in refusal.value.detail


@pytest.mark.parametrize("kind", ["hls", "concat", "dash", "sdp"])
def test_files_cannot_make_us_read_other_files(tmp_path: Path, kind: str) -> None:
    """A playlist that names a server-side path or an inner address would leak what is there."""
    secret = tmp_path / "secret.wav"
    secret.write_bytes(encode(tone(1.0), 16_000))
    with pytest.raises(UndecodableAudio):
        decoded(audio_files.playlists(str(secret))[kind])


def test_a_missing_file_is_the_callers_mistake(tmp_path: Path) -> None:
    """Nobody's upload is at fault when our own path is wrong, so this is no InvalidAudio."""
    with pytest.raises(FileNotFoundError):
        list(audio.decode(tmp_path / "nothing.wav", max_duration_s=1))


@pytest.mark.parametrize("form", [form for form in audio_files.FORMATS if "m4a" not in form])
def test_truncated_files_give_what_there_is(form: str) -> None:
    """An interrupted upload or a recorder out of battery still holds most of its words."""
    rate = 48_000 if form in ("ogg-opus", "webm") else 44_100
    rng = np.random.default_rng(0)
    noisy = tone(6.0, rate) + rng.normal(0, 0.02, (6 * rate, 1)).astype(np.float32)
    file = encode(noisy, rate, form)
    samples = decoded(file[: len(file) * 6 // 10])
    assert 2.5 < len(samples) / SAMPLING_RATE < 4.2
    assert peak_frequency(samples) == pytest.approx(440, abs=2)


@pytest.mark.parametrize("form", ["m4a", "m4a-alac"])
def test_m4a_without_its_index_is_refused(form: str) -> None:
    """The table of contents is written last; without it nothing can be found, and we must say so."""
    file = encode(tone(3.0), 16_000, form)
    with pytest.raises(UndecodableAudio):
        decoded(file[: len(file) // 2])


@pytest.mark.parametrize("form", ["wav-16", "aiff", "flac", "mp3"])
def test_truncation_is_told_where_the_header_tells(form: str) -> None:
    """Words missing without a warning would look like words not found."""
    file = encode(tone(6.0, 44_100), 44_100, form)
    stream = audio.decode(io.BytesIO(file[: len(file) * 6 // 10]), max_duration_s=60)
    list(stream)
    assert stream.info.warnings


@pytest.mark.parametrize("form", ["flac", "mp3"])
def test_damage_in_the_middle_costs_only_the_middle(form: str) -> None:
    """libsndfile stops at the first bad frame; an hour must not be lost to one bad sector."""
    rng = np.random.default_rng(0)
    noisy = tone(10.0, 44_100) + rng.normal(0, 0.02, (441_000, 1)).astype(np.float32)
    file = bytearray(encode(noisy, 44_100, form))
    third = len(file) // 3
    file[third : third + 3_000] = bytes(3_000)
    stream = audio.decode(io.BytesIO(bytes(file)), max_duration_s=60)
    samples = np.concatenate(list(stream))
    assert 9.2 < len(samples) / SAMPLING_RATE <= 10
    assert any("damaged" in warning for warning in stream.info.warnings)
    assert peak_frequency(samples[-SAMPLING_RATE:]) == pytest.approx(440, abs=2)


@pytest.mark.parametrize("claim", [0xFFFF_FFFF, 0xFFFF_FFF0, 0x7FFF_FFFF])
def test_a_wav_may_claim_four_gigabytes(claim: int) -> None:
    """Recorders that write to a pipe cannot know the size; the file is good and deserves no warning."""
    data = (tone(1.0)[:, 0] * 32_767).astype("<i2").tobytes()
    stream = audio.decode(io.BytesIO(wav(data, claimed_size=claim)), max_duration_s=10)
    assert_is_tone(np.concatenate(list(stream)), 1.0)
    assert stream.info.warnings == ()


def test_the_duration_limit_holds_while_decoding() -> None:
    """4 MB of Opus hold nine hours: what the header says, and what fits in memory, must not matter."""
    file = audio_files.silent_opus(9)
    assert len(file) < 5_000_000
    with pytest.raises(AudioTooLong, match="limit of 60 s"):
        decoded(file, max_duration_s=60)


def test_the_duration_limit_is_inclusive() -> None:
    """Users cut their recordings to the limit we state."""
    for rate in (16_000, 44_100):
        file = encode(tone(3.0, rate), rate)
        assert len(decoded(file, max_duration_s=3.0)) == 48_000
        with pytest.raises(AudioTooLong):
            decoded(file, max_duration_s=2.99)


def test_silence_is_judged_by_the_whole_file() -> None:
    """A quiet start is common; only a recording without any sound is useless."""
    quiet = np.zeros(25 * 16_000, np.float32)
    with pytest.raises(SilentAudio):
        decoded(encode(quiet, 16_000))
    quiet[-8_000:] = 0.01 * tone(0.5)[:, 0]
    assert len(decoded(encode(quiet, 16_000))) == len(quiet)


def test_one_nan_late_in_a_long_file_is_found() -> None:
    """One NaN becomes hundreds in the resampler, and then a NaN vector in the index."""
    samples = tone(30.0, 44_100)[:, 0]
    samples[-10] = np.nan
    with pytest.raises(audio.NonFiniteAudio):
        decoded(encode(samples, 44_100, "wav-float"))


def test_info_before_the_end_is_a_bug() -> None:
    """Facts that are not final must not be stored."""
    stream = audio.decode(io.BytesIO(encode(tone(1.0), 16_000)), max_duration_s=9)
    with pytest.raises(RuntimeError, match="this is a bug"):
        _ = stream.info


def test_a_closed_stream_is_over() -> None:
    """Stopping early must release the file, and not pretend that the recording was complete."""
    with audio.decode(io.BytesIO(encode(tone(25.0), 16_000)), max_duration_s=60) as stream:
        next(stream)
    assert list(stream) == []
    with pytest.raises(RuntimeError):
        _ = stream.info


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(["wav-16", "wav-ima-adpcm", "flac", "mp3", "ogg-vorbis", "ogg-opus", "m4a", "webm"]),
    places=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=20
    ),
    keep=st.floats(0.01, 1),
)
def test_mutilated_files_give_sound_or_a_refusal(
    form: str, places: list[tuple[float, int]], keep: float
) -> None:
    """No damage may surface as anything but finite samples or InvalidAudio."""
    file = bytearray(encode(tone(0.5, 48_000), 48_000, form))
    for place, value in places:
        file[int(place * len(file))] = value
    try:
        samples = decoded(bytes(file[: int(keep * len(file))]))
    except InvalidAudio:
        return
    assert np.isfinite(samples).all()


MEASURE_MEMORY = """
import resource, sys
from clasp_core import audio
list(audio.decode(sys.argv[1], max_duration_s=7200))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = sum(map(len, audio.decode(sys.argv[2], max_duration_s=7200)))
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_recording(tmp_path: Path) -> None:
    """Half an hour is 115 MB of samples, three hours would be 700: only a block at a time may be held."""
    short, long = tmp_path / "short", tmp_path / "long"
    short.write_bytes(encode(tone(1.0, 44_100, 2), 44_100, "flac"))
    long.write_bytes(encode(np.tile(tone(60.0, 44_100, 2), (30, 1)), 44_100, "flac"))
    answer = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY, short, long],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    count, grown_kib = map(int, answer.stdout.split())
    assert count == 1800 * SAMPLING_RATE
    assert grown_kib < 20_000


def test_what_decodes_does_not_import_torch() -> None:
    """The decoding process must start in a fraction of a second; segmenting is done by who started it."""
    code = "import sys; from clasp_core import audio, sandbox; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
