"""Whisper's decoder without its loop: what it would say first, had a clip begun at each fifth of a second.

Whisper writes one token after the other, each from all that came before. Here every window of 0.8 s is asked
at once, and apart, for the first token that is heard in it: the same weights, one pass, no text. The states
it answers with are words in 99 languages as far as it hears them, with all its doubts. Architecture and
prompt: Radford et al. 2022, sections 2.2 and 2.3.
"""

import copy
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clasp_core.encoders.whisper import HEAD_DIM, Frames, read_variables

DIM = 512
"""Of whisper-base."""
LAYERS = 6
HEADS = DIM // HEAD_DIM
WORDS = 50_257
"""Tokens of text; the others of the 51,865 are languages, tasks and times."""
LANGUAGES = 99
_START, _FIRST_LANGUAGE, _TRANSCRIBE, _NO_TIMES = 1, 2, 102, 106
"""Places behind the words."""

STRIDE = 10
"""Frames (20 ms each) from one window to the next."""
BEFORE, AFTER = 4, 36
"""A window reaches from so many frames before its place to so many after it."""


class Windows(NamedTuple):
    """A padded batch of states, (batch, windows, 512), of which each clip has `lengths` (batch,)."""

    values: Tensor
    lengths: Tensor


class _Block(nn.Module):
    """Pre-norm: attention among the tokens, attention to the frames, and a network."""

    def __init__(self) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(DIM)
        self.self_qkv = nn.Linear(DIM, 3 * DIM)
        self.self_out = nn.Linear(DIM, DIM)
        self.cross_norm = nn.LayerNorm(DIM)
        self.cross_query = nn.Linear(DIM, DIM)
        self.cross_key_value = nn.Linear(DIM, 2 * DIM)
        self.cross_out = nn.Linear(DIM, DIM)
        self.mlp_norm = nn.LayerNorm(DIM)
        self.mlp_in = nn.Linear(DIM, 4 * DIM)
        self.mlp_out = nn.Linear(4 * DIM, DIM)

    def forward(self, x: Tensor, among: Tensor | None, scenes: "Sequence[_Scene]") -> Tensor:
        """`among` (tokens, tokens) says which tokens attend to which; None: each to itself. The tokens hear
        one scene after the other, as many as each scene says.

        Few tokens hear many frames. So not every frame is made a key and a value: queries are taken to the
        frames instead, through the keys' weights, and what is heard goes through the values' weights. That is
        the same product in another order; a bias of keys adds the same to all frames, and so nothing.
        """
        batch, tokens, _ = x.shape
        query, key, value = self.self_qkv(self.self_norm(x)).chunk(3, dim=2)
        if among is not None:
            query, key, value = (
                part.view(batch, tokens, HEADS, HEAD_DIM).transpose(1, 2) for part in (query, key, value)
            )
            value = F.scaled_dot_product_attention(query, key, value, attn_mask=among)
            value = value.transpose(1, 2).reshape(batch, tokens, DIM)
        x = x + self.self_out(value)
        keys, values = self.cross_key_value.weight.to(x.dtype).view(2, HEADS, HEAD_DIM, DIM)
        query = self.cross_query(self.cross_norm(x)) * HEAD_DIM**-0.5
        query = query.view(batch * tokens, HEADS, HEAD_DIM).transpose(0, 1)
        sought = (query @ keys).view(HEADS, batch, tokens, DIM).transpose(0, 1)
        parts = sought.split([scene.tokens for scene in scenes], dim=2)
        heard = torch.cat([scene(part) for scene, part in zip(scenes, parts, strict=True)], dim=2)
        heard = heard.transpose(0, 1).reshape(HEADS, batch * tokens, DIM) @ values.transpose(1, 2)
        heard = heard.transpose(0, 1).reshape(batch, tokens, DIM) + self.cross_key_value.bias[DIM:]
        x = x + self.cross_out(heard)
        mixed: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x + mixed


class _Clip:
    """What tokens hear that hear the whole clip: frames (batch, n, 512), of which `valid` (batch, n)."""

    def __init__(self, tokens: int, frames: Tensor, valid: Tensor) -> None:
        self.tokens = tokens
        self._frames = frames
        self._kept = valid[:, None]

    def __call__(self, sought: Tensor) -> Tensor:
        """Means of the frames, (batch, heads, tokens, 512), as sought (the same shape)."""
        rows = sought.flatten(1, 2)
        scores = (rows @ self._frames.transpose(1, 2)).masked_fill(~self._kept, _NEVER)
        return (scores.softmax(2) @ self._frames).view(sought.shape)


class _Windows:
    """What tokens hear that each hear a window of the clip."""

    def __init__(self, windows: int, frames: Tensor, valid: Tensor) -> None:
        self.tokens = windows
        behind = (windows - 1) * STRIDE + AFTER - frames.shape[1]
        self._frames = F.pad(frames, (0, 0, BEFORE, behind)).unfold(1, BEFORE + AFTER, STRIDE).contiguous()
        """(batch, windows, 512, 40)"""
        kept = F.pad(valid, (BEFORE, behind)).unfold(1, BEFORE + AFTER, STRIDE)
        self._kept = kept[:, :, None]

    def __call__(self, sought: Tensor) -> Tensor:
        scores = (sought.transpose(1, 2) @ self._frames).masked_fill(~self._kept, _NEVER)
        return (scores.softmax(3) @ self._frames.transpose(2, 3)).transpose(1, 2)


_Scene = _Clip | _Windows
_NEVER = -1e4
"""A score without a share; finite, so that a window beyond a clip's end, which hears nothing, is no NaN."""


class WindowDecoder(nn.Module):
    """Frames of the encoder (batch, n, 512) to states (batch, ceil(n / 10), 512), one per window."""

    positions: Tensor
    words: Tensor
    marks: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("words", torch.zeros(WORDS, DIM), persistent=False)
        self.register_buffer("marks", torch.zeros(51_865 - WORDS, DIM), persistent=False)
        self.register_buffer("positions", torch.zeros(448, DIM), persistent=False)
        self.blocks = nn.ModuleList(_Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(DIM)

    def languages(self, frames: Frames) -> Tensor:
        """How likely each of Whisper's 99 languages is for each clip as a whole, (batch, 99)."""
        x = (self.marks[_START] + self.positions[0]).expand(frames.values.shape[0], 1, DIM)
        clip = _Clip(1, frames.values, _valid(frames))
        for block in self._blocks():
            x = block(x, None, [clip])
        scores = self.norm(x)[:, 0] @ self.marks[_FIRST_LANGUAGE : _FIRST_LANGUAGE + LANGUAGES].T
        likely: Tensor = scores.float().softmax(1)
        return likely

    def _blocks(self) -> list[_Block]:
        return cast(list[_Block], list(self.blocks))

    def forward(self, frames: Frames, languages: Tensor) -> Windows:
        """The prompt hears the whole clip, in a mixture of `languages` (batch, 99); a window its own part."""
        values, lengths = frames
        batch, count, _ = values.shape
        windows = (count + STRIDE - 1) // STRIDE
        tongue = languages.to(self.marks.dtype) @ self.marks[_FIRST_LANGUAGE : _FIRST_LANGUAGE + LANGUAGES]
        prompt = torch.stack(
            (
                (self.marks[_START] + self.positions[0]).expand(batch, DIM),
                tongue + self.positions[1],
                (self.marks[_TRANSCRIBE] + self.positions[2]).expand(batch, DIM),
            ),
            dim=1,
        )
        asked = (self.marks[_NO_TIMES] + self.positions[3]).expand(batch, windows, DIM)
        x = torch.cat((prompt, asked), dim=1)
        place = torch.arange(3 + windows, device=values.device)
        among = place[:, None] == place  # itself,
        among = among | ((place < 3) & (place <= place[:, None]))  # and what of the prompt came before
        valid = _valid(frames)
        scenes = [_Clip(3, values, valid), _Windows(windows, values, valid)]
        for block in self._blocks():
            x = block(x, among, scenes)
        return Windows(self.norm(x)[:, 3:], (lengths + STRIDE - 1) // STRIDE)

    def twin(self) -> "WindowDecoder":
        """Another with these weights, to be changed; the tables, which never are, are shared."""
        return copy.deepcopy(self, {id(table): table for table in (self.words, self.marks, self.positions)})

    @classmethod
    def load(cls, halves: Sequence[Path]) -> "WindowDecoder":
        """The pretrained decoder, in eval mode, from the files that make CTranslate2's whisper-base."""
        data = b"".join(path.read_bytes() for path in halves)
        version, name = struct.unpack_from("<IH", data, 0)
        if version != 6:
            raise ValueError(f"{halves[0]} is not a model in CTranslate2's format, version 6")
        variables = read_variables(data, 4 + 2 + name + 8, "decoder/")
        with torch.device("meta"):  # weights that are replaced at once need no beginning
            decoder = cls()
        tokens = variables["embeddings/weight"]
        decoder.words, decoder.marks = tokens[:WORDS], tokens[WORDS:]
        decoder.positions = variables["position_encodings/encodings"]
        decoder.load_state_dict(_state_dict(variables), assign=True)
        return decoder.eval().requires_grad_(False)


def _valid(frames: Frames) -> Tensor:
    """(batch, frames): which are a clip's own."""
    values, lengths = frames
    return torch.arange(values.shape[1], device=values.device) < lengths[:, None]


_NAMES = {
    "self_norm": "self_attention/layer_norm",
    "self_qkv": "self_attention/linear_0",
    "self_out": "self_attention/linear_1",
    "cross_norm": "attention/layer_norm",
    "cross_query": "attention/linear_0",
    "cross_key_value": "attention/linear_1",
    "cross_out": "attention/linear_2",
    "mlp_norm": "ffn/layer_norm",
    "mlp_in": "ffn/linear_0",
    "mlp_out": "ffn/linear_1",
}
"""Ours to CTranslate2's."""


def _state_dict(variables: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"norm": "layer_norm"} | {
        f"blocks.{layer}.{ours}": f"layer_{layer}/{theirs}"
        for layer in range(LAYERS)
        for ours, theirs in _NAMES.items()
    }
    state = {}
    for ours, theirs in names.items():
        weight, bias = ("gamma", "beta") if theirs.endswith("layer_norm") else ("weight", "bias")
        state[f"{ours}.weight"] = variables[f"{theirs}/{weight}"]
        state[f"{ours}.bias"] = variables[f"{theirs}/{bias}"]
    return state
