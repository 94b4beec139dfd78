"""What was acknowledged survives: a sample of `python -m tests.kill_test`, and that the whole is whole."""

import io
import random
import re
from pathlib import Path

import pytest

from clasp_core import faults
from clasp_core.faults import POINTS
from tests.kill_test import EVERYWHERE, EVERYWHERE_IN_S3, run
from tests.postgres import IN_A_FILE
from tests.service import ROOT

pytestmark = IN_A_FILE

SAMPLE = [
    ("upload", "catalog.registered"),
    ("upload", "library.registered"),
    ("worker", "catalog.completed"),
    ("delete", "library.forgotten"),
    ("shutdown", "index.placed"),
    ("start", "library.tidied"),
    ("backup", "backup.described"),
    ("restore", "restore.moved"),
    ("reindex", "reindex.switching"),
]


@pytest.mark.timeout(600)
def test_nothing_acknowledged_is_lost_whoever_is_killed_when(tmp_path: Path) -> None:
    """The promise that a library stands on, where it is hardest to keep, and at a few random moments."""
    log = io.StringIO()
    summary = run(tmp_path, kills=len(SAMPLE) + 8, seed=7, log=log, points=SAMPLE)
    assert summary["violations"] == [], log.getvalue()
    assert summary["points_passed"] == len(SAMPLE)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_acknowledged_is_lost_between_a_catalogue_and_a_store_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two systems that know nothing of each other must agree whoever dies between them: bytes that were sent
    and of which there is no row, and rows whose bytes are to go."""
    monkeypatch.setenv("CLASP_TEST_AUDIO_STORE", "s3")
    points = [("upload", "s3.sent"), ("delete", "s3.removed")]
    log = io.StringIO()
    summary = run(tmp_path, kills=len(points), seed=5, log=log, points=points)
    assert summary["violations"] == [], log.getvalue()
    assert summary["points_passed"] == len(points)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_nothing_acknowledged_is_lost_at_any_point_with_a_store_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same at every point that is passed then, large uploads and restores among them."""
    monkeypatch.setenv("CLASP_TEST_AUDIO_STORE", "s3")
    log, points = io.StringIO(), EVERYWHERE_IN_S3
    summary = run(tmp_path, kills=100, seed=random.SystemRandom().randrange(1000), log=log, points=points)
    assert summary["violations"] == [], log.getvalue()
    assert summary["points_passed"] == len(points)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_nothing_acknowledged_is_lost_in_three_hundred_kills(tmp_path: Path) -> None:
    """Every point, and the moments between them: the rare ones are what power cuts hit."""
    log = io.StringIO()
    summary = run(tmp_path, kills=300, seed=random.SystemRandom().randrange(1000), log=log, points=EVERYWHERE)
    assert summary["violations"] == [], log.getvalue()
    assert summary["points_passed"] == len(EVERYWHERE)


def test_every_point_is_killed_at() -> None:
    """A point that nobody dies at proves nothing; one that is misspelt is never passed."""
    passed = [
        point
        for path in sorted((ROOT / "clasp_core").glob("*.py"))
        for point in re.findall(r'\bfault\("([^"]+)"\)', path.read_text())
    ]
    assert sorted(passed) == sorted(POINTS)
    # at those of Milvus, in tests/core/test_milvus.py
    elsewhere = {point for point in POINTS if point.startswith("milvus.")}
    assert {point for _, point in EVERYWHERE + EVERYWHERE_IN_S3} == POINTS.keys() - elsewhere


def test_nothing_is_armed_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sets nothing risks nothing, and a name that is no point kills nobody."""
    assert faults._from_environment("") is None
    assert faults._armed is None
    die = faults._from_environment("library.registered:3")
    assert die is not None
    killed: list[int] = []
    monkeypatch.setattr(faults.os, "kill", lambda pid, number: killed.append(number))
    for _ in range(5):
        for point in POINTS:
            die(point)
    assert killed == [9]
