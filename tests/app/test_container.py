"""What the container may do: little, as its files say, and enough, as the service shows under such limits."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.audio_files import encode, tone
from tests.service import ROOT, RunningService, environment, eventually

USER = 10001
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
RIGHTS = {"proxy": ["NET_BIND_SERVICE"], "s3": ["CHOWN", "SETUID", "SETGID"]}
"""Of engines: the proxy's ports, and what the S3 store's image needs to become another user than root."""
ENLARGED = {"scaled", "monitoring"}


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
    and nobody a port that is open to other machines, but for the proxy's."""
    service = COMPOSE["services"][name]
    assert service["cap_drop"] == ["ALL"]
    assert service.get("cap_add", []) == RIGHTS.get(name, [])
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["tmpfs"][0] == "/tmp"
    assert not service.keys() & {"privileged", "devices", "network_mode", "pid", "ipc"}
    ours = "build" in service
    assert not (ours and "user" in service)
    for volume in service.get("volumes", []):
        assert volume == "./deploy/secrets/tls:/run/tls:ro" or not volume.startswith(("/", "."))
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:") or name == "proxy"
    # `fetch` runs once and serves nobody; Milvus writes beside its configuration
    assert service.get("read_only", False) is (name not in ("fetch", "milvus"))
    if not ours:
        assert re.search(r":v?\d+\.\d+", service["image"]), "not pinned by its version"
    if ENLARGED & set(service.get("profiles", [])):
        assert service["mem_limit"]
        assert service["healthcheck"] if not name.startswith("api") else "HEALTHCHECK" in dict(instructions())
        assert service["restart"] == ("on-failure:5" if name == "buckets" else "unless-stopped")


def test_what_ends_is_given_the_time_that_it_takes() -> None:
    """A replica that is killed while it drains breaks off the uploads for which it drains."""
    for name in ("api1", "api2"):
        service = COMPOSE["services"][name]
        seconds = int(service["stop_grace_period"].removesuffix("s"))
        assert seconds >= int(service["environment"]["CLASP_DRAIN_S"]) + 30
    proxied = (ROOT / "deploy" / "Caddyfile").read_text()
    assert "grace_period 60s" in proxied
    assert COMPOSE["services"]["proxy"]["stop_grace_period"] == "70s"


def test_databases_are_met_by_nobody_else() -> None:
    """PostgreSQL, Milvus and the S3 store are in a network without a way in or out; the proxy, where
    strangers come, is not in it."""
    assert COMPOSE["networks"]["data"] == {"internal": True}
    within = {name for name, service in COMPOSE["services"].items() if "data" in service.get("networks", [])}
    assert within == {"api1", "api2", "worker", "postgres", "milvus", "s3", "buckets"}
    for name in ("postgres", "milvus", "s3", "worker"):
        assert COMPOSE["services"][name]["networks"] == ["data"]


def test_secrets_are_made_and_belong_together(tmp_path: Path) -> None:
    """No password is in a file that is shared, none has a default, and what one container is told another
    expects. A second run changes nothing: it would lock everybody out."""
    (tmp_path / "deploy").mkdir()
    script = shutil.copy(ROOT / "deploy" / "secrets.sh", tmp_path / "deploy")
    folder = tmp_path / "deploy" / "secrets"

    def made() -> dict[str, str]:
        subprocess.run(["sh", script, "scaled"], check=True)
        return {
            path.name: path.read_text() for path in [*folder.iterdir(), tmp_path / ".env"] if path.is_file()
        }

    first = made()
    assert made() == first
    assert folder.stat().st_mode & 0o777 == 0o700
    said = dict(re.findall(r"^(\w+)=(.+)$", "\n".join(first.values()), re.MULTILINE))
    service = dict(line.split("=", 1) for line in first["clasp.env"].splitlines())
    secret = said["POSTGRES_PASSWORD"]
    assert re.fullmatch(r"[0-9a-f]{48}", secret)
    assert service["CLASP_DATABASE_URL"].split("//") == ["postgresql:", f"clasp:{secret}@postgres:5432/clasp"]
    assert service["CLASP_VECTOR_STORE_TOKEN"] == f"root:{said['COMMON_SECURITY_DEFAULTROOTPASSWORD']}"
    assert service["AWS_SECRET_ACCESS_KEY"] == first["s3.env"].split("SECRET_ACCESS_KEY=")[1].strip()
    assert service["CLASP_API_KEYS"] == first["metrics_key"]
    assert len(set(re.findall(r"[0-9a-f]{48}", "".join(first.values())))) == 5
    named = {path for service in COMPOSE["services"].values() if (path := service.get("env_file"))}
    assert {Path(path).name for path in named} <= first.keys()


def test_a_worker_says_that_it_goes_on(tmp_path: Path) -> None:
    """It has no port to ask; its container's health check looks how old a file is."""
    alive = tmp_path / "alive"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.stand_in", "worker", "--alive", alive],
        env=environment(data_dir=tmp_path / "index_data", threads=1) | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually(alive.exists, within_s=60)
        alive.unlink()
        eventually(alive.exists, within_s=10)
        (check,) = [part for part in COMPOSE["services"]["worker"]["healthcheck"]["test"] if "find" in part]
        check = check.replace("$$", "$").replace("/tmp/alive", str(alive))
        assert subprocess.run(["sh", "-c", check]).returncode == 0
    finally:
        process.terminate()
        assert process.wait(30) == 0
    os.utime(alive, (0, 0))
    assert subprocess.run(["sh", "-c", check]).returncode != 0


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
