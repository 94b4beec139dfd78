"""The real service as real processes, for tests that speak HTTP to it and pull its plug."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx

T = TypeVar("T")
START_WITHIN_S = 120


class RunningService:
    """`clasp serve` on a free port and a data directory of its own, which outlives restarts."""

    def __init__(self, data_dir: Path, **settings: object) -> None:
        self.data_dir = data_dir
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._environment = {
            name: value for name, value in os.environ.items() if not name.startswith("CLASP_")
        } | {
            "CLASP_DATA_DIR": str(data_dir / "index_data"),
            "CLASP_THREADS": "1",
            **{f"CLASP_{name.upper()}": str(value) for name, value in settings.items()},
        }
        if "CLASP_MODELS_DIR" in os.environ:
            self._environment.setdefault("CLASP_MODELS_DIR", os.environ["CLASP_MODELS_DIR"])
        self.process: subprocess.Popen[bytes] | None = None
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    def start(self, *, wait: bool = True) -> "RunningService":
        with (self.data_dir / "service.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "app.cli", "serve", "--port", str(self.port)],
                env=self._environment,
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

    def worker_pids(self) -> list[int]:
        """Processes of this service's workers, found by their parent."""
        assert self.process is not None
        found = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(self.process.pid)], capture_output=True
        )
        lines = found.stdout.decode().splitlines()
        return [int(line.split()[0]) for line in lines if " worker " in line]

    def descendants(self) -> list[int]:
        """Every process below the API process: workers and decoders."""
        assert self.process is not None
        found = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, check=True)
        pairs = [tuple(map(int, line.split())) for line in found.stdout.decode().splitlines()]
        below = [self.process.pid]
        for parent in below:
            below += [pid for pid, ppid in pairs if ppid == parent]
        return below[1:]

    def kill(self) -> None:
        """The API process dies as by a power cut; its workers notice."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def kill_workers(self) -> None:
        for pid in self.worker_pids():
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


def eventually(condition: Callable[[], T | None], *, within_s: float) -> T:
    """The condition's first true value; AssertionError where it takes too long."""
    deadline = time.monotonic() + within_s
    while True:
        if value := condition():
            return value
        assert time.monotonic() < deadline, f"{condition} was not true within {within_s} s"
        time.sleep(0.05)
