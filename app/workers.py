"""Ingest workers as processes: the loop one runs, and the supervisor that starts and restarts them.

A worker that `clasp serve` started lives no longer than it: it ends when its standard input closes.
It reports the timings of each batch, and the GPU memory it holds, as JSON lines on standard output.
"""

import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from uuid import uuid4

import orjson
import structlog

from app.opening import open_configured_library
from app.settings import Settings
from app.telemetry import Metrics, gpu_memory
from app.tracing import start_tracing, stop_tracing
from clasp_core.catalog import Catalog
from clasp_core.errors import DataMismatch
from clasp_core.ingest import Ingester, Timings, warm_up
from clasp_core.library import Library
from clasp_core.models import Model
from clasp_core.types import Seconds

_log = structlog.get_logger()

PROGRAM = (sys.executable, "-m", "app.cli")
"""Ourselves, as a command."""
READY_LINE = b"ready\n"
STOP_WITHIN_S: Seconds = 8.0
LONGEST_PAUSE_S: Seconds = 30.0
NICENESS = 10
"""Of workers beside a service: where both want a processor, questions get nine tenths of it, since somebody
waits for each. What nobody else wants is the workers' whole."""


def work(
    settings: Settings, *, owner: str | None = None, supervised: bool = False, alive: Path | None = None
) -> None:
    """Be an ingest worker until stopped: by SIGTERM or SIGINT, or when the supervisor is gone.

    `alive` is a file that is touched after each batch of segments and each look at the queue, for who
    cannot see the process: it is as old as what the worker is at now.

    Where the library is switched to another model, one that nobody supervises goes on with that; the
    others are at rest until they are stopped, and the service starts new ones when it has followed.
    """
    import signal

    if supervised:
        os.nice(NICENESS)  # before there are other threads, which have it from this one
    owner = owner or uuid4().hex
    structlog.contextvars.bind_contextvars(owner=owner)
    start_tracing("worker")
    model, library = open_configured_library(settings)
    ingester = _ingester(settings, model, library, owner, supervised, alive)
    stopping = threading.Event()

    def stop(*_: object) -> None:
        stopping.set()
        ingester.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    if supervised:
        threading.Thread(target=_stop_with_parent, args=[stop], daemon=True).start()
        sys.stdout.buffer.write(READY_LINE)
        sys.stdout.buffer.flush()
    _log.info("worker ready")
    while not stopping.is_set():
        try:
            ingester.run()
        except DataMismatch as switched:
            _log.info("worker's model was retired", reason=switched.detail)
            if supervised:
                stopping.wait()
                break
            active = library.catalog.active()
            library.close()
            model, library = open_configured_library(settings, active.name if active else None)
            ingester = _ingester(settings, model, library, owner, supervised, alive)
    library.close()
    stop_tracing()


def _ingester(
    settings: Settings, model: Model, library: Library, owner: str, supervised: bool, alive: Path | None
) -> Ingester:
    encoder = model.speech_encoder()
    warm_up(encoder)
    return Ingester(
        library,
        encoder,
        max_duration_s=settings.max_duration_s,
        owner=owner,
        observe=_report if supervised else lambda timings: None,
        alive=(lambda: None) if alive is None else alive.touch,
    )


def _report(timings: Timings) -> None:
    sys.stdout.buffer.write(orjson.dumps({"timings": asdict(timings), "gpus": gpu_memory()}) + b"\n")
    sys.stdout.buffer.flush()


def _stop_with_parent(stop: Callable[[], None]) -> None:
    """Standard input reaches its end when the parent process is gone, however it went."""
    while os.read(sys.stdin.fileno(), 1024):  # a buffered read would hold a lock that the exit needs
        pass
    stop()
    time.sleep(STOP_WITHIN_S)
    os._exit(1)


class Supervisor:
    """Keeps `settings.workers` worker processes alive; their recordings are free at once when one dies."""

    def __init__(self, settings: Settings, catalog: Catalog, metrics: Metrics) -> None:
        self._metrics = metrics
        self._keepers = [
            _Keeper(str(number), settings, catalog, metrics) for number in range(settings.workers)
        ]

    def start(self) -> None:
        for keeper in self._keepers:
            keeper.start()

    def stop(self) -> None:
        for keeper in self._keepers:
            keeper.stop()
        deadline = time.monotonic() + STOP_WITHIN_S
        for keeper in self._keepers:
            keeper.join(deadline - time.monotonic())

    def all_alive(self) -> bool:
        return all(keeper.ready for keeper in self._keepers)

    def observe(self) -> None:
        """Bring the gauges of workers' memory up to date."""
        self._metrics.worker_memory.clear()
        for keeper in self._keepers:
            if (pid := keeper.pid) is not None and (size := _resident_bytes(pid)) is not None:
                self._metrics.worker_memory.labels(keeper.name).set(size)


def _resident_bytes(pid: int) -> int | None:
    """A process's memory; None where it has ended, or the system has no /proc."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return None


class _Keeper:
    """One place for a worker: starts a process, listens to it, and starts the next when it ends."""

    def __init__(self, name: str, settings: Settings, catalog: Catalog, metrics: Metrics) -> None:
        self.name = name
        self.ready = False
        self._settings = settings
        self._catalog = catalog
        self._metrics = metrics
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="worker-keeper", daemon=True)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._lock:
            self._stopping.set()
            if self._process is not None:
                self._process.terminate()

    def join(self, within_s: Seconds) -> None:
        self._thread.join(max(0.0, within_s))
        if self._thread.is_alive() and self._process is not None:
            self._process.kill()
            self._thread.join()

    def _run(self) -> None:
        pause: Seconds = 0.0
        while not self._stopping.wait(pause):
            owner = uuid4().hex
            started = time.monotonic()
            with self._lock:
                if self._stopping.is_set():
                    return
                self._process = subprocess.Popen(  # noqa: S603 - our own program
                    [*PROGRAM, "worker", "--supervised", "--owner", owner],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=os.environ | self._settings.as_environment(),
                )
            self._listen(self._process)
            code = self._process.wait()
            self.ready = False
            stopping = self._stopping.is_set()
            if not stopping:
                self._metrics.worker_restarts.inc()
                _log.warning("worker ended; starting another", exit_status=code, owner=owner)
            if code or not stopping:
                try:
                    # what was killed because it had to end is no recording's fault
                    self._catalog.release(owner, died=not stopping)
                except Exception as error:  # the leases run out by themselves; the next worker must start
                    _log.error("the worker's recordings were not released", exc_info=error)
            if stopping:
                return
            lived_s = time.monotonic() - started
            pause = 0.0 if lived_s > LONGEST_PAUSE_S else min(LONGEST_PAUSE_S, 2 * pause + 0.1)

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        """Until the worker's standard output ends."""
        assert process.stdout is not None
        assert process.stdin is not None
        with process.stdin, process.stdout as lines:
            for line in lines:
                if line == READY_LINE:
                    self.ready = True
                    continue
                try:
                    report = orjson.loads(line)
                    timings, gpus = Timings(**report["timings"]), report["gpus"]
                except (orjson.JSONDecodeError, TypeError, KeyError):  # some library's remark
                    _log.warning("a worker wrote what is no report", bytes=len(line))
                else:
                    self._metrics.observe_ingest(timings)
                    self._metrics.observe_gpus(f"worker-{self.name}", gpus)
