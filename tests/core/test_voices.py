"""Voices: each engine that is here speaks, says which words, and what is not here says how to get it.

The neural engines are optional, and their voices are files: CLASP_PIPER_VOICE names a Piper voice (.onnx),
CLASP_KOKORO_VOICE a FOLDER/VOICE of Kokoro. Without them, or without a program, its tests skip.
"""

import importlib.util
import os
import shutil

import numpy as np
import pytest

from clasp_core.datasets.voices import open_voice
from clasp_core.errors import InvalidField, ProcessingFailed, VoiceUnavailable

SHORT = "The jury praised the city."
LONG = "The jury praised the city, and nobody who had read the report was surprised that it did so."


def opened(name):
    """The voice, or a skip that says what is missing."""
    engine, _, voice = name.partition(":")
    if engine in ("espeak-ng", "flite") and shutil.which(engine) is None:
        pytest.skip(f"the program {engine} is not installed")
    package = {"piper": "piper", "kokoro": "kokoro_onnx"}.get(engine)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed")
    if package and not voice:
        pytest.skip(f"CLASP_{engine.upper()}_VOICE names no voice")
    return open_voice(name)


@pytest.mark.parametrize(
    ("name", "lang"),
    [
        ("espeak-ng:en-us+f3:speed=170:pitch=40", "en-US"),
        ("espeak-ng:fa", "fa"),
        ("flite:slt:stretch=1.1", "en-US"),
        (f"piper:{os.environ.get('CLASP_PIPER_VOICE', '')}", None),
        (f"kokoro:{os.environ.get('CLASP_KOKORO_VOICE', '')}", None),
    ],
)
def test_a_voice_reads_what_it_is_given(name, lang):
    """Mono float32 with sound in it, at a stated rate, the longer the more there is to read."""
    voice = opened(name)
    assert lang in (None, voice.lang)
    assert voice.licence
    assert "/" not in voice.name, "a manifest must not tell of folders on this machine"
    short, rate = voice.speak(SHORT)
    long, _ = voice.speak(LONG)
    assert short.dtype == long.dtype == np.float32
    assert short.ndim == 1
    assert 8_000 <= rate <= 48_000
    assert 1.0 < len(short) / rate < 6.0
    assert len(long) > 2 * len(short)
    assert 0.05 < np.abs(short).max() <= 1.0


@pytest.mark.parametrize("engine", ["espeak-ng:en", "flite:rms"])
def test_a_program_repeats_itself_exactly(engine):
    """A data set that is made again, elsewhere or after a crash, must be the same set."""
    voice = opened(engine)
    (first, _), (again, _) = voice.speak(SHORT), voice.speak(SHORT)
    np.testing.assert_array_equal(first, again)


def test_texts_that_look_like_orders_are_read():
    """Sentences come from any corpus: a leading dash or an option's name must not reach the command line."""
    voice = opened("espeak-ng:en")
    for text in ("--help", "-f /etc/passwd", 'caf\u00e9 \u2028 and a " mark'):
        samples, rate = voice.speak(text)
        assert 0.2 < len(samples) / rate < 10


def test_options_change_the_voice():
    """Speeds and pitches make many speakers of one; an option that did nothing would be a lie in the card."""
    slow, fast = (opened(f"espeak-ng:en:speed={speed}") for speed in (120, 240))
    assert len(slow.speak(SHORT)[0]) > 1.5 * len(fast.speak(SHORT)[0])
    low, high = (opened(f"flite:slt:pitch={pitch}").speak(SHORT) for pitch in (90, 220))
    assert not np.array_equal(low[0], high[0])


@pytest.mark.parametrize(
    ("name", "text"), [("espeak-ng:en", " "), ("flite:slt", "火车 晚点 了"), ("flite:kal16", "سلام به همه")]
)
def test_what_says_nothing_is_an_error(name, text):
    """Silence, or a voice's hum, under a transcript teaches a model nonsense; it must never become a clip."""
    with pytest.raises(ProcessingFailed, match="says nothing"):
        opened(name).speak(text)


@pytest.mark.parametrize(
    "name",
    ["espeak-ng:no-such", "espeak-ng:en+zzz", "flite:no-such", "flite:/tmp/x.flitevox", "flite:awb_time"],
)
def test_a_voice_that_the_engine_lacks_is_named(name):
    """Both programs would quietly take another voice, and the card would name the wrong one; flite would
    even fetch an address."""
    opened(name.partition(":")[0] + (":en" if name.startswith("espeak") else ":slt"))
    with pytest.raises(VoiceUnavailable, match=r"has no voice"):
        open_voice(name)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("espeak-ng:en", "apt install espeak-ng"),
        ("flite:slt", "apt install flite"),
        ("piper:voice.onnx", r"clasp-search\[piper\]|published as"),
        ("kokoro:folder/af_heart", r"clasp-search\[kokoro\]|published as"),
    ],
)
def test_an_engine_that_is_absent_says_how_to_get_it(name, advice, monkeypatch, tmp_path):
    """None of the four is installed by default, for their licences; the error is where people learn that."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VoiceUnavailable, match=advice):
        open_voice(name)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("festival:kal", "espeak-ng:VOICE, flite:VOICE"),
        ("flite", "is none"),
        ("espeak-ng:en:speed=9", "from 80 to 450"),
        ("espeak-ng:en:speed=fast", "from 80 to 450"),
        ("espeak-ng:en:loud=1", "no option"),
        ("flite:slt:speed=160", "there are stretch, pitch"),
    ],
)
def test_a_name_that_means_nothing_is_refused_in_words(name, says):
    """They come from a command line, hours of synthesis before the mistake would be heard."""
    with pytest.raises(InvalidField, match=says):
        open_voice(name)
