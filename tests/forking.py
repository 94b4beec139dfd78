"""`python -m tests.stand_in` a hundred times over: processes forked from one that has imported everything.

To import takes ten times as long as to start. The forked are real processes, with an environment, pipes and
an end of their own; only the imports of one serve all, and leases are short. `Forked` is their `Popen`.
"""

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

SOCKET = "TEST_FORKING"
"""Variable with the path that the forking process listens at."""


class Forked:
    """A process running `tests.stand_in` with the arguments behind `python -m tests.stand_in`."""

    def __init__(
        self,
        command: list[str],
        *,
        env: dict[str, str],
        cwd: Path | None = None,
        stdin: int | None = None,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
    ) -> None:
        self.returncode: int | None = None
        self.args = command
        self.stdin: IO[bytes] | None = None
        self.stdout: IO[bytes] | None = None
        given: list[int] = []
        if stdin == subprocess.PIPE:
            theirs, ours = os.pipe()
            self.stdin = os.fdopen(ours, "wb")
            given.append(theirs)
        else:
            given.append(os.open(os.devnull, os.O_RDONLY))
        if stdout == subprocess.PIPE:
            ours, theirs = os.pipe()
            self.stdout = os.fdopen(ours, "rb")
            given.append(theirs)
        else:
            given.append(os.dup(_number(stdout, 1)))
        given.append(os.dup(_number(stderr, 2)))
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(os.environ[SOCKET])
        request = {
            "arguments": command[3:],
            "env": env | {SOCKET: os.environ[SOCKET]},
            "cwd": str(cwd or "."),
        }
        socket.send_fds(self._socket, [json.dumps(request).encode() + b"\n"], given)
        for descriptor in given:
            os.close(descriptor)
        self._answers = self._socket.makefile("rb")
        self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._socket], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if timeout is not None and not select.select([self._socket], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self._answers.readline() or KILLED)
            self._answers.close()
            self._socket.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


KILLED = -signal.SIGKILL


def _number(file: int | IO[bytes] | None, otherwise: int) -> int:
    if file is None:
        return otherwise
    return file if isinstance(file, int) else file.fileno()


def _serve(path: str) -> None:
    """Fork whatever is asked for, and say when it ended, until standard input does."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen(64)
    children: dict[int, socket.socket] = {}
    while True:
        readable, _, _ = select.select([listening, 0], [], [], 0.01)
        if 0 in readable:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            return
        if listening in readable:
            asking, _ = listening.accept()
            text, given, _, _ = socket.recv_fds(asking, 1 << 20, 3)
            while not text.endswith(b"\n"):
                text += asking.recv(1 << 20)
            if (pid := os.fork()) == 0:
                for open_one in (listening, asking, *children.values()):
                    open_one.close()
                _become(json.loads(text), given)
            for descriptor in given:
                os.close(descriptor)
            asking.sendall(b"%d\n" % pid)
            children[pid] = asking
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            with children.pop(pid) as asked, contextlib.suppress(OSError):
                asked.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def _become(request: dict[str, Any], given: list[int]) -> None:
    code = 1
    try:
        for number, descriptor in enumerate(given):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        sys.argv = ["clasp", *request["arguments"]]
        from clasp_core import faults, ingest, reindex
        from tests import stand_in

        ingest.LEASE_S = 3.0  # else each death of a service and its worker together costs 20 s of waiting
        reindex.FOLLOW_WITHIN_S = 2.0
        faults._armed = faults._from_environment(os.environ.get("CLASP_FAULT", ""))
        stand_in.main(worker_process=Forked)
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


@contextlib.contextmanager
def forking(folder: Path) -> Iterator[None]:
    """While this lasts, `Forked` works; where it does already, this is nothing."""
    if SOCKET in os.environ:
        yield
        return
    path = folder / "forking"
    with subprocess.Popen(
        [sys.executable, "-m", "tests.forking", str(path)], stdin=subprocess.PIPE
    ) as process:
        while not path.exists():
            assert process.poll() is None
            time.sleep(0.05)
        os.environ[SOCKET] = str(path)
        try:
            yield
        finally:
            del os.environ[SOCKET]
            assert process.stdin is not None
            process.stdin.close()


if __name__ == "__main__":
    if SOCKET in os.environ:  # be one that is forked: `python -m tests.forking keys list`
        asked = Forked(["python", "-m", "clasp", *sys.argv[1:]], env=dict(os.environ), cwd=Path.cwd())
        sys.exit(asked.wait())
    for module in ("app.indexing", "app.main", "clasp_core.backup", "clasp_core.s3", "tests.stand_in"):
        importlib.import_module(module)
    _serve(sys.argv[1])
