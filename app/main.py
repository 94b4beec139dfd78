"""The application object: settings in, a served library out."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from app import errors, routes
from app.access import Guard
from app.clients import Deadline
from app.schemas import ProblemBody
from app.service import Service
from app.settings import Settings
from app.telemetry import RequestContext
from app.uploads import MAX_JSON_BYTES, BodyLimit
from clasp_core.access import Keys

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
        redoc_url=None,
    )
    app.state.service = service
    app.include_router(routes.api)
    app.include_router(routes.api, prefix="/v1", include_in_schema=False)
    app.include_router(routes.operations)
    app.add_middleware(Guard, keys=lambda: Keys(service.library.catalog, settings.api_keys))
    errors.install(app)
    app.add_middleware(BodyLimit, max_bytes=MAX_JSON_BYTES)
    app.add_middleware(Deadline, timeout_s=settings.request_timeout_s)
    app.add_middleware(RequestContext, metrics=service.metrics)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


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
