"""That the tests which are left out by default are still there for who asks."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("arguments", "there"), [([], False), (["-m", "slow"], True), (["-m", "not slow"], False)]
)
def test_slow_tests_run_when_asked_for(arguments: list[str], there: bool) -> None:
    """A mark that hides tests for good would look exactly like tests that pass."""
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/app/test_kills.py", *arguments],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert ("test_nothing_acknowledged_is_lost_in_three_hundred_kills" in collected.stdout) is there
    assert "deselected" in collected.stdout
