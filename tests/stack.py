"""Several `clasp serve` without workers of their own, and several `clasp worker`, on one catalogue."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.service import ROOT, RunningService, environment, eventually, is_alive


class Worker:
    """A `clasp worker`, as an operator starts it."""

    def __init__(self, folder: Path, *, program: str, new_process: Any, settings: dict[str, Any]) -> None:
        self.log_path = folder / "worker.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._folder = folder
        self._program = program
        self._new_process = new_process
        self._settings = settings

    def start(self, **variables: str) -> "Worker":
        """`variables` join the environment."""
        with self.log_path.open("ab") as log:
            self.process = self._new_process(
                [sys.executable, "-m", self._program, "worker"],
                env=environment(**self._settings) | {"PYTHONPATH": str(ROOT)} | variables,
                stderr=log,
                cwd=self._folder,
            )
        return self

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Politely; the exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(30)


class Stack:
    """As a context manager it leaves no process behind, whatever happened."""

    def __init__(
        self,
        folder: Path,
        *,
        apis: int = 2,
        workers: int = 1,
        program: str = "tests.stand_in",
        new_process: Any = subprocess.Popen,
        **settings: object,
    ) -> None:
        """`settings` are everybody's, the data directory among them."""
        self.data_dir = folder / "index_data"
        self.settings = {"data_dir": self.data_dir, "threads": 1, "workers": 0} | settings
        self.apis: list[RunningService] = []
        self.workers: list[Worker] = []
        for number in range(apis):
            (home := folder / f"api-{number}").mkdir(parents=True)
            api = RunningService(home, program=program)
            api.settings = self.settings
            api.new_process = new_process
            self.apis.append(api)
        for number in range(workers):
            (home := folder / f"worker-{number}").mkdir(parents=True)
            worker = Worker(home, program=program, new_process=new_process, settings=self.settings)
            self.workers.append(worker)

    def __enter__(self) -> "Stack":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self.workers:
            if worker.process is not None:
                worker.kill()
        for api in self.apis:
            api.__exit__(kind, error, trace)
        eventually(lambda: not self.processes(), within_s=40)

    def start(self) -> "Stack":
        for api in self.apis:
            api.start(wait=False)
        for worker in self.workers:
            worker.start()
        for api in self.apis:
            api.wait_until_ready()
        return self

    def stop(self) -> list[int]:
        """Politely, workers first; all exit statuses."""
        return [part.stop() for part in (*self.workers, *self.apis)]

    def processes(self) -> list[int]:
        """All that were started by this stack and run still, children of what was killed among them: they
        have its log open."""
        logs = {worker.log_path for worker in self.workers}
        logs |= {api.data_dir / "service.log" for api in self.apis}
        return [pid for pid in _writers(logs) if is_alive(pid)]

    def log(self) -> str:
        return "".join(
            path.read_text(errors="replace")
            for path in (
                *(api.data_dir / "service.log" for api in self.apis),
                *(worker.log_path for worker in self.workers),
            )
            if path.exists()
        )

    def contents(self) -> set[str]:
        """sha256 of every recording's file in the data directory."""
        root = self.data_dir / "audio"
        return {
            path.parent.name + path.name
            for path in root.rglob("*")
            if path.is_file() and path.parent.name != "incoming"
        }


def _writers(logs: set[Path]) -> Iterator[int]:
    for link in Path("/proc").glob("[0-9]*/fd/2"):
        with contextlib.suppress(OSError):
            if link.readlink() in logs:
                yield int(link.parts[2])
