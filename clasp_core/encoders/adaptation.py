"""Speech encoders whose upper layers are trained too: whole, or by low-rank adapters.

What was trained is a small safetensors file beside the fusion; the pretrained file stays what it is. A
low-rank adapter (Hu et al. 2021) is a parametrisation of a linear layer's weight, W + B A; to serve, the sum
is worked out once, so that it costs nothing then. These lines are all that is needed of it here, for our own
Whisper and transformers' HuBERT alike, where `peft` would bring a framework.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from clasp_core.encoders.whisper import Frames
from clasp_core.errors import ModelUnavailable
from clasp_core.types import Waveform


class LayeredEncoder(Protocol):
    """A speech encoder that can be cut between two of its layers; `above` of `below` is the whole."""

    dim: int

    @property
    def depth(self) -> int:
        """How many layers there are."""
        ...

    def upper(self, layer: int) -> nn.ModuleDict:
        """The module's own `layers` from there on, and `norm` where one follows them."""
        ...

    def below(self, waveform: Waveform, layer: int) -> Tensor:
        """What enters that layer for one clip: (frames, width). Without gradients."""
        ...

    def above(self, frames: Frames, layer: int) -> Tensor:
        """The pooled rows (n, dim) that come of it, with gradients; padding has no influence."""
        ...


@dataclass(frozen=True, slots=True)
class Adaptation:
    """Which part of an encoder is trained: its upper `layers`, by adapters of that `rank`, or whole (0)."""

    layers: int
    rank: int = 0
    alpha: float = 16.0
    """Adapters count alpha / rank times."""


class _LowRank(nn.Module):
    """Adds a product of two thin matrices to a weight; nothing, to begin with."""

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.a = nn.Parameter(torch.empty(rank, inputs))
        self.b = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self._scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self._scale * self.b @ self.a).to(weight.dtype)


def adapt(encoder: LayeredEncoder, adaptation: Adaptation) -> nn.ModuleDict:
    """Make those layers trainable, and nothing else; the part of the encoder that holds them."""
    assert isinstance(encoder, nn.Module)
    encoder.requires_grad_(False)
    if not 0 < adaptation.layers <= encoder.depth:
        raise ModelUnavailable(
            f"{adaptation.layers} layers cannot be adapted: the encoder has {encoder.depth}."
        )
    part = encoder.upper(encoder.depth - adaptation.layers)
    if not adaptation.rank:
        part.requires_grad_(True)
        return part
    add_adapters(part["layers"], adaptation.rank, adaptation.alpha)
    return part


def add_adapters(module: nn.Module, rank: int, alpha: float | None = None) -> None:
    """Give every linear layer within a module a low-rank adapter, which counts alpha / rank times (once)."""
    for layer in [found for found in module.modules() if isinstance(found, nn.Linear)]:
        low_rank = _LowRank(layer.weight, rank, 1.0 if alpha is None else alpha / rank)
        parametrize.register_parametrization(layer, "weight", low_rank.to(layer.weight.device))


def merge(module: nn.Module) -> None:
    """Work the adapters' sums out, for good."""
    for adapted in list(module.modules()):
        if parametrize.is_parametrized(adapted, "weight"):
            parametrize.remove_parametrizations(adapted, "weight")


def save(part: nn.ModuleDict, adaptation: Adaptation, path: Path) -> None:
    """Write what was trained of an adapted part, by the names it has there."""
    trained = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in part.named_parameters()
        if parameter.requires_grad
    }
    save_file(trained, path, {"format": "clasp-adaptation/1", "adaptation": json.dumps(asdict(adaptation))})


def apply(encoder: LayeredEncoder, path: Path) -> None:
    """Put what `save` wrote into the encoder it was trained on, for good.

    Raises ModelUnavailable where the file is none of these, belongs to another network, or holds NaN.
    """
    assert isinstance(encoder, nn.Module)
    try:
        with safe_open(path, "pt") as file:
            adaptation = Adaptation(**json.loads((file.metadata() or {})["adaptation"]))
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelUnavailable(f"{path} does not hold an adapted encoder: {error}.") from error
    part = adapt(encoder, adaptation)
    trained = {name: parameter for name, parameter in part.named_parameters() if parameter.requires_grad}
    for name in sorted(trained.keys() | stored.keys()):
        if name not in trained or name not in stored or trained[name].shape != stored[name].shape:
            raise ModelUnavailable(f"{path} was trained on another encoder: {name} does not fit.")
        if not torch.isfinite(stored[name]).all():
            raise ModelUnavailable(f"{path}: {name} holds NaN or infinity.")
        trained[name].data.copy_(stored[name])
    merge(part)
    encoder.requires_grad_(False)
