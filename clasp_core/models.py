"""The models a library can be searched with, by name: two encoders into one space, and a fingerprint.

    open_model("mini").text_encoder().encode(["..."])      -> unit vectors of questions
    open_model("mini").speech_encoder().encode([waveform]) -> unit vectors of segments

Opening a model is cheap and checks what is there; each encoder is loaded when it is asked for, since
the process that answers questions needs the text side only, and the one that indexes the speech side.
"""

import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from clasp_core.encoders import Heard as Heard
from clasp_core.encoders import SpeechEncoder as SpeechEncoder
from clasp_core.encoders import TextEncoder as TextEncoder
from clasp_core.encoders import TranscribingEncoder as TranscribingEncoder
from clasp_core.encoders.weights import PinnedWeights, remembered_sha256
from clasp_core.errors import ModelUnavailable
from clasp_core.systems import SYSTEMS, System, read

if TYPE_CHECKING:
    import torch

_EMBEDDED = Path(__file__).parent / "weights"

PROCESSING = 1
"""Raise when decoding, segmenting or text normalisation changes what vectors come out."""


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
    calibration_file: Path | None
    """Where what its scores mean is kept, if it was measured: see `clasp_core.calibration`."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits of everything a stored vector depends on. Vectors of two fingerprints never meet.

        Raises ModelUnavailable where a part is missing.
        """
        ...

    def text_encoder(self) -> TextEncoder: ...
    def speech_encoder(self) -> SpeechEncoder: ...
    def parts(self) -> list[Part]: ...


EMBEDDED = ("mini", "hybrid")
AVAILABLE = (*EMBEDDED, *SYSTEMS)


def open_model(name: str, *, models_dir: Path | None = None, device: str = "cpu") -> Model:
    """The model of that name, or the one in that folder.

    A folder holds `model.json` and what that describes, as `clasp train` writes them. `device` is "cpu",
    "cuda" or "auto". Raises ModelUnavailable for a name that is neither, or a folder of another version.
    """
    if name in SYSTEMS:
        return PaperModel(name, SYSTEMS[name], None, models_dir, device)
    folder = _EMBEDDED / name if name in EMBEDDED else Path(name)
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
        case {"format": "clasp-model/1", "architecture": "hybrid", "base": str(base)}:
            place = base if base in EMBEDDED else str(folder / base)
            mixed = open_model(place, models_dir=models_dir, device=device)
            if not isinstance(mixed, MiniModel):
                raise ModelUnavailable(f"{folder} is a mixture with {base!r}, which is no model like mini.")
            return HybridModel(name, mixed, folder / "mixture.json", models_dir, device)
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
        self.calibration_file: Path | None = fusion.parent / "calibration.json"
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

        trained = Part(
            "fusion",
            f"{self.name} fusion",
            "trained by this project",
            "MIT",
            "here",
            _size(self.fusion),
            self.fusion,
        )
        return [
            *(_pinned_part(role, weights, self._models_dir) for role, weights in PRETRAINED.items()),
            trained,
        ]


class HybridModel:
    """A model like `mini` with transcripts mixed into its speech vectors; its questions are unchanged."""

    about = "mini, with transcripts by whisper-base mixed in"

    def __init__(
        self, name: str, base: MiniModel, mixture: Path, models_dir: Path | None, device: str
    ) -> None:
        self.name = name
        self.dim = base.dim
        self.base = base
        self.mixture = mixture
        self.calibration_file: Path | None = mixture.parent / "calibration.json"
        self._models_dir = models_dir
        self._device = device

    @cached_property
    def fingerprint(self) -> str:
        from clasp_core.hybrid import identity
        from clasp_core.transcription import whisper_identity

        for part in self._own_parts():
            if part.path is None:
                remedy = "pip install 'clasp-search[transcription]'"
                lacking = self.mixture if part.role == "mixture" else f"{part.title}: {remedy}"
                raise ModelUnavailable(f"The model {self.name!r} lacks {lacking}.")
        own = [whisper_identity(), identity(), remembered_sha256(self.mixture)]
        return _digest([PROCESSING, self.base.fingerprint, *own])

    def text_encoder(self) -> TextEncoder:
        return self.base.text_encoder()

    def speech_encoder(self) -> SpeechEncoder:
        from clasp_core.hybrid import HybridSpeechEncoder, Mixture
        from clasp_core.transcription import WhisperTranscriber

        transcriber = WhisperTranscriber(self._models_dir, device=resolve_device(self._device).type)
        mixture = Mixture.load(self.mixture)
        return HybridSpeechEncoder(self.base.speech_encoder(), self.text_encoder(), transcriber, mixture)

    def parts(self) -> list[Part]:
        return [*self.base.parts(), *self._own_parts()]

    def _own_parts(self) -> list[Part]:
        from clasp_core.encoders.whisper import WHISPER_BASE_HALVES
        from clasp_core.transcription import WHISPER_FILES

        whole, half = WHISPER_FILES[0], WHISPER_BASE_HALVES[0]
        found = half.found(self._models_dir) or whole.found(self._models_dir)
        package, runtime = half.sources[0], importlib.util.find_spec("ctranslate2")
        engine = Path(runtime.origin).parent if runtime is not None and runtime.origin is not None else None
        mixture = self.mixture if self.mixture.is_file() else None
        return [
            Part(
                "transcriber",
                package.distribution,
                "the whisper-base decoder",
                half.licence,
                f"{package.distribution}=={package.version}",
                _size(found),
                found,
            ),
            Part("runtime", "ctranslate2", "CTranslate2, which runs it", "MIT", "ctranslate2", None, engine),
            Part(
                "mixture",
                f"{self.name} mixture",
                "trained by this project",
                "MIT",
                "here",
                _size(mixture),
                mixture,
            ),
        ]


class PaperModel:
    """A system of the paper, from the files in the models folder; `fusion` where it has its own."""

    def __init__(
        self, name: str, system: System, fusion: Path | None, models_dir: Path | None, device: str
    ) -> None:
        self.name = name
        self.dim = system.dim
        self.about = system.about
        self.system = system
        self._fusion = fusion
        self.calibration_file: Path | None = None
        if fusion is not None:
            self.calibration_file = fusion.parent / "calibration.json"
        elif models_dir is not None:
            self.calibration_file = models_dir / "calibrations" / f"{name}.json"
        self._models_dir = models_dir
        self._device = device

    @cached_property
    def fingerprint(self) -> str:
        parts = {role: content_hash(path) for role, path in self.located().items()}
        return _digest([PROCESSING, self.system.as_json(), parts])

    def text_encoder(self) -> TextEncoder:
        from clasp_core.paper import PaperTextEncoder

        own = () if self._fusion is None else ("fusion",)
        located = self.located("text", "tokenizer", *own)
        return PaperTextEncoder(self.system, located, resolve_device(self._device))

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

        parts = []
        for role, key in self.system.pretrained.items():
            pinned = _pinned(role, key)
            parts += [_pinned_part(name, weights, self._models_dir) for name, weights in pinned.items()]
            if not pinned:
                parts.append(part(role, key))
        if self._fusion is not None:
            adapter = self._fusion.with_name("encoder.safetensors")
            for role, path in (("fusion", self._fusion), ("adapter", adapter)):
                found = path if path.is_file() else None
                if role == "fusion" or found is not None:
                    parts.append(
                        Part(role, "own", "a model folder's own", "its own", "here", _size(found), found)
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
                for weights in _pinned(part.role, self.system.pretrained.get(part.role, "")).values():
                    weights.locate(self._models_dir)
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


def _pinned(role: str, key: str) -> "dict[str, PinnedWeights]":
    """The files of a small pretrained part by role, or none where it is one of `hub.PUBLISHED`."""
    from clasp_core.encoders.e5 import E5_SMALL
    from clasp_core.encoders.efficientnet import EFFICIENTNET_LITE0
    from clasp_core.encoders.use import USE_MULTILINGUAL, USE_WORDS
    from clasp_core.encoders.whisper import WHISPER_BASE, WHISPER_TINY_EN

    files = {
        "whisper-base": {role: WHISPER_BASE},
        "whisper-tiny-en": {role: WHISPER_TINY_EN},
        "efficientnet-lite0": {role: EFFICIENTNET_LITE0},
        "efficientnet-lite0-logits": {role: EFFICIENTNET_LITE0},
        "e5-small": {role: E5_SMALL},
        "use-multilingual": {role: USE_MULTILINGUAL, "tokenizer": USE_WORDS},
    }
    return files.get(key, {})


def _pinned_part(role: str, weights: PinnedWeights, models_dir: Path | None) -> Part:
    found = weights.found(models_dir)
    source = " or ".join(f"{s.distribution}=={s.version}" for s in weights.sources)
    return Part(
        role, weights.sources[0].distribution, weights.title, weights.licence, source, _size(found), found
    )


_WEIGHT_FILES = (".json", ".safetensors", ".txt", ".model")


def content_hash(path: Path) -> str:
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
