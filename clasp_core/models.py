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
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from clasp_core.encoders.weights import PinnedWeights, remembered_sha256
from clasp_core.errors import ModelUnavailable
from clasp_core.systems import SYSTEMS, System, read
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
    key: str
    """Its name for `clasp models fetch`, or the package's; parts of several models are one by it."""
    title: str
    licence: str
    source: str
    """The package, repository or address it is published at."""
    size_bytes: int | None
    """As it is on this machine, else as it is published; None where that is not known."""
    path: Path | None
    """Where it is on this machine, or None."""


class Model(Protocol):
    """Opening one is cheap; what it needs and lacks shows when that is asked for."""

    name: str
    dim: int
    about: str
    """One phrase that says which model this is."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits of everything a stored vector depends on. Vectors of two fingerprints never meet.

        Raises ModelUnavailable where a part is missing.
        """
        ...

    def text_encoder(self) -> TextEncoder: ...
    def speech_encoder(self) -> SpeechEncoder: ...
    def parts(self) -> list[Part]: ...


AVAILABLE = ("mini", *SYSTEMS)


def open_model(name: str, *, models_dir: Path | None = None, device: str = "cpu") -> Model:
    """The model of that name, or the one in that folder.

    A folder holds `model.json` and `fusion.safetensors`, as `clasp train` writes them. `device` is "cpu",
    "cuda" or "auto". Raises ModelUnavailable for a name that is neither, or a folder of another version.
    """
    if name in SYSTEMS:
        return PaperModel(name, SYSTEMS[name], None, models_dir, device)
    folder = _EMBEDDED / name if name == "mini" else Path(name)
    try:
        description = json.loads((folder / "model.json").read_text())
    except FileNotFoundError:
        raise ModelUnavailable(
            f"There is no model {name!r}: it is neither a model folder nor one of {', '.join(AVAILABLE)}."
        ) from None
    except ValueError as error:
        raise ModelUnavailable(f"{folder / 'model.json'} is not JSON: {error}.") from error
    fusion = folder / "fusion.safetensors"
    match description:
        case {"format": "clasp-model/1", "architecture": "mini", "dim": int(dim)}:
            return MiniModel(name, dim, fusion, models_dir, device)
        case {"format": "clasp-model/1", "architecture": "paper", "system": dict(system)}:
            return PaperModel(name, read(system), fusion, models_dir, device)
    raise ModelUnavailable(f"{folder} holds a model of another version of this program.")


class MiniModel:
    """`mini`'s architecture with the fusion weights of one folder."""

    about = "the embedded default"

    def __init__(self, name: str, dim: int, fusion: Path, models_dir: Path | None, device: str) -> None:
        self.name = name
        self.dim = dim
        self.fusion = fusion
        self._models_dir = models_dir
        self._device = device

    @cached_property
    def fingerprint(self) -> str:
        from clasp_core.mini import PRETRAINED

        parts = [weights.sources[0].sha256 for weights in PRETRAINED.values()]
        return _digest([PROCESSING, *parts, remembered_sha256(self.fusion)])

    def text_encoder(self) -> TextEncoder:
        from clasp_core.mini import MiniTextEncoder

        return MiniTextEncoder(self.fusion, self._models_dir, resolve_device(self._device))

    def speech_encoder(self) -> SpeechEncoder:
        from clasp_core.mini import MiniSpeechEncoder

        return MiniSpeechEncoder(self.fusion, self._models_dir, resolve_device(self._device))

    def parts(self) -> list[Part]:
        from clasp_core.mini import PRETRAINED

        def part(role: str, weights: PinnedWeights) -> Part:
            found = weights.found(self._models_dir)
            source = " or ".join(f"{s.distribution}=={s.version}" for s in weights.sources)
            return Part(
                role,
                weights.sources[0].distribution,
                weights.title,
                weights.licence,
                source,
                _size(found),
                found,
            )

        trained = Part(
            "fusion",
            f"{self.name} fusion",
            "trained by this project",
            "MIT",
            "here",
            _size(self.fusion),
            self.fusion,
        )
        return [*(part(role, weights) for role, weights in PRETRAINED.items()), trained]


class PaperModel:
    """A system of the paper, from the files in the models folder; `fusion` where it has its own."""

    def __init__(
        self, name: str, system: System, fusion: Path | None, models_dir: Path | None, device: str
    ) -> None:
        self.name = name
        self.dim = 768
        self.about = system.about
        self.system = system
        self._fusion = fusion
        self._models_dir = models_dir
        self._device = device

    @cached_property
    def fingerprint(self) -> str:
        parts = {role: _content_hash(path) for role, path in self.located().items()}
        return _digest([PROCESSING, self.system.as_json(), parts])

    def text_encoder(self) -> TextEncoder:
        from clasp_core.paper import PaperTextEncoder

        return PaperTextEncoder(self.located("text")["text"], resolve_device(self._device))

    def speech_encoder(self) -> SpeechEncoder:
        from clasp_core.paper import PaperSpeechEncoder

        return PaperSpeechEncoder(self.system, self.located(), resolve_device(self._device))

    def parts(self) -> list[Part]:
        from clasp_core.hub import PUBLISHED

        def part(role: str, key: str) -> Part:
            published = PUBLISHED[key]
            found = None if self._models_dir is None else published.found(self._models_dir)
            size = _size(found) if found else published.megabytes * 1_000_000
            return Part(role, key, published.title, published.licence, published.source, size, found)

        parts = [part(role, key) for role, key in self.system.pretrained.items()]
        if self._fusion is not None:
            fusion = self._fusion if self._fusion.is_file() else None
            parts.append(
                Part("fusion", "own", "a model folder's own", "its own", "here", _size(fusion), fusion)
            )
        elif self.system.weights is not None:
            parts.append(part("fusion", self.system.weights))
        else:
            parts.append(Part("fusion", "-", "was not published: train it", "-", "-", None, None))
        return parts

    def located(self, *roles: str) -> dict[str, Path]:
        """Where all parts are, or those of these roles. Raises ModelUnavailable, naming a missing one."""
        located = {}
        for part in self.parts():
            if roles and part.role not in roles:
                continue
            if part.path is None:
                place = self._models_dir or "CLASP_MODELS_DIR, which is not set"
                raise ModelUnavailable(
                    f"The model {self.name!r} lacks its {part.role} part ({part.title}) in {place}:"
                    " run `clasp models fetch`, or put the published files there."
                    if part.source != "-"
                    else f"No weights of {self.name!r} were published: train it, and use the trained folder."
                )
            located[part.role] = part.path
        return located


def _digest(identity: object) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


_WEIGHT_FILES = (".json", ".safetensors", ".txt", ".model")


def _content_hash(path: Path) -> str:
    """sha256 of a file, or of the names and hashes of all files in a folder that a model can be read from."""
    if path.is_file():
        return remembered_sha256(path)
    files = sorted(file for file in path.rglob("*") if file.suffix in _WEIGHT_FILES)
    listed = [[str(file.relative_to(path)), remembered_sha256(file)] for file in files]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _size(path: Path | None) -> int | None:
    """Bytes of a file, or of what a folder's models are read from."""
    if path is None:
        return None
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.suffix in _WEIGHT_FILES)


def use_threads(threads: int) -> None:
    """Bound what this process's models take on the CPU; call it before the first of them is loaded.

    threads: 0 means half of the cores, at least one. oneDNN keeps a compiled kernel, with its buffers, for
    each shape it has seen, a thousand by default; recordings have every length, so that is memory without
    end for no speed (docs/decisions.md).
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    import torch

    torch.set_num_threads(threads or max(1, (os.cpu_count() or 2) // 2))


def resolve_device(device: str) -> "torch.device":
    """ "auto" means CUDA where there is one. Raises ModelUnavailable for a device that is not there."""
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ModelUnavailable("CLASP_DEVICE=cuda, but torch sees no CUDA device.")
    return torch.device("cuda" if device == "cuda" or (device == "auto" and available) else "cpu")
