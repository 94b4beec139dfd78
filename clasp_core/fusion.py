"""The fusion networks of the paper and its notebooks, and the two losses they were trained with.

A fusion maps a speech vector (n, 1024 or 768) and a spectrogram vector (n, 1000) to the space of the
text encoder (n, 768). Its output is not of unit length (reference: INF 24, TE 12-16, PG 68-74). With
smaller encoders than the paper's, those widths are theirs; the layers between keep the paper's.

Sub-module names and order are those of the published files. They mislead: `text_seq` and the gates
called `..._text` are the *speech* side; shapes, never names, say which branch is which.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clasp_core.errors import ModelUnavailable

DIM = 768
"""Of LaBSE, of the paraphrase XLM-R, and so of every fusion of the paper's."""
SPEECH_DIM = 1024
PICTURE_DIM = 1000
"""HuBERT-large's width, and the ImageNet classes whose logits EfficientNet-B7 gives."""


def _branch(inputs: int, dim: int, first: int = 768) -> nn.Sequential:
    """The final models' branch: 43 of the published entries are made of two of these and a joint part."""
    return nn.Sequential(
        nn.Linear(inputs, first),
        nn.BatchNorm1d(first),
        nn.ReLU(),
        nn.Dropout(0.15),
        nn.Linear(first, 576),
        nn.BatchNorm1d(576),
        nn.LeakyReLU(),
        nn.Dropout(0.10),
        nn.Linear(576, dim),
    )


def _narrow_branch(inputs: int) -> nn.Sequential:
    """The trunk of the early (wav2vec 2.0) models' branches, 576 wide at its end."""
    return nn.Sequential(
        nn.Linear(inputs, 576),
        nn.BatchNorm1d(576),
        nn.LeakyReLU(),
        nn.Dropout(0.15),
        nn.Linear(576, 384),
        nn.BatchNorm1d(384),
        nn.LeakyReLU(),
        nn.Dropout(0.10),
        nn.Linear(384, 576),
        nn.LeakyReLU(),
    )


def _early_branch(inputs: int, dim: int) -> nn.Sequential:
    return nn.Sequential(*_narrow_branch(inputs), nn.Linear(576, dim))


def _early_gating_branch(inputs: int, dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, 1024),
        nn.BatchNorm1d(1024),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(1024, 512),
        nn.BatchNorm1d(512),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(512, dim),
    )


def _mix(inputs: int, dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, 1024),
        nn.BatchNorm1d(1024),
        nn.LeakyReLU(),
        nn.Linear(1024, 800),
        nn.LeakyReLU(),
        nn.Linear(800, dim),
    )


class Fusion(nn.Module):
    """What all of them are: (speech (n, s), picture (n, p)) to (n, dim), not of unit length.

    A fusion of one branch ignores the other input, which may be None.
    """

    speech_branch: str | None
    picture_branch: str | None
    """Names of the sub-modules that take each input; None where it is not used."""

    def forward(self, speech: Tensor | None, picture: Tensor | None) -> Tensor:
        raise NotImplementedError


class _TwoBranches(Fusion):
    """The branches of all but the gating networks, in the order in which the published files have them."""

    speech_branch = "audio_seq"
    picture_branch = "image_seq"

    def __init__(self, picture_branch: nn.Sequential, speech_branch: nn.Sequential) -> None:
        super().__init__()
        self.image_seq = picture_branch
        self.audio_seq = speech_branch


class ConcatFusion(_TwoBranches):
    """`HubertLabseConcat` (INF 24, TE 12): two branches, concatenated speech first, and a joint network."""

    def __init__(self, picture_branch: nn.Sequential, speech_branch: nn.Sequential, dim: int = DIM) -> None:
        super().__init__(picture_branch, speech_branch)
        self.mix_seq = _mix(2 * dim, dim)

    def forward(self, speech: Tensor | None, picture: Tensor | None) -> Tensor:
        joined = torch.cat((self.audio_seq(speech), self.image_seq(picture)), dim=1)
        fused: Tensor = self.mix_seq(joined)
        return fused


class GatingFusion(Fusion):
    """`HubertLabseGating` (TE 15): each branch through an input and a forget gate, then weighted.

    One softmax runs over the weights of both modalities and all dimensions together, so the weights of
    a dimension do not add up to 1 and outputs are small in norm. So it was trained, so it stays.
    """

    speech_branch = "text_seq"
    picture_branch = "image_seq"

    def __init__(self, picture_branch: nn.Sequential, speech_branch: nn.Sequential, dim: int = DIM) -> None:
        super().__init__()
        self.image_seq = picture_branch
        self.text_seq = speech_branch
        self.input_gate_text = nn.Sequential(nn.Linear(dim, dim), nn.Sigmoid())
        self.input_gate_image = nn.Sequential(nn.Linear(dim, dim), nn.Sigmoid())
        self.forget_gate_text = nn.Sequential(nn.Linear(dim, dim), nn.Sigmoid())
        self.forget_gate_image = nn.Sequential(nn.Linear(dim, dim), nn.Sigmoid())
        self.tanh_text = nn.Sequential(nn.Linear(dim, dim), nn.Tanh())
        self.tanh_image = nn.Sequential(nn.Linear(dim, dim), nn.Tanh())
        self.weight = nn.Sequential(nn.Linear(2 * dim, 2 * dim))

    def forward(self, speech: Tensor | None, picture: Tensor | None) -> Tensor:
        said, seen = self.text_seq(speech), self.image_seq(picture)
        said = self.input_gate_text(said) * self.tanh_text(said) + self.forget_gate_text(said) * said
        seen = self.input_gate_image(seen) * self.tanh_image(seen) + self.forget_gate_image(seen) * seen
        of_said, of_seen = self.weight(torch.cat((said, seen), dim=1)).softmax(dim=1).chunk(2, dim=1)
        fused: Tensor = of_said * said + of_seen * seen
        return fused


class SpeechOnly(Fusion):
    """`TextAudioNN` (PG 72): the speech branch alone."""

    speech_branch = "audio_seq"
    picture_branch = None

    def __init__(self, branch: nn.Sequential) -> None:
        super().__init__()
        self.audio_seq = branch

    def forward(self, speech: Tensor | None, picture: Tensor | None) -> Tensor:
        fused: Tensor = self.audio_seq(speech)
        return fused


class SpectrogramOnly(Fusion):
    """`ImagetextNN` (PG 73): the spectrogram branch alone."""

    speech_branch = None
    picture_branch = "image_seq"

    def __init__(self, branch: nn.Sequential) -> None:
        super().__init__()
        self.image_seq = branch

    def forward(self, speech: Tensor | None, picture: Tensor | None) -> Tensor:
        fused: Tensor = self.image_seq(picture)
        return fused


class TransformerFusion(_TwoBranches):
    """`ImageTextAudioNNV2` (PG 70): tried by the authors, in no table of the paper.

    Each modality's transformer sees a sequence of length one, so its attention has nothing to attend to.
    """

    def __init__(self, picture_branch: nn.Sequential, speech_branch: nn.Sequential, dim: int = DIM) -> None:
        super().__init__(picture_branch, speech_branch)
        self.image_transformer_encoder = self._transformer()
        self.audio_transformer_encoder = self._transformer()
        mix = _mix(2 * 576, dim)
        self.mix_seq, self.fc = mix[:3], mix[3:]

    @staticmethod
    def _transformer() -> nn.TransformerEncoder:
        layer = nn.TransformerEncoderLayer(576, 8, 1152, 0.1, batch_first=True)
        return nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)

    def forward(self, speech: Tensor | None, picture: Tensor | None) -> Tensor:
        said = self.audio_transformer_encoder(self.audio_seq(speech).unsqueeze(1)).squeeze(1)
        seen = self.image_transformer_encoder(self.image_seq(picture).unsqueeze(1)).squeeze(1)
        fused: Tensor = self.fc(self.mix_seq(torch.cat((said, seen), dim=1)))
        return fused


class AttentionFusion(_TwoBranches):
    """Ours, for the paper's readers who asked: the two branches attend to each other.

    The branches' outputs become a sequence of two tokens, each marked by a learned vector of its
    modality; one transformer layer lets them attend to each other, and a learned query pools them.
    """

    def __init__(self, picture_branch: nn.Sequential, speech_branch: nn.Sequential, dim: int = DIM) -> None:
        super().__init__(picture_branch, speech_branch)
        self.modality = nn.Parameter(torch.randn(2, dim) * 0.02)
        self.attention = nn.TransformerEncoderLayer(dim, 8, 2 * dim, 0.1, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(dim)
        self.pool = nn.Linear(dim, 1)
        self.out = nn.Linear(dim, dim)

    def forward(self, speech: Tensor | None, picture: Tensor | None) -> Tensor:
        tokens = torch.stack((self.audio_seq(speech), self.image_seq(picture)), dim=1) + self.modality
        tokens = self.norm(self.attention(tokens))
        fused: Tensor = self.out((self.pool(tokens).softmax(dim=1) * tokens).sum(dim=1))
        return fused


class Layout(NamedTuple):
    """How a fusion is built for given widths of speech, picture and output, and the notebooks' name of it
    (None: it is ours)."""

    build: Callable[[int, int, int], Fusion]
    notebook_class: str | None


LAYOUTS: Mapping[str, Layout] = {
    "concat": Layout(lambda s, p, d: ConcatFusion(_branch(p, d), _branch(s, d), d), "HubertLabseConcat"),
    "gating": Layout(lambda s, p, d: GatingFusion(_branch(p, d), _branch(s, d), d), "HubertLabseGating"),
    "attention": Layout(lambda s, p, d: AttentionFusion(_branch(p, d), _branch(s, d), d), None),
    "speech": Layout(lambda s, _, d: SpeechOnly(_branch(s, d)), None),
    "spectrogram": Layout(lambda _, p, d: SpectrogramOnly(_branch(p, d)), None),
    "early-concat": Layout(
        lambda s, p, d: ConcatFusion(_early_branch(p, d), _early_branch(s, d), d), "ImageTextAudioNN"
    ),
    "early-gating": Layout(
        lambda s, p, d: GatingFusion(_early_gating_branch(p, d), _early_gating_branch(s, d), d),
        "ImageTextAudioNNGating",
    ),
    "early-speech": Layout(lambda s, _, d: SpeechOnly(_early_branch(s, d)), "TextAudioNN"),
    "early-spectrogram": Layout(lambda _, p, d: SpectrogramOnly(_early_branch(p, d)), "ImagetextNN"),
    "early-transformer": Layout(
        lambda s, p, d: TransformerFusion(_narrow_branch(p), _narrow_branch(s), d), "ImageTextAudioNNV2"
    ),
    "wav2vec-concat": Layout(
        lambda s, p, d: ConcatFusion(_branch(p, d), _branch(s, d, first=700), d), "Wav2vecConcat"
    ),
}


def create(
    layout: str, speech_dim: int = SPEECH_DIM, picture_dim: int = PICTURE_DIM, dim: int = DIM
) -> Fusion:
    """A fusion with fresh random weights, in training mode. KeyError for an unknown layout."""
    return LAYOUTS[layout].build(speech_dim, picture_dim, dim)


def restore(layout: str, state: Mapping[str, Tensor], dim: int = DIM) -> Fusion:
    """The fusion with these weights, in eval mode: input widths are read from the branches' first layers.

    Gates may be named as bare layers, without the `.0` of the notebook's Sequential.
    Raises ModelUnavailable where a name is missing, left over, or of another shape.
    """
    template = LAYOUTS[layout].build(1, 1, 8)

    def width(branch: str | None) -> int:
        first = state.get(f"{branch}.0.weight")
        return 1 if first is None or first.ndim != 2 else first.shape[1]

    fusion = create(layout, width(template.speech_branch), width(template.picture_branch), dim)
    state = {_GATE.sub(r"\1.0.\2", name): tensor for name, tensor in state.items()}
    try:
        fusion.load_state_dict(
            {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ModelUnavailable(f"These are not the weights of a {layout!r} fusion: {reason}") from error
    return fusion.eval().requires_grad_(False)


_GATE = re.compile(r"^((?:input_gate|forget_gate|tanh)_(?:text|image)|weight)\.(weight|bias)$")


# --- losses

Loss: TypeAlias = Literal["clasp", "lasp"]

TEMPERATURE = 0.07


def clasp_loss(
    speech: Tensor, text: Tensor, *, temperature: float | Tensor = TEMPERATURE, inverted: bool = False
) -> Tensor:
    """The symmetric contrastive loss of a batch: speech (n, d) and text (n, d), row i said and meant alike.

    Both are brought to unit length; every other row of the batch is a negative (paper section 3.3, TE 16).
    The notebooks multiply the cosines by the temperature where CLIP divides by it, which leaves the
    softmax almost flat; `inverted` does the same, for faithful retraining.
    """
    scale = temperature if inverted else 1 / temperature
    scores = scale * F.normalize(speech, dim=1) @ F.normalize(text, dim=1).T
    labels = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2


def lasp_loss(speech: Tensor, text: Tensor, *, delta: float = 0.6) -> Tensor:
    """The regression loss: Huber's, between the fusion's output as it is and the text vector (PG 74)."""
    return F.huber_loss(speech, text, delta=delta)


# --- which convention were the inputs in?


class Fit(NamedTuple):
    """How far a branch's first layer, fed some inputs, is from what its batch norm saw in training.

    `offset` is the root mean square of (mean - running mean) / running deviation over the units, and
    `spread` the median of the ratio of deviations; training inputs give about 0 and 1.
    """

    offset: float
    spread: float

    @property
    def distance(self) -> float:
        """0 for a perfect fit; the larger the worse."""
        return self.offset + abs(math.log(max(self.spread, 1e-9)))


@torch.inference_mode()
def fit_of(branch: nn.Module, inputs: Tensor) -> Fit:
    """Compare inputs (n >= 2, width) with the running statistics of a branch's first BatchNorm1d."""
    assert isinstance(branch, nn.Sequential)
    linear, norm = branch[0], branch[1]
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    deviation = (norm.running_var + norm.eps).sqrt()
    values = linear(inputs)
    offset = ((values.mean(0) - norm.running_mean) / deviation).square().mean().sqrt()
    spread = (values.std(0) / deviation).median()
    return Fit(float(offset), float(spread))
