"""Self-supervised speech encoders of the paper: waveforms to one vector a clip.

HuBERT (Hsu et al. 2021) in the final model and wav2vec 2.0 (Baevski et al. 2020) in the early ones,
frozen, by `transformers`, from a folder in the hub's layout (`facebook/hubert-large-ls960-ft`, 1024-d;
`facebook/wav2vec2-base-960h`, 768-d). Paper (arXiv 2412.13071), section 3, "self-supervised speech";
notebook `clasp-inference`, cells 8-9, and `extract-pretrained-embeddings`, cells 7, 275 and 279: peak
normalisation, the processor's own normalisation, mean of `last_hidden_state` over time. The vectors
are not unit length; normalising them is the fusion's business.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from clasp_core.encoders.batching import batches
from clasp_core.encoders.folders import read_json, read_network
from clasp_core.encoders.vision_imports import require_transformers
from clasp_core.encoders.whisper import Frames
from clasp_core.errors import ModelUnavailable
from clasp_core.types import SAMPLING_RATE, Seconds, Waveform

if TYPE_CHECKING:
    from transformers import HubertModel, Wav2Vec2Model

    Network: TypeAlias = HubertModel | Wav2Vec2Model

BATCH_S: Seconds = 60.0
"""Padded seconds that go through the network at once; the convolutions take about 25 MB for each."""

_HEAD = r"^lm_head\."
"""What a checkpoint fine-tuned for recognition has and the base network has not."""
_MASK = r"(^|\.)masked_spec_embed$"
"""Stands in for masked frames while training; never read in eval mode."""


class _Reached(Exception):
    """A layer was come to whose input is all that is wanted."""


class SelfSupervisedSpeechEncoder(nn.Module):
    """Clips to mean-pooled features (n, dim). A clip's vector does not depend on its batch (to 1e-4).

    `min_samples` is the shortest clip that gives a frame: 400 samples, 25 ms, with the published
    convolutions.
    """

    def __init__(self, network: "Network", *, normalises: bool, batch_s: Seconds = BATCH_S) -> None:
        """`normalises`: bring each clip to zero mean and unit variance first, as the processor would."""
        super().__init__()
        config = network.config
        self.network = network
        self.dim: int = config.hidden_size
        self.min_samples = 1
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            self.min_samples = (self.min_samples - 1) * stride + kernel
        self._normalises = normalises
        self._norm_follows = bool(config.do_stable_layer_norm)
        # GroupNorm takes its statistics over a clip's whole time: padding would enter into them
        self._pads = config.feat_extract_norm == "layer"
        self._batch_samples = round(batch_s * SAMPLING_RATE)

    @torch.inference_mode()
    def frames(self, waveforms: Sequence[Waveform]) -> list[Tensor]:
        """The features behind the means: for each clip float32 (frames, dim), 50 a second.

        Raises as `forward` does.
        """
        clips = [self._prepared(place, waveform) for place, waveform in enumerate(waveforms)]
        frames: list[Tensor] = [torch.empty(0)] * len(clips)
        for places in batches([len(clip) for clip in clips], self._batch_samples, equal=not self._pads):
            hidden, lengths = self._hidden([clips[place] for place in places])
            for place, features, length in zip(places, hidden, lengths.tolist(), strict=True):
                frames[place] = features[:length]
        self._refuse_overflow(*frames)
        return frames

    @torch.inference_mode()
    def forward(self, waveforms: Sequence[Waveform]) -> Tensor:
        """Mono clips at 16 kHz, at any level, to float32 rows (n, dim) on the module's device.

        Raises ValueError, naming the clip's place, for one that is shorter than `min_samples`, holds NaN
        or infinity, or is silent (all samples the same): the notebooks stored random vectors there.
        Raises FloatingPointError where the network overflows, as float16 can: never a vector of NaN.
        """
        clips = [self._prepared(place, waveform) for place, waveform in enumerate(waveforms)]
        device = next(self.network.parameters()).device
        vectors = torch.empty(len(clips), self.dim, device=device)
        for places in batches([len(clip) for clip in clips], self._batch_samples, equal=not self._pads):
            hidden, lengths = self._hidden([clips[place] for place in places])
            valid = torch.arange(hidden.shape[1], device=device) < lengths[:, None]
            vectors[places] = (hidden * valid[..., None]).sum(1) / lengths[:, None]
        self._refuse_overflow(vectors)
        return vectors

    @property
    def depth(self) -> int:
        return len(self.network.encoder.layers)

    def upper(self, layer: int) -> nn.ModuleDict:
        """`norm` only where it follows the layers: wav2vec 2.0 base has it before them."""
        parts: dict[str, nn.Module] = {"layers": self.network.encoder.layers[layer:]}
        if self._norm_follows:
            parts["norm"] = self.network.encoder.layer_norm
        return nn.ModuleDict(parts)

    @torch.inference_mode()
    def below(self, waveform: Waveform, layer: int) -> Tensor:
        """Raises ValueError as `forward` does."""
        parameter = next(self.network.parameters())
        samples = torch.from_numpy(self._prepared(0, waveform)).to(parameter.device, parameter.dtype)
        reached: list[Tensor] = []

        def stop(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            reached.append(arguments[0])
            raise _Reached

        handle = self.network.encoder.layers[layer].register_forward_pre_hook(stop)
        try:
            self.network(samples[None])
        except _Reached:
            return reached[0][0].float()
        finally:
            handle.remove()
        raise AssertionError("the layer was not reached: this is a bug")

    def above(self, frames: Frames, layer: int) -> Tensor:
        x = frames.values
        valid = torch.arange(x.shape[1], device=x.device) < frames.lengths[:, None]
        for upper in self.network.encoder.layers[layer:]:
            x = upper(x, attention_mask=valid[:, None, None, :])
        if self._norm_follows:
            x = self.network.encoder.layer_norm(x)
        return (x * valid[..., None]).sum(1) / frames.lengths[:, None]

    def _refuse_overflow(self, *tensors: Tensor) -> None:
        if not all(torch.isfinite(tensor).all() for tensor in tensors):
            raise FloatingPointError(f"{type(self.network).__name__} overflowed; load it in a wider dtype")

    def _prepared(self, place: int, waveform: Waveform) -> Waveform:
        samples: Waveform = np.asarray(waveform, dtype=np.float32)
        if len(samples) < self.min_samples:
            what = (
                f"has {len(samples)} samples; the encoder needs {self.min_samples}"
                if len(samples)
                else "is empty"
            )
            raise ValueError(f"clip {place} {what}")
        if not np.isfinite(samples).all():
            raise ValueError(f"clip {place} holds NaN or infinity")
        if np.ptp(samples) == 0:
            raise ValueError(f"clip {place} is silent: all its samples are {samples[0]}")
        samples = samples / np.abs(samples).max()
        if self._normalises:
            samples = (samples - samples.mean()) / np.sqrt(samples.var() + np.float32(1e-7))
        return samples

    def _hidden(self, clips: list[Waveform]) -> tuple[Tensor, Tensor]:
        """Padded frames (len(clips), frames, dim) of a batch, and how many are each clip's own."""
        device = next(self.network.parameters()).device
        lengths = cast(torch.LongTensor, torch.tensor([len(clip) for clip in clips], device=device))
        samples = nn.utils.rnn.pad_sequence([torch.from_numpy(clip) for clip in clips], batch_first=True)
        samples = samples.to(device, self.network.dtype)
        mask = torch.arange(samples.shape[1], device=device) < lengths[:, None] if self._pads else None
        hidden = self.network(samples, attention_mask=mask).last_hidden_state.float()
        return hidden, self.network._get_feat_extract_output_lengths(lengths)

    @classmethod
    def load(
        cls, folder: Path, dtype: torch.dtype = torch.float32, *, batch_s: Seconds = BATCH_S
    ) -> "SelfSupervisedSpeechEncoder":
        """The encoder from a folder with config.json, preprocessor_config.json and model.safetensors.

        config.json says whether it is HuBERT or wav2vec 2.0; the weights may be those of the network
        fine-tuned for recognition, whose output layer is left out. Both spellings of the positional
        convolution's weight-normalised kernel are read (`weight_g`, `weight_v` and `parametrizations`).
        `dtype` is that of the computation: float16 and bfloat16 are for CUDA; vectors come out as float32.

        Raises ModelUnavailable where a file, a weight or the `paper` extra is missing, and for weights
        that have no place in the network.
        """
        require_transformers()
        from transformers import HubertModel, Wav2Vec2Model

        config = read_json(folder / "config.json")
        kinds: dict[str, type[Network]] = {"hubert": HubertModel, "wav2vec2": Wav2Vec2Model}
        kind = kinds.get(str(config.get("model_type")))
        if kind is None or config.get("add_adapter"):
            raise ModelUnavailable(
                f"{folder} holds a model of type {config.get('model_type')!r};"
                " a HuBERT or a wav2vec 2.0 without adapter is needed."
            )
        preparation = read_json(folder / "preprocessor_config.json")
        if preparation.get("sampling_rate", SAMPLING_RATE) != SAMPLING_RATE:
            raise ModelUnavailable(
                f"{folder} wants {preparation['sampling_rate']} Hz; clips here have 16000."
            )
        network = read_network(kind, folder, spare=f"{_HEAD}|{_MASK}", dispensable=_MASK)
        _bake_weight_norm(network)
        normalises = bool(preparation.get("do_normalize", True))
        network.to(dtype=dtype)
        return cls(network, normalises=normalises, batch_s=batch_s)


def _bake_weight_norm(network: "Network") -> None:
    """Compute the positional convolution's kernel once, in float32, instead of in every pass in `dtype`."""
    convolution = network.encoder.pos_conv_embed.conv
    if parametrize.is_parametrized(convolution):
        parametrize.remove_parametrizations(convolution, "weight")
        convolution.requires_grad_(False)
