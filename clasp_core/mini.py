"""`mini`, the embedded default model: CLASP's shape on small pretrained parts.

    waveform ── log-mel ─┬─ whisper-base encoder ── 5 tokens/s of 1024 ─┐
                         │                                              ├─ fusion ── unit vector (384)
                         └─ EfficientNet-Lite0 ──── 1 token/s of 1280 ──┘
    text ── multilingual-e5-small ── minus the mean text vector ────────── unit vector (384)

As in the paper (section 3) the encoders stay frozen and only the fusion is trained, towards the text
encoder's space. Ours differs where the paper's readers wished it to: tokens are pooled by attention
rather than averaged, and the spectrogram branch passes a learned gate.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from clasp_core.encoders.e5 import E5_SMALL, E5Encoder
from clasp_core.encoders.efficientnet import DIM as PICTURE_DIM
from clasp_core.encoders.efficientnet import EFFICIENTNET_LITE0, EfficientNetLite0
from clasp_core.encoders.whisper import DIM as FRAME_DIM
from clasp_core.encoders.whisper import MELS, WHISPER_BASE, LogMel, Mel, WhisperEncoder
from clasp_core.types import Embeddings, Waveform

DIM = 384
TOKEN_FRAMES = 10
"""Whisper frames (20 ms each) in one speech token of the fusion: 5 tokens a second."""
TILE_FRAMES = 96
"""Log-mel frames (10 ms each) in one picture: 80 x 96 pixels, a multiple of the network's stride of 32."""


class Features(NamedTuple):
    """What the frozen encoders give for a batch of clips, padded with zeros beyond each clip's lengths.

    speech (batch, tokens, 1024): the means of the first and second half of every 10 Whisper frames.
    pictures (batch, tiles, 1280): one EfficientNet vector per 0.96 s of spectrogram.
    """

    speech: Tensor
    speech_lengths: Tensor
    pictures: Tensor
    picture_lengths: Tensor

    def to(self, device: torch.device) -> "Features":
        return Features(*(tensor.to(device) for tensor in self))


class SpeechBackbone(nn.Module):
    """The two frozen encoders of a clip: samples to `Features`."""

    def __init__(self, models_dir: Path | None) -> None:
        super().__init__()
        self.log_mel = LogMel()
        self.whisper = WhisperEncoder.load(WHISPER_BASE.locate(models_dir))
        self.efficientnet = EfficientNetLite0.load(EFFICIENTNET_LITE0.locate(models_dir))

    @torch.inference_mode()
    def forward(self, waveforms: Sequence[Waveform]) -> Features:
        mel = self.log_mel(waveforms)
        frames, lengths = self.whisper(mel)
        speech_lengths = -(-lengths // TOKEN_FRAMES)
        return Features(_tokens(frames, lengths), speech_lengths, *self._pictures(mel))

    def _pictures(self, mel: Mel) -> tuple[Tensor, Tensor]:
        """The spectrogram cut into tiles of fixed size: a clip's pictures never depend on its batch."""
        lengths = -(-mel.lengths // TILE_FRAMES)
        rows = []
        for values, frames, tiles in zip(mel.values, mel.lengths.tolist(), lengths.tolist(), strict=True):
            silence = values[:, :frames].min()
            canvas = silence.repeat(MELS, tiles * TILE_FRAMES)
            canvas[:, :frames] = values[:, :frames]
            rows.append(canvas.view(MELS, tiles, TILE_FRAMES).transpose(0, 1))
        pictures = torch.cat(rows).flip(1).unsqueeze(1).expand(-1, 3, -1, -1)
        features = self.efficientnet(pictures).split(lengths.tolist())
        return nn.utils.rnn.pad_sequence(list(features), batch_first=True), lengths


def _tokens(frames: Tensor, lengths: Tensor) -> Tensor:
    """(batch, n, 512) frames to (batch, ceil(n / 10), 1024) tokens; means over the valid frames only."""
    batch, n, _ = frames.shape
    half = TOKEN_FRAMES // 2
    padded = F.pad(frames, (0, 0, 0, -n % TOKEN_FRAMES))
    halves = padded.shape[1] // half
    valid = (torch.arange(padded.shape[1], device=frames.device) < lengths.unsqueeze(1)).view(
        batch, halves, half
    )
    sums = padded.view(batch, halves, half, FRAME_DIM).sum(2)
    means = sums / valid.sum(2).clamp(min=1).unsqueeze(2)
    return means.view(batch, halves // 2, 2 * FRAME_DIM)


class _AttentionPool(nn.Module):
    """Tokens to one vector per head group: learned queries, softmax over time, concatenated and projected."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.scores = nn.Linear(width, heads)
        self.project = nn.Linear(width, width)
        self.heads = heads

    def forward(self, tokens: Tensor, valid: Tensor) -> Tensor:
        batch, n, width = tokens.shape
        scores = self.scores(tokens).masked_fill(~valid.unsqueeze(2), float("-inf"))
        weights = scores.softmax(1).transpose(1, 2).unsqueeze(2)
        values = tokens.view(batch, n, self.heads, width // self.heads).transpose(1, 2)
        pooled: Tensor = self.project((weights @ values).flatten(1))
        return pooled


class FusionHead(nn.Module):
    """One fusion network: a speech branch, a spectrogram branch behind a gate, and their sum.

    `Features` to unit vectors (batch, 384).
    """

    def __init__(self, width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.speech_in = nn.Sequential(
            nn.LayerNorm(2 * FRAME_DIM), nn.Dropout(dropout), nn.Linear(2 * FRAME_DIM, width)
        )
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.speech_layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.speech_norm = nn.LayerNorm(width)
        self.speech_pool = _AttentionPool(width, heads)
        self.speech_out = nn.Linear(width, DIM)
        self.picture_in = nn.Sequential(
            nn.LayerNorm(PICTURE_DIM), nn.Linear(PICTURE_DIM, width), nn.GELU(), nn.Dropout(dropout)
        )
        self.picture_pool = _AttentionPool(width, heads)
        self.picture_out = nn.Linear(width, DIM)
        self.gate = nn.Linear(2 * DIM, DIM)
        nn.init.constant_(self.gate.bias, -2.0)

    def forward(self, features: Features, with_picture: Tensor | None = None) -> Tensor:
        """`with_picture` (batch, 1): which clips' spectrogram branch counts; all, unless training says so."""
        valid = _valid(features.speech_lengths, features.speech.shape[1])
        x = self.speech_in(features.speech)
        x = self.speech_layers(x, src_key_padding_mask=~valid)
        speech = self.speech_out(self.speech_pool(self.speech_norm(x), valid))
        valid = _valid(features.picture_lengths, features.pictures.shape[1])
        picture = self.picture_out(self.picture_pool(self.picture_in(features.pictures), valid))
        gate = torch.sigmoid(self.gate(torch.cat((speech, picture), dim=1)))
        if with_picture is not None:
            gate = gate * with_picture
        return F.normalize(speech + gate * picture, dim=1)


class MiniFusion(nn.Module):
    """The trained part: `Features` to unit vectors (batch, 384) in the mean-centred text space.

    The mean of a few heads that were trained apart: with so little speech to learn from, what one head
    gets wrong by chance the others mostly do not. `text_mean` (384,) is the mean text vector of the
    training sentences; the text side subtracts it.
    """

    text_mean: Tensor

    def __init__(
        self, members: int = 3, width: int = 384, layers: int = 2, heads: int = 8, dropout: float = 0.2
    ) -> None:
        super().__init__()
        self.config = {"members": members, "width": width, "layers": layers, "heads": heads}
        self.register_buffer("text_mean", torch.zeros(DIM))
        self.heads = nn.ModuleList(FusionHead(width, layers, heads, dropout) for _ in range(members))

    def forward(self, features: Features) -> Tensor:
        return F.normalize(torch.stack([head(features) for head in self.heads]).sum(0), dim=1)


def _valid(lengths: Tensor, width: int) -> Tensor:
    return torch.arange(width, device=lengths.device) < lengths.unsqueeze(1)


PRETRAINED = {"speech": WHISPER_BASE, "spectrogram": EFFICIENTNET_LITE0, "text": E5_SMALL}


def load_fusion(path: Path) -> MiniFusion:
    """The trained fusion from a safetensors file (which records its own shape), in eval mode."""
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - not a dict
    fusion = MiniFusion(**config)
    fusion.load_state_dict(state)
    return fusion.eval().requires_grad_(False)


def save_fusion(fusion: MiniFusion, path: Path) -> None:
    """Half precision halves the file; cosines change by less than 1e-5."""
    state = {name: tensor.detach().cpu().half().contiguous() for name, tensor in fusion.state_dict().items()}
    save_file(state, path, {"config": json.dumps(fusion.config)})


class MiniTextEncoder:
    """Sentences to unit vectors of the mean-centred E5 space."""

    dim = DIM

    def __init__(self, fusion: Path, models_dir: Path | None, device: torch.device) -> None:
        with safe_open(fusion, "pt") as file:
            self._mean = file.get_tensor("text_mean").float().to(device)
        self._e5 = E5Encoder.load(E5_SMALL.locate(models_dir)).to(device)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Embeddings:
        if not texts:
            return np.empty((0, DIM), np.float32)
        vectors: Embeddings = F.normalize(self._e5(texts) - self._mean, dim=1).cpu().numpy()
        return vectors


class MiniSpeechEncoder:
    """Segments to unit vectors of the same space."""

    dim = DIM
    picture_rate: int | None = None

    def __init__(self, fusion: Path, models_dir: Path | None, device: torch.device) -> None:
        self._backbone = SpeechBackbone(models_dir).to(device)
        self._fusion = load_fusion(fusion).to(device)
        self._together = 32 if device.type == "cuda" else 1

    @torch.inference_mode()
    def encode(self, waveforms: Sequence[Waveform], pictured: Sequence[Waveform] | None = None) -> Embeddings:
        """On a GPU, clips of like length go together; on a CPU one at a time, where padding costs
        more than batching saves (measured: 0.021 against 0.030 of real time)."""
        vectors = np.empty((len(waveforms), DIM), np.float32)
        order = sorted(range(len(waveforms)), key=lambda place: len(waveforms[place]))
        for start in range(0, len(order), self._together):
            places = order[start : start + self._together]
            features = self._backbone([waveforms[place] for place in places])
            vectors[places] = self._fusion(features).cpu().numpy()
        return vectors
