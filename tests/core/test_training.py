"""Training: from a manifest to a model folder that serves, and that has learnt what it was shown."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from clasp_core.errors import InvalidField
from clasp_core.evaluation import evaluate_manifest
from clasp_core.models import open_model
from clasp_core.training import TrainingConfig, _contrastive, read_config, train

SAMPLES = Path(__file__).parent.parent.parent / "samples"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model taught the short bundled samples by heart."""
    folder = tmp_path_factory.mktemp("training")
    lines = [json.loads(line) for line in (SAMPLES / "manifest.jsonl").read_text().splitlines()]
    short = [line | {"split": "train"} for line in lines if line["duration_s"] < 20]
    for line in short:
        line["audio"] = str(SAMPLES / line["audio"])
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, short)))
    (folder / "config.toml").write_text(
        "manifest = 'manifest.jsonl'\noutput = 'model'\ncache = 'cache'\nspeeds = [1.0, 0.9]\npairs = 10\n"
        "epochs = 40\nmembers = 2\nwidth = 64\nlayers = 1\nbatch_size = 8\nwarmup_steps = 5\n"
        "learning_rate = 2e-3\ndropout = 0.0\naverage_last = 2\ndevice = 'cpu'\n"
    )
    return train(read_config(folder / "config.toml"))


def test_a_trained_folder_serves_and_knows_its_recordings(trained: Path) -> None:
    """`CLASP_MODEL=folder` must work with no further step, or training is a toy."""
    model = open_model(str(trained))
    report = evaluate_manifest(model, trained.parent / "manifest.jsonl", by=["lang"])
    assert report["overall"]["text_to_speech"]["hits@1"] >= 0.9
    assert report["overall"]["speech_to_text"]["hits@1"] >= 0.9
    assert report["groups"]["lang"]["en"]["text_to_speech"]["pool"] == 8
    assert model.fingerprint != open_model("mini").fingerprint


def test_what_was_done_is_recorded(trained: Path) -> None:
    """A model without its configuration and losses cannot be trusted or made again."""
    record = json.loads((trained / "training.json").read_text())
    assert record["config"]["epochs"] == 40
    assert len(record["history"]) == 80
    assert record["history"][39]["loss"] < record["history"][0]["loss"] / 4


def test_the_same_seed_gives_the_same_weights(trained: Path, tmp_path: Path) -> None:
    """Otherwise no figure of a model card can be checked by anybody."""
    config = read_config(trained.parent / "config.toml")
    again = train(TrainingConfig(**{**_fields(config), "output": tmp_path / "again"}))
    assert (again / "fusion.safetensors").read_bytes() == (trained / "fusion.safetensors").read_bytes()


def test_features_are_computed_once(trained: Path) -> None:
    """Features take far longer than an epoch; a second run must not compute them again."""
    shards = list((trained.parent / "cache").glob("*.npz"))
    assert len(shards) == 2, "one shard for each speed"


def test_the_loss_is_the_symmetric_cross_entropy_of_its_definition() -> None:
    """Against a slow version: a repeated text is no negative of itself, in either direction."""
    generator = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)

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
    assert float(_contrastive(vectors, places, targets, number, 0.05)) == pytest.approx(
        expected / 6, rel=1e-5
    )


def test_a_misspelt_setting_is_refused(tmp_path: Path) -> None:
    """A typing error in a configuration must not silently train something else."""
    (tmp_path / "config.toml").write_text("manifest='m'\noutput='o'\ncache='c'\nepoch=3\n")
    with pytest.raises(InvalidField, match="epoch"):
        read_config(tmp_path / "config.toml")


def _fields(config: TrainingConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in TrainingConfig.__dataclass_fields__}
