"""The nouns that cross module borders. Frozen facts; behaviour lives with their owners."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Seconds: TypeAlias = float

Waveform: TypeAlias = NDArray[np.float32]
"""Mono samples in about [-1, 1], shape (n,); at `SAMPLING_RATE` unless it is said otherwise."""

Embeddings: TypeAlias = NDArray[np.float32]
"""Unit-length rows, shape (n, dim)."""

SAMPLING_RATE = 16_000
"""Hz of every `Waveform`; the rate of all speech encoders here (Whisper, HuBERT, wav2vec 2.0)."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A span of a recording, in seconds from its start, with its samples.

    `pictured` is the same span at a model's `picture_rate`, for models whose spectrogram needs one.
    """

    start_s: Seconds
    end_s: Seconds
    waveform: Waveform
    pictured: Waveform | None = None


@dataclass(frozen=True, slots=True)
class SegmentHit:
    """A matching span. `score` is the cosine with the query, in [-1, 1].

    `transcript` is what is said in it, as its model heard it; None by models that write nothing down.
    """

    start_s: Seconds
    end_s: Seconds
    score: float
    transcript: str | None = None
