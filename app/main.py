"""The application object: settings in, a served library out."""

import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from types import FrameType
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from app import errors, pages, routes
from app.access import Gate, Guard
from app.clients import Connection, Deadline
from app.schemas import ProblemBody
from app.service import Service
from app.settings import Settings
from app.telemetry import RequestContext
from app.uploads import MAX_JSON_BYTES, BodyLimit
from clasp_core.access import Keys

_log = structlog.get_logger()

FINISH_WITHIN_S = 15
"""What requests in flight have left once nobody new is let in; after that they are cut off."""
DESCRIPTION = """Find what was said in recordings, in any language, without transcribing them.

Upload recordings to `/audio`; ask `/search` in any language. Every path is also served under `/v1`.

Where the service has API keys, every path needs one but `/healthz`, `/readyz` and this description, and each
call the scope that stands beside it; a key with the scope `admin` has all. Keys may be limited to some
collections.
"""


def create_app(settings: Settings) -> FastAPI:
    """Opens the library and loads the text encoder before it returns; raises ClaspError where it cannot."""
    service = Service(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.stop()

    app = FastAPI(
        title="CLASP search",
        version=version("clasp-search"),
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # made of what a foreign host has: ours is in app/pages
        redoc_url=None,
        # FastAPI's own spans and events hold query strings and exceptions' messages: see app/tracing
        telemetry={"auto_configure": False, "tracing": False, "metrics": False, "logs": False},
    )
    app.state.service = service
    app.include_router(routes.api)
    app.include_router(routes.api, prefix="/v1", include_in_schema=False)
    app.include_router(routes.operations)
    app.include_router(pages.pages)
    gate = Gate(lambda: Keys(service.library.catalog, settings.api_keys))
    app.state.gate = gate
    app.add_middleware(Guard, gate=gate)
    errors.install(app)
    app.add_middleware(BodyLimit, max_bytes=MAX_JSON_BYTES)
    app.add_middleware(Deadline, timeout_s=settings.request_timeout_s)
    app.add_middleware(RequestContext, metrics=service.metrics)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


class Server(uvicorn.Server):
    """Ends in this order: not ready, but open for `drain_s`, until every load balancer has noticed; no new
    connections; requests in flight finished, or cut off after FINISH_WITHIN_S; workers; the library closed.

    A second signal ends the first of these at once.
    """

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        http: Any = partial(Connection, idle_s=settings.upload_idle_s, most=settings.max_connections)
        super().__init__(
            uvicorn.Config(app, http=http, log_config=None, timeout_graceful_shutdown=FINISH_WITHIN_S)
        )
        self._service: Service = app.state.service
        self._drain_s = settings.drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        draining = self._service.leaving
        self._service.leaving = True
        if draining or not self._drain_s:
            super().handle_exit(sig, frame)
        else:
            threading.Thread(target=self._drain, args=(sig, frame), name="drain", daemon=True).start()

    def _drain(self, sig: int, frame: FrameType | None) -> None:
        _log.info("not ready any more; still answering", seconds=self._drain_s)
        time.sleep(self._drain_s)
        if not self.should_exit:
            super().handle_exit(sig, frame)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description, with our one error body in place of its own; no key is a way to ask, too."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        components = schema["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            components.pop(name, None)
        components["ProblemBody"] = ProblemBody.model_json_schema()
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
                if "security" in operation:
                    operation["security"].append({})
        app.openapi_schema = schema
    return app.openapi_schema
