"""What one API process is made of, and the order in which it comes to life and ends."""

import math
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime

import structlog

from app.answering import Answerer, Engine
from app.fetching import Fetcher
from app.opening import open_configured_library
from app.preconditions import InFlight
from app.readiness import Readiness, Watch, why_not_writable, why_too_full
from app.settings import Settings
from app.telemetry import Metrics, gpu_memory
from app.tracing import start_tracing, stop_tracing
from app.workers import Supervisor
from clasp_core.calibration import calibration_of
from clasp_core.catalog import StoredModel
from clasp_core.errors import (
    ClaspError,
    DatabaseUnavailable,
    IndexUnavailable,
    ModelUnavailable,
    NotCalibrated,
)
from clasp_core.ivf import GivenUp
from clasp_core.library import Library
from clasp_core.models import Model
from clasp_core.types import Seconds

_log = structlog.get_logger()

SAVE_EVERY_S: Seconds = 60.0
LOOK_EVERY_S: Seconds = 1.0
"""How soon a switch of the library to another model is noticed; one look is one small query."""
TRY_AGAIN_AFTER_S: Seconds = 5.0
RESCALE_AGAIN_AFTER_S: Seconds = 600.0
"""After a failure, of memory say; each try takes minutes of a processor."""
WORKERS_START_WITHIN_S: Seconds = 120.0


class Service:
    """The library, the text encoder's thread, and the ingest workers. Ready before it serves.

    When the library is switched to another model (`clasp reindex`), the service follows: it loads that
    model aside while the old one answers, exchanges the two at once, and then its workers. Where it
    cannot, it goes on answering by the old one, and is not ready.
    """

    def __init__(self, settings: Settings) -> None:
        """Opens and loads everything. Raises ClaspError where the service cannot run."""
        self.settings = settings
        self.metrics = Metrics()
        self.fetcher = Fetcher(settings.url_hosts, settings.url_timeout_s)
        self.in_flight = InFlight()
        start_tracing("api")
        model, library = open_configured_library(settings)
        library.observe_refresh = self.metrics.observe_refresh
        with ThreadPoolExecutor(1) as aside:  # mostly SQLite at work, while Python loads the text encoder
            tidied = aside.submit(library.tidy)
            self.answerer = Answerer(Engine(model, library), self.metrics)
            tidied.result()
        self.metrics.observe_model(model.name, model.fingerprint)
        try:
            calibration_of(model)
        except NotCalibrated as error:
            _log.info("hits will carry no confidence", reason=error.detail)
        self.supervisor = Supervisor(settings, library.catalog, self.metrics)
        self.leaving = False
        """Whether the process was told to end: answered all the same, but nobody should come."""
        self._cannot_follow: str | None = None
        self._exchanging_workers = False
        self._closing = threading.Event()
        self._keeper = threading.Thread(target=self._keep_house, name="housekeeper", daemon=True)
        self._rescaler = threading.Thread(target=self._rescale, name="rescaler", daemon=True)
        self._follower = threading.Thread(target=self._follow, name="follower", daemon=True)
        self._watch = Watch(
            {
                "index": self._why_not_current,
                "data_dir": lambda: why_not_writable(settings.data_dir),
                "disk": lambda: why_too_full(
                    settings.data_dir, settings.min_free_bytes + settings.max_upload_bytes
                ),
                **({"audio_store": lambda: self.library.store.trouble()} if settings.audio_store else {}),
            },
            stopping=frozenset({"index"}),
        )

    @property
    def model(self) -> Model:
        """The model that answers."""
        return self.answerer.engine.model

    @property
    def library(self) -> Library:
        """The library, opened with the model that answers."""
        return self.answerer.engine.library

    def start(self) -> None:
        self.answerer.start()
        self.supervisor.start()
        self._keeper.start()
        self._follower.start()
        self._rescaler.start()
        self._watch.start()

    def stop(self) -> None:
        self.leaving = True
        self._closing.set()
        self._watch.stop()
        self._follower.join()
        self.supervisor.stop()
        self.answerer.stop()
        self._keeper.join()
        self._rescaler.join()
        try:
            self.library.close()
        except Exception as error:  # a full disk, say: nothing is lost by it
            _log.warning("no snapshot of the index; it will be rebuilt at need", error=str(error))
        stop_tracing()

    def readiness(self) -> Readiness:
        """What is well and what is not, without waiting for anything."""
        working = self.supervisor.all_alive() or self._exchanging_workers
        return self._watch.readiness(
            {
                "process": "The service is shutting down." if self.leaving else None,
                "model": self._cannot_follow,
                "workers": None if working else "An ingest worker is starting.",
            }
        )

    def observe(self) -> None:
        """Bring the gauges up to date. Waits for no refresh of the index."""
        readiness = self.readiness()
        self.metrics.ready.set(readiness.why_not is None)
        for check, trouble in readiness.checks.items():
            self.metrics.check_ok.labels(check).set(trouble is None)
        self.metrics.search_waiting.set(self.answerer.waiting())
        disk = shutil.disk_usage(self.settings.data_dir)
        self.metrics.disk_free.set(disk.free)
        self.metrics.disk_total.set(disk.total)
        self.metrics.observe_gpus("api", gpu_memory())
        self.supervisor.observe()
        with suppress(DatabaseUnavailable):  # its gauges stay; `clasp_ready` says that something is wrong
            self._observe_library()

    def _observe_library(self) -> None:
        library = self.library
        catalog = library.catalog
        counts = catalog.counts()
        for status in ("pending", "processing", "ready", "failed"):
            self.metrics.recordings.labels(status).set(counts.get(status, 0))
        oldest = catalog.oldest_pending()
        waited = 0.0 if oldest is None else (datetime.now(UTC).replace(tzinfo=None) - oldest).total_seconds()
        self.metrics.queue_age.set(max(0.0, waited))
        self.metrics.failed.clear()
        for code, count in catalog.failures().items():
            self.metrics.failed.labels(code).set(count)
        self.metrics.index_vectors.set(library.indexed())
        self.metrics.observe_index(*library.index_kind())
        self.metrics.unsaved.set(library.unsaved_changes())
        saved_at = library.saved_at()
        self.metrics.snapshot_age.set(math.nan if saved_at is None else max(0.0, time.time() - saved_at))

    def _why_not_current(self) -> str | None:
        """Brings the index up to date, so that the next question need not wait for it."""
        library = self.library
        try:
            library.refresh()
        except IndexUnavailable as error:
            return error.detail
        except Exception:
            if library is self.library:  # else it was exchanged meanwhile, and closed
                raise
        return None

    def _keep_house(self) -> None:
        """A snapshot now and then, so that a start after a crash has little to catch up with; and the vectors
        of models that are needed no more are dropped, but for the one that this service cannot leave yet."""
        while not self._closing.wait(SAVE_EVERY_S):
            library = self.library
            started = time.perf_counter()
            try:
                if not library.is_current():
                    library.catalog.keep(library.model)
                library.forget_retired()
                library.catalog.forget_done()
                library.sweep_again()
                library.save_index()
            except Exception as error:
                _log.warning("no snapshot of the index; it will be rebuilt at need", error=str(error))
            else:
                _log.debug("index snapshot", seconds=round(time.perf_counter() - started, 3))

    def _rescale(self) -> None:
        """Let the index become another kind when the library has outgrown the one it has."""
        pause = LOOK_EVERY_S
        while not self._closing.wait(pause):
            pause = LOOK_EVERY_S if self._rescaled(self.library) else RESCALE_AGAIN_AFTER_S

    def _rescaled(self, library: Library) -> bool:
        """Whether there was no trouble with it."""
        try:
            library.rescale(lambda: self._closing.is_set() or self.library is not library)
        except GivenUp:
            pass
        except Exception as error:
            if library is self.library:  # else it was exchanged meanwhile, and closed
                _log.error("the index stays as it is", kind=library.index_kind()[0], exc_info=error)
                return False
        return True

    def _follow(self) -> None:
        """Notice that the library has another model, and go there."""
        pause = LOOK_EVERY_S
        while not self._closing.wait(pause):
            pause = LOOK_EVERY_S
            try:
                active = self.library.catalog.active()
                if active is not None and active.fingerprint != self.library.model:
                    self._go_over(active)
                self._cannot_follow = None
            except DatabaseUnavailable:
                continue  # the look at the index says so
            except Exception as error:
                pause = TRY_AGAIN_AFTER_S
                detail = error.detail if isinstance(error, ClaspError) else f"{type(error).__name__}: {error}"
                reason = (
                    f"The library was switched to another model, which this service cannot follow: {detail}"
                    f" It goes on answering by {self.model.name}."
                )
                if reason != self._cannot_follow:
                    _log.error("cannot follow the library to its model", reason=reason, exc_info=error)
                self._cannot_follow = reason

    def _go_over(self, active: StoredModel) -> None:
        """Answer by the library's new model, which is loaded first, and let it have workers of its own."""
        if not active.name:
            raise ModelUnavailable(f"Nobody said what {active.fingerprint} is called.")
        _log.info("the library has another model; loading it", model=active.name)
        settings = self.settings.model_copy(update={"model": active.name})
        model, library = open_configured_library(settings)
        library.observe_refresh = self.metrics.observe_refresh
        try:
            engine, left = Engine(model, library), self.answerer.engine
        except BaseException:
            library.catalog.close()
            raise
        self.answerer.engine = engine
        self.metrics.observe_model(model.name, model.fingerprint)
        _log.warning("another model answers; set CLASP_MODEL before the next start", model=active.name)
        left.library.catalog.close()
        if self._closing.is_set():
            return
        self._exchanging_workers = True
        self.supervisor.stop()
        self.supervisor = Supervisor(settings, library.catalog, self.metrics)
        self.supervisor.start()
        deadline = time.monotonic() + WORKERS_START_WITHIN_S
        while not self.supervisor.all_alive() and time.monotonic() < deadline:
            if self._closing.wait(0.1):
                break
        self._exchanging_workers = False
