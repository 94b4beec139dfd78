"""EfficientNet-B7, through timm: the encoder that looks at the paper's spectrogram picture.

Tan & Le 2019, from torchvision's weights (`EfficientNet_B7_Weights.IMAGENET1K_V1`): what the authors
take are the classifier's 1000 logits, on pictures as `cv2.imread` gives them, in BGR, 0..255, 450 x 610,
neither resized nor scaled nor brought to ImageNet's mean (notebook `clasp-inference`, cells 7 and 12).
That is far from what the network was trained on, and it is what the fusion learned from.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from clasp_core.encoders.folders import leave_file, read_tensors
from clasp_core.encoders.vision_imports import import_timm
from clasp_core.errors import ModelUnavailable

BATCH_PICTURES = 4
"""Pictures that go through the network at once; each takes about 0.2 GB at 450 x 610, in float32."""

_SCALING = {
    "b0": (1.0, 1.0),
    "b1": (1.0, 1.1),
    "b2": (1.1, 1.2),
    "b3": (1.2, 1.4),
    "b4": (1.4, 1.8),
    "b5": (1.6, 2.2),
    "b6": (1.8, 2.6),
    "b7": (2.0, 3.1),
}
"""Multipliers of width and depth (Tan & Le 2019, section 3.3, and their code)."""
_B0 = ((16, 1), (24, 2), (40, 2), (80, 3), (112, 3), (192, 4), (320, 1))
"""Channels and repeats of each stage at width and depth 1 (Tan & Le 2019, table 1)."""
_WIDE_EPS = {"b5": 1e-3, "b6": 1e-3, "b7": 1e-3}
"""Where torchvision's BatchNorm differs from torch's default of 1e-5: those weights are TensorFlow's."""

_BLOCK_PARTS = {
    # torchvision's place in a block's Sequential -> timm's names, by place in Conv2dNormActivation
    "separable": (("conv_dw", "bn1"), ("se",), ("conv_pw", "bn2")),
    "inverted": (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("se",), ("conv_pwl", "bn3")),
}
_SE_PARTS = {"fc1": "conv_reduce", "fc2": "conv_expand"}
_BLOCK = re.compile(r"features\.([1-7])\.(\d+)\.block\.(\d)\.(\w+)\.(\w+)")
_AROUND = {
    "features.0.0": "conv_stem",
    "features.0.1": "bn1",
    "features.8.0": "conv_head",
    "features.8.1": "bn2",
    "classifier.1": "classifier",
}


class EfficientNetB7(nn.Module):
    """Pictures (n, 3, height, width) to logits (n, 1000). `variant` is "b7", or what the file holds."""

    dim = 1000

    def __init__(
        self,
        network: nn.Module,
        variant: str,
        *,
        channels_last: bool = False,
        batch_pictures: int = BATCH_PICTURES,
    ) -> None:
        super().__init__()
        self.network = network
        if channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.variant = variant
        self._batch = batch_pictures
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    @torch.inference_mode()
    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures in BGR with values 0..255, uint8 or floating, to float32 logits on the module's device.

        Raises ValueError for another shape, FloatingPointError where the network overflows, as float16 can.
        """
        if pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(f"pictures of shape {tuple(pictures.shape)}; (n, 3, height, width) is needed")
        weight = next(self.network.parameters())
        logits = torch.empty(len(pictures), self.dim, device=weight.device)
        for start in range(0, len(pictures), self._batch):
            some = pictures[start : start + self._batch].to(weight.device, weight.dtype)
            logits[start : start + self._batch] = self.network(some.contiguous(memory_format=self._format))
        if not torch.isfinite(logits).all():
            raise FloatingPointError("EfficientNet overflowed, or a picture holds NaN or infinity")
        return logits

    @classmethod
    def load(
        cls,
        path: Path,
        dtype: torch.dtype = torch.float32,
        *,
        channels_last: bool = False,
        batch_pictures: int = BATCH_PICTURES,
    ) -> "EfficientNetB7":
        """The network from a safetensors file of torchvision's state dict, in eval mode, on the CPU.

        Its entries are named as torchvision names them (`features.0.0.weight` ... `classifier.1.bias`, 1200
        for B7); each must find its place, and each place its entry. Which of B0 to B7 it is shows in its
        shapes. `dtype` is that of the computation and `channels_last` its layout: float16 and True are
        worth having on CUDA.

        Raises ModelUnavailable for a file that is not one of these, and without the `paper` extra.
        """
        theirs = read_tensors(path)
        variant = _variant(theirs, path)
        timm = import_timm()
        with torch.device("meta"):  # the names and shapes, without 66 million random numbers
            network: nn.Module = timm.create_model(
                f"efficientnet_{variant}", pretrained=False, bn_eps=_WIDE_EPS.get(variant, 1e-5)
            )
        ours = {_timm_name(name) or name: tensor for name, tensor in theirs.items()}
        floats = {
            name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in ours.items()
        }
        if len(ours) < len(theirs):
            raise ModelUnavailable(f"{path} holds some of its weights twice, under two names.")
        # load_state_dict alone is not strict about BatchNorm's counts of batches
        if different := sorted(ours.keys() ^ network.state_dict().keys()):
            raise ModelUnavailable(
                f"{path} is not EfficientNet-{variant}: it lacks, or has no place for,"
                f" {', '.join(different[:3])}{f' and {len(different) - 3} more' * (len(different) > 3)}."
            )
        try:
            network.load_state_dict(floats, strict=True, assign=True)
        except RuntimeError as error:
            raise ModelUnavailable(f"{path} is not EfficientNet-{variant}: {error}") from error
        network.eval().requires_grad_(False)
        leave_file(network)
        network.to(dtype)
        return cls(network, variant, channels_last=channels_last, batch_pictures=batch_pictures)


def _variant(state: Mapping[str, Tensor], path: Path) -> str:
    """The scaling whose stages have the file's widths and numbers of blocks."""
    stages = tuple(_stages(state))
    for variant, (width, depth) in _SCALING.items():
        if stages == tuple((_scaled(channels, width), math.ceil(count * depth)) for channels, count in _B0):
            return variant
    raise ModelUnavailable(f"{path} does not hold torchvision's EfficientNet B0 to B7.")


def _stages(state: Mapping[str, Tensor]) -> Iterator[tuple[int, int]]:
    """Channels and blocks of each stage: a block's last convolution has as many outputs as its stage."""
    for stage in range(1, 8):
        blocks = {
            int(match[2]) for name in state if (match := _BLOCK.fullmatch(name)) and match[1] == str(stage)
        }
        last = state.get(f"features.{stage}.0.block.{2 if stage == 1 else 3}.0.weight")
        yield (0 if last is None else len(last)), len(blocks)


def _scaled(channels: int, width: float) -> int:
    """Channels times width, to the nearest multiple of 8, never losing more than a tenth."""
    scaled = max(8, int(channels * width + 4) // 8 * 8)
    return scaled if scaled >= 0.9 * channels * width else scaled + 8


def _timm_name(name: str) -> str | None:
    """timm's name for an entry of torchvision's state dict, None for one that is none.

    torchvision numbers the layers of a block, timm names them; and only blocks that expand (all but
    stage 1's) have the first convolution.
    """
    layer, _, entry = name.rpartition(".")
    if layer in _AROUND:
        return f"{_AROUND[layer]}.{entry}"
    if not (match := _BLOCK.fullmatch(name)):
        return None
    stage, block, place, inner, entry = match.groups()
    parts = _BLOCK_PARTS["separable" if stage == "1" else "inverted"]
    if int(place) >= len(parts):
        return None
    part = parts[int(place)]
    if part == ("se",):
        if inner not in _SE_PARTS:
            return None
        found = f"se.{_SE_PARTS[inner]}"
    elif inner in ("0", "1"):
        found = part[int(inner)]
    else:
        return None
    return f"blocks.{int(stage) - 1}.{block}.{found}.{entry}"
