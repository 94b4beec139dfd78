"""A disk that is full while things are written: nothing acknowledged is lost, and room is all it takes."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.app.test_errors import check_problem
from tests.kill_test import Sent, new_recording
from tests.postgres import IN_A_FILE
from tests.service import RunningService, eventually

pytestmark = IN_A_FILE

SmallDisk = Callable[[int], Path]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Makes a data directory on a file system of so many MB. Only root may make one."""
    folder = tmp_path / "index_data"
    folder.mkdir()

    def mounted(megabytes: int) -> Path:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder]
        made = subprocess.run(mount, capture_output=True)
        if made.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {made.stderr.decode().strip()}")
        return folder

    yield mounted
    if not folder.is_mount():
        return
    eventually(lambda: subprocess.run(["umount", folder], capture_output=True).returncode == 0, within_s=20)


def fill(folder: Path) -> None:
    """To the last byte, or nearly."""
    with (folder / "ballast").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass


def upload(service: RunningService, sent: Sent) -> int:
    return service.upload(sent.content, id=sent.id).status_code


@pytest.mark.timeout(300)
def test_a_full_disk_loses_nothing_and_room_is_enough(small_disk: SmallDisk) -> None:
    """Disks fill up at night. An upload, a deletion, a worker's commit and a snapshot all meet it; what is
    refused is not half done, what is there is still found, and nobody has to repair anything afterwards."""
    kept = [new_recording(number) for number in range(6)]
    disk = small_disk(4)
    with RunningService(disk.parent, program="tests.stand_in", min_free_bytes=0) as service:
        service.start()
        for sent in kept[:4]:
            assert upload(service, sent) == 202
        for sent in kept[:4]:
            assert service.settled(sent.id)["status"] == "ready"
        assert len(service.found("anything")) == 4
        worker = service.worker_pids()
        for pid in worker:
            os.kill(pid, signal.SIGSTOP)
        for sent in kept[4:]:
            assert upload(service, sent) == 202
        fill(disk)
        for pid in worker:
            os.kill(pid, signal.SIGCONT)

        assert upload(service, new_recording(100)) == 507
        deleted = service.client.delete(f"/audio/{kept[0].id}")
        if deleted.status_code == 204:
            kept.pop(0)
        assert {hit["id"] for hit in service.found("anything")} >= {sent.id for sent in kept[:3]}
        assert service.stop() == 0

        for _ in range(2):  # once still without room: it starts, or says why not
            service.start(wait=False)
            assert service.process is not None
            with contextlib.suppress(AssertionError):
                service.wait_until_ready()
            code = service.stop()
            said = [line for line in service.log().splitlines() if not line.startswith("{")]
            assert code == 0 or said[-1].startswith("clasp: "), said
            (disk / "ballast").unlink(missing_ok=True)

        service.start()
        eventually(lambda: all(item["status"] == "ready" for item in service.listed()), within_s=60)
        assert {item["id"] for item in service.listed()} == {sent.id for sent in kept}
        assert upload(service, new_recording(101)) == 202
        for sent in kept:
            assert service.client.get(f"/audio/{sent.id}/content").content == sent.content
            assert service.found_by_sound(sent.content)[0]["id"] == sent.id
        assert service.stop() == 0


@pytest.mark.skipif(
    os.environ.get("CLASP_TEST_AUDIO_STORE") == "s3", reason="what fills this disk are recordings"
)
def test_what_is_refused_or_waits_for_room_is_not_lost(small_disk: SmallDisk) -> None:
    """The one failure every service meets some day: uploads are refused and leave nothing behind, what is
    there is found, what was accepted waits, and all goes on once there is room."""
    disk = small_disk(24)
    with RunningService(disk.parent, program="tests.stand_in", min_free_bytes=0) as service:
        service.start()
        first = service.ready(new_recording(0).content)["id"]
        large = [os.urandom(5_000_000) for _ in range(6)]
        answers = [service.upload(content) for content in large]
        refused = [answer for answer in answers if answer.status_code != 202]
        assert refused
        for answer in refused:
            check_problem(answer, 507, "disk_full")
        eventually(lambda: {one["status"] for one in service.listed()} == {"ready", "failed"}, within_s=20)
        assert len(service.stored()) == len(service.listed())
        assert [hit["id"] for hit in service.found_by_sound(new_recording(0).content)] == [first]
        for one in service.listed():
            if one["id"] != first:
                assert service.client.delete(f"/audio/{one['id']}").status_code == 204

        (worker,) = service.worker_pids()
        os.kill(worker, signal.SIGSTOP)
        more = json.dumps({"notes": 30_000 * "x"})  # what is written again when the recording is leased
        waiting = [service.upload(new_recording(n).content, metadata=more).json()["id"] for n in range(1, 30)]
        fill(disk)
        os.kill(worker, signal.SIGCONT)
        eventually(lambda: "until the catalogue can be written" in service.log(), within_s=20)
        assert service.found("anything")[0]["id"]
        assert service.client.get(f"/audio/{waiting[-1]}").json()["status"] in ("pending", "processing")
        (disk / "ballast").unlink()
        for one in waiting:
            assert service.settled(one, within_s=30)["status"] == "ready"
        with contextlib.closing(sqlite3.connect(disk / "catalog.sqlite3")) as db:
            assert db.execute("SELECT DISTINCT attempts FROM recordings").fetchall() == [(1,)]
        assert service.worker_pids() == [worker]
        assert service.stop() == 0
        assert "unexpected error" not in service.log()
