"""The check for keys that were committed: it must find them, and must be believed."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.service import ROOT


def checked(folder: Path) -> subprocess.CompletedProcess[str]:
    """What `make check` runs, on another folder."""
    return subprocess.run(
        [sys.executable, "-m", "tests.secrets_check", str(folder)], cwd=ROOT, capture_output=True, text=True
    )


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with some honest files."""
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    (tmp_path / ".gitignore").write_text(".env\n")
    (tmp_path / "notes.md").write_text(f"sha256 {'0123456789abcdef' * 4}, a key is `clasp_<id>_<secret>`\n")
    return tmp_path


def test_a_planted_key_is_found(repository: Path) -> None:
    """A key in the history of a public repository is lost for good: it must not get that far. It is found by
    its form, as the service makes it, wherever it stands; and the check's output does not spread it."""
    assert checked(repository).returncode == 0, "no false alarms"
    key = "clasp_" + "0123456789ab" + "_" + "0123456789abcdef" * 4
    (repository / ".env").write_text(f"CLASP_API_KEYS={key}\n")
    assert checked(repository).returncode == 0, "git ignores it"
    (repository / "notes.md").write_text(f"# how to\n\n    curl -H 'X-API-Key: {key}' ...\n")
    (repository / "deploy.py").write_text("-----BEGIN RSA PRIVATE " + "KEY-----\n")
    found = checked(repository)
    assert found.returncode == 1
    assert found.stdout.splitlines() == [
        "deploy.py:1: Private Key",
        "notes.md:3: clasp-search API key",
    ]
    assert key not in found.stdout + found.stderr
