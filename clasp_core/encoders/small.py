"""Small networks in the places of the paper's large ones: clips and pictures to one vector each.

The paper's systems with encoders that fit into package registries: same pipeline, same fusions, a hundredth
of the work. As in the paper, speech is the mean of the encoder's frames, and the spectrogram is looked at
as a picture.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clasp_core.encoders.batching import batches
from clasp_core.encoders.efficientnet import DIM as PICTURE_DIM
from clasp_core.encoders.efficientnet import EfficientNetLite0
from clasp_core.encoders.whisper import Frames, LogMel, WhisperEncoder
from clasp_core.types import SAMPLING_RATE, Seconds, Waveform

BATCH_S: Seconds = 60.0
"""Padded seconds that go through the network at once on a GPU; on a CPU clips go one by one."""
BATCH_PICTURES = 8


class MeanWhisper(nn.Module):
    """Clips of up to 30 s to the means of Whisper's frames, (n, dim). Not of unit length."""

    def __init__(self, whisper: WhisperEncoder) -> None:
        super().__init__()
        self.log_mel = LogMel()
        self.whisper = whisper
        self.dim = whisper.dim

    @torch.inference_mode()
    def forward(self, waveforms: Sequence[Waveform]) -> Tensor:
        """Raises ValueError for a clip longer than 30 s."""
        device = self.log_mel.window.device
        vectors = torch.empty(len(waveforms), self.dim, device=device)
        budget = round(BATCH_S * SAMPLING_RATE) if device.type == "cuda" else 1
        for places in batches([len(waveform) for waveform in waveforms], budget):
            mel = self.log_mel([waveforms[place] for place in places])
            vectors[places] = self.above(self.whisper.below(mel, 0), 0)
        return vectors

    @property
    def depth(self) -> int:
        return len(self.whisper.blocks)

    def upper(self, layer: int) -> nn.ModuleDict:
        return nn.ModuleDict({"layers": self.whisper.blocks[layer:], "norm": self.whisper.norm})

    @torch.inference_mode()
    def below(self, waveform: Waveform, layer: int) -> Tensor:
        return self.whisper.below(self.log_mel([waveform]), layer).values[0]

    def above(self, frames: Frames, layer: int) -> Tensor:
        values, lengths = self.whisper.above(frames, layer)
        return values.sum(1) / lengths[:, None]

    @classmethod
    def load(cls, path: Path) -> "MeanWhisper":
        return cls(WhisperEncoder.load(path)).eval()


class LitePictures(nn.Module):
    """The paper's pictures to EfficientNet-Lite0's pooled features (n, 1280), or its logits (n, 1000).

    Halved first: the picture's 450 x 610 then come to the scale of the 224 x 224 that the network was
    trained on, at a quarter of the work. Unlike the paper's B7 it sees them in RGB, in its own range.
    """

    def __init__(self, network: EfficientNetLite0, *, logits: bool) -> None:
        super().__init__()
        self.network = network
        self.dim = 1000 if logits else PICTURE_DIM
        self._logits = logits

    @torch.inference_mode()
    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures (n, 3, height, width) in BGR, values 0..255, to float32 rows on the module's device."""
        weight = next(self.network.parameters())
        rows = torch.empty(len(pictures), self.dim, device=weight.device)
        for start in range(0, len(pictures), BATCH_PICTURES):
            some = pictures[start : start + BATCH_PICTURES].to(weight.device, weight.dtype)
            some = (F.avg_pool2d(some, 2).flip(1) - 127) / 128
            made = self.network.classify(some) if self._logits else self.network(some)
            rows[start : start + BATCH_PICTURES] = made
        return rows

    @classmethod
    def load(cls, path: Path, *, logits: bool) -> "LitePictures":
        return cls(EfficientNetLite0.load(path), logits=logits).eval()
