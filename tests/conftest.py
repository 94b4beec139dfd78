"""What tests of the service share: one running service, the bundled samples in it, and the marks' meaning."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from app.samples import SAMPLES
from tests.service import RunningService

# Tests run side by side; OpenMP's idle threads wait in busy loops, and take the processor from the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MAX_UPLOAD_BYTES = 4_000_000
"""What the shared service accepts: more than any honest file of the tests."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `slow` run only when the expression after `-m` speaks of them. Those that start processes
    come first, so that none of the long ones is what all others wait for at the end."""
    items.sort(key=lambda item: item.path.parent.name == "core")
    if "slow" in config.getoption("markexpr"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if item not in slow]
    config.hook.pytest_deselected(items=slow)


@dataclass(frozen=True)
class Sample:
    """A bundled recording: its manifest line and its bytes."""

    line: dict[str, Any]
    content: bytes

    @property
    def id(self) -> str:
        return self.line["id"]

    @property
    def text(self) -> str:
        return self.line["text"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def samples() -> dict[str, Sample]:
    """The bundled recordings by id."""
    manifest = lines(SAMPLES / "manifest.jsonl")
    return {line["id"]: Sample(line, (SAMPLES / line["audio"]).read_bytes()) for line in manifest}


@pytest.fixture(scope="session")
def bees(samples: dict[str, Sample]) -> bytes:
    """Some honest recording."""
    return samples["en-bees"].content


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """The one service that most tests talk to, each in a collection of its own."""
    folder = tmp_path_factory.mktemp("service")
    with RunningService(folder, max_upload_bytes=MAX_UPLOAD_BYTES) as running:
        yield running.start()
        workers_lost = running.metric("clasp_worker_restarts_total")
        assert running.stop() == 0
        assert workers_lost == 0, "something that a test uploaded took a worker down"
        assert "unexpected error" not in running.log(), "something that a test asked met a bug"


@pytest.fixture
def collection() -> str:
    """The name of a collection that nobody else uses."""
    return f"test-{uuid4().hex}"


@pytest.fixture(scope="session")
def searchable(service: RunningService, samples: dict[str, Sample]) -> str:
    """The name of a collection that holds every sample, ready to be found."""
    for sample in samples.values():
        form = {"id": sample.id, "lang": sample.line["lang"], "collection": "samples"}
        uploaded = service.upload(
            sample.content, **form, metadata=json.dumps({"voice": sample.line["speaker"]})
        )
        assert uploaded.status_code == 202, uploaded.text
    for sample in samples.values():
        assert service.settled(sample.id, within_s=120)["status"] == "ready"
    return "samples"


@pytest.fixture(scope="session")
def speech_dev() -> Path:
    """The folder of real speech that CLASP_SPEECH_DEV names."""
    folder = os.environ.get("CLASP_SPEECH_DEV")
    if not folder or not (Path(folder) / "manifest.jsonl").is_file():
        pytest.skip("CLASP_SPEECH_DEV does not name a folder of real speech with a manifest.jsonl")
    return Path(folder)
