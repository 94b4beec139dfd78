"""`clasp demo`, which `make demo` calls: a stranger's first minute with the project."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.samples import ask, lines
from tests.service import ROOT, RunningService, environment


def test_the_demo_finds_everything_and_leaves_nothing(tmp_path: Path) -> None:
    """Status 0 only if every question in every language found its recording first: the product's promise."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "demo"],
        env=environment(threads=1) | {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)},
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
    spoken = {line["id"]: line["lang"] for line in lines("manifest.jsonl")}
    questions = lines("questions.jsonl")
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
    service: RunningService, bees: bytes, change: dict[str, Any], right: bool
) -> None:
    """A demo that is always content proves nothing: another recording, or the wrong minute, is BAD."""
    service.upload(bees, id="demo-bees", collection="demo").raise_for_status()
    service.settled("demo-bees")
    question = {"q": "bees", "lang": "en", "expect": "demo-bees"} | change
    assert ask(service.client, question, "demo") is right
