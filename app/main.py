"""The application object: settings in, a served library out."""

import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.openapi.utils import get_openapi

from app import errors, routes
from app.schemas import ProblemBody
from app.service import Service
from app.settings import Settings
from app.telemetry import RequestContext
from app.uploads import MAX_JSON_BYTES, BodyLimit

DESCRIPTION = """Find what was said in recordings, in any language, without transcribing them.

Upload recordings to `/audio`; ask `/search` in any language. Every path is also served under `/v1`.
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
        dependencies=[Depends(_require_key)] if settings.api_keys else [],
        redoc_url=None,
    )
    app.state.service = service
    app.include_router(routes.api)
    app.include_router(routes.api, prefix="/v1", include_in_schema=False)
    app.include_router(routes.operations)
    errors.install(app)
    app.add_middleware(BodyLimit, max_bytes=MAX_JSON_BYTES)
    app.add_middleware(RequestContext, metrics=service.metrics)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


OPEN_PATHS = frozenset({"/healthz", "/readyz"})


def _require_key(request: Request) -> None:
    """`Authorization: Bearer KEY` or `X-API-Key: KEY`, compared in constant time."""
    if request.url.path in OPEN_PATHS:
        return
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    given = bearer.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
    keys = routes.get_service(request).settings.api_keys
    if not any([hmac.compare_digest(given.encode(), key.encode()) for key in keys]):
        raise errors.HttpError("unauthorized", "An API key is needed.", {"WWW-Authenticate": "Bearer"})


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description, with our one error body in place of its own."""
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
        app.openapi_schema = schema
    return app.openapi_schema
