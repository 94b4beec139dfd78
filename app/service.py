"""What one API process is made of, and the order in which it comes to life and ends."""

import threading
import time
from datetime import UTC, datetime

import structlog

from app.answering import Answerer, Engine
from app.opening import open_configured_library
from app.settings import Settings
from app.telemetry import Metrics
from app.workers import Supervisor
from clasp_core.calibration import calibration_of
from clasp_core.catalog import StoredModel
from clasp_core.errors import ClaspError, ModelUnavailable, NotCalibrated
from clasp_core.library import Library
from clasp_core.models import Model
from clasp_core.types import Seconds

_log = structlog.get_logger()

SAVE_EVERY_S: Seconds = 60.0
LOOK_EVERY_S: Seconds = 1.0
"""How soon a switch of the library to another model is noticed; one look is one small query."""
TRY_AGAIN_AFTER_S: Seconds = 5.0
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
        model, library = open_configured_library(settings)
        library.tidy()
        self.answerer = Answerer(Engine(model, library), self.metrics)
        self.metrics.observe_model(model.name, model.fingerprint)
        try:
            calibration_of(model)
        except NotCalibrated as error:
            _log.info("hits will carry no confidence", reason=error.detail)
        self.supervisor = Supervisor(settings, library.catalog, self.metrics)
        self._cannot_follow: str | None = None
        self._exchanging_workers = False
        self._closing = threading.Event()
        self._keeper = threading.Thread(target=self._keep_house, name="housekeeper", daemon=True)
        self._follower = threading.Thread(target=self._follow, name="follower", daemon=True)

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

    def stop(self) -> None:
        self._closing.set()
        self._follower.join()
        self.supervisor.stop()
        self.answerer.stop()
        self._keeper.join()
        try:
            self.library.close()
        except Exception as error:  # a full disk, say: nothing is lost by it
            _log.warning("no snapshot of the index; it will be rebuilt at need", error=str(error))

    def why_not_ready(self) -> str | None:
        """None when questions are answered and recordings are embedded; else what is missing."""
        if self._closing.is_set():
            return "The service is shutting down."
        if self._cannot_follow is not None:
            return self._cannot_follow
        if not self.supervisor.all_alive() and not self._exchanging_workers:
            return "An ingest worker is starting."
        self.library.refresh()
        return None

    def observe_library(self) -> None:
        """Bring the gauges up to date."""
        catalog = self.library.catalog
        counts = catalog.counts()
        for status in ("pending", "processing", "ready", "failed"):
            self.metrics.recordings.labels(status).set(counts.get(status, 0))
        oldest = catalog.oldest_pending()
        waited = 0.0 if oldest is None else (datetime.now(UTC).replace(tzinfo=None) - oldest).total_seconds()
        self.metrics.queue_age.set(max(0.0, waited))
        self.metrics.index_vectors.set(len(self.library.refresh()))

    def _keep_house(self) -> None:
        """A snapshot now and then, so that a start after a crash has little to catch up with; and the vectors
        of models that are needed no more are dropped, but for the one that this service cannot leave yet."""
        while not self._closing.wait(SAVE_EVERY_S):
            library = self.library
            started = time.perf_counter()
            try:
                if not library.is_current():
                    library.catalog.keep(library.model)
                library.catalog.forget_retired()
                library.save_index()
            except Exception as error:
                _log.warning("no snapshot of the index; it will be rebuilt at need", error=str(error))
            else:
                _log.debug("index snapshot", seconds=round(time.perf_counter() - started, 3))

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
