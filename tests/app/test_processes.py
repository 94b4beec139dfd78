"""The life and death of processes: a dead worker is replaced, nothing lingers. More deaths: test_kills.py."""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.audio_files import encode, speech
from tests.conftest import Sample
from tests.milvus import IN_MEMORY
from tests.service import ROOT, RunningService, clasp, environment, eventually, is_alive


def recording(seed: int) -> bytes:
    """A second of babble unlike any other seed's."""
    return encode(speech(1.0, seed=seed), 16_000)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[RunningService]:
    """A service of this test's own."""
    with RunningService(tmp_path, program="tests.stand_in") as running:
        yield running.start()


def all_ready(service: RunningService, contents: dict[str, bytes], within_s: float) -> None:
    """Wait until these and all others are ready.

    A recording that happened to be at work in five kills is given up with a reason that says to upload
    it again; so that is done here.
    """

    def unsettled() -> list[dict[str, Any]]:
        items = {item["id"]: item for item in service.listed(limit=1000)}
        missing = contents.keys() - items.keys()
        assert not missing, f"acknowledged, but missing: {missing}"
        for item in items.values():
            if item["status"] == "failed":
                assert item["error"]["code"] == "processing_failed", item
                again = service.upload(contents[item["id"]])
                assert (again.status_code, again.json()["id"]) == (200, item["id"])
        return [item for item in items.values() if item["status"] != "ready"]

    eventually(lambda: not unsettled(), within_s=within_s)


# --- the worker


def test_a_killed_worker_is_replaced_and_loses_nothing(alone: RunningService) -> None:
    """Decoders and models crash, and kernels kill for memory; the queue must be worked off all the same."""
    ids = {}
    for number in range(24):
        content = recording(number)
        ids[alone.upload(content).raise_for_status().json()["id"]] = content
        if number in (8, 16):
            eventually(alone.worker_pids, within_s=30)
            alone.kill_workers()
    all_ready(alone, ids, within_s=90)
    assert len(alone.listed()) == len(ids)
    assert alone.metric("clasp_worker_restarts_total") >= 1
    assert len(alone.found("anything", limit=1000)) == len(ids)

    # load balancers should know of the loss; but questions need no worker, and go on being answered
    alone.kill_workers()
    refusal = eventually(
        lambda: answer if (answer := alone.client.get("/readyz")).status_code == 503 else None, within_s=5
    )
    assert refusal.json()["code"] == "not_ready"
    assert refusal.headers["retry-after"] == "2"
    assert alone.client.get("/healthz").status_code == 200
    assert len(alone.found("anything", limit=1000)) == len(ids)
    alone.wait_until_ready()


# --- the API process


def test_workers_end_when_the_api_is_killed(alone: RunningService) -> None:
    """Orphans would go on writing beside the next service, and hold its memory."""
    for number in range(10):
        alone.upload(recording(number)).raise_for_status()
    processes = alone.processes()
    assert len(processes) >= 2
    alone.kill()
    eventually(lambda: not any(map(is_alive, processes)), within_s=25)


def test_sigterm_ends_everything_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Container platforms give 30 seconds and then kill; status 0 says that nothing went wrong. What was
    in the middle of being embedded is simply done after the next start."""
    monkeypatch.setenv("STAND_IN_PAUSE_S", "0.5")
    with RunningService(tmp_path, program="tests.stand_in") as service:
        service.start()
        long = service.upload(encode(speech(90.0), 16_000)).json()["id"]
        eventually(lambda: service.client.get(f"/audio/{long}").json()["status"] == "processing", within_s=20)
        processes = service.processes()
        began = time.monotonic()
        assert service.stop() == 0
        assert time.monotonic() - began < 30
        eventually(lambda: not any(map(is_alive, processes)), within_s=5)
        assert "Fatal Python error" not in service.log()
        monkeypatch.delenv("STAND_IN_PAUSE_S")
        service.start()
        assert service.settled(long)["status"] == "ready"


@IN_MEMORY
def test_everything_is_as_it_was_after_a_restart(alone: RunningService, samples: dict[str, Sample]) -> None:
    """The index in memory is a copy; it must come back the same, from its snapshot or without."""
    for name in ("en-bees", "fr-lift", "es-bread", "en-doctor"):
        alone.ready(samples[name].content, id=name, metadata=json.dumps({"name": name}))
    alone.client.delete("/audio/fr-lift").raise_for_status()
    before = (alone.listed(), alone.found("bees in the hive"))
    index = alone.data_dir / "index_data" / "index"
    damage: list[Callable[[], object]] = [
        lambda: None,
        lambda: [path.write_bytes(path.read_bytes()[:-100]) for path in index.glob("vectors-*")],
    ]
    for spoil in damage:
        assert alone.stop() == 0
        assert list(index.glob("vectors-*"))
        spoil()
        alone.start()
        assert (alone.listed(), alone.found("bees in the hive")) == before


# --- starts that must fail


def refuses_to_start(folder: Path, *words: str, **settings: object) -> None:
    """That `clasp serve` ends with 1 and one line for people that says why, logging aside."""
    done = clasp("serve", cwd=folder, **({"port": 0} | settings))
    assert done.returncode == 1, (done.stdout, done.stderr)
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert line.startswith("clasp: ")
    for word in words:
        assert word in line


def test_wrong_weights_are_refused(tmp_path: Path) -> None:
    """A damaged or swapped weights file gives plausible nonsense; better to say which file, and its hash."""
    from clasp_core.encoders.e5 import E5_SMALL

    folder = tmp_path / "weights"
    folder.mkdir()
    shutil.copy(E5_SMALL.locate(None), folder / E5_SMALL.local_name)
    with (folder / E5_SMALL.local_name).open("r+b") as file:
        file.seek(1000)
        file.write(b"spoilt")
    refuses_to_start(tmp_path, E5_SMALL.local_name, "sha256", E5_SMALL.sources[0].sha256, models_dir=folder)


def test_a_taken_port_is_refused(tmp_path: Path) -> None:
    """The commonest mistake of all: it is already running."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refuses_to_start(tmp_path, f"port {port}", "in use", port=port)


def test_an_address_of_another_machine_is_refused(tmp_path: Path) -> None:
    """As is a host name that nobody knows: the line repeats what was asked for."""
    refuses_to_start(tmp_path, "listen", "192.0.2.1", host="192.0.2.1", port=0, api_keys="secret")


def test_the_data_of_another_model_is_refused(tmp_path: Path, bees: bytes) -> None:
    """Vectors of two models in one index would rank nonsense; the line says what can be done about it."""
    from safetensors.numpy import load_file, save_file

    from clasp_core import models

    (tmp_path / "bees.opus").write_bytes(bees)
    assert clasp("index", "bees.opus", cwd=tmp_path).returncode == 0
    other = tmp_path / "other"
    shutil.copytree(Path(models.__file__).parent / "weights" / "mini", other)
    weights = load_file(other / "fusion.safetensors")
    name = min(weights)
    save_file(weights | {name: weights[name] * 1.01}, other / "fusion.safetensors")
    refuses_to_start(tmp_path, "another model", "clasp reindex", model=other)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """A wrong mount shows at the start, not at the first upload."""
    (tmp_path / "file").write_text("")
    refuses_to_start(tmp_path, "file", data_dir=tmp_path / "file" / "index_data")


def test_several_processes_share_one_library(tmp_path: Path, bees: bytes) -> None:
    """Two services on one data directory (a rolling update) and a `clasp worker` beside them: each sees at
    once what another did, and all end politely."""
    program = "tests.stand_in"
    with (
        RunningService(tmp_path, program=program, workers=0) as first,
        RunningService(tmp_path, program=program, workers=0) as second,
    ):
        first.start(wait=False)
        second.start(wait=False)
        for service in (first, second):
            service.wait_until_ready()
        uploaded = first.upload(bees, id="bees").json()
        assert uploaded["status"] == "pending"
        command = [sys.executable, "-m", program, "worker"]
        with subprocess.Popen(
            command,
            env=environment(**first.settings) | {"PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            stderr=subprocess.DEVNULL,
        ) as worker:
            try:
                assert second.settled("bees")["status"] == "ready"
                assert second.found("bees in the hive") == first.found("bees in the hive") != []
                second.client.delete("/audio/bees").raise_for_status()
                assert first.found("bees in the hive") == []
                worker.terminate()
                assert worker.wait(30) == 0
            finally:
                worker.kill()
        assert (first.stop(), second.stop()) == (0, 0)
