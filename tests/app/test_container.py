"""What the container may do: little, as its files say, and enough, as the service shows under such limits."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.audio_files import encode, tone
from tests.service import ROOT, RunningService

USER = 10001
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, those of its last stage only."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    found: list[tuple[str, str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        name, _, arguments = line.strip().partition(" ")
        if name.upper() == "FROM":
            found.clear()
        if name:
            found.append((name.upper(), arguments.strip()))
    return found


def test_the_image_s_user_is_not_root() -> None:
    """A number and no name: an orchestrator that asks for non-root (`runAsNonRoot`) cannot look a name up.
    What runs behind it, the health check too, is that user's; and the program is nobody's to change."""
    written = instructions()
    names = [name for name, _ in written]
    assert [arguments for name, arguments in written if name == "USER"] == [str(USER)]
    assert names.index("USER") < min(names.index(name) for name in ("ENTRYPOINT", "CMD", "HEALTHCHECK"))
    assert "RUN" not in names[names.index("USER") :]
    for name, arguments in written:
        if name in ("COPY", "ADD"):
            assert "--chown" not in arguments
    assert any(f"useradd --uid {USER}" in arguments for _, arguments in written)
    assert ("VOLUME", "/data") in written


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_composed_service_can_do_little(name: str) -> None:
    """Somebody who breaks out of a decoder must find no capability, no way to root and nothing to write to;
    and nobody a port that is open to other machines."""
    service = COMPOSE["services"][name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["tmpfs"] == ["/tmp"]
    assert not service.keys() & {"privileged", "cap_add", "devices", "user", "network_mode", "pid", "ipc"}
    assert not any("docker.sock" in volume or volume.startswith(("/", ".")) for volume in service["volumes"])
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    # `fetch` runs once and serves nobody
    assert service.get("read_only") is (True if "ports" in service else None)


ALL_ELSE_READ_ONLY = """
set -e
mount --make-rprivate /
mount --bind "$WRITABLE" "$WRITABLE"
for place in $(cut -d ' ' -f 5 /proc/self/mountinfo); do
    case $place in
        "$WRITABLE" | /proc* | /sys* | /dev*) ;;
        *) mount -o remount,bind,ro "$place" ;;
    esac
done
exec "$@"
"""
# The container has no capability. Here it is one, to read: the interpreter may lie in somebody's closed home.
READING = "-all,+dac_read_search"
CONFINED = [
    *("unshare", "--mount", "sh", "-c", ALL_ELSE_READ_ONLY, "sh"),
    *("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--no-new-privs"),
    *(f"--inh-caps={READING}", f"--ambient-caps={READING}", f"--bounding-set={READING}"),
]


@pytest.fixture
def writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All that `CONFINED` can write to; `index_data` and `tmp` in it are the container's /data and /tmp."""
    if os.geteuid() != 0 or not (shutil.which("unshare") and shutil.which("setpriv")):
        pytest.skip("only root, with unshare and setpriv, can take a service's file system away")
    folder = tmp_path / "writable"
    for path in (folder, folder / "index_data", folder / "tmp"):
        path.mkdir()
        os.chown(path, USER, USER)
    monkeypatch.setenv("WRITABLE", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder / "tmp"))
    tried = subprocess.run([*CONFINED, "true"], capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"this machine lets nobody remount file systems: {tried.stderr}")
    return folder


def test_the_service_works_as_the_container_runs_it(writable: Path) -> None:
    """No root, and nothing to write to but its data and /tmp: uploads and searches work all the same, and it
    did not even try elsewhere."""
    for elsewhere in (ROOT / "app" / "x", Path("/var/tmp/x"), Path("/tmp/x"), writable.parent / "x"):
        assert subprocess.run([*CONFINED, "touch", elsewhere], capture_output=True).returncode != 0
    content = encode(tone(1.0, rate=48_000), 48_000, "m4a")
    with RunningService(writable, program="tests.stand_in", under=CONFINED) as service:
        service.start()
        pids = service.processes()
        assert len(pids) > 1
        for pid in pids:
            status = Path(f"/proc/{pid}/status").read_text()
            assert re.search(rf"^Uid:\t{USER}\t{USER}\t{USER}\t{USER}$", status, re.MULTILINE)
            assert re.search(r"^NoNewPrivs:\t1$", status, re.MULTILINE)
        record = service.ready(content, id="a")
        assert [hit["id"] for hit in service.found("anything")] == ["a"]
        assert [hit["id"] for hit in service.found_by_sound(content)] == ["a"]
        assert service.client.get("/audio/a/content").content == content
        assert service.client.delete("/audio/a").status_code == 204
        assert record["status"] == "ready"
        assert service.stop() == 0
        log = service.log()
    assert not re.search("Read-only file system|Permission denied|Traceback", log), log
    owners = {path.stat().st_uid for path in (writable / "index_data").rglob("*")}
    assert owners == {USER}
    assert list((writable / "tmp").iterdir()) == []
