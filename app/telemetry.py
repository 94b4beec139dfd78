"""Logs, request ids and metrics: what an operator sees.

No question and no recording is logged, nor what came with it but its id; questions are where
CLASP_LOG_QUESTIONS asks for that.
"""

import logging
import re
import sys
import threading
import time
import uuid
from contextlib import ExitStack

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.tracing import request_span
from clasp_core.ingest import Timings
from clasp_core.types import Seconds

_log = structlog.get_logger()
_ACCEPTABLE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
"""Asked by machines every few seconds: no trace is made of them."""


def configure_logging(level: str) -> None:
    """JSON lines on standard error, ours and the libraries' alike, with the request id where there is one."""
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _without_colour,
                structlog.processors.EventRenamer("message"),
                structlog.processors.JSONRenderer(ensure_ascii=False),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = True
    # it writes query strings, that is, questions; `disabled` is undone by pymilvus's logging configuration
    logging.getLogger("uvicorn.access").addFilter(lambda record: False)
    logging.getLogger("httpcore").setLevel("WARNING")  # it writes where a URL redirects, with what is signed
    logging.getLogger("alembic").setLevel("WARNING")
    # what nobody expected, and ends a process or a thread, is a line like all others
    sys.excepthook = lambda *error: _log.critical("unexpected end", exc_info=error)
    threading.excepthook = lambda of: _log.critical("a thread ended", exc_info=of.exc_value, thread=_name(of))


def _name(of: threading.ExceptHookArgs) -> str:
    return "" if of.thread is None else of.thread.name


def _without_colour(_: object, __: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
    event.pop("color_message", None)  # uvicorn's duplicate of its message, for terminals
    return event


def request_id() -> str:
    """The current request's id, or an empty string outside of one."""
    return str(structlog.contextvars.get_contextvars().get("request_id", ""))


class Metrics:
    """The Prometheus series of one API process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "clasp_http_requests",
            "Requests by route and status.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "clasp_http_request_seconds",
            "Time to answer, by route.",
            ["method", "route"],
            registry=self.registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
        )
        self.errors = Counter(
            "clasp_errors", "Errors answered, by code (docs/errors.md).", ["code"], registry=self.registry
        )
        self.search_seconds = Histogram(
            "clasp_search_stage_seconds",
            "Stages of answering a batch of questions.",
            ["stage"],
            registry=self.registry,
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
        )
        self.search_batch = Histogram(
            "clasp_search_batch_size",
            "Questions answered together.",
            registry=self.registry,
            buckets=(1, 2, 4, 8, 16, 32),
        )
        self.search_wait = Histogram(
            "clasp_search_wait_seconds",
            "Time that a question waited for the batch before its own.",
            registry=self.registry,
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
        )
        self.search_waiting = Gauge(
            "clasp_search_waiting", "Questions that wait to be answered.", registry=self.registry
        )
        self.ingest_seconds = Counter(
            "clasp_ingest_stage_seconds",
            "Seconds of work by stage; index is the service's, the others are its workers'.",
            ["stage"],
            registry=self.registry,
        )
        self.ingest_batch = Histogram(
            "clasp_ingest_batch_size",
            "Segments embedded together.",
            registry=self.registry,
            buckets=(1, 2, 4, 8, 16, 32),
        )
        self.ingest_wait = Histogram(
            "clasp_ingest_seconds",
            "From a recording's arrival until it was ready.",
            registry=self.registry,
            buckets=(0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 14400),
        )
        self.refresh_seconds = Histogram(
            "clasp_index_refresh_seconds",
            "Time to bring what changed into the index.",
            registry=self.registry,
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 30),
        )
        self.ingested = Counter("clasp_ingested_recordings", "Recordings processed.", registry=self.registry)
        self.ingested_audio = Counter(
            "clasp_ingested_audio_seconds", "Seconds of sound processed.", registry=self.registry
        )
        self.worker_restarts = Counter("clasp_worker_restarts", "Workers that died.", registry=self.registry)
        self.worker_memory = Gauge(
            "clasp_worker_resident_memory_bytes",
            "Memory of an ingest worker.",
            ["worker"],
            registry=self.registry,
        )
        self.gpu_memory = Gauge(
            "clasp_gpu_memory_bytes",
            "Allocated and reserved by the process, as torch says; free and total of the device.",
            ["process", "device", "kind"],
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)
        self.recordings = Gauge(
            "clasp_recordings", "Recordings by status.", ["status"], registry=self.registry
        )
        self.failed = Gauge(
            "clasp_failed_recordings", "Failed recordings by code.", ["code"], registry=self.registry
        )
        self.queue_age = Gauge(
            "clasp_queue_age_seconds", "Age of the oldest pending recording.", registry=self.registry
        )
        self.model = Gauge(
            "clasp_model", "1 for the model that answers.", ["name", "fingerprint"], registry=self.registry
        )
        self.index_vectors = Gauge("clasp_index_vectors", "Vectors in the index.", registry=self.registry)
        self.index_kind = Gauge(
            "clasp_index_kind", "1 for how the index keeps vectors.", ["kind"], registry=self.registry
        )
        self.index_recall = Gauge(
            "clasp_index_recall",
            "Share of the ten best recordings that is found, as measured; 1 where all are looked at.",
            registry=self.registry,
        )
        self.index_probes = Gauge(
            "clasp_index_probes", "Lists that a search looks at.", registry=self.registry
        )
        self.snapshot_age = Gauge(
            "clasp_index_snapshot_age_seconds",
            "Time since the index was last saved, which happens when it has changed.",
            registry=self.registry,
        )
        self.unsaved = Gauge(
            "clasp_index_unsaved_changes",
            "Changes that the next start would have to read again.",
            registry=self.registry,
        )
        self.disk_free = Gauge(
            "clasp_disk_free_bytes", "Room for data on the data directory's disk.", registry=self.registry
        )
        self.disk_total = Gauge(
            "clasp_disk_total_bytes", "Size of the data directory's disk.", registry=self.registry
        )
        self.ready = Gauge("clasp_ready", "1 where /readyz answers 200.", registry=self.registry)
        self.check_ok = Gauge(
            "clasp_check_ok", "1 where a check of /readyz is well.", ["check"], registry=self.registry
        )

    def observe_model(self, name: str, fingerprint: str) -> None:
        self.model.clear()
        self.model.labels(name, fingerprint).set(1)

    def observe_index(self, kind: str, recall: float, probes: int) -> None:
        for one in ("flat", "half", "ivf"):
            self.index_kind.labels(one).set(one == kind)
        self.index_recall.set(recall)
        self.index_probes.set(probes)

    def observe_ingest(self, timings: Timings) -> None:
        for stage in ("decode", "segment", "embed", "commit"):
            self.ingest_seconds.labels(stage).inc(max(0.0, getattr(timings, stage)))
        for size in timings.batches:
            self.ingest_batch.observe(size)
        for seconds in timings.waits:
            self.ingest_wait.observe(seconds)
        self.ingested.inc(timings.recordings)
        self.ingested_audio.inc(timings.audio)

    def observe_refresh(self, seconds: Seconds) -> None:
        self.ingest_seconds.labels("index").inc(seconds)
        self.refresh_seconds.observe(seconds)

    def observe_gpus(self, process: str, gpus: list[dict[str, int]]) -> None:
        for number, gpu in enumerate(gpus):
            for kind, size in gpu.items():
                self.gpu_memory.labels(process, number, kind).set(size)


def gpu_memory() -> list[dict[str, int]]:
    """Bytes `allocated` and `reserved` by this process, `free` and `total`, of each GPU that torch uses here.

    Nothing where torch has not been asked for one yet: to look would take a GPU's memory by itself.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return []
    gpus = []
    for device in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(device)
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        gpus.append({"allocated": allocated, "reserved": reserved, "free": free, "total": total})
    return gpus


class RequestContext:
    """ASGI middleware: a request id in every log line and answer; and for each request one log line (with the
    key that asked, the error's code, and the recording that came or went), one metric and one span."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        identity = given if _ACCEPTABLE_ID.fullmatch(given) else uuid.uuid4().hex
        status = 500
        started = time.perf_counter()

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = identity
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        with ExitStack() as around:
            span = None
            bound = {"request_id": identity}
            if scope["path"].removeprefix("/v1") not in _PROBES:
                span = around.enter_context(request_span(Headers(scope=scope)))
                if span.trace_id:
                    bound["trace_id"] = span.trace_id
            around.enter_context(structlog.contextvars.bound_contextvars(**bound))
            try:
                await self._app(scope, receive, tagged)
            finally:
                seconds = time.perf_counter() - started
                route = getattr(scope.get("route"), "path", "unmatched")
                method = scope["method"] if route != "unmatched" else "any"
                self._metrics.requests.labels(method, route, status).inc()
                self._metrics.request_seconds.labels(method, route).observe(seconds)
                if (code := scope.get("code")) is not None:
                    self._metrics.errors.labels(code).inc()
                known = {"code": code, "recording": scope.get("recording")}
                told = {name: value for name, value in known.items() if value is not None}
                if span is not None:
                    span.finish(method, route, status, told | {"request_id": identity})
                if (key := getattr(scope.get("grant"), "name", None)) is not None:
                    told["key"] = key
                _log.info(
                    "request", method=method, route=route, status=status, seconds=round(seconds, 4), **told
                )
