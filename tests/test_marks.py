"""That the tests which are left out by default are still there for who asks."""

import subprocess
import sys
from pathlib import Path

THRICE = """
import pytest
for arguments in ([], ["-m", "slow"], ["-m", "not slow"]):
    print("asked for:", arguments)
    pytest.main(["--collect-only", "-q", "tests/app/test_kills.py", *arguments])
"""


def test_slow_tests_run_when_asked_for() -> None:
    """A mark that hides tests for good would look exactly like tests that pass."""
    done = subprocess.run(
        [sys.executable, "-c", THRICE], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    _, *collected = done.stdout.split("asked for:")
    there = ["test_nothing_acknowledged_is_lost_in_three_hundred_kills" in listed for listed in collected]
    assert there == [False, True, False]
    assert all("deselected" in listed for listed in collected)
