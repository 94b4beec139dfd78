"""`hybrid`: what a segment sounds like and what was heard in it as words, in one vector.

    segment ─┬─ mini's speech encoder ───────────────────────── speech vector ──┐
             │                                                                  ├─ mixture ── unit vector
             └─ whisper-base ── two readings ── mini's text encoder ── their mean ┘

The paper compares vectors made of speech with those of a recogniser's transcripts (section 4.3) and
leaves it at either or. Here both are made when a recording is indexed, and how much each counts is
learnt: in a language that the recogniser writes well the words nearly decide, in one that it hardly
knows the sound does. Questions are embedded as for `mini`, and a search costs the same.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soxr
from numpy.typing import NDArray

from clasp_core.encoders import Heard, SpeechEncoder, TextEncoder
from clasp_core.encoders.whisper import MAX_SAMPLES
from clasp_core.errors import ModelUnavailable
from clasp_core.language import normalize_text, primary_language
from clasp_core.transcription import Transcriber, Transcript
from clasp_core.types import SAMPLING_RATE, Embeddings, Seconds, Waveform

EVIDENCE = ("confidence", "agreement", "pace")
"""What speaks for or against a transcript: see `evidence`."""
BYTES_PER_S = 14.0
"""Of UTF-8 in a second of speech: about what English, Persian and Chinese alike come to when read out."""
SILENCE_S: Seconds = 0.5
"""Before the first reading of a segment. Segments are cut where speech begins; without silence there, Whisper
takes that for the middle of a sentence, and loses words."""
SLOWED = 0.9
"""Tempo and pitch of the second reading. The mean of both readings' vectors finds more than either, and more
than the mean of the best five texts of one (docs/experiments.md)."""
LOOPING = 2.4
"""A text that zlib makes this many times smaller repeats itself (Radford et al. 2022, section 4.5)."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """How much a transcript's vector counts beside the speech vector, in log-odds.

    They are a sum: `bias`, what the language adds (nothing for one not in `langs`), and each number of
    the evidence times its `weights`.
    """

    bias: float = 0.0
    weights: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(EVIDENCE, 0.0))
    langs: Mapping[str, float] = field(default_factory=dict)

    def shares(self, evidence: NDArray[np.float64], langs: Sequence[str | None]) -> NDArray[np.float64]:
        """Of each transcript's vector in its mixture, (n,) in (0, 1)."""
        weights = np.array([self.weights[name] for name in EVIDENCE])
        by_language = np.array([self.langs.get(primary_language(lang) or "", 0.0) for lang in langs])
        odds = np.clip(self.bias + by_language + evidence @ weights, -50, 50)
        shares: NDArray[np.float64] = 1 / (1 + np.exp(-odds))
        return shares

    def save(self, path: Path) -> None:
        document = {"format": "clasp-mixture/1"} | asdict(self)
        path.write_text(json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Mixture":
        """Raises ModelUnavailable for a file that is missing or is not one."""
        try:
            match json.loads(path.read_text()):
                case {
                    "format": "clasp-mixture/1",
                    "bias": int() | float() as bias,
                    "weights": dict(weights),
                    "langs": dict(langs),
                } if set(weights) == set(EVIDENCE):
                    numbers = [bias, *weights.values(), *langs.values()]
                    if all(isinstance(number, int | float) and np.isfinite(number) for number in numbers):
                        return cls(bias, weights, langs)
        except (OSError, ValueError) as error:
            raise ModelUnavailable(f"{path} cannot be read: {error}.") from error
        raise ModelUnavailable(f"{path} is not a mixture of speech and transcripts that this version knows.")


def identity() -> list[object]:
    """What a stored vector depends on beside the networks and the mixture."""
    return [SILENCE_S, SLOWED, LOOPING, BYTES_PER_S]


def is_usable(transcript: Transcript) -> bool:
    """Whether there are words in it, and not the same ones again and again.

    A recogniser that has lost its way repeats itself until its length runs out; most sure of itself then.
    """
    written = transcript.text.encode(errors="replace")
    return (
        any(character.isalnum() for character in transcript.text)
        and bool(np.isfinite(transcript.confidence))
        and len(written) < LOOPING * len(zlib.compress(written))
    )


class Words(NamedTuple):
    """What a segment's readings come to: the more confident text, at the mean of their confidences, and one
    unit vector (dim,), the mean of theirs."""

    transcript: Transcript
    vector: NDArray[np.float32]


def read(
    transcriber: Transcriber,
    text: TextEncoder,
    waveforms: Sequence[Waveform],
    langs: Sequence[str | None],
) -> list[Words | None]:
    """The words of each segment, from two readings; None where neither is usable."""
    first = transcriber.transcribe([_led(waveform) for waveform in waveforms], langs)
    told = [transcript.lang for transcript in first]
    second = transcriber.transcribe([_slowed(waveform) for waveform in waveforms], told)
    readings = [[one for one in pair if is_usable(one)] for pair in zip(first, second, strict=True)]
    texts = [normalize_text(one.text, one.lang) for pair in readings for one in pair]
    vectors = iter(text.encode(texts) if texts else ())
    words: list[Words | None] = []
    for pair in readings:
        if not pair:
            words.append(None)
            continue
        best = max(pair, key=lambda one: one.confidence)
        confidence = float(np.mean([one.confidence for one in pair]))
        shown = Transcript(normalize_text(best.text, best.lang), best.lang, confidence)
        vector: Embeddings = np.stack([next(vectors) for _ in pair])
        if len(pair) == 2:
            vector = mix(vector[:1], vector[1:], np.array([0.5]))
        words.append(Words(shown, vector[0]))
    return words


def _led(waveform: Waveform) -> Waveform:
    silence = min(round(SILENCE_S * SAMPLING_RATE), max(0, MAX_SAMPLES - len(waveform)))
    return np.pad(waveform, (silence, 0))


def _slowed(waveform: Waveform) -> Waveform:
    """As it is where it would not fit the encoder any more."""
    if len(waveform) > SLOWED * MAX_SAMPLES - 1:
        return waveform
    slowed: Waveform = soxr.resample(waveform, SAMPLING_RATE, SAMPLING_RATE / SLOWED)
    return slowed


def evidence(
    transcripts: Sequence[Transcript],
    durations: Sequence[Seconds] | NDArray[np.float64],
    speech: Embeddings,
    written: Embeddings,
) -> NDArray[np.float64]:
    """(n, 3): the recogniser's mean log-probability, the cosine of both vectors, and how far the amount of
    text is from what can be said in that time: |ln(bytes per second / 14)|."""
    sizes = np.array([1 + len(transcript.text.encode(errors="replace")) for transcript in transcripts])
    return np.column_stack(
        [
            np.array([transcript.confidence for transcript in transcripts], float),
            np.einsum("nd,nd->n", speech.astype(float), written.astype(float)),
            np.abs(np.log(sizes / (BYTES_PER_S * np.maximum(np.asarray(durations, float), 0.1)))),
        ]
    )


def mix(speech: Embeddings, written: Embeddings, shares: NDArray[np.float64]) -> Embeddings:
    """Unit rows (n, dim) between those of both, at these shares of the second."""
    sums = (1 - shares[:, None]) * speech + shares[:, None] * written
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    # opposite vectors at equal shares have no middle: the sound is what is certain
    mixed = np.where(lengths > 1e-3, sums / np.maximum(lengths, 1e-3), speech)
    return mixed.astype(np.float32)


class HybridSpeechEncoder:
    """Segments to mixtures of their speech vectors and their transcripts' vectors."""

    picture_rate: int | None = None

    def __init__(
        self, speech: SpeechEncoder, text: TextEncoder, transcriber: Transcriber, mixture: Mixture
    ) -> None:
        """`speech` and `text` are encoders into one space, the first of which needs no pictures."""
        self.dim = speech.dim
        self._speech = speech
        self._text = text
        self._transcriber = transcriber
        self._mixture = mixture

    def encode(self, waveforms: Sequence[Waveform], pictured: Sequence[Waveform] | None = None) -> Embeddings:
        """As `hear` where no language is known."""
        return self.hear(waveforms, [None] * len(waveforms)).vectors

    def hear(self, waveforms: Sequence[Waveform], langs: Sequence[str | None]) -> Heard:
        """The mixtures, and the transcripts, normalised as questions are.

        Where nothing was written down, or the same again and again, the vector is the speech vector
        itself and the transcript None.
        """
        if not waveforms:
            return Heard(np.empty((0, self.dim), np.float32), [])
        vectors = self._speech.encode(waveforms)
        texts: list[str | None] = [None] * len(waveforms)
        read_in = read(self._transcriber, self._text, waveforms, langs)
        found = [(place, words) for place, words in enumerate(read_in) if words is not None]
        if found:
            places = [place for place, _ in found]
            transcripts = [words.transcript for _, words in found]
            written = np.stack([words.vector for _, words in found])
            durations = [len(waveforms[place]) / SAMPLING_RATE for place in places]
            seen = evidence(transcripts, durations, vectors[places], written)
            shares = self._mixture.shares(seen, [transcript.lang for transcript in transcripts])
            vectors[places] = mix(vectors[places], written, shares)
            for place, transcript in zip(places, transcripts, strict=True):
                texts[place] = transcript.text
        return Heard(vectors, texts)
