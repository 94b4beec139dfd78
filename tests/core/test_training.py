"""Training: from a manifest to a model folder that serves, and that has learnt what it was shown."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from app.samples import SAMPLES
from clasp_core.errors import InvalidField, ProcessingFailed
from clasp_core.evaluation import evaluate_manifest
from clasp_core.mini import read_fusion
from clasp_core.models import open_model
from clasp_core.training import read_config, train
from clasp_core.training.config import DataConfig, examples_of
from clasp_core.training.features import FeatureCache, Row
from clasp_core.training.losses import LossConfig, Objective
from clasp_core.training.output import run_folder

MINI = """
output = "model"
[data]
manifest = "manifest.jsonl"
cache = "cache"
speeds = [1.0]
[model]
architecture = "mini"
rank = 4
pairs = 4
[loss]
negatives = "all"
temperature = 0.05
[optimizer]
learning_rate = 1e-3
weight_decay = 0.05
clip_norm = 1.0
[schedule]
name = "cosine"
warmup_steps = 1
[training]
epochs = 4
batch_size = 4
average_last = 1
device = "cpu"
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model taught a few short bundled samples, on the real pretrained parts."""
    folder = tmp_path_factory.mktemp("training")
    lines = [json.loads(line) for line in (SAMPLES / "manifest.jsonl").read_text().splitlines()]
    short = [line | {"split": "train"} for line in sorted(lines, key=lambda line: line["duration_s"])[:8]]
    for line in short:
        line["audio"] = str(SAMPLES / line["audio"])
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, short)))
    (folder / "config.toml").write_text(MINI)
    return train(read_config(folder / "config.toml"))


def test_a_trained_folder_serves_and_knows_its_recordings(trained: Path) -> None:
    """`CLASP_MODEL=folder` must work with no further step, or training is a toy."""
    model = open_model(str(trained))
    report = evaluate_manifest(model, trained.parent / "manifest.jsonl", by=["lang"])
    assert report["overall"]["text_to_speech"]["hits@1"] >= 0.9
    assert report["overall"]["speech_to_text"]["hits@1"] >= 0.9
    assert model.fingerprint != open_model("mini").fingerprint


def test_what_was_done_is_recorded(trained: Path) -> None:
    """A model without its configuration and losses cannot be trusted or made again."""
    record = json.loads((trained / "training.json").read_text())
    assert record["config"]["training"]["epochs"] == 4
    assert str(trained.parent) not in json.dumps(record), "the places on a machine say nothing about a model"
    assert len(record["history"]) == 4
    assert record["history"][-1]["loss"] < record["history"][0]["loss"]


def test_the_same_seed_gives_the_same_weights(trained: Path, tmp_path: Path) -> None:
    """Otherwise no figure of a model card can be checked by anybody."""
    config = read_config(trained.parent / "config.toml")
    again = train(replace(config, output=tmp_path / "again"))
    shapes, tensors = zip(
        *(read_fusion(folder / "fusion.safetensors") for folder in (trained, again)), strict=True
    )
    assert shapes[0] == shapes[1]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_features_are_computed_once(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features take far longer than an epoch; a second run, or one on fewer items, computes none again."""
    cache = trained.parent / "cache"
    before = sorted(path for path in cache.rglob("*.safetensors"))
    lines = (trained.parent / "manifest.jsonl").read_text().splitlines()
    (trained.parent / "fewer.jsonl").write_text("\n".join(reversed(lines[:6])))
    config = read_config(trained.parent / "config.toml")
    monkeypatch.setattr("clasp_core.training.mini.SpeechBackbone", None)
    train(
        replace(
            config,
            data=replace(config.data, manifest=trained.parent / "fewer.jsonl", validation="train"),
            model=replace(config.model, pairs=0),
            training=replace(config.training, epochs=1, watch="mrr"),
            output=trained.parent / "fewer",
        )
    )
    (only,) = json.loads((trained.parent / "fewer" / "training.json").read_text())["history"]
    assert 0 < only["validation_mrr"] <= 1
    assert sorted(path for path in cache.rglob("*.safetensors")) == before
    assert not list(cache.glob("runs/*")), "what a run needed to go on goes when it has ended"


def test_the_loss_is_the_symmetric_cross_entropy_of_its_definition() -> None:
    """Against a slow version: a repeated text is no negative of itself, in either direction."""
    generator = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> torch.Tensor:
        return F.normalize(torch.randn(*shape, generator=generator), dim=-1)

    vectors, targets = unit(3, 8), unit(5, 8)
    places, number = torch.tensor([0, 1, 4]), torch.tensor([7, 8, 9, 6, 7])  # texts 0 and 4 say the same
    expected = 0.0
    for row, place in enumerate(places.tolist()):
        rivals = [t for t in range(5) if t == place or number[t] != number[place]]
        scores = [float(vectors[row] @ targets[t]) / 0.05 for t in rivals]
        expected += np.log(np.exp(scores).sum()) - float(vectors[row] @ targets[place]) / 0.05
        clips = [c for c, p in enumerate(places.tolist()) if c == row or number[p] != number[place]]
        scores = [float(vectors[c] @ targets[place]) / 0.05 for c in clips]
        expected += np.log(np.exp(scores).sum()) - float(vectors[row] @ targets[place]) / 0.05
    objective = Objective(LossConfig(temperature=0.05, negatives="all"), targets, number)
    assert float(objective(3 * vectors, places)) == pytest.approx(expected / 6, rel=1e-5)


def test_the_inverted_temperature_is_the_notebooks(tmp_path: Path) -> None:
    """TE 16, step by step: `logits = (speech @ text.T) * temperature`, cross entropy with the diagonal twice.

    Faithful retraining needs that formula; ours, which divides, is another model.
    """
    generator = torch.Generator().manual_seed(1)
    speech, targets = torch.randn(6, 16, generator=generator), torch.randn(9, 16, generator=generator)
    places = torch.tensor([3, 0, 8, 5, 1, 2])
    a, b = F.normalize(speech, dim=-1), F.normalize(targets[places], dim=-1)
    numbers = torch.arange(9)
    for inverted, logits in ((True, a @ b.T * 0.07), (False, a @ b.T / 0.07)):
        labels = torch.arange(6)
        theirs = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        for learned in (False, True):
            ours = Objective(LossConfig(inverted=inverted, learned=learned), targets, numbers)
            torch.testing.assert_close(ours(speech, places), theirs)
            ours(speech, places).backward() if learned else None
            gradient = ours.log_scale.grad
            assert (gradient is not None) == learned
    huber = Objective(LossConfig(name="lasp"), targets, numbers)(speech, places)
    torch.testing.assert_close(huber, torch.nn.HuberLoss(delta=0.6)(speech, targets[places]))
    runaway = Objective(LossConfig(learned=True), targets, numbers)
    runaway.log_scale.data.fill_(math.log(5000))
    capped = Objective(LossConfig(temperature=0.01), targets, numbers)
    torch.testing.assert_close(runaway(speech, places), capped(speech, places))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("epochs = 4", "epoch = 40"), r"\[training\]: epoch; known are epochs"),
        (("[schedule]", "[shedule]"), "the file: shedule"),
        (("rank = 4", "rank = 2.5"), "model.rank has a value of the wrong type"),
        (("epochs = 4", "epochs = true"), "training.epochs has a value of the wrong type"),
        (('"cosine"', '"cosines"'), "schedule.name 'cosines'; known are constant, step, cosine"),
        (('cache = "cache"', ""), "lacks data.cache"),
        (('"mini"', '"maxi"'), "architecture is 'maxi'"),
        (("epochs = 4", "epochs = 2\nema = 0.9"), "exclude each other"),
        (("epochs = 4", "epochs = 2\npatience = 3"), "patience needs training.watch"),
        (("epochs = 4", "epochs = 0"), "epochs must be above 0"),
        (("speeds = [1.0]", "speeds = [9.0]"), "within 0.5 and 2"),
        (("epochs = 4", "epochs = "), "cannot be read as TOML"),
    ],
)
def test_what_a_configuration_cannot_mean_is_refused(
    tmp_path: Path, change: tuple[str, str], reason: str
) -> None:
    """A typing error in a configuration must not silently train something else."""
    assert change[0] in MINI
    (tmp_path / "config.toml").write_text(MINI.replace(*change))
    with pytest.raises(InvalidField, match=reason):
        read_config(tmp_path / "config.toml")


def test_validation_holds_out_whole_speakers(tmp_path: Path) -> None:
    """Early stopping on voices that are also learnt from stops too late; new data must not move the line."""

    def split(speakers: int) -> tuple[set[str], set[str]]:
        lines = [
            {"id": f"{n}", "audio": "x.wav", "text": "words", "split": "train", "speaker": f"s{n % speakers}"}
            for n in range(400)
        ]
        (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
        learnt, held = examples_of(DataConfig(tmp_path / "manifest.jsonl", tmp_path, validation_share=0.25))
        assert len(learnt) + len(held) == 400
        return {item.speaker or "" for item in learnt}, {item.speaker or "" for item in held}

    learnt, held = split(100)
    assert not learnt & held
    assert 10 <= len(held) <= 40
    _, more_held = split(200)
    assert held <= more_held
    with pytest.raises(InvalidField, match="no item of the split 'trained'"):
        examples_of(DataConfig(tmp_path / "manifest.jsonl", tmp_path, split="trained"))


def test_features_survive_kills_damage_and_undecodable_inputs(tmp_path: Path) -> None:
    """What is on disk is not computed again, in the very batches of an undisturbed run; damage is."""
    keys = [f"clip {number}" for number in range(600)]
    asked: list[list[int]] = []

    def compute(places: list[int], until: int = 600) -> list[Row | str]:
        if places[0] >= until:
            raise KeyboardInterrupt
        asked.append(places)
        return [
            "nothing can be heard" if place == 7 else {"rows": torch.full((place % 3 + 1, 2), float(place))}
            for place in places
        ]

    def opened() -> FeatureCache:
        return FeatureCache(tmp_path, "an encoder", 1.0, precision="float32")

    with pytest.raises(KeyboardInterrupt):
        opened().fill(keys, lambda places: compute(places, 400), together=5)
    lost = len(asked)
    opened().fill(keys, compute, together=5)
    again = asked[lost:]
    assert again[0][0] == 260, "the first shard was complete"
    assert all(batch in [list(range(n, n + 5)) for n in range(0, 600, 5)] for batch in again)

    cache = opened()
    assert "nothing can be heard" in cache.left_out["clip 7"]
    assert "clip 7" not in cache
    for place in (0, 8, 255, 260, 599):
        rows = cache.row(keys[place])["rows"]
        assert rows.shape == (place % 3 + 1, 2) == (cache.length(keys[place], "rows"), 2)
        assert bool((rows == place).all())
    shard = sorted(cache.folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:100])
    asked.clear()
    opened().fill(keys, compute, together=5)
    assert 0 < sum(map(len, asked)) < 600
    assert sum(key in opened() for key in keys) == 599
    assert "clip 0" not in FeatureCache(tmp_path, "another encoder", 1.0, precision="float32")


def test_two_processes_do_not_train_the_same_run(tmp_path: Path) -> None:
    """Somebody restarts a run that was never dead: the second must not write into the first one's state."""
    with run_folder(tmp_path, "a run"):
        with pytest.raises(ProcessingFailed, match="Another process"), run_folder(tmp_path, "a run"):
            pass
        with run_folder(tmp_path, "another run"):
            pass
    with run_folder(tmp_path, "a run") as folder:
        assert list(folder.iterdir()) == []


def test_the_shipped_recipes_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make train` is the first thing somebody tries who doubts the shipped weights."""
    monkeypatch.setenv("CLASP_SPEECH_DEV", "/data")
    recipes = sorted((SAMPLES.parents[1] / "training").glob("*.toml"))
    assert [read_config(path).data.manifest for path in recipes] == [Path("/data/manifest.jsonl")] * len(
        recipes
    )
