"""Processes forked from one that has imported everything: what a test starts is there at once.

To import takes ten times as long as to start. The forked are real processes, with an environment, pipes,
signals and an end of their own; only the imports of one serve all. `Forked` is their `Popen`, `run` their
`subprocess.run`, and `children` knows who started whom. Some tests start the program the plain way
(test_demo, test_readme, test_container); with CLASP_TEST_FORKING=0 all do.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NoReturn

SOCKET = "TEST_FORKING"
"""Variable with the path that the forking process listens at: the same for all that it forked."""
_SHORT_LEASES = "TEST_SHORT_LEASES"
KILLED = -signal.SIGKILL
_PROGRAMS = (
    "app.cli",
    "app.indexing",
    "app.main",
    "clasp_core.backup",
    "clasp_core.mini",
    "clasp_core.s3",
    "tests.core.doubles",
)


class Forked:
    """A process that runs a module of ours, by the command `PYTHON -m MODULE ARGUMENTS...`."""

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
        assert command[:2] == [sys.executable, "-m"], command
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
        self._socket = _connected()
        request = {
            "command": command[2:],
            "env": env | {SOCKET: os.environ[SOCKET]},
            "cwd": str(cwd or Path.cwd()),
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


def run(
    command: list[str], *, env: dict[str, str], cwd: Path, timeout: float
) -> "subprocess.CompletedProcess[str]":
    """What it printed, and how it ended. Killed, and TimeoutExpired, where it takes longer than that."""
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as complaints:
        process = Forked(command, env=env, cwd=cwd, stdout=printed, stderr=complaints)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        for file in (printed, complaints):
            file.seek(0)
        return subprocess.CompletedProcess(command, code, printed.read().decode(), complaints.read().decode())


def children(pid: int) -> dict[int, list[str]]:
    """Command lines of the forked processes that this one asked for, and that are not waited for."""
    if SOCKET not in os.environ:
        return {}
    with _connected() as asking, asking.makefile("rb") as answers:
        asking.sendall(b"null\n")
        known = json.loads(answers.readline())
    return {child: command for child, parent, command in known if parent == pid}


@contextlib.contextmanager
def short_leases() -> Iterator[None]:
    """For what is started meanwhile: else each death of a service and its worker together costs 20 s."""
    if _SHORT_LEASES in os.environ:
        yield
        return
    os.environ[_SHORT_LEASES] = "1"
    try:
        yield
    finally:
        del os.environ[_SHORT_LEASES]


def _number(file: int | IO[bytes] | None, otherwise: int) -> int:
    if file is None:
        return otherwise
    return file if isinstance(file, int) else file.fileno()


def address() -> str:
    """What `SOCKET` has to be for `python -m tests.forking MODULE ARGUMENTS...` to be a forked process."""
    if SOCKET not in os.environ:
        os.environ[SOCKET] = _start()
    return os.environ[SOCKET]


def _connected() -> socket.socket:
    there = socket.socket(socket.AF_UNIX)
    there.connect(address())
    return there


@functools.cache
def _start() -> str:
    """The path that a forking process listens at, which ends with this one."""
    folder = tempfile.TemporaryDirectory(prefix="forking-")
    path = Path(folder.name, "socket")
    command = [sys.executable, "-m", "tests.forking", str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)

    @atexit.register
    def stop() -> None:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
        folder.cleanup()

    while not path.exists():
        assert process.poll() is None
        time.sleep(0.02)
    return str(path)


def _become(request: dict[str, Any], given: list[int]) -> None:
    for number, descriptor in enumerate(given):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    module, *arguments = request["command"]
    sys.argv = [module, *arguments]

    from app import workers
    from clasp_core import faults, ingest, reindex

    workers.subprocess = SimpleNamespace(Popen=Forked, PIPE=subprocess.PIPE)  # type: ignore[assignment]
    if _SHORT_LEASES in os.environ:
        ingest.LEASE_S = 3.0
        reindex.FOLLOW_WITHIN_S = 2.0
    faults._armed = faults._from_environment(os.environ.get("CLASP_FAULT", ""))
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end(program: Callable[..., None], *arguments: object) -> NoReturn:
    """Run a program and end as the interpreter would, but for taking everything apart that was imported."""
    code = 1
    try:
        program(*arguments)
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _serve(path: str) -> tuple[dict[str, Any], list[int]] | None:
    """Fork whatever is asked for, and say when it ended, until standard input does. Returns in each child,
    with what it is to become; and in the forking process itself, at the end, with None."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{path}.new")
    listening.listen(64)
    woken, waking = socket.socketpair()
    waking.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
    Path(f"{path}.new").rename(path)
    alive: dict[int, tuple[socket.socket, int, list[str]]] = {}
    while True:
        readable, _, _ = select.select([listening, woken, 0], [], [])
        if 0 in readable:
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
            return None
        if woken in readable:
            woken.recv(4096)
            while alive:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                asked, _, _ = alive.pop(pid)
                with asked, contextlib.suppress(OSError):
                    asked.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
        if listening not in readable:
            continue
        asking, _ = listening.accept()
        text, given, _, _ = socket.recv_fds(asking, 1 << 20, 3)
        while not text.endswith(b"\n"):
            text += asking.recv(1 << 20)
        asked_for = json.loads(text)
        if asked_for is None:
            known = [[pid, parent, command] for pid, (_, parent, command) in alive.items()]
            with asking:
                asking.sendall(json.dumps(known).encode() + b"\n")
            continue
        if (pid := os.fork()) == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for ours in (listening, woken, waking, asking, *(asked for asked, _, _ in alive.values())):
                ours.close()
            return asked_for, given
        for descriptor in given:
            os.close(descriptor)
        peer = asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        alive[pid] = (asking, struct.unpack("3i", peer)[0], asked_for["command"])
        asking.sendall(b"%d\n" % pid)


if __name__ == "__main__":
    if SOCKET in os.environ:  # be one that is forked: `python -m tests.forking app.cli keys list`
        sys.exit(Forked([sys.executable, "-m", *sys.argv[1:]], env=dict(os.environ)).wait())
    for program in _PROGRAMS:
        importlib.import_module(program)
    gc.freeze()  # what all of them have: to look through it would copy it
    if (wanted := _serve(sys.argv[1])) is not None:
        _end(_become, *wanted)
