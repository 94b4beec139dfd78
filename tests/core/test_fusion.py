"""The fusion networks: the published weights must fit them name by name, and mean the same in them."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clasp_core import fusion
from clasp_core.errors import ModelUnavailable
from clasp_core.fusion import LAYOUTS, clasp_loss, fit_of, lasp_loss
from clasp_core.hub import PUBLISHED
from clasp_core.systems import SYSTEMS, System, read

BRANCH = [
    *(f"{layer}.{name}" for layer in (0, 4, 8) for name in ("weight", "bias")),
    *(
        f"{layer}.{name}"
        for layer in (1, 5)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ),
]
MIX = [
    *(f"mix_seq.{layer}.{name}" for layer in (0, 3, 5) for name in ("weight", "bias")),
    *(
        f"mix_seq.1.{name}"
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ),
]
GATES = [
    f"{gate}.0.{name}"
    for gate in (
        "input_gate_text",
        "input_gate_image",
        "forget_gate_text",
        "forget_gate_image",
        "tanh_text",
        "tanh_image",
        "weight",
    )
    for name in ("weight", "bias")
]


def lived_in(layout: str, seed: int = 0, **dims: int) -> fusion.Fusion:
    """A fusion whose batch statistics are not the initial ones, in eval mode."""
    torch.manual_seed(seed)
    network = fusion.create(layout, **dims)
    speech_dim, picture_dim = dims.get("speech_dim", 1024), dims.get("picture_dim", 1000)
    for _ in range(3):
        network(torch.randn(8, speech_dim) + 1, 3 * torch.randn(8, picture_dim))
    return network.eval()


@pytest.mark.parametrize(
    ("layout", "speech_dim", "parameters", "entries"),
    [
        ("concat", 1024, 6_344_608, 43),
        ("gating", 1024, 9_237_888, 46),
        ("early-concat", 768, 5_807_392, None),
        ("early-gating", 768, 9_560_576, None),
        ("early-speech", 768, 1_331_328, None),
        ("early-spectrogram", 768, 1_464_960, None),
        ("early-transformer", 768, 36_454_432, None),
        ("wav2vec-concat", 768, 6_056_404, 43),
    ],
)
def test_the_notebooks_networks_have_the_notebooks_sizes(
    layout: str, speech_dim: int, parameters: int, entries: int | None
) -> None:
    """A layer more or less would still train, and would no longer be the system of the paper's table."""
    network = fusion.create(layout, speech_dim)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    if entries is not None:
        assert len(network.state_dict()) == entries


def test_the_published_files_names_are_the_networks() -> None:
    """Whole files are loaded by these names, strictly; a file of other names would be another model."""
    concat = [f"{branch}.{name}" for branch in ("image_seq", "audio_seq") for name in BRANCH] + MIX
    gating = [f"{branch}.{name}" for branch in ("image_seq", "text_seq") for name in BRANCH] + GATES
    assert sorted(fusion.create("concat").state_dict()) == sorted(concat)
    assert sorted(fusion.create("gating").state_dict()) == sorted(gating)


def branch(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Reference table A2, written out."""

    def layer(place: int, x: Tensor) -> Tensor:
        return x @ state[f"{name}.{place}.weight"].T + state[f"{name}.{place}.bias"]

    def norm(place: int, x: Tensor) -> Tensor:
        mean, var = state[f"{name}.{place}.running_mean"], state[f"{name}.{place}.running_var"]
        return (x - mean) / (var + 1e-5).sqrt() * state[f"{name}.{place}.weight"] + state[
            f"{name}.{place}.bias"
        ]

    x = norm(1, layer(0, x)).clamp(min=0)
    x = norm(5, layer(4, x))
    return layer(8, torch.where(x > 0, x, 0.01 * x))


def test_concatenation_puts_speech_first() -> None:
    """Table A2 by hand: speech before picture, ReLU then leaky ReLU, no normalisation at the end."""
    network = lived_in("concat")
    state = network.state_dict()
    speech, picture = torch.randn(5, 1024), torch.randn(5, 1000)
    x = torch.cat((branch(state, "audio_seq", speech), branch(state, "image_seq", picture)), dim=1)
    x = x @ state["mix_seq.0.weight"].T + state["mix_seq.0.bias"]
    x = (x - state["mix_seq.1.running_mean"]) / (state["mix_seq.1.running_var"] + 1e-5).sqrt()
    x = F.leaky_relu(x * state["mix_seq.1.weight"] + state["mix_seq.1.bias"])
    x = F.leaky_relu(x @ state["mix_seq.3.weight"].T + state["mix_seq.3.bias"])
    x = x @ state["mix_seq.5.weight"].T + state["mix_seq.5.bias"]
    torch.testing.assert_close(network(speech, picture), x, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(x.norm(dim=1), torch.ones(5), atol=0.05)


def test_gating_weighs_all_dimensions_of_both_by_one_softmax() -> None:
    """Table A3 by hand: the weights of a dimension do not add up to 1, and "text" is the speech side."""
    network = lived_in("gating")
    state = network.state_dict()
    speech, picture = torch.randn(5, 1024), torch.randn(5, 1000)

    def gated(modality: str, x: Tensor) -> Tensor:
        def linear(name: str) -> Tensor:
            return x @ state[f"{name}_{modality}.0.weight"].T + state[f"{name}_{modality}.0.bias"]

        return (
            torch.sigmoid(linear("input_gate")) * torch.tanh(linear("tanh"))
            + torch.sigmoid(linear("forget_gate")) * x
        )

    said = gated("text", branch(state, "text_seq", speech))
    seen = gated("image", branch(state, "image_seq", picture))
    logits = torch.cat((said, seen), dim=1) @ state["weight.0.weight"].T + state["weight.0.bias"]
    weights = torch.exp(logits) / torch.exp(logits).sum(dim=1, keepdim=True)
    expected = weights[:, :768] * said + weights[:, 768:] * seen
    torch.testing.assert_close(network(speech, picture), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_fits_small_encoders(layout: str) -> None:
    """Other widths in and out, the paper's layers between; in the wrong width the file is refused."""
    network = lived_in(layout, speech_dim=24, picture_dim=40, dim=16)
    again = fusion.restore(layout, network.state_dict(), 16)
    speech, picture = torch.randn(6, 24), torch.randn(6, 40)
    with torch.inference_mode():
        assert network(speech, picture).shape == (6, 16)
        torch.testing.assert_close(again(speech, picture), network(speech, picture))
    with pytest.raises(ModelUnavailable, match="not the weights"):
        fusion.restore(layout, network.state_dict())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_comes_back_from_its_weights(layout: str) -> None:
    """A served model is its file: the widths are read from it, and eval mode makes rows independent."""
    network = lived_in(layout, speech_dim=24, picture_dim=1000)
    again = fusion.restore(layout, network.state_dict())
    speech, picture = torch.randn(6, 24), torch.randn(6, 1000)
    with torch.inference_mode():
        vectors = again(speech, picture)
        alone = torch.cat([again(speech[i : i + 1], picture[i : i + 1]) for i in range(6)])
        torch.testing.assert_close(vectors, network(speech, picture))
    torch.testing.assert_close(vectors, alone, atol=1e-5, rtol=1e-4)
    assert vectors.shape == (6, 768)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_branch_that_is_there_counts(layout: str) -> None:
    """A fusion that ignored one of its inputs would pass every test of shapes."""
    network = lived_in(layout, speech_dim=24)
    speech, picture = torch.randn(2, 24), torch.randn(2, 1000)
    vectors = network(speech, picture)
    assert torch.equal(network(-speech, picture), vectors) == (network.speech_branch is None)
    assert torch.equal(network(speech, -picture), vectors) == (network.picture_branch is None)


def test_gates_may_be_named_without_their_activation() -> None:
    """Other implementers write the gates as bare layers; the same 46 tensors must not be turned away."""
    network = lived_in("gating")
    state = {
        name.replace(".0.", ".") if name.split(".")[0] not in ("text_seq", "image_seq") else name: tensor
        for name, tensor in network.state_dict().items()
    }
    assert "tanh_text.weight" in state
    speech, picture = torch.randn(3, 1024), torch.randn(3, 1000)
    torch.testing.assert_close(fusion.restore("gating", state)(speech, picture), network(speech, picture))


def test_weights_of_another_layout_are_refused() -> None:
    """A gating file under a concat name must not load half."""
    with pytest.raises(ModelUnavailable, match="not the weights of a 'concat'"):
        fusion.restore("concat", fusion.create("gating").state_dict())
    state = fusion.create("concat").state_dict()
    del state["mix_seq.1.running_var"]
    with pytest.raises(ModelUnavailable, match="running_var"):
        fusion.restore("concat", state)


# --- losses


def test_the_contrastive_loss_is_the_symmetric_cross_entropy() -> None:
    """Written out: the mean over rows and columns of -log softmax at the diagonal."""
    random = np.random.default_rng(0)
    speech, text = random.normal(size=(2, 7, 16))
    for inverted, scale in ((False, 1 / 0.07), (True, 0.07)):
        scores = (
            scale
            * (speech / np.linalg.norm(speech, axis=1, keepdims=True))
            @ (text / np.linalg.norm(text, axis=1, keepdims=True)).T
        )
        rows = scores - np.log(np.exp(scores).sum(1, keepdims=True))
        columns = scores - np.log(np.exp(scores).sum(0, keepdims=True))
        expected = -(np.diag(rows).mean() + np.diag(columns).mean()) / 2
        loss = clasp_loss(torch.from_numpy(speech), torch.from_numpy(text), inverted=inverted)
        assert float(loss) == pytest.approx(expected, abs=1e-9)


def test_the_inverted_temperature_leaves_the_softmax_flat() -> None:
    """The logged 9,762.9 of an epoch against 9,887.7 for guessing: even perfect pairs hardly lower it."""
    vectors = torch.eye(32)
    guessing = np.log(32)
    assert float(clasp_loss(vectors, vectors, inverted=True)) == pytest.approx(guessing, rel=0.03)
    assert float(clasp_loss(vectors, vectors)) < 1e-4


def test_the_regression_loss_sees_lengths() -> None:
    """LASP compares the fusion's output as it is: half the square below 0.6, linear above."""
    text = F.normalize(torch.ones(1, 4), dim=1)
    assert float(lasp_loss(text + 0.2, text)) == pytest.approx(0.5 * 0.2**2)
    assert float(lasp_loss(text + 2.0, text)) == pytest.approx(0.6 * (2.0 - 0.3))


# --- how were the inputs prepared?


@pytest.mark.parametrize("prepared", ["l2", "raw"])
def test_a_fusion_s_statistics_tell_how_its_inputs_were_prepared(prepared: str) -> None:
    """The one question about the published files that only the files can answer."""
    torch.manual_seed(1)
    centre = torch.randn(64)

    def clips(n: int) -> Tensor:
        return 9 * (centre + 0.3 * torch.randn(n, 64))

    network = fusion.create("concat", speech_dim=64, picture_dim=1000)
    branch = network.get_submodule("audio_seq")
    for _ in range(200):
        x = clips(32)
        branch(F.normalize(x, dim=1) if prepared == "l2" else x)
    x = clips(24)
    l2, raw = fit_of(branch, F.normalize(x, dim=1)), fit_of(branch, x)
    right, wrong = (l2, raw) if prepared == "l2" else (raw, l2)
    assert right.distance < 0.5
    assert wrong.distance > 1.5


# --- systems


def test_every_row_of_the_paper_s_table_is_a_system() -> None:
    """Whoever read table 2 must be able to name each of its trained rows."""
    rows = {
        (None, "efficientnet-b7", "labse", "early-spectrogram", "lasp"),
        ("wav2vec2-base", None, "labse", "early-speech", "lasp"),
        ("wav2vec2-base", "efficientnet-b7", "labse", "early-concat", "lasp"),
        ("hubert-large", "efficientnet-b7", "labse", "concat", "clasp"),
    } | {
        (
            speech,
            "efficientnet-b7",
            text,
            fused if speech == "hubert-large" else f"early-{fused}",
            "lasp",
        )
        for text in ("xlm-r", "labse")
        for speech in ("wav2vec2-base", "hubert-large")
        for fused in ("gating", "concat")
    }
    assert rows <= {(s.speech, s.spectrogram, s.text, s.fusion, s.loss) for s in SYSTEMS.values()}
    assert {s.weights for s in SYSTEMS.values()} == {
        None,
        "clasp-concat",
        "clasp-gating",
        "lasp-concat",
        "lasp-gating",
    }


@pytest.mark.parametrize(
    ("system", "file", "layout", "loss"),
    [
        ("paper", "CLASP_Concat_Final_Fusion_Encoder.pt", "concat", "clasp"),
        ("paper-gating", "CLASP_Gating.pt", "gating", "clasp"),
        ("paper-lasp", "LASP_Concat.pt", "concat", "lasp"),
        ("paper-lasp-gating", "LASP_Gating.pt", "gating", "lasp"),
    ],
)
def test_each_published_file_is_the_system_it_is(system: str, file: str, layout: str, loss: str) -> None:
    """Table A5: the files differ in nothing but their names where the fusion is the same."""
    declared = SYSTEMS[system]
    assert declared.weights is not None
    published = PUBLISHED[declared.weights]
    assert (published.folder, [f.name for f in published.files]) == ("llm-lab/CLASP", [file])
    assert (declared.fusion, declared.loss, declared.text, declared.speech) == (
        layout,
        loss,
        "labse",
        "hubert-large",
    )


def test_the_encoders_are_the_paper_s() -> None:
    """Table A1: another checkpoint of a family gives other vectors, which the fusion does not know."""
    assert {key: PUBLISHED[key].folder for key in ("hubert-large", "wav2vec2-base", "labse", "xlm-r")} == {
        "hubert-large": "facebook/hubert-large-ls960-ft",
        "wav2vec2-base": "facebook/wav2vec2-base-960h",
        "labse": "sentence-transformers/LaBSE",
        "xlm-r": "sentence-transformers/paraphrase-xlm-r-multilingual-v1",
    }
    assert PUBLISHED["efficientnet-b7"].source.endswith("efficientnet_b7_lukemelas-c5b4e57e.pth")


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_can_be_built(name: str) -> None:
    """Its fusion takes what its encoders give, and its description survives being written down."""
    system = SYSTEMS[name]
    widths = {"hubert-large": 1024, "wav2vec2-base": 768, None: 1}
    network = fusion.create(system.fusion, widths[system.speech]).eval()
    assert (network.speech_branch is None) == (system.speech is None)
    assert (network.picture_branch is None) == (system.spectrogram is None)
    vectors = network(torch.randn(2, widths[system.speech]), torch.randn(2, 1000))
    assert vectors.shape == (2, 768)
    assert read(system.as_json()).as_json() == system.as_json()


@pytest.mark.parametrize(
    ("description", "named"),
    [
        ({"fusion": "sum"}, "fusion 'sum'"),
        ({"speech": "whisper"}, "speech 'whisper'"),
        ({"text": None}, "text None"),
        ({"inputs": "L2"}, "inputs 'L2'"),
        ({"temperature": 1}, "temperature"),
    ],
)
def test_a_description_that_is_not_understood_is_refused(description: dict[str, object], named: str) -> None:
    """A misspelt word must not quietly give the default model."""
    with pytest.raises(ModelUnavailable, match=named):
        read(System().as_json() | description)
