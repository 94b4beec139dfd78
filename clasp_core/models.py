"""The models a library can be searched with, by name: two encoders into one space, and a fingerprint.

    open_model("mini").text_encoder().encode(["..."])      -> unit vectors of questions
    open_model("mini").speech_encoder().encode([waveform]) -> unit vectors of segments

Opening a model is cheap and checks what is there; each encoder is loaded when it is asked for, since
the process that answers questions needs the text side only, and the one that indexes the speech side.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from clasp_core.encoders.weights import PinnedWeights, sha256_of
from clasp_core.errors import ModelUnavailable
from clasp_core.types import Embeddings, Waveform

if TYPE_CHECKING:
    import torch

_EMBEDDED = Path(__file__).parent / "weights"

PROCESSING = 1
"""Raise when decoding, segmenting or text normalisation changes what vectors come out."""


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


@dataclass(frozen=True, slots=True)
class Part:
    """One pretrained or trained part of a model, for `clasp models list`."""

    role: str
    title: str
    licence: str
    path: Path | None
    """Where it is on this machine, or None."""


class Model(Protocol):
    name: str
    dim: int
    fingerprint: str
    """16 hex digits of everything a stored vector depends on. Vectors of two fingerprints never meet."""

    def text_encoder(self) -> TextEncoder: ...
    def speech_encoder(self) -> SpeechEncoder: ...
    def parts(self) -> list[Part]: ...


def open_model(name: str, *, models_dir: Path | None = None, device: str = "cpu") -> Model:
    """The model of that name, or the one in that folder (as `clasp train` writes it).

    `device` is "cpu", "cuda" or "auto". Raises ModelUnavailable for a name that is neither.
    """
    folder = _EMBEDDED / name if name in AVAILABLE else Path(name)
    if not (folder / "model.json").is_file():
        names = ", ".join(AVAILABLE)
        raise ModelUnavailable(
            f"There is no model {name!r}: it is neither one of {names} nor a model folder."
        )
    return _MiniModel(name, folder, models_dir, device)


AVAILABLE = ("mini",)


class _MiniModel:
    """`mini`'s architecture with the fusion weights of one folder."""

    def __init__(self, name: str, folder: Path, models_dir: Path | None, device: str) -> None:
        description = json.loads((folder / "model.json").read_text())
        if description.get("format") != "clasp-model/1":
            raise ModelUnavailable(f"{folder} holds a model of another version of this program.")
        self.name = name
        self.dim = int(description["dim"])
        self._fusion_path = folder / "fusion.safetensors"
        self._models_dir = models_dir
        self._device = device
        self.fingerprint = self._fingerprint()

    def _fingerprint(self) -> str:
        from clasp_core.mini import PRETRAINED

        parts = [weights.sources[0].sha256 for weights in PRETRAINED.values()]
        identity = json.dumps([PROCESSING, *parts, sha256_of(self._fusion_path)])
        return hashlib.sha256(identity.encode()).hexdigest()[:16]

    def text_encoder(self) -> TextEncoder:
        from clasp_core.mini import MiniTextEncoder

        return MiniTextEncoder(self._fusion_path, self._models_dir, resolve_device(self._device))

    def speech_encoder(self) -> SpeechEncoder:
        from clasp_core.mini import MiniSpeechEncoder

        return MiniSpeechEncoder(self._fusion_path, self._models_dir, resolve_device(self._device))

    def parts(self) -> list[Part]:
        from clasp_core.mini import PRETRAINED

        def part(role: str, weights: PinnedWeights) -> Part:
            return Part(role, weights.title, weights.licence, weights.found(self._models_dir))

        trained = Part("fusion", "trained by this project", "MIT", self._fusion_path)
        return [*(part(role, weights) for role, weights in PRETRAINED.items()), trained]


def use_threads(threads: int) -> None:
    """Bound the CPU threads of this process's models; 0 means half of the cores, at least one."""
    import torch

    torch.set_num_threads(threads or max(1, (os.cpu_count() or 2) // 2))


def resolve_device(device: str) -> "torch.device":
    """ "auto" means CUDA where there is one. Raises ModelUnavailable for a device that is not there."""
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ModelUnavailable("CLASP_DEVICE=cuda, but torch sees no CUDA device.")
    return torch.device("cuda" if device == "cuda" or (device == "auto" and available) else "cpu")
