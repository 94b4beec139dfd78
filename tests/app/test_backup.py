"""`clasp backup` and `clasp restore` around a service that is in use."""

import contextlib
import json
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from clasp_core.backup import restore
from tests.app.test_processes import recording
from tests.conftest import Sample
from tests.postgres import IN_A_FILE
from tests.service import RunningService, clasp, environment, eventually

pytestmark = IN_A_FILE


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service whose data directory these tests copy."""
    with RunningService(tmp_path_factory.mktemp("backup")) as service:
        yield service.start()
        assert service.stop() == 0


@dataclass
class Client:
    """Uploads all the time, deletes half of it, and notes when it was answered what. Its first five stay."""

    name: str
    contents: dict[str, bytes] = field(default_factory=dict)
    acknowledged: dict[str, float] = field(default_factory=dict)
    asked_to_delete: dict[str, float] = field(default_factory=dict)
    deleted: dict[str, float] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def work(self, base_url: httpx.URL, over: threading.Event, seed: int) -> None:
        chance = random.Random(seed)
        with httpx.Client(base_url=base_url, timeout=60) as client:
            while not over.wait(0.2):
                seed += 1
                name = f"{self.name}-{seed}"
                self.contents[name] = recording(seed)
                form = {"data": {"id": name}, "files": {"file": self.contents[name]}}
                self._expect(client.post("/audio", **form), 202)
                self.acknowledged[name] = time.monotonic()
                left = [one for one in self.acknowledged if one not in self.asked_to_delete][5:]
                if left and seed % 2:
                    one = chance.choice(left)
                    self.asked_to_delete[one] = time.monotonic()
                    self._expect(client.delete(f"/audio/{one}"), 204)
                    self.deleted[one] = time.monotonic()

    def _expect(self, answer: httpx.Response, status: int) -> None:
        if answer.status_code != status:
            self.refused.append(answer.text)


def made(done: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    outcome: dict[str, Any] = json.loads(done.stdout)
    return outcome


def records(data_dir: Path) -> dict[str, dict[str, Any]]:
    """What a library that nobody runs holds: its records with their bytes and the number of their vectors."""
    with contextlib.closing(sqlite3.connect(data_dir / "catalog.sqlite3")) as db:
        db.row_factory = sqlite3.Row
        rows = db.execute(
            "SELECT *, (SELECT count(*) FROM segments WHERE recording = key) AS vectors FROM recordings"
        )
        found = {row["id"]: dict(row) for row in rows}
    for row in found.values():
        sha256 = row["sha256"]
        row["bytes"] = (data_dir / "audio" / sha256[:2] / sha256[2:]).read_bytes()
    return found


def test_backups_under_load_hold_all_that_was_acknowledged(
    running: RunningService, samples: dict[str, Sample], tmp_path: Path
) -> None:
    """The service cannot be stopped every night: each backup must be a library of some moment while it was
    made, with everything acknowledged before, and it is made between two writes of a busy day."""
    for name in ("en-bees", "es-bread"):
        running.ready(samples[name].content, id=name)
    folder, place = running.data_dir, tmp_path / "backup"
    clients = [Client("x"), Client("y")]
    over = threading.Event()
    threads = [
        threading.Thread(target=client.work, args=(running.client.base_url, over, seed))
        for client, seed in zip(clients, (10_000, 20_000), strict=True)
    ]
    for thread in threads:
        thread.start()
    try:
        eventually(lambda: all(len(client.deleted) > 3 for client in clients), within_s=60)
        for number in range(3):
            began = time.monotonic()
            outcome = made(clasp("backup", place, "--json", cwd=folder))
            ended = time.monotonic()
            new = tmp_path / f"restored {number}"
            restore(place, new)
            found = records(new)
            assert len(found) == sum(outcome["recordings"].values())
            assert found.keys() >= {"en-bees", "es-bread"}
            for client in clients:
                mine = {name for name in found if name.startswith(f"{client.name}-")}
                stayed = {
                    name
                    for name, when in list(client.acknowledged.items())
                    if when < began and client.asked_to_delete.get(name, ended) >= ended
                }
                gone = {name for name, when in list(client.deleted.items()) if when < began}
                assert stayed, "the test shows nothing"
                assert mine >= stayed
                assert not mine & gone
                assert all(found[name]["bytes"] == client.contents[name] for name in mine)
            assert all(row["vectors"] == (row["segments"] or 0) for row in found.values())
            assert all((row["vectors"] > 0) == (row["status"] == "ready") for row in found.values())
            assert not any(row["lease_owner"] for row in found.values())
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert not any(client.refused for client in clients), "the service goes on while it is backed up"
    for client in clients:
        for name in client.acknowledged.keys() - client.deleted.keys():
            running.client.delete(f"/audio/{name}").raise_for_status()


def test_a_restored_library_answers_as_the_one_that_was_lost(
    running: RunningService, samples: dict[str, Sample], tmp_path: Path
) -> None:
    """The new machine serves at once what the old one knew: there is no worker here that could embed anything
    anew, and every record and hit is the same."""
    for name in ("en-doctor", "hi-exam", "fr-lift"):
        running.ready(samples[name].content, id=name, metadata=json.dumps({"name": name}))
    questions = ("bees in the hive", "the lift is broken", "چه کسی نان می‌پزد؟")
    before = (running.listed(), [running.found(question, limit=1000) for question in questions])
    place = tmp_path / "backup"
    shown = clasp("backup", place, cwd=running.data_dir)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"{len(before[0])} recordings" in shown.stdout
    shown = clasp("restore", place, "--verify-only", cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "intact" in shown.stdout
    assert not (tmp_path / "index_data").exists()
    with RunningService(tmp_path, workers=0) as elsewhere:
        assert clasp("restore", place, cwd=tmp_path).returncode == 0
        elsewhere.start()
        after = (elsewhere.listed(), [elsewhere.found(question, limit=1000) for question in questions])
        assert after == before
        content = elsewhere.client.get("/audio/en-doctor/content").raise_for_status().content
        assert content == samples["en-doctor"].content
        refused = clasp("restore", place, cwd=tmp_path)
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
        assert "not empty" in refused.stderr
        assert elsewhere.listed() == before[0]
        assert elsewhere.stop() == 0


def test_trouble_is_one_line_and_status_1(running: RunningService, tmp_path: Path) -> None:
    """Backups are run by cron, which mails what is printed: the reason, and no traceback."""
    data_dir = running.data_dir / "index_data"
    clutter = tmp_path / "clutter"
    (clutter / "mine").mkdir(parents=True)
    file = tmp_path / "file"
    file.write_bytes(b"")
    place = tmp_path / "backup"
    assert clasp("backup", place, cwd=tmp_path, data_dir=data_dir).returncode == 0
    damaged = next(path for path in (place / "audio").rglob("*") if path.is_file())
    damaged.write_bytes(b"")
    elsewhere = {"database_url": "postgresql://me:secret@127.0.0.1:9/clasp"}
    for arguments, settings, words in (
        (["backup", clutter], {}, "folder of its own"),
        (["backup", place], elsewhere, "database"),
        (["restore", place, "--data-dir", tmp_path / "new"], {}, damaged.name),
        (["restore", place, "--verify-only"], {}, damaged.name),
        (["restore", place, "--data-dir", file], {}, "File exists"),
    ):
        done = clasp(*arguments, cwd=tmp_path, **{"data_dir": data_dir, **settings})
        assert (done.returncode, done.stdout) == (1, ""), (arguments, done.stderr)
        assert done.stderr.startswith("clasp: "), done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert words in done.stderr
        assert "secret" not in done.stderr
    assert not (tmp_path / "new").exists()

    # a disk without room for the catalogue
    command = f"ulimit -f 8; exec {sys.executable} -m app.cli backup full"
    done = subprocess.run(
        ["bash", "-c", command],
        env=environment(data_dir=data_dir),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith("clasp: The backup to full was not made: ")
    assert clasp("restore", "full", "--verify-only", cwd=tmp_path).returncode == 1
