"""Spans as OpenTelemetry traces, sent by OTLP over HTTP: extra `tracing`, and OTEL_EXPORTER_OTLP_ENDPOINT.

The variable is OpenTelemetry's own; its SDK reads the others of them (headers, sampling, OTEL_SERVICE_NAME).
Requests become spans by a few lines here rather than by FastAPI's or anybody's instrumentation: those note
the query string, that is, the question.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

import structlog

from clasp_core import tracing
from clasp_core.tracing import Attributes
from clasp_core.types import Seconds

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

_log = structlog.get_logger()

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
FLUSH_WITHIN_S: Seconds = 3.0
"""How long the end of a process may wait for a collector that does not answer."""
_WITHOUT_MESSAGES = {"record_exception": False, "set_status_on_exception": False}
"""An exception's message may repeat what was sent."""
_tracer: "_Tracer | None" = None


def start_tracing(process: str) -> None:
    """Send this process's spans where the environment says; without it, or without the extra, do nothing.

    `process` is `api` or `worker`.
    """
    global _tracer
    if not any(os.environ.get(name) for name in ENDPOINTS) or _tracer is not None:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        _log.warning("no traces: pip install 'clasp-search[tracing]'")
        return
    facts = {"service.version": version("clasp-search"), "clasp.process": process}
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "clasp-search"}
    # of our own, not the process's: what else is able to trace (FastAPI is) stays silent
    provider = TracerProvider(resource=Resource.create(facts | named), shutdown_on_exit=False)
    timeout = None if os.environ.get("OTEL_EXPORTER_OTLP_TIMEOUT") else FLUSH_WITHIN_S
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(timeout=timeout)))
    _tracer = _Tracer(provider)
    tracing.listen(_tracer)
    _log.info("traces are sent", process=process)


def stop_tracing() -> None:
    """Send what has not been sent yet."""
    if _tracer is not None:
        _tracer.provider.shutdown()


class RequestSpan:
    """The span of one HTTP request, to be told what is known when it is over."""

    def __init__(self, span: "Span | None") -> None:
        self._span = span

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits, or nothing where no trace is made."""
        return "" if self._span is None else f"{self._span.get_span_context().trace_id:032x}"

    def finish(self, method: str, route: str, status: int, attributes: Attributes) -> None:
        if self._span is not None:
            from opentelemetry.trace import StatusCode

            self._span.update_name(f"{method} {route}")
            self._span.set_attributes(
                {"http.request.method": method, "http.route": route, "http.response.status_code": status}
                | _prefixed(attributes)
            )
            if status >= 500:
                self._span.set_status(StatusCode.ERROR)


@contextmanager
def request_span(headers: Mapping[str, str]) -> Iterator[RequestSpan]:
    """The span around a request, a part of the caller's trace where `traceparent` (W3C) names one."""
    if _tracer is None:
        yield RequestSpan(None)
        return
    with _tracer.server_span(headers) as span:
        yield RequestSpan(span)


class _Tracer:
    """`clasp_core.tracing.Listener` by OpenTelemetry's SDK."""

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.provider = provider
        self._tracer = provider.get_tracer("clasp")
        self._propagator = TraceContextTextMapPropagator()

    def server_span(self, headers: Mapping[str, str]) -> "AbstractContextManager[Span]":
        from opentelemetry.trace import SpanKind

        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        span: AbstractContextManager[Span] = self._tracer.start_as_current_span(
            "request", self._propagator.extract(carrier), SpanKind.SERVER, **_WITHOUT_MESSAGES
        )
        return span

    def span(self, name: str, attributes: Attributes) -> AbstractContextManager[object]:
        span: AbstractContextManager[object] = self._tracer.start_as_current_span(
            name, attributes=_prefixed(attributes), **_WITHOUT_MESSAGES
        )
        return span

    def record(self, name: str, began: Seconds, ended: Seconds, attributes: Attributes) -> None:
        epoch_ns = time.time_ns() - time.perf_counter_ns()
        span = self._tracer.start_span(
            name, attributes=_prefixed(attributes), start_time=epoch_ns + int(began * 1e9)
        )
        span.end(epoch_ns + int(ended * 1e9))


def _prefixed(attributes: Attributes) -> dict[str, str | int | float]:
    return {f"clasp.{name}": value for name, value in attributes.items()}
