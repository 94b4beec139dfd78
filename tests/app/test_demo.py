"""`make demo`: a stranger's first minute with the project."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import SAMPLES, lines
from tests.service import RunningService, environment


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", SAMPLES / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_finds_everything_and_leaves_nothing(tmp_path: Path) -> None:
    """Status 0 only if every question in every language found its recording first: the product's promise."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    done = subprocess.run(
        [sys.executable, str(SAMPLES / "demo.py")],
        env=environment(threads=1) | {"TMPDIR": str(temporary)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert list(tmp_path.iterdir()) == [temporary]
    assert [path.name for path in temporary.iterdir() if path.name.startswith("clasp-demo-")] == []
    running = subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True, check=True).stdout
    assert str(temporary) not in running
    wrong = [line for line in done.stdout.splitlines() if line.startswith("BAD")]
    assert not wrong, "\n".join(wrong)
    assert done.returncode == 0, done.stderr


def test_the_demo_asks_in_many_languages() -> None:
    """At least five, Persian among them, and mostly other ones than the recordings': that is the point."""
    spoken = {line["id"]: line["lang"] for line in lines(SAMPLES / "manifest.jsonl")}
    questions = lines(SAMPLES / "questions.jsonl")
    assert {question["expect"] for question in questions} <= spoken.keys()
    assert len({question["lang"] for question in questions}) >= 5
    assert "fa" in {question["lang"] for question in questions}
    across = [question for question in questions if spoken[question["expect"]] != question["lang"]]
    assert len(across) > len(questions) / 2


@pytest.mark.parametrize(
    ("change", "right"),
    [
        ({}, True),
        ({"expect": "en-doctor"}, False),
        ({"expect_start_s": 0.0, "expect_end_s": 5.0}, True),
        ({"expect_start_s": 20.0, "expect_end_s": 30.0}, False),
    ],
)
def test_the_demo_notices_a_wrong_answer(
    demo: ModuleType, service: RunningService, bees: bytes, change: dict[str, Any], right: bool
) -> None:
    """A demo that is always content proves nothing: another recording, or the wrong minute, is BAD."""
    service.upload(bees, id="demo-bees", collection="demo").raise_for_status()
    service.settled("demo-bees")
    question = {"q": "bees", "lang": "en", "expect": "demo-bees"} | change
    assert demo.ask(service.client, question, "demo") is right
