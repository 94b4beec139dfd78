"""What rooms, microphones and lines do to speech, as functions of samples: noise, echo, telephone, speed.

All take and give a `Waveform` at 16 kHz, leave their argument as it is, and draw whatever chance decides
from the generator they are given, so that the same generator gives the same samples. Nothing here clips
but `clip` and `telephone`: a result may leave [-1, 1], and who writes it to a file scales or clips it.

`Recipe` names chains of them in words, for the command line and for manifests.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Self, TypeAlias, cast, get_args

import numpy as np
import soxr
from numpy.typing import NDArray

from clasp_core.errors import InvalidField, SilentAudio
from clasp_core.types import SAMPLING_RATE, Seconds, Waveform

NoiseKind = Literal["white", "pink", "babble"]

SPEED_RANGE = (0.25, 4.0)
RT60_RANGE_S = (0.02, 10.0)
TELEPHONE_BAND_HZ = (300, 3400)

_TELEPHONE_RATE = 8_000
_MU = 255
_TAPS = 401  # of the telephone's band-pass: 50 ms at 8 kHz, edges about 65 Hz wide


def add_noise(
    samples: Waveform,
    snr_db: float,
    kind: NoiseKind,
    random: np.random.Generator,
    *,
    babble: Sequence[Waveform] | None = None,
) -> Waveform:
    """The samples with noise at `snr_db` decibels of signal-to-noise ratio below them.

    The ratio is of mean powers over the whole clip, pauses included. white: equal power in every Hz.
    pink: equal power in every octave, the long-term slope of crowds and traffic. babble: the sum of
    `babble`, other people's utterances, each made equally loud and begun at a random place, again from
    its start where it is too short. Four to eight of them make a murmur; one is a competing speaker.

    Raises SilentAudio where the samples or an utterance of `babble` have no power, since no noise has the
    ratio then; ValueError for `kind` babble without `babble`, another kind, or a ratio that is not finite.
    """
    if not math.isfinite(snr_db):
        raise ValueError(f"the signal-to-noise ratio must be finite, not {snr_db}")
    power = _power(samples, "the recording")
    noise = _noise(len(samples), kind, random, babble)
    scale = math.sqrt(power / (_power(noise, "the noise") * 10 ** (snr_db / 10)))
    return (samples + scale * noise).astype(np.float32)


def _noise(
    length: int, kind: NoiseKind, random: np.random.Generator, babble: Sequence[Waveform] | None
) -> NDArray[np.float64]:
    if kind == "white":
        return random.standard_normal(length)
    if kind == "pink":
        # At least a second, or the lowest bin of a short clip would hold most of the power.
        size = max(length, SAMPLING_RATE)
        spectrum = np.fft.rfft(random.standard_normal(size))
        spectrum[0] = 0
        spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
        return np.fft.irfft(spectrum, size)[:length]
    if kind != "babble":
        raise ValueError(f"noise is one of {', '.join(get_args(NoiseKind))}, not {kind!r}")
    if not babble:
        raise ValueError("babble needs utterances of others")
    noise = np.zeros(length)
    for utterance in babble:
        voice = utterance / math.sqrt(_power(utterance, "an utterance of the babble"))
        noise += np.resize(np.roll(voice, -int(random.integers(len(voice)))), length)
    return noise


def reverberate(samples: Waveform, rt60_s: Seconds, random: np.random.Generator) -> Waveform:
    """The samples as heard in a room whose sound takes `rt60_s` seconds to fall by 60 dB.

    The room is `room_response`; the result is as long as the samples and has their power. Raises
    SilentAudio where they have none, ValueError for a time outside `RT60_RANGE_S`.
    """
    return convolve(samples, room_response(rt60_s, random))


def room_response(rt60_s: Seconds, random: np.random.Generator, direct_to_room_db: float = 0.0) -> Waveform:
    """A synthetic room impulse response: the direct sound, then noise that decays exponentially.

    Polack's statistical model: Gaussian noise under 10 ** (-3 t / rt60_s), followed down to -90 dB. The
    first sample is the direct sound and 1; the room's share has `direct_to_room_db` decibels less energy.
    0 dB is a listener at the critical distance, some metres from the speaker. Early echoes and the
    faster decay of high notes are left out. Raises ValueError for a time outside `RT60_RANGE_S`.
    """
    if not RT60_RANGE_S[0] <= rt60_s <= RT60_RANGE_S[1]:
        raise ValueError(f"a reverberation time lies in {RT60_RANGE_S} s, not {rt60_s}")
    time = np.arange(1, round(1.5 * rt60_s * SAMPLING_RATE)) / SAMPLING_RATE
    room = random.standard_normal(len(time)) * 10 ** (-3 * time / rt60_s)
    room *= math.sqrt(10 ** (-direct_to_room_db / 10) / np.square(room).sum())
    return np.concatenate([[1.0], room]).astype(np.float32)


def convolve(samples: Waveform, response: Waveform) -> Waveform:
    """The samples through an impulse response, measured or made: as long as they were, and as powerful.

    The response's largest sample is taken for the direct sound, which keeps its place in time; so words
    stay where they were, and only the tail beyond the end is lost. Raises SilentAudio where the samples
    or the response have no power.
    """
    power = _power(samples, "the recording")
    _power(response, "the impulse response")
    size = 1 << (len(samples) + len(response) - 2).bit_length()
    sound = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(response, size), size)
    begin = int(np.abs(response).argmax())
    sound = sound[begin : begin + len(samples)]
    return (sound * math.sqrt(power / _power(sound, "the result"))).astype(np.float32)


def telephone(samples: Waveform) -> Waveform:
    """The samples through a telephone line: 300 to 3400 Hz, 8 kHz, 8 bits of mu-law (ITU-T G.711's curve).

    Clipped to [-1, 1], as the line would. As long as before, and no quieter or later inside the band.
    """
    narrow = soxr.resample(samples, SAMPLING_RATE, _TELEPHONE_RATE, quality="HQ")
    narrow = np.clip(np.convolve(narrow, _telephone_band(), "same")[: len(narrow)], -1, 1)
    pressed = np.sign(narrow) * np.log1p(_MU * np.abs(narrow)) / math.log1p(_MU)
    steps = np.round(pressed * 127) / 127  # a sign and seven bits
    heard = np.sign(steps) * np.expm1(np.abs(steps) * math.log1p(_MU)) / _MU
    wide: Waveform = soxr.resample(heard.astype(np.float32), _TELEPHONE_RATE, SAMPLING_RATE, quality="HQ")
    return _of_length(wide, len(samples))


@lru_cache(maxsize=1)
def _telephone_band() -> NDArray[np.float64]:
    """A linear-phase band-pass at 8 kHz: two windowed sincs, one less the other."""
    time = np.arange(_TAPS) - _TAPS // 2
    low, high = (2 * edge / _TELEPHONE_RATE for edge in TELEPHONE_BAND_HZ)
    band: NDArray[np.float64] = (high * np.sinc(high * time) - low * np.sinc(low * time)) * np.hamming(_TAPS)
    return band


def change_speed(samples: Waveform, factor: float) -> Waveform:
    """The samples played `factor` times as fast: 1 / factor as long, and higher by the same factor.

    Tempo and pitch together, as a tape does (Ko et al. 2015, who train with 0.9 and 1.1). Raises
    ValueError for a factor outside `SPEED_RANGE`.
    """
    if not SPEED_RANGE[0] <= factor <= SPEED_RANGE[1]:
        raise ValueError(f"a change of speed lies in {SPEED_RANGE}, not {factor}")
    if factor == 1:
        return samples.copy()
    faster: Waveform = soxr.resample(samples, SAMPLING_RATE * factor, SAMPLING_RATE, quality="HQ")
    return _of_length(faster, round(len(samples) / factor))


def change_gain(samples: Waveform, gain_db: float) -> Waveform:
    """The samples louder by `gain_db` decibels, or quieter; never clipped, see `clip`."""
    return (samples * 10 ** (gain_db / 20)).astype(np.float32)


def clip(samples: Waveform, share: float) -> Waveform:
    """The samples of an overdriven microphone: the loudest `share` of them, in (0, 1), held at one level.

    The level stays below the peak, so the result is quieter, not louder. Raises ValueError for another
    share.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share of clipped samples lies between 0 and 1, not {share}")
    ceiling = np.quantile(np.abs(samples), 1 - share)
    return np.clip(samples, -ceiling, ceiling).astype(np.float32)


def _power(samples: NDArray[np.floating], what: str) -> float:
    power = float(np.square(samples, dtype=np.float64).mean()) if len(samples) else 0.0
    if not power > 0:
        raise SilentAudio(f"There is no sound in {what}.")
    return power


def _of_length(samples: Waveform, length: int) -> Waveform:
    """Resamplers round lengths in their own ways; this cuts or pads the sample or two that differ."""
    return np.pad(samples[:length], (0, max(0, length - len(samples))))


# --- recipes

_Draw: TypeAlias = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Step:
    """One function of a recipe and the range its number is drawn from, evenly; both ends may be equal."""

    name: str
    kind: str = ""
    range: _Draw = (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A chain of augmentations, in the order in which they are written.

    Steps, joined by "+", each with a number or a range LOW..HIGH:

        none                       clean speech
        speed:0.9..1.1             `change_speed`
        reverb:0.3..0.8            `reverberate`, seconds
        noise:white:10..20         `add_noise`, decibels; also pink, babble
        gain:-12..0                `change_gain`, decibels
        clip:0.01..0.05            `clip`, share of samples
        telephone                  `telephone`
    """

    steps: tuple[Step, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a recipe. Raises InvalidField, which says what is wrong with which step."""
        return cls(tuple(_step(part) for part in text.split("+") if part != "none"))

    @property
    def needs_babble(self) -> bool:
        return any(step.kind == "babble" for step in self.steps)

    def apply(
        self, samples: Waveform, random: np.random.Generator, *, babble: Sequence[Waveform] | None = None
    ) -> tuple[Waveform, str]:
        """The augmented samples, and the recipe with the numbers that were drawn ("noise:white:12.5")."""
        done = []
        for step in self.steps:
            value = round(float(random.uniform(*step.range)), 3)
            samples = _APPLY[step.name](samples, value, step.kind, random, babble)
            words = [step.name, step.kind, f"{value:g}" if step.name != "telephone" else ""]
            done.append(":".join(word for word in words if word))
        return samples, "+".join(done) or "none"


_Applied: TypeAlias = Callable[
    [Waveform, float, str, np.random.Generator, Sequence[Waveform] | None], Waveform
]

_APPLY: dict[str, _Applied] = {
    "speed": lambda samples, value, kind, random, babble: change_speed(samples, value),
    "reverb": lambda samples, value, kind, random, babble: reverberate(samples, value, random),
    "noise": lambda samples, value, kind, random, babble: add_noise(
        samples, value, cast(NoiseKind, kind), random, babble=babble
    ),
    "gain": lambda samples, value, kind, random, babble: change_gain(samples, value),
    "clip": lambda samples, value, kind, random, babble: clip(samples, value),
    "telephone": lambda samples, value, kind, random, babble: telephone(samples),
}

_LIMITS: dict[str, _Draw] = {
    "speed": SPEED_RANGE,
    "reverb": RT60_RANGE_S,
    "noise": (-30.0, 100.0),
    "gain": (-60.0, 40.0),
    "clip": (0.0001, 0.9),
}


def _step(text: str) -> Step:
    name, *words = text.strip().split(":")
    if name not in _APPLY:
        raise InvalidField(f"No augmentation is called {name!r}; there are none, {', '.join(_APPLY)}.")
    if name == "telephone":
        if words:
            raise InvalidField(f"The augmentation {text!r} should have nothing after its name.")
        return Step(name)
    kind = words.pop(0) if name == "noise" and words else ""
    if name == "noise" and kind not in get_args(NoiseKind):
        raise InvalidField(f"Noise is one of {', '.join(get_args(NoiseKind))}, not {kind!r}.")
    try:
        (drawn,) = words
        ends = [float(end) for end in drawn.split("..")]
        low, high = ends if len(ends) > 1 else ends * 2
    except ValueError as error:
        raise InvalidField(f"The augmentation {text!r} needs one number or a range LOW..HIGH.") from error
    least, most = _LIMITS[name]
    if not least <= low <= high <= most:
        raise InvalidField(f"In the augmentation {text!r}, numbers go from {least:g} to {most:g}, rising.")
    return Step(name, kind, (low, high))
