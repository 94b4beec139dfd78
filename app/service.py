"""What one API process is made of, and the order in which it comes to life and ends."""

import threading
import time
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray

from app.answering import Answerer
from app.opening import open_configured_library
from app.settings import Settings
from app.telemetry import Metrics
from app.workers import Supervisor
from clasp_core.ingest import embed_recording, mean_vector
from clasp_core.models import SpeechEncoder
from clasp_core.types import Seconds

_log = structlog.get_logger()

SAVE_EVERY_S: Seconds = 60.0
MAX_QUERY_RECORDING_S: Seconds = 60.0


class Service:
    """The library, the text encoder's thread, and the ingest workers. Ready before it serves."""

    def __init__(self, settings: Settings) -> None:
        """Opens and loads everything. Raises ClaspError where the service cannot run."""
        self.settings = settings
        self.metrics = Metrics()
        self.model, self.library = open_configured_library(settings)
        self.library.tidy()
        self.library.refresh()
        encoder = self.model.text_encoder()
        encoder.encode(["warm-up"])
        self.answerer = Answerer(self.library, encoder, self.metrics)
        self.supervisor = Supervisor(settings, self.library.catalog, self.metrics)
        self._speech_lock = threading.Lock()
        self._closing = threading.Event()
        self._saver = threading.Thread(target=self._save_index, name="index-saver", daemon=True)

    def start(self) -> None:
        self.answerer.start()
        self.supervisor.start()
        self._saver.start()

    def stop(self) -> None:
        self._closing.set()
        self.supervisor.stop()
        self.answerer.stop()
        self._saver.join()
        self.library.close()

    def why_not_ready(self) -> str | None:
        """None when questions are answered and recordings are embedded; else what is missing."""
        if self._closing.is_set():
            return "The service is shutting down."
        if not self.supervisor.all_alive():
            return "An ingest worker is starting."
        self.library.refresh()
        return None

    def embed_recording(self, path: Path) -> NDArray[np.float32]:
        """A recording as a query: one unit vector (dim,). Raises InvalidAudio."""
        with self._speech_lock:
            return mean_vector(embed_recording(self._speech, path, max_duration_s=MAX_QUERY_RECORDING_S))

    @cached_property
    def _speech(self) -> SpeechEncoder:
        return self.model.speech_encoder()

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

    def _save_index(self) -> None:
        """A snapshot now and then, so that a start after a crash has little to catch up with."""
        while not self._closing.wait(SAVE_EVERY_S):
            started = time.perf_counter()
            try:
                self.library.save_index()
            except OSError as error:
                _log.warning("index snapshot failed; it will be rebuilt at need", error=str(error))
            else:
                _log.debug("index snapshot", seconds=round(time.perf_counter() - started, 3))
