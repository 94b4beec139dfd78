"""`deploy/check_service.py`: the one script that is run against whatever a service is made of."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SAMPLES
from tests.postgres import postgres_url
from tests.service import ROOT, RunningService
from tests.stack import Stack


def checked(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "deploy" / "check_service.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


def test_a_single_machine_passes(service: RunningService) -> None:
    """SQLite and FAISS; and it leaves nothing of its own behind."""
    before = service.listed()
    done = checked("--url", str(service.client.base_url))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert service.listed() == before


def test_what_is_not_right_is_told(service: RunningService) -> None:
    """One line and status 1, for a pipeline: where nobody listens, and where the collection is not empty."""
    service.ready((SAMPLES / "audio" / "en-bees.opus").read_bytes(), collection="taken")
    for arguments in (("--url", "http://127.0.0.1:1"), ("--collection", "taken")):
        done = checked("--url", str(service.client.base_url), *arguments)
        assert done.returncode == 1
        assert done.stderr == ""
        assert done.stdout.splitlines()[-1].startswith("BAD ")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_stack_passes(tmp_path: Path) -> None:
    """The same script, unchanged, with each API of several machines' worth of processes."""
    settings = {"database_url": postgres_url(), "api_keys": "a key"}
    with Stack(tmp_path, program="app.cli", **settings) as stack:
        for api in stack.apis:
            api.client.headers["X-API-Key"] = "a key"
        stack.start()
        for api in stack.apis:
            done = checked("--url", str(api.client.base_url), "--key", "a key")
            assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
