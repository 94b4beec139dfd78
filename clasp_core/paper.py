"""The paper's encoders at work: HuBERT and EfficientNet-B7 fused into LaBSE's space.

    waveform 16 kHz ── HuBERT-large, mean over time ─── 1024 ─┐
    waveform 22,050 Hz ── picture ── EfficientNet-B7 ── 1000 ─┴─ fusion ── unit vector (768)
    text ── LaBSE ───────────────────────────────────────────────────────── unit vector (768)

Which of them, and which fusion, a `System` says; small encoders may stand in the large ones' places. All are
frozen (paper, section 3), except where a trained folder brings a speech encoder's upper layers along.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clasp_core import fusion
from clasp_core.encoders import adaptation
from clasp_core.encoders.e5 import E5Encoder
from clasp_core.encoders.efficientnet_b7 import EfficientNetB7
from clasp_core.encoders.folders import read_tensors
from clasp_core.encoders.hubert import SelfSupervisedSpeechEncoder
from clasp_core.encoders.sentence import SentenceEncoder
from clasp_core.encoders.small import LitePictures, MeanWhisper
from clasp_core.encoders.use import UseEncoder
from clasp_core.errors import ModelUnavailable
from clasp_core.spectrogram import PICTURE_RATE, SpectrogramPictures, reference_width
from clasp_core.systems import Inputs, System
from clasp_core.types import Embeddings, Waveform

TEXT_MEAN = "text_mean"
"""The entry of a fusion's file that holds the mean vector (dim,) of the texts it was trained on."""


class PaperTextEncoder:
    """Sentences to unit vectors (n, dim), in the space where the fusion was trained.

    That is the text encoder's own, or, where the fusion's file has a `text_mean`, the space without that
    mean: small text encoders press all sentences into a narrow cone around it.
    """

    def __init__(self, system: System, parts: Mapping[str, Path], device: torch.device) -> None:
        self.dim = system.dim
        self._mean = torch.zeros((), device=device)
        if "fusion" in parts and (mean := read_tensors(parts["fusion"]).get(TEXT_MEAN)) is not None:
            if mean.shape != (self.dim,) or not torch.isfinite(mean).all():
                raise ModelUnavailable(
                    f"{parts['fusion']}: {TEXT_MEAN} is not a mean of {system.text} vectors."
                )
            self._mean = mean.to(device)
        self._encode = load_text_encoder(system, parts, device)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Embeddings:
        if not texts:
            return np.empty((0, self.dim), np.float32)
        vectors: Embeddings = (
            F.normalize(self._encode(texts).to(self._mean) - self._mean, dim=1).cpu().numpy()
        )
        return vectors


def load_text_encoder(
    system: System, parts: Mapping[str, Path], device: torch.device
) -> Callable[[Sequence[str]], Tensor]:
    """What maps texts to rows (n, dim) as they come."""
    match system.text:
        case "e5-small":
            return E5Encoder.to_serve(parts["text"], device)
        case "use-multilingual":
            return UseEncoder(parts["text"], parts["tokenizer"])
    return SentenceEncoder.load(parts["text"]).to(device)


@dataclass(frozen=True, slots=True)
class Branches:
    """What the encoders make of some segments, as they come: HuBERT-large's (n, 1024), B7's (n, 1000)."""

    speech: Tensor | None
    picture: Tensor | None

    def prepared(self, inputs: Inputs) -> "Branches":
        """As the fusion takes them: each row brought to unit length, for `l2`."""
        if inputs == "raw":
            return self
        return Branches(*(None if x is None else F.normalize(x, dim=1) for x in (self.speech, self.picture)))


class PaperBackbone:
    """A system's speech and spectrogram encoders. `parts` may have an `adapter` of the former.

    On CUDA, HuBERT computes in bfloat16 and EfficientNet in channels-last float32; elsewhere all is float32.
    """

    def __init__(self, system: System, parts: Mapping[str, Path], device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.speech = self.pictures = self.spectrogram = None
        if system.speech is not None:
            dtype = torch.bfloat16 if cuda else torch.float32
            self.speech = load_speech_encoder(system, parts, dtype).to(device)
        if system.spectrogram is not None:
            self.spectrogram = _load_picture_encoder(
                system.spectrogram, parts["spectrogram"], channels_last=cuda
            ).to(device)
            self.pictures = SpectrogramPictures().to(device)
        self.picture_rate = None if self.pictures is None else PICTURE_RATE

    @torch.inference_mode()
    def __call__(self, waveforms: Sequence[Waveform], pictured: Sequence[Waveform] | None) -> Branches:
        speech = picture = None
        if self.speech is not None:
            speech = self.speech(waveforms)
        if self.spectrogram is not None and self.pictures is not None:
            if pictured is None or len(pictured) != len(waveforms):
                raise ValueError(f"each segment is needed at {PICTURE_RATE} Hz too, for its picture")
            picture = self._logits(pictured)
        return Branches(speech, picture)

    def _logits(self, pictured: Sequence[Waveform]) -> Tensor:
        """EfficientNet's logits (n, 1000), or features, of the pictures, each as wide as the reference's.

        Its time labels make that 608 to 610 columns, and the network's padding is not indifferent to it,
        so pictures go through it with those of their own width.
        """
        assert self.spectrogram is not None
        assert self.pictures is not None
        pictures = self.pictures(pictured)
        widths = [reference_width(len(waveform)) for waveform in pictured]
        logits = torch.empty(len(pictured), self.spectrogram.dim, device=pictures.device)
        for width in set(widths):
            places = [place for place, own in enumerate(widths) if own == width]
            logits[places] = self.spectrogram(pictures[places, :, :, :width])
        return logits


def load_speech_encoder(
    system: System, parts: Mapping[str, Path], dtype: torch.dtype = torch.float32
) -> SelfSupervisedSpeechEncoder | MeanWhisper:
    """The system's speech encoder on the CPU, adapted where `parts` says so; Whisper always in float32."""
    encoder: SelfSupervisedSpeechEncoder | MeanWhisper
    if system.speech in ("whisper-base", "whisper-tiny-en"):
        encoder = MeanWhisper.load(parts["speech"])
    else:
        encoder = SelfSupervisedSpeechEncoder.load(parts["speech"], dtype)
    if "adapter" in parts:
        adaptation.apply(encoder, parts["adapter"])
    return encoder


def _load_picture_encoder(name: str, path: Path, *, channels_last: bool) -> EfficientNetB7 | LitePictures:
    if name == "efficientnet-b7":
        return EfficientNetB7.load(path, channels_last=channels_last)
    return LitePictures.load(path, logits=name.endswith("-logits"))


class PaperSpeechEncoder:
    """Segments to unit vectors (n, dim)."""

    def __init__(self, system: System, parts: Mapping[str, Path], device: torch.device) -> None:
        self._inputs = system.inputs
        self._fusion = load_fusion(system, parts["fusion"]).to(device)
        self._backbone = PaperBackbone(system, parts, device)
        self.dim = system.dim
        self.picture_rate: int | None = self._backbone.picture_rate

    @torch.inference_mode()
    def encode(self, waveforms: Sequence[Waveform], pictured: Sequence[Waveform] | None = None) -> Embeddings:
        if not waveforms:
            return np.empty((0, self.dim), np.float32)
        branches = self._backbone(waveforms, pictured).prepared(self._inputs)
        vectors: Embeddings = (
            F.normalize(self._fusion(branches.speech, branches.picture), dim=1).cpu().numpy()
        )
        return vectors


def load_fusion(system: System, path: Path) -> fusion.Fusion:
    """A system's fusion from a safetensors file, in eval mode.

    Raises ModelUnavailable where names or shapes are not the system's, or a value is not finite.
    """
    state = read_tensors(path)
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelUnavailable(f"{path}: {name} holds NaN or infinity.")
    state.pop(TEXT_MEAN, None)
    return fusion.restore(system.fusion, state, system.dim)


def fits(network: fusion.Fusion, branches: Branches) -> dict[str, dict[Inputs, fusion.Fit]]:
    """For each branch, how well both conventions of its inputs agree with its own batch statistics.

    The statistics that a fusion gathered in training tell how its inputs were prepared: the right
    convention gives values like theirs, the wrong one is off by the norms' ratio (reference B4).
    """
    found: dict[str, dict[Inputs, fusion.Fit]] = {}
    conventions: tuple[Inputs, ...] = ("l2", "raw")
    for inputs in conventions:
        prepared = branches.prepared(inputs)
        for role, name, values in (
            ("speech", network.speech_branch, prepared.speech),
            ("spectrogram", network.picture_branch, prepared.picture),
        ):
            if name is not None and values is not None:
                found.setdefault(role, {})[inputs] = fusion.fit_of(network.get_submodule(name), values)
    return found
