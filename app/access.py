"""Who asks, and what they may do: a key for every path but a few, a scope for every call.

`Guard` asks for the key before anything else of a request is looked at, its body and whether there is
such an address among it, and keeps it to its rate. Endpoints then say by `Reader`, `Writer` or `Admin`
what they need.
"""

import math
from collections.abc import Callable
from typing import Annotated

import anyio
import anyio.to_thread
from fastapi import Depends, Request, Security
from fastapi.security import APIKeyHeader, HTTPBearer, SecurityScopes
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app.errors import HttpError, problem
from clasp_core.access import Grant, Keys
from clasp_core.library import check_name
from clasp_core.limits import Pace, Rate
from clasp_core.types import Seconds

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/openapi.json", "/docs", "/"})
"""What says nothing of anybody's recordings."""
OPEN_BELOW = "/page/"
"""The page's files, likewise."""
_AT_ONCE = 4


class Guard:
    """ASGI middleware: 401 `unauthorized`, 429 `rate_limited`, or a `Grant` in the request's scope."""

    def __init__(self, app: ASGIApp, keys: Callable[[], Keys]) -> None:
        """`keys` is asked for each request: a service may exchange its library."""
        self._app = app
        self._keys = keys
        self._limiter: anyio.CapacityLimiter | None = None
        self._pace = Pace()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_open(scope["path"]):
            if self._limiter is None:
                # threads of our own: where all others wait for a long recording, a question does not
                self._limiter = anyio.CapacityLimiter(_AT_ONCE)
            given = _presented(Headers(scope=scope))
            grant = await anyio.to_thread.run_sync(self._keys().authenticate, given, limiter=self._limiter)
            if grant is None:
                refusal = problem(
                    "unauthorized", "An API key is needed.", headers={"WWW-Authenticate": "Bearer"}
                )
                await refusal(scope, receive, send)
                return
            scope["grant"] = grant
            if grant.key is not None and grant.rate is not None:
                wait_s = self._pace.take(grant.key, grant.rate)
                if wait_s > 0:
                    await _too_many(grant.rate, wait_s)(scope, receive, send)
                    return
        await self._app(scope, receive, send)


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_BELOW)


def _too_many(rate: Rate, wait_s: Seconds) -> Response:
    headers = {
        "Retry-After": str(math.ceil(wait_s)),
        # draft-ietf-httpapi-ratelimit-headers
        "RateLimit-Policy": f'"key";q={rate.requests};w={rate.window_s:.0f}',
        "RateLimit": f'"key";r=0;t={math.ceil(wait_s)}',
    }
    return problem("rate_limited", f"The key may ask {rate.requests} times a {rate.per}.", headers=headers)


def _presented(headers: Headers) -> str:
    """`Authorization: Bearer KEY` or `X-API-Key: KEY`; else an empty text."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    return bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


_BEARER = HTTPBearer(scheme_name="bearer", auto_error=False)
_HEADER = APIKeyHeader(name="X-API-Key", scheme_name="header", auto_error=False)


async def _granted(
    request: Request,
    needed: SecurityScopes,
    bearer: Annotated[object, Depends(_BEARER)],  # these two are for the API's description;
    header: Annotated[object, Depends(_HEADER)],  # what they find, the guard has judged
) -> Grant:
    grant: Grant = request.scope["grant"]
    for scope in needed.scopes:
        if not grant.allows(scope):  # type: ignore[arg-type]
            raise HttpError("forbidden", f"The key lacks the scope {scope}.")
    return grant


Reader = Annotated[Grant, Security(_granted, scopes=["read"])]
Writer = Annotated[Grant, Security(_granted, scopes=["write"])]
Admin = Annotated[Grant, Security(_granted, scopes=["admin"])]


def visible(grant: Grant, collection: str | None) -> frozenset[str] | None:
    """The collections that a call is about: the one it names, or all that the key may see (None: all).

    HttpError `forbidden` where it names another than the key may see, whether there is such a one or not;
    InvalidField where that is no name.
    """
    if collection is None:
        return grant.collections
    check_name("collection", collection)
    if grant.collections is not None and collection not in grant.collections:
        raise HttpError("forbidden", f"The key is not for the collection {collection!r}.")
    return frozenset({collection})


def destination(grant: Grant, collection: str | None) -> str:
    """The collection that an upload goes to. HttpError `collection_required` where the key is for several and
    none is named; else as `visible`."""
    if collection is not None:
        visible(grant, collection)
        return collection
    if grant.collections is None:
        return "default"
    if len(grant.collections) > 1:
        raise HttpError("collection_required", "The key is for several collections; name one.")
    (only,) = grant.collections
    return only
