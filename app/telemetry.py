"""Logs, request ids and metrics: what an operator sees. No question and no recording is ever logged."""

import logging
import re
import sys
import time
import uuid

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clasp_core.ingest import Timings

_log = structlog.get_logger()
_ACCEPTABLE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


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
    logging.getLogger("uvicorn.access").disabled = True  # it writes query strings, that is, questions
    logging.getLogger("httpcore").setLevel("WARNING")  # it writes where a URL redirects, with what is signed
    logging.getLogger("alembic").setLevel("WARNING")


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
        self.ingest_seconds = Counter(
            "clasp_ingest_stage_seconds", "Worker seconds by stage.", ["stage"], registry=self.registry
        )
        self.ingested = Counter("clasp_ingested_recordings", "Recordings processed.", registry=self.registry)
        self.ingested_audio = Counter(
            "clasp_ingested_audio_seconds", "Seconds of sound processed.", registry=self.registry
        )
        self.worker_restarts = Counter("clasp_worker_restarts", "Workers that died.", registry=self.registry)
        self.recordings = Gauge(
            "clasp_recordings", "Recordings by status.", ["status"], registry=self.registry
        )
        self.queue_age = Gauge(
            "clasp_queue_age_seconds", "Age of the oldest pending recording.", registry=self.registry
        )
        self.model = Gauge(
            "clasp_model", "1 for the model that answers.", ["name", "fingerprint"], registry=self.registry
        )
        self.index_vectors = Gauge("clasp_index_vectors", "Vectors in the index.", registry=self.registry)

    def observe_model(self, name: str, fingerprint: str) -> None:
        self.model.clear()
        self.model.labels(name, fingerprint).set(1)

    def observe_ingest(self, timings: Timings) -> None:
        for stage in ("decode", "embed", "commit"):
            self.ingest_seconds.labels(stage).inc(getattr(timings, stage))
        self.ingested.inc(timings.recordings)
        self.ingested_audio.inc(timings.audio)


class RequestContext:
    """ASGI middleware: a request id in every log line and answer, one log line (which names the key that
    asked) and one metric a request."""

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

        with structlog.contextvars.bound_contextvars(request_id=identity):
            try:
                await self._app(scope, receive, tagged)
            finally:
                seconds = time.perf_counter() - started
                route = getattr(scope.get("route"), "path", "unmatched")
                method = scope["method"] if route != "unmatched" else "any"
                self._metrics.requests.labels(method, route, status).inc()
                self._metrics.request_seconds.labels(method, route).observe(seconds)
                key = getattr(scope.get("grant"), "name", None)
                by = {} if key is None else {"key": key}
                _log.info(
                    "request", method=method, route=route, status=status, seconds=round(seconds, 4), **by
                )
