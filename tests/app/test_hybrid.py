"""`CLASP_MODEL=hybrid` from the outside: hits say what was heard, and an upload's language is used."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from app.cli import cli
from app.main import create_app
from app.settings import Settings
from clasp_core import sandbox
from clasp_core.errors import ModelUnavailable
from clasp_core.models import open_model
from tests.conftest import Sample

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, samples: dict[str, Sample]) -> Iterator[Settings]:
    """Of a library with three samples, indexed through the command line."""
    try:
        _ = open_model("hybrid").fingerprint
    except ModelUnavailable as missing:
        pytest.skip(str(missing))
    folder, threads = tmp_path_factory.mktemp("hybrid"), torch.get_num_threads()
    given = {"CLASP_MODEL": "hybrid", "CLASP_DATA_DIR": str(folder / "data"), "CLASP_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (given | {"CLASP_WORKERS": "0"}).items():
            patch.setenv(name, value)
        for name in ("en-bees", "zh-chess", "fr-lift"):
            (folder / f"{name}.opus").write_bytes(samples[name].content)
        files = [str(folder / f"{name}.opus") for name in ("en-bees", "fr-lift")]
        assert as_json("index", *files, "--json")["indexed"] == 2
        assert as_json("index", str(folder / "zh-chess.opus"), "--lang", "zh", "--json")["indexed"] == 1
        yield Settings()
    torch.set_num_threads(threads)
    sandbox.stop()


def as_json(*arguments: str) -> Any:
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_command_line_shows_what_was_heard(settings: Settings) -> None:
    """In the table and in the JSON: a person sees at a glance whether a hit is right."""
    arguments = ["search", "Where do bees spend the winter?", "--limit", "1"]
    (hit,) = as_json(*arguments, "--json")["hits"]
    assert hit["metadata"]["path"].endswith("en-bees.opus")
    assert "bees stay inside the hive" in hit["segments"][0]["transcript"]
    assert hit["confidence"] > 0.8
    assert [found["id"] for found in as_json(*arguments, "--min-score", "auto", "--json")["hits"]] == [
        hit["id"]
    ]
    table = CliRunner(env={"COLUMNS": "200"}).invoke(cli, arguments).stdout
    assert table.splitlines()[0].split() == ["rank", "time", "score", "conf.", "recording", "id", "heard"]
    assert "bees stay inside the hive" in table


def test_hits_say_what_was_heard(settings: Settings, samples: dict[str, Sample]) -> None:
    """Over HTTP, too; and a recording as the question is heard as an upload is, so it finds itself."""
    with TestClient(create_app(settings)) as client:
        answer = client.get("/search", params={"q": "两位老人在下棋", "lang": "zh"}).json()
        assert answer["model"]["name"] == "hybrid"
        best = answer["hits"][0]["segments"][0]
        assert best.keys() == {"start_s", "end_s", "score", "transcript"}
        assert any("\u4e00" <= letter <= "\u9fff" for letter in best["transcript"])
        asked = {"files": {"file": samples["zh-chess"].content}, "data": {"lang": "zh"}}
        answer = client.post("/search/audio", **asked).json()  # type: ignore[arg-type]
        assert answer["query"] == {"text": None, "lang": "zh", "normalized": None}
        assert answer["hits"][0]["score"] == pytest.approx(1, abs=1e-3)
        assert answer["hits"][0]["metadata"]["path"].endswith("zh-chess.opus")
        refused = client.post("/search/audio", files={"file": b"x"}, data={"lang": "not a tag"})
        assert (refused.status_code, refused.json()["code"]) == (422, "invalid_language")
