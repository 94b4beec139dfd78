"""The paper's sentence encoders: what sentence-transformers makes of the same folder, without it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clasp_core.encoders.sentence import SentenceEncoder
from clasp_core.encoders.vision_imports import require_transformers
from clasp_core.errors import ModelUnavailable
from tests.paper_checkpoints import SENTENCES, rewrite, save_sentence_bert, save_xlmr

SAVE: dict[str, Callable[..., Path]] = {"labse": save_sentence_bert, "xlmr": save_xlmr}
ODD = [
    "",
    " ",
    "\u200b",
    "\x00\x01",
    "a" * 3000,
    "می‌روم " * 400,
    "蜜" * 700,
    "🙂" * 300,
    "[SEP] <mask> </s>",
    "  spaces   before and\tafter \n",
    "ONE",
    "one",
]
TEXTS = [*SENTENCES, *ODD]


@pytest.fixture(scope="module", params=["labse", "xlmr"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SAVE[request.param](tmp_path_factory.mktemp("text") / request.param)


@pytest.fixture(scope="module")
def encoder(folder: Path) -> SentenceEncoder:
    return SentenceEncoder.load(folder)


@pytest.fixture
def labse(tmp_path: Path) -> Path:
    """A folder that a test may change."""
    return save_sentence_bert(tmp_path / "labse")


def change(path: Path, **members: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | members))


def theirs(folder: Path) -> Any:
    """The folder as sentence-transformers loads it."""
    require_transformers()
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def their_vectors(folder: Path, texts: list[str]) -> Tensor:
    vectors = theirs(folder).encode(texts, convert_to_tensor=True, show_progress_bar=False)
    return vectors.clone()


def is_built_in(encoder: SentenceEncoder) -> bool:
    return not any("sentence_transformers" in type(module).__module__ for module in encoder.modules())


def test_vectors_are_those_of_sentence_transformers(folder: Path, encoder: SentenceEncoder) -> None:
    """The fusion was trained towards that library's vectors. Many scripts, odd and over-long texts."""
    vectors = encoder(TEXTS)
    assert is_built_in(encoder)
    assert vectors.shape == (len(TEXTS), encoder.dim) == (28, 32)
    torch.testing.assert_close(vectors, their_vectors(folder, TEXTS), atol=1e-5, rtol=0)


def test_a_text_does_not_feel_its_batch(encoder: SentenceEncoder) -> None:
    """The same question has the same answer, whoever else asks at the time."""
    together = encoder(TEXTS)
    alone = torch.cat([encoder([text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    scores = F.cosine_similarity(together[:16, None], together[None, :16], dim=2) - torch.eye(16)
    assert scores.max() < 0.999, "the sentences must be told apart, or the comparison says nothing"


def test_batches_keep_to_their_budget(folder: Path, encoder: SentenceEncoder) -> None:
    """Many long texts at once must not be one huge batch, nor change a vector."""
    small = SentenceEncoder.load(folder, batch_tokens=64)
    shapes: list[tuple[int, int]] = []
    small.chain.network.register_forward_pre_hook(lambda _, arguments: shapes.append(arguments[0].shape))
    torch.testing.assert_close(small(TEXTS), encoder(TEXTS), atol=1e-4, rtol=0)
    assert sum(count for count, _ in shapes) == len(TEXTS)
    assert all(count * length <= 64 or count == 1 for count, length in shapes)
    assert max(count for count, _ in shapes) > 1


def test_labse_is_of_unit_length_and_the_paraphrase_model_is_not(tmp_path: Path) -> None:
    """One chain ends in a normalisation, the other does not; whoever compares vectors must know which."""
    lengths = {
        name: np.linalg.norm(SentenceEncoder.load(save(tmp_path / name))(SENTENCES), axis=1)
        for name, save in SAVE.items()
    }
    np.testing.assert_allclose(lengths["labse"], 1, atol=1e-5)
    assert (np.abs(lengths["xlmr"] - 1) > 0.1).all()


def test_nothing_in_gives_nothing_out(encoder: SentenceEncoder) -> None:
    """A batch of no queries needs no special case."""
    assert encoder([]).shape == (0, encoder.dim)


def test_folders_of_newer_versions_are_read_too(folder: Path, tmp_path: Path) -> None:
    """Version 6 moved the classes, renamed the pooling's settings and gave each part a config.json."""
    theirs(folder).save(str(tmp_path / "new"))
    spelling = (tmp_path / "new" / "modules.json").read_text() + (
        tmp_path / "new/1_Pooling/config.json"
    ).read_text()
    assert "sentence_transformers.models" not in spelling
    assert '"pooling_mode": "' in spelling
    encoder = SentenceEncoder.load(tmp_path / "new")
    assert is_built_in(encoder)
    torch.testing.assert_close(encoder(TEXTS), their_vectors(folder, TEXTS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["activation.Tanh", "linear.Identity", "activation.GELU", "activation.ReLU"])
def test_activations_of_the_dense_layer(tmp_path: Path, name: str) -> None:
    """LaBSE has tanh; each of the others of the table is the one it is called."""
    folder = save_sentence_bert(tmp_path, activation=f"torch.nn.modules.{name}")
    encoder = SentenceEncoder.load(folder)
    assert is_built_in(encoder)
    torch.testing.assert_close(encoder(SENTENCES), their_vectors(folder, SENTENCES), atol=1e-5, rtol=0)


def test_mean_pooling_before_a_dense_layer(tmp_path: Path) -> None:
    """The parts combine freely: the pooling is the folder's, not the architecture's."""
    folder = save_sentence_bert(tmp_path, pooling="mean")
    encoder = SentenceEncoder.load(folder)
    assert is_built_in(encoder)
    torch.testing.assert_close(encoder(TEXTS), their_vectors(folder, TEXTS), atol=1e-5, rtol=0)


def test_texts_are_cut_where_the_folder_says(tmp_path: Path) -> None:
    """256 tokens for LaBSE, 128 for the paraphrase model: later words were never trained on."""
    folder = save_sentence_bert(tmp_path, max_seq_length=8)
    encoder = SentenceEncoder.load(folder)
    long = "The home team won the final by three goals to one."
    torch.testing.assert_close(encoder([long]), encoder([f"{long} {long}"]), atol=1e-6, rtol=0)
    torch.testing.assert_close(encoder([long]), their_vectors(folder, [long]), atol=1e-5, rtol=0)
    assert F.cosine_similarity(encoder([long]), encoder(["The home team"])).item() < 0.999


def test_lower_casing_is_the_folders_decision(labse: Path) -> None:
    """LaBSE tells cases apart; a folder may say that its encoder does not."""
    cased = SentenceEncoder.load(labse)(["ONE", "one"])
    assert not torch.allclose(cased[0], cased[1], atol=1e-2)
    change(labse / "sentence_bert_config.json", do_lower_case=True)
    uncased = SentenceEncoder.load(labse)
    torch.testing.assert_close(*uncased(["ONE", "one"]), atol=1e-6, rtol=0)
    torch.testing.assert_close(uncased(TEXTS), their_vectors(labse, TEXTS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("limit", [None, 10_000])
def test_no_text_is_longer_than_the_positions(folder: Path, tmp_path: Path, limit: int | None) -> None:
    """A folder without a limit, or with one too high, must not crash the thread that answers everybody."""
    unlimited = SAVE[folder.name](tmp_path, max_seq_length=limit)
    change(tmp_path / "tokenizer_config.json", model_max_length=10**30)
    vectors = SentenceEncoder.load(unlimited)(["bees " * 2000, "bees"])
    assert torch.isfinite(vectors).all()


BEYOND: dict[str, Callable[[Path], None]] = {
    "max pooling": lambda folder: change(
        folder / "1_Pooling" / "config.json", pooling_mode_cls_token=False, pooling_mode_max_tokens=True
    ),
    "two poolings": lambda folder: change(
        folder / "1_Pooling" / "config.json", pooling_mode_mean_tokens=True
    ),
    "another activation": lambda folder: change(
        folder / "2_Dense" / "config.json", activation_function="torch.nn.modules.activation.Softsign"
    ),
    "a prompt": lambda folder: (folder / "config_sentence_transformers.json").write_text(
        '{"prompts": {"query": "query: "}, "default_prompt_name": "query"}'
    ),
}
"""Changes to a LaBSE folder after which its chain is beyond the built-in reader."""


def make_beyond(folder: Path, what: str) -> None:
    BEYOND[what](folder)
    if what == "two poolings":  # twice as much goes into the dense layer
        change(folder / "2_Dense" / "config.json", in_features=64)
        rewrite(
            folder / "2_Dense" / "model.safetensors",
            lambda state: state | {"linear.weight": torch.cat([state["linear.weight"]] * 2, dim=1)},
        )


@pytest.mark.parametrize("what", BEYOND)
def test_other_chains_are_left_to_sentence_transformers(labse: Path, what: str) -> None:
    """Any folder of that library serves, as it would there: nothing of a chain is skipped."""
    plain = SentenceEncoder.load(labse)(SENTENCES)
    make_beyond(labse, what)
    encoder = SentenceEncoder.load(labse)
    assert not is_built_in(encoder)
    vectors = encoder(SENTENCES)
    assert encoder([]).shape == (0, encoder.dim)
    assert vectors.shape == (len(SENTENCES), encoder.dim)
    torch.testing.assert_close(vectors, their_vectors(labse, SENTENCES), atol=1e-5, rtol=0)
    assert not torch.allclose(vectors, plain, atol=1e-3), "the change must be one that shows"


@pytest.mark.parametrize("what", BEYOND)
def test_without_sentence_transformers_other_chains_say_so(
    labse: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extra is optional: its absence must be a sentence that helps, not half a chain."""
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert SentenceEncoder.load(labse).dim == 32, "the paper's own chains do without"
    make_beyond(labse, what)
    with pytest.raises(ModelUnavailable, match=r"pip install 'clasp-search\[sentence-transformers\]'"):
        SentenceEncoder.load(labse)


def test_code_that_a_folder_brings_is_not_run(labse: Path, tmp_path: Path) -> None:
    """A model folder is data. Neither its modules nor its activations may name what is imported."""
    trace = tmp_path / "trace"
    (labse / "intruder.py").write_text(
        f"open({str(trace)!r}, 'w')\nclass Transformer: pass\nclass Tanh: pass\n"
    )
    change(labse / "2_Dense" / "config.json", activation_function="intruder.Tanh")
    with pytest.raises(ModelUnavailable, match=r"intruder\.Tanh"):
        SentenceEncoder.load(labse)
    modules = json.loads((labse / "modules.json").read_text())
    modules[0]["type"] = "intruder.Transformer"
    (labse / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelUnavailable, match=r"intruder\.Transformer"):
        SentenceEncoder.load(labse)
    assert not trace.exists()


def test_a_folder_keeps_to_itself(labse: Path) -> None:
    """modules.json may not point at other files of the machine."""
    modules = json.loads((labse / "modules.json").read_text())
    modules[2]["path"] = "../elsewhere"
    (labse / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelUnavailable, match="elsewhere"):
        SentenceEncoder.load(labse)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("model.safetensors", "encoder.layer.1.output.dense.bias"),
        ("model.safetensors", "embeddings.LayerNorm.weight"),
        ("2_Dense/model.safetensors", "linear.bias"),
    ],
)
def test_every_weight_is_needed(labse: Path, file: str, name: str) -> None:
    """A gap would be filled with random numbers, and the vectors would look like any others."""
    rewrite(labse / file, lambda state: {key: value for key, value in state.items() if key != name})
    with pytest.raises(ModelUnavailable, match=name.rpartition(".")[2]):
        SentenceEncoder.load(labse)


def test_unused_heads_may_come_along(labse: Path) -> None:
    """The published file has BERT's pooler and position numbers; a masked-language head is no harm either."""
    vectors = SentenceEncoder.load(labse)(SENTENCES)
    rewrite(labse / "model.safetensors", lambda state: state | {"cls.predictions.bias": torch.zeros(9)})
    torch.testing.assert_close(SentenceEncoder.load(labse)(SENTENCES), vectors, atol=1e-6, rtol=0)
    rewrite(labse / "model.safetensors", lambda state: state | {"encoder.layer.2.bias": torch.zeros(9)})
    with pytest.raises(ModelUnavailable, match=r"no place for encoder\.layer\.2"):
        SentenceEncoder.load(labse)


def test_the_files_may_be_replaced_while_the_encoder_runs(labse: Path) -> None:
    """Weights that stay mapped change with their file, and end the process when it is cut short."""
    encoder = SentenceEncoder.load(labse)
    assert encoder(TEXTS).isfinite().all()
    assert str(labse) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("file", ["model.safetensors", "2_Dense/model.safetensors"])
@pytest.mark.parametrize("beyond", [False, True], ids=["built-in", "sentence-transformers"])
def test_pickles_are_not_an_alternative(labse: Path, file: str, beyond: bool) -> None:
    """Whichever reader is at work: weights come from safetensors or not at all."""
    state_path = labse / file
    torch.save({}, state_path.with_name("pytorch_model.bin"))
    if beyond:
        make_beyond(labse, "another activation")
    assert is_built_in(SentenceEncoder.load(labse)) is not beyond
    state_path.unlink()
    with pytest.raises(ModelUnavailable, match=r"safetensors|pickle"):
        SentenceEncoder.load(labse)


@pytest.mark.parametrize(
    "name", ["modules.json", "config.json", "tokenizer.json", "1_Pooling/config.json", "2_Dense/config.json"]
)
def test_damaged_files_are_named(labse: Path, name: str) -> None:
    """Half a download must stop the start, with the folder in the message."""
    content = (labse / name).read_bytes()
    (labse / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelUnavailable, match="labse"):
        SentenceEncoder.load(labse)


def test_parts_that_do_not_fit_are_refused(labse: Path) -> None:
    """The dense layer of one model after the transformer of another."""
    change(labse / "2_Dense" / "config.json", in_features=24)
    with pytest.raises(ModelUnavailable, match="24"):
        SentenceEncoder.load(labse)
