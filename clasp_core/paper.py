"""The paper's encoders at work: HuBERT and EfficientNet-B7 fused into LaBSE's space.

    waveform 16 kHz ── HuBERT-large, mean over time ─── 1024 ─┐
    waveform 22,050 Hz ── picture ── EfficientNet-B7 ── 1000 ─┴─ fusion ── unit vector (768)
    text ── LaBSE ───────────────────────────────────────────────────────── unit vector (768)

Which of them, and which fusion, a `System` says. All are frozen (paper, section 3).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clasp_core import fusion
from clasp_core.encoders.efficientnet_b7 import EfficientNetB7
from clasp_core.encoders.folders import read_tensors
from clasp_core.encoders.hubert import SelfSupervisedSpeechEncoder
from clasp_core.encoders.sentence import SentenceEncoder
from clasp_core.errors import ModelUnavailable
from clasp_core.spectrogram import PICTURE_RATE, SpectrogramPictures, reference_width
from clasp_core.systems import Inputs, System
from clasp_core.types import Embeddings, Waveform


class PaperTextEncoder:
    """Sentences to unit vectors (n, 768)."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._encoder = SentenceEncoder.load(folder).to(device)
        self.dim = self._encoder.dim

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Embeddings:
        if not texts:
            return np.empty((0, self.dim), np.float32)
        vectors: Embeddings = F.normalize(self._encoder(texts), dim=1).cpu().numpy()
        return vectors


@dataclass(frozen=True, slots=True)
class Branches:
    """What the frozen encoders make of some segments: (n, 1024) or (n, 768), and (n, 1000), as they come."""

    speech: Tensor | None
    picture: Tensor | None

    def prepared(self, inputs: Inputs) -> "Branches":
        """As the fusion takes them: each row brought to unit length, for `l2`."""
        if inputs == "raw":
            return self
        return Branches(*(None if x is None else F.normalize(x, dim=1) for x in (self.speech, self.picture)))


class PaperBackbone:
    """A system's frozen speech and spectrogram encoders.

    On CUDA, HuBERT computes in bfloat16 and EfficientNet in channels-last float32; elsewhere all is float32.
    """

    def __init__(self, system: System, parts: Mapping[str, Path], device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.speech = self.pictures = self.spectrogram = None
        if system.speech is not None:
            dtype = torch.bfloat16 if cuda else torch.float32
            self.speech = SelfSupervisedSpeechEncoder.load(parts["speech"], dtype).to(device)
        if system.spectrogram is not None:
            self.spectrogram = EfficientNetB7.load(parts["spectrogram"], channels_last=cuda).to(device)
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
        """EfficientNet's logits (n, 1000) of the pictures, each as wide as the reference's.

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


class PaperSpeechEncoder:
    """Segments to unit vectors (n, 768)."""

    def __init__(self, system: System, parts: Mapping[str, Path], device: torch.device) -> None:
        self._inputs = system.inputs
        self._fusion = load_fusion(system, parts["fusion"]).to(device)
        self._backbone = PaperBackbone(system, parts, device)
        self.dim = fusion.DIM
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
    return fusion.restore(system.fusion, state)


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
