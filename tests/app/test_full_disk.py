"""A disk that is full while things are written: nothing acknowledged is lost, and room is all it takes."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kill_test import Sent, new_recording
from tests.service import RunningService, eventually


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A data directory on a file system of 4 MB. Only root may make one."""
    folder = tmp_path / "index_data"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {made.stderr.decode().strip()}")
    yield folder
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
def test_a_full_disk_loses_nothing_and_room_is_enough(tmp_path: Path, small_disk: Path) -> None:
    """Disks fill up at night. An upload, a deletion, a worker's commit and a snapshot all meet it; what is
    refused is not half done, what is there is still found, and nobody has to repair anything afterwards."""
    kept = [new_recording(number) for number in range(6)]
    with RunningService(tmp_path, program="tests.stand_in") as service:
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
        fill(small_disk)
        for pid in worker:
            os.kill(pid, signal.SIGCONT)

        assert upload(service, new_recording(100)) >= 500
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
            (small_disk / "ballast").unlink(missing_ok=True)

        service.start()
        eventually(lambda: all(item["status"] == "ready" for item in service.listed()), within_s=60)
        assert {item["id"] for item in service.listed()} == {sent.id for sent in kept}
        assert upload(service, new_recording(101)) == 202
        for sent in kept:
            assert service.client.get(f"/audio/{sent.id}/content").content == sent.content
            assert service.found_by_sound(sent.content)[0]["id"] == sent.id
        assert service.stop() == 0
