"""`clasp models fetch` and `convert`: a published part from a hub into a folder of weights, in one go."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clasp_core.hub import GROUPS, PUBLISHED
from tests.app.test_cli import as_json, failed
from tests.hub_server import FIRST, Hub
from tests.service import clasp, environment

MAKER = Path(__file__).parents[1] / "core" / "checkpoint_files.py"
FUSION = "CLASP_Concat_Final_Fusion_Encoder"


class Call:
    def __reduce__(self) -> Any:
        return os.system, ("touch trace",)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the published form, with `.expected`, the tensors that are in them."""
    folder = tmp_path_factory.mktemp("checkpoints")
    subprocess.run([sys.executable, MAKER, "small", folder], check=True, env=environment())
    return folder


@pytest.fixture
def server(checkpoints: Path) -> Iterator[Hub]:
    """A hub that has the published fusion encoder's repository."""
    with Hub() as served:
        served.files["llm-lab/CLASP", FIRST, f"{FUSION}.pt"] = (checkpoints / "small.pt").read_bytes()
        served.branches["llm-lab/CLASP", "main"] = FIRST
        yield served


def fetch(*arguments: str, cwd: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    return clasp("models", "fetch", *arguments, cwd=cwd, models_dir=cwd / "weights", hub_endpoint=endpoint)


def test_a_published_part_is_fetched_and_readable(server: Hub, checkpoints: Path, tmp_path: Path) -> None:
    """From nothing to weights the service can read; and again without the network."""
    files = as_json(fetch("clasp-concat", "--json", cwd=tmp_path, endpoint=server.endpoint))["files"]
    folder = tmp_path / "weights" / "llm-lab" / "CLASP"
    assert [(file["path"], file["state"]) for file in files] == [
        (str(folder / f"{FUSION}.pt"), "fetched"),
        (str(folder / f"{FUSION}.safetensors"), "converted"),
    ]
    assert {(file["part"], file["commit"]) for file in files} == {("clasp-concat", FIRST)}
    tensors, expected = load_file(files[1]["path"]), load_file(checkpoints / "small.pt.expected")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)

    again = fetch("clasp-concat", cwd=tmp_path, endpoint="http://127.0.0.1:9")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("present") == 2
    assert f"llm-lab/CLASP/{FUSION}.safetensors" in again.stdout

    damaged = folder / f"{FUSION}.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    failed(fetch("clasp-concat", cwd=tmp_path, endpoint=server.endpoint), str(damaged), "replaced or damaged")


def test_another_revision_can_be_asked_for(server: Hub, tmp_path: Path) -> None:
    """What somebody evaluated with may not be what is newest."""
    revision = f"clasp-concat={'9' * 40}"
    failed(
        fetch("clasp-concat", "--revision", revision, cwd=tmp_path, endpoint=server.endpoint), "9" * 40, "404"
    )
    done = fetch(
        "clasp-concat", "--revision", f"clasp-concat={FIRST}", cwd=tmp_path, endpoint=server.endpoint
    )
    assert done.returncode == 0, done.stderr


def test_wrong_usage_is_said_before_anything_is_fetched(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 2 and what would be right; status 1 where only the folder is not set."""
    for arguments, words in (
        (["whisper"], "clasp-concat"),
        (["clasp-concat", "--revision", "main"], "PART=REV"),
        ([], "PART"),
    ):
        done = fetch(*arguments, cwd=tmp_path, endpoint=server.endpoint)
        assert done.returncode == 2
        assert words in done.stderr
    monkeypatch.delenv("CLASP_MODELS_DIR", raising=False)
    failed(clasp("models", "fetch", "clasp-concat", cwd=tmp_path), "CLASP_MODELS_DIR")
    assert server.requests == []
    assert list(tmp_path.iterdir()) == []


def test_the_help_names_all_that_can_be_fetched(tmp_path: Path) -> None:
    """Nobody reads the source to learn a part's name."""
    shown = " ".join(clasp("models", "fetch", "--help", cwd=tmp_path).stdout.split()).replace("- ", "-")
    for name in [*PUBLISHED, *GROUPS]:
        assert name in shown


def test_a_checkpoint_is_converted(checkpoints: Path, tmp_path: Path) -> None:
    """For weights that came some other way."""
    (tmp_path / "fusion.pt").write_bytes((checkpoints / "small.pt").read_bytes())
    done = clasp("models", "convert", "fusion.pt", cwd=tmp_path)
    assert done.stdout == "fusion.safetensors: HubertLabseConcat, 43 tensors\n"
    made = as_json(clasp("models", "convert", "fusion.pt", "--out", "x.st", "--json", cwd=tmp_path))
    assert (made["path"], made["class"], made["tensors"]) == ("x.st", "HubertLabseConcat", 43)
    assert (tmp_path / "x.st").read_bytes() == (tmp_path / "fusion.safetensors").read_bytes()


def test_a_checkpoint_that_could_run_something_is_refused(tmp_path: Path) -> None:
    """One line that names what it would have called, and nothing done."""
    torch.save({"x": Call()}, tmp_path / "evil.pt")
    failed(clasp("models", "convert", "evil.pt", cwd=tmp_path), "evil.pt", "posix.system")
    assert {path.name for path in tmp_path.iterdir()} == {"evil.pt"}
    assert clasp("models", "convert", "nothing.pt", cwd=tmp_path).returncode == 2
