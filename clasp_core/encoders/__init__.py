"""What an encoder is, and below it the pretrained networks in plain torch: samples or words in, features out.

Each module owns one network, how its weights file is read, and nothing else; which network serves
which model, and what is trained on top, is `clasp_core.models`.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from clasp_core.types import Embeddings, Waveform


class TextEncoder(Protocol):
    dim: int

    def encode(self, texts: Sequence[str]) -> Embeddings:
        """Normalised texts to unit rows (n, dim); a row does not depend on its neighbours (to 1e-4)."""
        ...


class SpeechEncoder(Protocol):
    dim: int
    picture_rate: int | None
    """Hz of the second copy of each segment that the encoder's spectrogram is made of; None: needs none."""

    def encode(self, waveforms: Sequence[Waveform], pictured: Sequence[Waveform] | None = None) -> Embeddings:
        """Segments of up to 30 s to unit rows (n, dim); a row does not depend on its neighbours (to 1e-4).

        `pictured` holds the same segments at `picture_rate`; ValueError where they are needed and missing.
        """
        ...


class Heard(NamedTuple):
    """What an encoder makes of n segments: unit rows (n, dim), and for each what is said, or None."""

    vectors: Embeddings
    transcripts: Sequence[str | None]


@runtime_checkable
class TranscribingEncoder(SpeechEncoder, Protocol):
    """A speech encoder that writes down what it hears on its way to the vectors."""

    def hear(self, waveforms: Sequence[Waveform], langs: Sequence[str | None]) -> Heard:
        """`encode`'s rows, and the texts. `langs` are BCP 47 tags of what is spoken, None where unknown."""
        ...
