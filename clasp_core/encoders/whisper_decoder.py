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
_START, _FIRST_LANGUAGE, _TRANSCRIBE, _NO_TIMES = 50_258, 50_259, 50_359, 50_363

STRIDE = 10
"""Frames (20 ms each) from one window to the next."""
BEFORE, AFTER = 4, 36
"""A window reaches from so many frames before its place to so many after it."""


class Windows(NamedTuple):
    """A padded batch of states, (batch, windows, 512), of which each clip has `lengths` (batch,)."""

    values: Tensor
    lengths: Tensor


KeysValues = tuple[Tensor, Tensor]


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

    def heard(self, frames: Tensor) -> KeysValues:
        """Keys and values of the frames, each (batch, heads, frames, 64)."""
        batch, count, _ = frames.shape
        key, value = (
            self.cross_key_value(frames).view(batch, count, 2, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        )
        return key, value

    def forward(self, x: Tensor, among: Tensor | None, heard: KeysValues, within: Tensor) -> Tensor:
        """`among` (tokens, tokens) and `within` (batch, tokens or 1, frames) say what may be attended to."""
        batch, tokens, _ = x.shape
        qkv = self.self_qkv(self.self_norm(x)).view(batch, tokens, 3, HEADS, HEAD_DIM)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=among)
        x = x + self.self_out(attended.transpose(1, 2).reshape(batch, tokens, DIM))
        query = self.cross_query(self.cross_norm(x)).view(batch, tokens, HEADS, HEAD_DIM).transpose(1, 2)
        attended = F.scaled_dot_product_attention(query, *heard, attn_mask=within[:, None])
        x = x + self.cross_out(attended.transpose(1, 2).reshape(batch, tokens, DIM))
        mixed: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x + mixed


class WindowDecoder(nn.Module):
    """Frames of the encoder (batch, n, 512) to states (batch, ceil(n / 10), 512), one per window."""

    positions: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.zeros(51_865, DIM), persistent=False)
        self.register_buffer("positions", torch.zeros(448, DIM), persistent=False)
        self.blocks = nn.ModuleList(_Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(DIM)

    def languages(self, frames: Frames) -> Tensor:
        """How likely each of Whisper's 99 languages is for each clip as a whole, (batch, 99)."""
        x = (self.tokens[_START] + self.positions[0]).expand(len(frames.values), 1, DIM)
        within = _valid(frames)[:, None, :]
        for block in self._blocks():
            x = block(x, None, block.heard(frames.values), within)
        scores = self.norm(x)[:, 0] @ self.tokens[_FIRST_LANGUAGE : _FIRST_LANGUAGE + LANGUAGES].T
        likely: Tensor = scores.float().softmax(1)
        return likely

    def _blocks(self) -> list[_Block]:
        return cast(list[_Block], list(self.blocks))

    def forward(self, frames: Frames, languages: Tensor) -> Windows:
        """The prompt hears the whole clip, in a mixture of `languages` (batch, 99); a window its own part."""
        values, lengths = frames
        batch, count, _ = values.shape
        windows = -(-count // STRIDE)
        tongue = languages.to(self.tokens.dtype) @ self.tokens[_FIRST_LANGUAGE : _FIRST_LANGUAGE + LANGUAGES]
        prompt = torch.stack(
            (
                (self.tokens[_START] + self.positions[0]).expand(batch, DIM),
                tongue + self.positions[1],
                (self.tokens[_TRANSCRIBE] + self.positions[2]).expand(batch, DIM),
            ),
            dim=1,
        )
        asked = (self.tokens[_NO_TIMES] + self.positions[3]).expand(batch, windows, DIM)
        x = torch.cat((prompt, asked), dim=1)
        device = values.device
        among = torch.eye(3 + windows, dtype=torch.bool, device=device)
        among[3:, :3] = True
        among[:3, :3] = torch.ones(3, 3, dtype=torch.bool, device=device).tril()
        valid = _valid(frames)
        at = torch.arange(count, device=device)
        starts = STRIDE * torch.arange(windows, device=device)[:, None]
        reached = (at >= starts - BEFORE) & (at < starts + AFTER)
        within = torch.cat((valid[:, None].expand(batch, 3, count), reached[None] & valid[:, None]), dim=1)
        within = within | ~within.any(
            2, keepdim=True
        )  # padding windows attend to anything rather than nothing
        for block in self._blocks():
            x = block(x, among, block.heard(values), within)
        return Windows(self.norm(x)[:, 3:], -(-lengths // STRIDE))

    def twin(self) -> "WindowDecoder":
        """Another with these weights, to be changed; the tables, which never are, are shared."""
        return copy.deepcopy(self, {id(table): table for table in (self.tokens, self.positions)})

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
        decoder.tokens = variables["embeddings/weight"]
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
