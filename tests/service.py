"""The real service as real processes, for tests that speak HTTP to it and pull its plug."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx
import sqlalchemy as sa

from tests import forking
from tests.milvus import lite_server
from tests.object_store import object_store
from tests.postgres import database_settings

T = TypeVar("T")
START_WITHIN_S = 120
FORKING = os.environ.get("CLASP_TEST_FORKING") != "0"
ROOT = Path(__file__).parent.parent


def environment(**settings: object) -> dict[str, str]:
    """This process's environment with these settings and no others, but for where weights are."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("CLASP_") or name == "CLASP_MODELS_DIR"
    }
    return kept | {f"CLASP_{name.upper()}": str(value) for name, value in settings.items()}


def engines(data_dir: Path) -> dict[str, object]:
    """Settings for the engines that the environment wants the service to be tested with, instead of those
    that need nothing: CLASP_TEST_DATABASE=postgresql, CLASP_TEST_VECTOR_STORE=milvus and
    CLASP_TEST_AUDIO_STORE=s3. The same for the same data directory."""
    chosen = database_settings(data_dir)
    if os.environ.get("CLASP_TEST_VECTOR_STORE") == "milvus":
        chosen["vector_store"] = f"milvus:{lite_server()}"
    if os.environ.get("CLASP_TEST_AUDIO_STORE") == "s3":
        chosen |= object_store().settings(data_dir)
    return chosen


def sql(data_dir: Path, statement: str, **values: object) -> list[Any]:
    """Run a statement on the catalogue of a data directory, behind everybody's back; the rows it gives."""
    engine = sa.create_engine(
        str(engines(data_dir).get("database_url", f"sqlite:///{data_dir}/catalog.sqlite3"))
    )
    with engine.begin() as db:
        done = db.execute(sa.text(statement), values)
        rows = list(done) if done.returns_rows else []
    engine.dispose()
    return rows


def clasp(
    *arguments: object, cwd: Path, within_s: float = 120, program: str = "app.cli", **settings: object
) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would; by default on the data directory `cwd/index_data`."""
    data_dir = Path(str(settings.get("data_dir", cwd / "index_data")))
    settings = engines(data_dir) | {"threads": 1} | settings
    command = [sys.executable, "-m", program, *map(str, arguments)]
    env = environment(**settings) | {"COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    if FORKING:
        return forking.run(command, env=env, cwd=cwd, timeout=within_s)
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=within_s)


class RunningService:
    """`clasp serve` on a free port and a data directory of its own, which outlives restarts.

    As a context manager it leaves no process behind, whatever happened.
    """

    def __init__(
        self, data_dir: Path, *, program: str = "app.cli", under: Sequence[str] = (), **settings: object
    ) -> None:
        """`program` is the module that is `clasp`; `tests.stand_in` needs no model's weights or time. `under`
        is a command that becomes the one behind it, such as `setpriv`."""
        self.data_dir = data_dir
        self.program = program
        self.under = under
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        where = Path(str(settings.get("data_dir", data_dir / "index_data")))
        self.settings = {"data_dir": where, "threads": 1} | engines(where) | settings
        self.new_process: Any = forking.Forked if FORKING and not under else subprocess.Popen
        self.process: subprocess.Popen[bytes] | None = None
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    def __enter__(self) -> "RunningService":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        if self.process is not None and self.process.poll() is None:
            left = self.processes()
            self.process.kill()
            self.process.wait()
            eventually(lambda: not any(map(is_alive, left)), within_s=40)

    def start(self, *, wait: bool = True) -> "RunningService":
        with (self.data_dir / "service.log").open("ab") as log:
            self.process = self.new_process(
                [*self.under, sys.executable, "-m", self.program, "serve", "--port", str(self.port)],
                env=environment(**self.settings) | {"PYTHONPATH": str(ROOT)},
                stderr=log,
                cwd=self.data_dir,
            )
        if wait:
            self.wait_until_ready()
        return self

    def wait_until_ready(self) -> None:
        def is_ready() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.log()
            try:
                return self.client.get("/readyz").is_success
            except httpx.TransportError:
                return False

        eventually(is_ready, within_s=START_WITHIN_S)

    def log(self) -> str:
        return (self.data_dir / "service.log").read_text(errors="replace")

    def processes(self) -> list[int]:
        """The service's process and all that descend from it."""
        assert self.process is not None
        listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, check=True).stdout
        parents = {int(pid): int(parent) for pid, parent in map(bytes.split, listed.splitlines())}
        found = [self.process.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
            found += forking.children(pid)
        return found

    def worker_pids(self) -> list[int]:
        """Processes of this service's workers, found by their parent."""
        assert self.process is not None
        found = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(self.process.pid)], capture_output=True
        )
        lines = found.stdout.decode().splitlines()
        plain = [int(line.split()[0]) for line in lines if " worker " in line]
        return plain + [
            pid for pid, command in forking.children(self.process.pid).items() if "worker" in command
        ]

    def kill(self) -> None:
        """The API process dies as by a power cut; its workers notice."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def kill_workers(self) -> None:
        for pid in self.worker_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> int:
        """Politely; the exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(60)

    # --- what tests say often

    def upload(self, content: bytes, **form: Any) -> httpx.Response:
        headers = form.pop("headers", None)
        return self.client.post("/audio", files={"file": content}, data=form, headers=headers)

    def ready(self, content: bytes, **form: Any) -> dict[str, Any]:
        """The record of a recording that has been uploaded and can be found."""
        uploaded = self.upload(content, **form)
        assert uploaded.is_success, uploaded.text
        record = self.settled(uploaded.json()["id"])
        assert record["status"] == "ready", record
        return record

    def settled(self, recording_id: str, within_s: float = 60) -> dict[str, Any]:
        """The record once it is ready or failed."""

        def final() -> dict[str, Any] | None:
            record = self.client.get(f"/audio/{recording_id}").raise_for_status().json()
            return record if record["status"] in ("ready", "failed") else None

        return eventually(final, within_s=within_s)

    def found(self, q: str, **parameters: Any) -> list[dict[str, Any]]:
        answer = self.client.get("/search", params={"q": q, **parameters})
        hits: list[dict[str, Any]] = answer.raise_for_status().json()["hits"]
        return hits

    def found_by_sound(self, content: bytes, **parameters: Any) -> list[dict[str, Any]]:
        answer = self.client.post("/search/audio", files={"file": content}, params=parameters)
        hits: list[dict[str, Any]] = answer.raise_for_status().json()["hits"]
        return hits

    def listed(self, **parameters: Any) -> list[dict[str, Any]]:
        """All records, by as many pages as there are."""
        items: list[dict[str, Any]] = []
        cursor: dict[str, str] = {}
        while True:
            page = self.client.get("/audio", params={**parameters, **cursor}).raise_for_status().json()
            items += page["items"]
            if page["next_cursor"] is None:
                return items
            cursor = {"cursor": page["next_cursor"]}

    def raw(self, request: bytes, within_s: float = 10) -> bytes:
        """What comes back for bytes that no HTTP client would send, up to the end of the connection."""
        answer = b""
        with socket.create_connection(("127.0.0.1", self.port), within_s) as connection:
            connection.sendall(request)
            while data := connection.recv(1 << 16):
                answer += data
        return answer

    def stored(self) -> set[str]:
        """Files of recordings in the data directory or the store, those still arriving among them."""
        root = self.data_dir / "index_data" / "audio"
        objects = object_store().keys(root.parent) if "audio_store" in self.settings else set()
        return objects | {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's series with these labels, 0 where there is none."""
        total = 0.0
        for line in self.client.get("/metrics").raise_for_status().text.splitlines():
            series, _, value = line.rpartition(" ")
            if series.partition("{")[0] == name and all(f'{k}="{v}"' in series for k, v in labels.items()):
                total += float(value)
        return total


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def eventually(condition: Callable[[], T | None], *, within_s: float) -> T:
    """The condition's first true value; AssertionError where it takes too long."""
    deadline = time.monotonic() + within_s
    while True:
        if value := condition():
            return value
        assert time.monotonic() < deadline, f"{condition} was not true within {within_s} s"
        time.sleep(0.05)
