"""Augmentation: every effect has the size it claims, measured on what comes out."""

import numpy as np
import pytest

from clasp_core.datasets.augmentation import (
    Recipe,
    add_noise,
    change_gain,
    change_speed,
    clip,
    convolve,
    reverberate,
    room_response,
    telephone,
)
from clasp_core.errors import InvalidField, SilentAudio
from tests.audio_files import speech, tone

RATE = 16_000


def decibels(ratio):
    return 10 * np.log10(ratio)


def power(samples):
    return np.square(samples, dtype=np.float64).mean()


def band_power(samples, low, high):
    """Mean power between two frequencies in Hz."""
    spectrum = np.abs(np.fft.rfft(samples.astype(np.float64))) ** 2
    frequency = np.fft.rfftfreq(len(samples), 1 / RATE)
    return 2 * spectrum[(frequency >= low) & (frequency < high)].sum() / len(samples) ** 2


@pytest.fixture
def random():
    return np.random.default_rng(7)


@pytest.mark.parametrize("kind", ["white", "pink", "babble"])
@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 12.5])
def test_noise_has_the_ratio_it_claims(random, kind, snr_db):
    """Robustness curves have this ratio as their axis: what was added must be that far below the speech."""
    clean = speech(2.0)
    others = [speech(seconds, seed=seed) for seed, seconds in enumerate((0.7, 3.0, 1.1, 2.0))]
    noisy = add_noise(clean, snr_db, kind, random, babble=others)
    assert noisy.dtype == np.float32
    assert len(noisy) == len(clean)
    assert decibels(power(clean) / power(noisy - clean)) == pytest.approx(snr_db, abs=0.1)


def test_noises_have_the_spectra_they_are_named_for(random):
    """White has as much in every Hz, so twice as much (3 dB) an octave up; pink as much in each octave."""
    clean = tone(8.0)[:, 0]
    steps = {}
    for kind in ("white", "pink"):
        noise = add_noise(clean, 0, kind, random) - clean
        octaves = [band_power(noise, edge, 2 * edge) for edge in (125, 250, 500, 1000, 2000, 4000)]
        steps[kind] = np.polyfit(range(6), decibels(np.array(octaves)), 1)[0]
    assert steps["white"] == pytest.approx(3.0, abs=0.3)
    assert steps["pink"] == pytest.approx(0.0, abs=0.3)


def test_babble_holds_every_voice_equally_loud(random):
    """A quiet utterance must murmur as loudly as a shouted one, or babble would be one voice."""
    clean = speech(4.0)
    shouted, quiet = tone(1.0, frequency=1000)[:, 0], 0.01 * tone(1.5, frequency=3000)[:, 0]
    noise = add_noise(clean, 10, "babble", random, babble=[shouted, quiet]) - clean
    voices = band_power(noise, 900, 1100), band_power(noise, 2900, 3100)
    assert decibels(voices[0] / voices[1]) == pytest.approx(0, abs=0.2)
    assert sum(voices) / power(noise) > 0.98, "and nothing else"


@pytest.mark.parametrize("rt60_s", [0.2, 0.5, 1.2])
def test_a_room_decays_as_it_claims(random, rt60_s):
    """Schroeder's backward integral of the response, fitted from -5 to -35 dB (T30), must give the RT60."""
    response = room_response(rt60_s, random)[1:]
    left = decibels(np.cumsum(np.square(response, dtype=np.float64)[::-1])[::-1])
    left -= left[0]
    fitted = (left < -5) & (left > -35)
    slope = np.polyfit(np.arange(len(left))[fitted] / RATE, left[fitted], 1)[0]
    assert -60 / slope == pytest.approx(rt60_s, rel=0.05)


def test_reverberation_smears_but_moves_nothing(random):
    """A click keeps its place and gains a tail: hits tell people where to listen. Loudness stays, too."""
    click = np.zeros(RATE, np.float32)
    click[4000] = 1.0
    heard = reverberate(click, 0.4, random)
    assert len(heard) == len(click)
    assert np.abs(heard).argmax() == 4000
    assert np.abs(heard[:3999]).max() < 1e-5, "nothing is heard before it sounds"
    assert power(heard[4001:]) > 0.1 * power(heard)
    assert power(heard) == pytest.approx(power(click), rel=1e-3)


def test_a_measured_response_is_aligned_at_its_direct_sound():
    """Measured responses begin with the way from speaker to microphone, which must not delay the words."""
    said = speech(1.0)
    response = np.zeros(800, np.float32)
    response[320], response[500] = -0.5, 0.2
    heard = convolve(said, response)
    slow = np.convolve(said, response)[320 : 320 + len(said)]
    np.testing.assert_allclose(heard, slow * np.sqrt(power(said) / power(slow)), atol=1e-5)


def test_a_telephone_passes_its_band_and_nothing_else():
    """Inside the band tones come through with G.711's usual 35 dB; outside, with next to nothing."""
    middle = slice(2000, -2000)  # a tone that begins and ends abruptly is not one tone there
    for inside in (400, 1000, 3200):
        sent = tone(1.0, frequency=inside)[:, 0]
        heard = telephone(sent)
        assert len(heard) == len(sent)
        assert decibels(power(sent[middle]) / power((heard - sent)[middle])) > 33
    for outside in (50, 200, 3700, 5000, 7000):
        assert power(telephone(tone(1.0, frequency=outside)[:, 0])[middle]) < 1e-4 * 0.125
    hiss = np.random.default_rng(0).normal(0, 0.1, 2 * RATE).astype(np.float32)
    heard = telephone(hiss) * np.hanning(len(hiss))  # or its ends would leak over all frequencies
    assert decibels(band_power(heard, 4200, 8000) / band_power(heard, 400, 3300)) < -60, "8 kHz hold no more"
    assert np.abs(telephone(3 * tone(0.5, frequency=800)[:, 0])).max() < 1.3, "a line is driven no further"


@pytest.mark.parametrize("factor", [0.8, 0.9, 1.1, 1.25])
def test_speed_changes_length_and_pitch_together(factor):
    """Twice the speed is half the time and an octave up; the pitch shows that it is the tape's way."""
    faster = change_speed(tone(2.0, frequency=1000)[:, 0], factor)
    assert len(faster) == round(2 * RATE / factor)
    loudest = np.abs(np.fft.rfft(faster * np.hanning(len(faster)))).argmax() * RATE / len(faster)
    assert loudest == pytest.approx(1000 * factor, abs=1)
    assert np.abs(faster[2000:-2000]).max() == pytest.approx(0.5, abs=0.01)


def test_gain_and_clipping_are_exact():
    """20 dB are a factor of ten; a tenth of the samples, and no more, lies on the ceiling."""
    said = speech(1.0)
    np.testing.assert_allclose(change_gain(said, 20), 10 * said, rtol=1e-6)
    clipped = clip(said, 0.1)
    ceiling = np.abs(clipped).max()
    assert np.mean(np.abs(clipped) == ceiling) == pytest.approx(0.1, abs=0.001)
    under = np.abs(said) < ceiling
    np.testing.assert_array_equal(clipped[under], said[under])


def test_the_same_generator_gives_the_same_sound():
    """A data set that was interrupted goes on as it would have gone, and its argument is not written to."""
    said, others = speech(1.0), [speech(1.0, seed=5)]
    kept = said.copy()
    recipe = Recipe.parse("speed:0.9..1.1+reverb:0.2..0.6+noise:babble:5..15+gain:-6..0+clip:0.01..0.02")
    first, words = recipe.apply(said, np.random.default_rng(3), babble=others)
    again, same = recipe.apply(said, np.random.default_rng(3), babble=others)
    other, _ = recipe.apply(said, np.random.default_rng(4), babble=others)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(said, kept)
    assert words == same
    assert len(other) != len(first)
    repeated, _ = Recipe.parse(words).apply(said, np.random.default_rng(3), babble=others)
    np.testing.assert_array_equal(repeated, first, "what a manifest says was done can be done again")


def test_no_recipe_is_clean_speech():
    """`none` beside others keeps a share of a data set clean."""
    said = speech(0.5)
    heard, words = Recipe.parse("none").apply(said, np.random.default_rng(0))
    np.testing.assert_array_equal(heard, said)
    assert words == "none"


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("echo:1", "no augmentation is called 'echo'"),
        ("noise:10", "noise is one of white, pink, babble"),
        ("noise:brown:10", "noise is one of"),
        ("speed", "needs one number"),
        ("speed:fast", "needs one number"),
        ("reverb:0.5..0.2", "rising"),
        ("speed:9", "from 0.25 to 4"),
        ("gain:nan", "from -60 to 40"),
        ("telephone:2", "nothing after"),
        ("", "no augmentation is called"),
    ],
)
def test_a_recipe_that_means_nothing_is_refused_in_words(recipe, says):
    """It comes from a command line; hours of synthesis later is too late to find out."""
    with pytest.raises(InvalidField, match=f"(?i){says}"):
        Recipe.parse(recipe)


def test_silence_and_nonsense_are_refused(random):
    """Silence has no signal-to-noise ratio: noise at full scale, or NaN, must never stand in for speech."""
    silence = np.zeros(1000, np.float32)
    with pytest.raises(SilentAudio):
        add_noise(silence, 10, "white", random)
    with pytest.raises(SilentAudio):
        add_noise(speech(0.2), 10, "babble", random, babble=[silence])
    with pytest.raises(SilentAudio):
        reverberate(silence, 0.5, random)
    for wrong in (
        lambda: add_noise(speech(0.2), 10, "babble", random),
        lambda: add_noise(speech(0.2), float("nan"), "white", random),
        lambda: add_noise(speech(0.2), 10, "brown", random),
        lambda: reverberate(speech(0.2), 0, random),
        lambda: change_speed(speech(0.2), 0),
        lambda: clip(speech(0.2), 1.0),
    ):
        with pytest.raises(ValueError, match=r"not|needs"):
            wrong()
