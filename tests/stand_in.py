"""`clasp` with a model that costs microseconds and understands nothing, for tests of what surrounds models.

    python -m tests.stand_in serve --port 8000

Everything else is the real program: processes, catalogue, index, decoding. It starts in two seconds and
embeds hundreds of recordings a second, so that thousands of uploads, or hundreds of kills, are minutes.
A recording that is asked with as sound is its own best hit; a text finds all, in an order without meaning.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from app import opening, workers
from clasp_core.models import Model, Part
from clasp_core.types import Embeddings, Waveform
from tests.core.doubles import DIM, LetterTextEncoder, SpectralSpeechEncoder

PAUSE_S = float(os.environ.get("STAND_IN_PAUSE_S", "0"))
"""What each question, and each segment, takes: for tests of what happens meanwhile."""


class SlowTextEncoder(LetterTextEncoder):
    def encode(self, texts: Sequence[str]) -> Embeddings:
        time.sleep(PAUSE_S * len(texts))
        return super().encode(texts)


class SlowSpeechEncoder(SpectralSpeechEncoder):
    def encode(self, waveforms: Sequence[Waveform], pictured: Sequence[Waveform] | None = None) -> Embeddings:
        time.sleep(PAUSE_S * len(waveforms))
        return super().encode(waveforms, pictured)


OTHER = "other-stand-in"
"""A second model, of another dimension, for a library to move to; by any other name it is the first."""


class StandIn:
    """A `Model` of the encoders that tests use elsewhere."""

    about = "a stand-in for tests"
    calibration_file: Path | None = None

    def __init__(self, name: str) -> None:
        self.name = OTHER if name == OTHER else "stand-in"
        self.dim = 2 * DIM if name == OTHER else DIM
        self.fingerprint = "07e457a4d1457a4d" if name == OTHER else "57a4d1457a4d1457"

    def text_encoder(self) -> SlowTextEncoder:
        return SlowTextEncoder(self.dim)

    def speech_encoder(self) -> SlowSpeechEncoder:
        return SlowSpeechEncoder(self.dim)

    def parts(self) -> list[Part]:
        return []


def open_stand_in(name: str, *, models_dir: Path | None = None, device: str = "cpu") -> Model:
    return StandIn(name)


def main() -> None:
    """Be `clasp`."""
    opening.open_model = open_stand_in  # type: ignore[assignment]
    opening.use_threads = lambda threads: None  # type: ignore[assignment]
    workers.PROGRAM = (sys.executable, "-m", "tests.stand_in")

    from app import cli

    cli.main()


if __name__ == "__main__":
    main()
