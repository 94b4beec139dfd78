"""`mini`, the embedded default model: CLASP's shape on small pretrained parts.

    waveform ── log-mel ─┬─ whisper-base encoder ─── frames ───────────── 50/s of 512 ──┐
                         │      └── whisper-base decoder, by windows ───── 5/s of 512 ──┼─ fusion ── vector
                         └─ EfficientNet-Lite0 ──── pictures ───────────── 1/s of 1280 ─┘
    text ── multilingual-e5-small ── minus the mean text vector ────────────────────────────────── vector

Both vectors are of unit length, 384 wide. As in the paper (section 3) speech and spectrogram encoders stay
frozen and the fusion is trained, towards the text encoder's space. Ours is made of what pretrained networks
know already: Whisper's decoder hears the words of each window (`encoders/whisper_decoder.py`), and the text
encoder's own layers read them, with all doubts, as they would read a text. Low-rank adapters and a few linear
layers are all that is trained.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from clasp_core.encoders import adaptation
from clasp_core.encoders.compiled import Compiled
from clasp_core.encoders.e5 import E5_SMALL, END, PREFIX, E5Encoder, E5Network
from clasp_core.encoders.efficientnet import DIM as PICTURE_DIM
from clasp_core.encoders.efficientnet import EFFICIENTNET_LITE0, EfficientNetLite0
from clasp_core.encoders.whisper import DIM as FRAME_DIM
from clasp_core.encoders.whisper import (
    MELS,
    WHISPER_BASE_HALVES,
    Frames,
    LogMel,
    Mel,
    WhisperEncoder,
)
from clasp_core.encoders.whisper_decoder import STRIDE, WORDS, WindowDecoder
from clasp_core.errors import ModelUnavailable
from clasp_core.types import Embeddings, Waveform

DIM = 384
TILE_FRAMES = 96
"""Log-mel frames (10 ms each) in one picture: 80 x 96 pixels, a multiple of the network's stride of 32."""


class Features(NamedTuple):
    """What the frozen encoders give for a batch of clips, padded with zeros beyond each clip's lengths.

    frames (batch, n, 512): Whisper's, 50 a second. pictures (batch, tiles, 1280): one EfficientNet vector
    per 0.96 s of spectrogram. languages (batch, 99): how likely each of Whisper's is.
    """

    frames: Tensor
    frame_lengths: Tensor
    pictures: Tensor
    picture_lengths: Tensor
    languages: Tensor

    def to(self, device: torch.device) -> "Features":
        return Features(*(tensor.to(device) for tensor in self))


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows (n, width) of different n as one tensor (batch, n, width) with zeros behind, and their lengths."""
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True), lengths


class SpeechBackbone(nn.Module):
    """The frozen encoders of clips: samples to `Features`.

    On a CPU the encoders take one clip at a time, where padding costs more than batching saves; the
    decoder takes all together, since what it costs is mostly the reading of its weights.
    """

    def __init__(self, models_dir: Path | None) -> None:
        super().__init__()
        halves = [half.locate(models_dir) for half in WHISPER_BASE_HALVES]
        self.log_mel = LogMel()
        self.whisper = WhisperEncoder.load(halves[1])
        self.decoder = WindowDecoder.load(halves)
        self.efficientnet = EfficientNetLite0.load(EFFICIENTNET_LITE0.locate(models_dir))

    @torch.inference_mode()
    def forward(self, waveforms: Sequence[Waveform]) -> Features:
        one_by_one = self.decoder.positions.device.type == "cpu"
        batches = [[waveform] for waveform in waveforms] if one_by_one else [waveforms]
        frames: list[Tensor] = []
        pictures: list[Tensor] = []
        for batch in batches:
            mel = self.log_mel(batch)
            heard = self.whisper(mel)
            frames += [row[:n] for row, n in zip(heard.values, heard.lengths.tolist(), strict=True)]
            pictures += self._pictures(mel)
        together = Frames(*padded(frames))
        return Features(*together, *padded(pictures), self.decoder.languages(together))

    def _pictures(self, mel: Mel) -> Sequence[Tensor]:
        """One (tiles, 1280) a clip."""
        rows = [
            tiles(values[:, :frames]) for values, frames in zip(mel.values, mel.lengths.tolist(), strict=True)
        ]
        return torch.split(self.look(torch.cat(rows)), [len(row) for row in rows])

    def look(self, pictures: Tensor) -> Tensor:
        """(tiles, 80, 96) to (tiles, 1280)."""
        features: Tensor = self.efficientnet(pictures.unsqueeze(1).expand(-1, 3, -1, -1))
        return features


def tiles(mel: Tensor) -> Tensor:
    """A clip's log-mel spectrogram (80, frames) as pictures, (tiles, 80, 96), low tones below.

    The last is filled up with the clip's own silence. Of fixed size, a clip's pictures never depend on its
    batch.
    """
    count = -(-mel.shape[1] // TILE_FRAMES)
    filled = F.pad(mel, (0, count * TILE_FRAMES - mel.shape[1]), value=float(mel.min()))
    return filled.view(MELS, count, TILE_FRAMES).transpose(0, 1).flip(1)


class _Reader(nn.Module):
    """The text encoder's layers, reading what was heard in place of pieces of text."""

    positions: Tensor
    token_type: Tensor
    before: Tensor
    after: Tensor

    def __init__(self, e5: E5Network) -> None:
        super().__init__()
        self.norm = e5.norm
        self.layers = e5.layers
        for name, values in (
            ("positions", e5.positions.data),
            ("token_type", e5.token_type.data),
            ("before", e5.words(torch.tensor(PREFIX))),
            ("after", e5.words(torch.tensor(END))),
        ):
            self.register_buffer(name, values.clone(), persistent=False)

    def forward(self, heard: Tensor, counts: Tensor, valid: Tensor) -> Tensor:
        """`heard` (batch, n, 384), of which each place counts as `counts` (batch, n) say, from 0 to 1.

        A place that counts for less than half has the position of the one before it: repetitions of a word
        do not move the rest of the sentence. The mean of the last layer, of unit length.
        """
        batch = heard.shape[0]
        prefix = self.before.shape[0]
        places = prefix - 1 + ((counts > 0.5) & valid).long().cumsum(1)
        places = places.clamp(prefix, self.positions.shape[0] - 2)
        positions = torch.cat(
            (
                self.positions[:prefix].expand(batch, -1, -1),
                self.positions[places],
                self.positions[places.amax(1, keepdim=True) + 1],
            ),
            dim=1,
        )
        pieces = torch.cat(
            (self.before.expand(batch, -1, -1), heard, self.after.expand(batch, -1, -1)), dim=1
        )
        one = torch.ones(batch, 1, device=heard.device)
        weights = torch.cat((one.expand(batch, prefix), counts * valid, one), dim=1)
        mask = weights.clamp(min=1e-4).log().masked_fill(weights == 0, -1e4)[:, None, None, :]
        x = self.norm(pieces + positions + self.token_type)
        for layer in self.layers:
            x = layer(x, mask)
        pooled = (x.float() * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
        return F.normalize(pooled, dim=1)


class Read(NamedTuple):
    """What a fusion makes of a batch: unit vectors (batch, 384), and the windows they were read from."""

    vectors: Tensor
    windows: Tensor
    """States of the words heard, (batch, n, 512)."""
    valid: Tensor
    """Which windows are a clip's own, and were not withheld, (batch, n)."""


class MiniFusion(nn.Module):
    """The trained part: `Features` to unit vectors (batch, 384) in the mean-centred text space.

    `text_mean` (384,) is the mean text vector of the training sentences; the text side subtracts it.
    `pieces` and `piece_ends`: the text encoder's pieces of each of Whisper's tokens, end to end; tokens
    without any (parts of characters) are never heard.
    """

    text_mean: Tensor
    words: Tensor
    meanings: Tensor
    pieces: Tensor
    piece_ends: Tensor

    def __init__(
        self,
        decoder: WindowDecoder,
        e5: E5Network,
        pieces: Tensor,
        piece_ends: Tensor,
        rank: int = 16,
    ) -> None:
        super().__init__()
        self.config = {"rank": rank}
        self.decoder = decoder
        self.reader = _Reader(e5)
        for module in (self.decoder.blocks, self.reader.layers):
            module.requires_grad_(False)
            adaptation.add_adapters(module, rank)
        self.decoder.norm.requires_grad_(False)
        self.reader.norm.requires_grad_(False)
        self.from_frames = nn.Linear(2 * FRAME_DIM, DIM)
        self.from_states = nn.Linear(FRAME_DIM, DIM)
        self.picture_norm = nn.LayerNorm(PICTURE_DIM)
        self.from_pictures = nn.Linear(PICTURE_DIM, DIM)
        for addition in (self.from_frames, self.from_states, self.from_pictures):
            nn.init.zeros_(addition.weight)
            nn.init.zeros_(addition.bias)
        self.counts = nn.Linear(FRAME_DIM, 1)
        nn.init.zeros_(self.counts.weight)
        nn.init.constant_(self.counts.bias, 6.0)
        self.repetition = nn.Parameter(torch.tensor(-8.0))
        self.register_buffer("text_mean", torch.zeros(DIM))
        self.register_buffer("pieces", pieces)
        self.register_buffer("piece_ends", piece_ends)
        meanings, silent = _meanings(e5, pieces, piece_ends)
        self.register_buffer("words", decoder.words[~silent], persistent=False)
        self.register_buffer("meanings", meanings[~silent].T.contiguous(), persistent=False)

    def forward(
        self,
        features: Features,
        *,
        with_picture: Tensor | None = None,
        audible: Tensor | None = None,
    ) -> Read:
        """For training: `with_picture` (batch,) says whose spectrogram counts, `audible` (batch, n) which
        windows are heard at all; all, unless it says so.
        """
        frames = Frames(features.frames, features.frame_lengths)
        states, lengths = self.decoder(frames, features.languages)
        count = states.shape[1]
        valid = torch.arange(count, device=states.device) < lengths[:, None]
        if audible is not None:
            valid = valid & audible
        sound = _halves(frames, count)
        heard, repeated = self._heard(states)
        heard = heard + self.from_frames(sound).float() + self.from_states(states).float()
        pictures = self.from_pictures(self.picture_norm(self._pictured(features, count))).float()
        heard = heard + (pictures if with_picture is None else pictures * with_picture[:, None, None])
        counts = torch.sigmoid(self.counts(states)[..., 0].float() + self.repetition * repeated)
        vectors = F.normalize(self.reader(heard, counts, valid) - self.text_mean, dim=1)
        return Read(vectors, states, valid)

    def _heard(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Each window's expected meaning, (batch, n, 384), and how surely its word is the last window's."""
        words = F.linear(states, self.words.to(states.dtype)).float().softmax(2).to(states.dtype)
        place = torch.arange(words.shape[1], device=words.device)
        last = place == place[:, None] - 1
        repeated = ((words @ words.transpose(1, 2)).float() * last).sum(2)
        return F.linear(words, self.meanings.to(states.dtype)).float(), repeated

    @staticmethod
    def _pictured(features: Features, count: int) -> Tensor:
        """The picture that each window begins in, (batch, count, 1280)."""
        place = STRIDE * torch.arange(count, device=features.pictures.device) // (TILE_FRAMES // 2)
        last = (features.picture_lengths - 1).clamp(min=0)
        places = torch.minimum(place[None], last[:, None])
        return features.pictures.gather(1, places[..., None].expand(-1, -1, PICTURE_DIM))

    def trained(self) -> dict[str, Tensor]:
        """All that a file of this fusion holds."""
        state = {name: value for name, value in self.named_parameters() if value.requires_grad}
        return state | {name: getattr(self, name) for name in ("text_mean", "pieces", "piece_ends")}


def _halves(frames: Frames, count: int) -> Tensor:
    """(batch, count, 1024): means over the halves of the 0.2 s that each window begins with."""
    values, _ = frames
    batch, n, _ = values.shape
    padded = F.pad(values, (0, 0, 0, count * STRIDE - n))
    return padded.view(batch, count, 2, STRIDE // 2, FRAME_DIM).mean(3).flatten(2)


def _meanings(e5: E5Network, pieces: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """The mean embedding of the pieces of each of Whisper's tokens (50257, 384), and which have none."""
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    words = torch.repeat_interleave(torch.arange(WORDS), counts)
    sums = torch.zeros(WORDS, DIM)
    for start in range(0, len(pieces), 1 << 14):
        chosen = slice(start, start + (1 << 14))
        sums.index_add_(0, words[chosen], e5.words(pieces[chosen].long()))
    return sums / counts.clamp(min=1)[:, None], counts == 0


PRETRAINED = {
    "speech": WHISPER_BASE_HALVES[1],
    "words": WHISPER_BASE_HALVES[0],
    "spectrogram": EFFICIENTNET_LITE0,
    "text": E5_SMALL,
}


def build_fusion(
    models_dir: Path | None,
    pieces: Tensor,
    piece_ends: Tensor,
    *,
    decoder: WindowDecoder | None = None,
    rank: int = 16,
) -> MiniFusion:
    """An untrained fusion on the pretrained parts; it takes a decoder that is there already."""
    if decoder is None:
        decoder = WindowDecoder.load([half.locate(models_dir) for half in WHISPER_BASE_HALVES])
    e5 = E5Network.load(E5_SMALL.locate(models_dir))
    return MiniFusion(decoder, e5, pieces, piece_ends, rank)


def read_fusion(path: Path) -> tuple[dict[str, int], dict[str, Tensor]]:
    """What a fusion's file holds: its shape, and its tensors, in float32 where they are numbers.

    Raises ModelUnavailable where it is of another version.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ModelUnavailable(
                f"{path} was trained by another version of this program: it is no {FORMAT}. Train it again."
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return json.loads(metadata["config"]), {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }


FORMAT = "mini-fusion/3"


def load_fusion(path: Path, models_dir: Path | None, decoder: WindowDecoder | None = None) -> MiniFusion:
    """The trained fusion from a safetensors file (which records its own shape), to serve.

    Raises ModelUnavailable for a file of another version, or whose tensors are not this network's.
    """
    config, state = read_fusion(path)
    fusion = build_fusion(models_dir, state["pieces"], state["piece_ends"], decoder=decoder, **config)
    expected = fusion.trained()
    for name in sorted(expected.keys() | state.keys()):
        if name not in state or name not in expected or state[name].shape != expected[name].shape:
            raise ModelUnavailable(f"{path} does not hold this network's {name}.")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(state[name])
    adaptation.merge(fusion)
    return fusion.eval().requires_grad_(False)


def save_fusion(fusion: MiniFusion, path: Path) -> None:
    """Half precision halves the file; cosines change by less than 1e-4."""
    write_fusion(fusion.config, fusion.trained(), path)


def write_fusion(config: Mapping[str, int], tensors: Mapping[str, Tensor], path: Path) -> None:
    """The inverse of `read_fusion`."""
    state = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in tensors.items()
    }
    save_file(state, path, {"format": FORMAT, "config": json.dumps(dict(config))})


class MiniTextEncoder:
    """Sentences to unit vectors of the mean-centred E5 space."""

    dim = DIM

    def __init__(self, fusion: Path, models_dir: Path | None, device: torch.device) -> None:
        with safe_open(fusion, "pt") as file:
            self._mean = file.get_tensor("text_mean").float().to(device)
        self._e5 = E5Encoder.to_serve(E5_SMALL.locate(models_dir), device)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Embeddings:
        if not texts:
            return np.empty((0, DIM), np.float32)
        vectors: Embeddings = F.normalize(self._e5(texts) - self._mean, dim=1).cpu().numpy()
        return vectors


class _Alone(nn.Module):
    """All that becomes of one clip after its log-mel spectrogram, in one graph, without padding."""

    def __init__(self, backbone: SpeechBackbone, fusion: MiniFusion) -> None:
        super().__init__()
        self.backbone = backbone
        self.fusion = fusion

    def forward(self, mel: Tensor, pictures: Tensor) -> Tensor:
        """(1, 80, frames) and its `tiles` to (1, 384)."""
        one = torch.ones(1, dtype=torch.long)
        frames = self.backbone.whisper(Mel(mel, one * mel.shape[2]))
        seen = self.backbone.look(pictures)[None]
        languages = self.backbone.decoder.languages(frames)
        features = Features(frames.values, frames.lengths, seen, one * seen.shape[1], languages)
        vectors: Tensor = self.fusion(features).vectors
        return vectors


class MiniSpeechEncoder:
    """Segments to unit vectors of the same space."""

    dim = DIM
    picture_rate: int | None = None

    def __init__(self, fusion: Path, models_dir: Path | None, device: torch.device) -> None:
        """On a CPU compiled, and then one clip at a time: padding would cost more than batching saves.

        Raises ModelUnavailable where a part is missing, or is not computed rightly on this processor.
        """
        backbone = SpeechBackbone(models_dir)
        network = load_fusion(fusion, models_dir, backbone.decoder.twin())
        self._log_mel = backbone.log_mel
        self._alone: Compiled | None = None
        if device.type == "cpu":
            mel = torch.linspace(-1, 1, MELS * 2 * TILE_FRAMES).view(1, MELS, 2 * TILE_FRAMES)
            self._alone = Compiled(
                _Alone(backbone, network), (mel, tiles(mel[0])), ([-1, MELS, -1], [-1, MELS, TILE_FRAMES])
            )
        else:
            self._together = backbone.to(device), network.to(device)

    @torch.inference_mode()
    def encode(self, waveforms: Sequence[Waveform], pictured: Sequence[Waveform] | None = None) -> Embeddings:
        vectors = np.empty((len(waveforms), DIM), np.float32)
        if self._alone is not None:
            for place, waveform in enumerate(waveforms):
                mel = self._log_mel([waveform]).values
                vectors[place] = self._alone(mel.numpy(), tiles(mel[0]).numpy())
            return vectors
        backbone, network = self._together
        order = sorted(range(len(waveforms)), key=lambda place: len(waveforms[place]))
        for start in range(0, len(order), TOGETHER):
            places = order[start : start + TOGETHER]
            vectors[places] = network(backbone([waveforms[place] for place in places])).vectors.cpu().numpy()
        return vectors


TOGETHER = 32
"""Clips on a GPU at once. More would hold too much: each window's words are 50,257 numbers."""
