"""Who asks, and what they may do: a key for every path but a few, a scope for every call.

`Guard` asks for the key before anything else of a request is looked at, its body and whether there is
such an address among it, and keeps it to its rate. Endpoints then say by `Reader`, `Writer` or `Admin`
what they need. A key stands in a header or, where a browser asks for our own page, in a cookie.
"""

import asyncio
import math
from collections.abc import Callable
from typing import Annotated
from urllib.parse import quote, unquote

import anyio
import anyio.to_thread
from fastapi import Depends, Request, Security
from fastapi.security import APIKeyHeader, HTTPBearer, SecurityScopes
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import HttpError, problem
from clasp_core.access import Grant, Keys
from clasp_core.library import check_name
from clasp_core.limits import Pace, Rate
from clasp_core.types import Seconds

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/openapi.json", "/docs", "/"})
"""What says nothing of anybody's recordings."""
OPEN_BELOW = "/page/"
"""The page's files, likewise."""
COOKIE = "clasp_key"
REMEMBERED_S: Seconds = 30 * 86_400.0
"""How long a browser keeps the cookie that it was to remember; else until it is closed."""
_SESSION = "/session"


class Gate:
    """Where keys are judged and kept to their rates, the same however they were presented."""

    def __init__(self, keys: Callable[[], Keys]) -> None:
        """`keys` is asked for each look-up: a service may exchange its library."""
        self._keys = keys
        self._waiting: list[tuple[str, asyncio.Future[Grant | None]]] = []
        self._looking: asyncio.Task[None] | None = None
        self._limiter: anyio.CapacityLimiter | None = None
        self._pace = Pace()

    async def admit(self, scope: Scope, given: str) -> Grant:
        """What whoever gives this key may do, which is left in the request's scope, too.

        HttpError `unauthorized` or `rate_limited`.
        """
        grant = self._keys().authenticate_fixed(given) or await self._looked_up(given)
        if grant is None:
            raise HttpError("unauthorized", "An API key is needed.", {"WWW-Authenticate": "Bearer"})
        scope["grant"] = grant
        if grant.key is not None and grant.rate is not None:
            wait_s = self._pace.take(grant.key, grant.rate)
            if wait_s > 0:
                raise _too_many(grant.rate, wait_s)
        return grant

    async def _looked_up(self, given: str) -> Grant | None:
        """Who comes while others are looked up is next, with all who came meanwhile: so every look-up begins
        after whom it is for has come, and a burst of requests costs two of them."""
        answer: asyncio.Future[Grant | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((given, answer))
        if self._looking is None:
            self._looking = asyncio.create_task(self._look_up())
        return await answer

    async def _look_up(self) -> None:
        if self._limiter is None:
            # a thread of our own: where all others wait for a long recording, a question does not
            self._limiter = anyio.CapacityLimiter(1)
        while together := self._waiting:
            self._waiting = []
            try:
                grants = await anyio.to_thread.run_sync(
                    self._keys().authenticate, [given for given, _ in together], limiter=self._limiter
                )
            except Exception as error:  # theirs, each of whom it is told
                for _, answer in together:
                    if not answer.done():
                        answer.set_exception(error)
            else:
                for (_, answer), grant in zip(together, grants, strict=True):
                    if not answer.done():  # else its client has gone
                        answer.set_result(grant)
        self._looking = None


class Guard:
    """ASGI middleware: 401 `unauthorized`, 429 `rate_limited`, or a `Grant` in the request's scope.

    Where no header says who asks, it may be a browser, in which any page can ask: those of other origins may
    change nothing then, which is 403 `forbidden`, and have no use of the cookie.
    """

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_open(scope):
            await self._app(scope, receive, send)
            return

        async def private(message: Message) -> None:
            if message["type"] == "http.response.start":  # for caches that know nothing of our headers
                MutableHeaders(scope=message).setdefault("Cache-Control", "private")
            await send(message)

        headers = Headers(scope=scope)
        try:
            given = _presented(headers)
            if given is None:
                if scope["method"] not in ("GET", "HEAD"):
                    refuse_other_origins(headers)
                given = _in_cookie(headers)
            await self._gate.admit(scope, given)
        except HttpError as error:
            await problem(error.code, str(error), headers=error.headers)(scope, receive, private)
            return
        await self._app(scope, receive, private)


def _is_open(scope: Scope) -> bool:
    path: str = scope["path"]
    return (
        path in OPEN_PATHS
        or path.startswith(OPEN_BELOW)
        or (path.removeprefix("/v1") == _SESSION and scope["method"] in ("POST", "DELETE"))
    )


def _too_many(rate: Rate, wait_s: Seconds) -> HttpError:
    headers = {
        "Retry-After": str(math.ceil(wait_s)),
        # draft-ietf-httpapi-ratelimit-headers
        "RateLimit-Policy": f'"key";q={rate.requests};w={rate.window_s:.0f}',
        "RateLimit": f'"key";r=0;t={math.ceil(wait_s)}',
    }
    return HttpError("rate_limited", f"The key may ask {rate.requests} times a {rate.per}.", headers)


def _presented(headers: Headers) -> str | None:
    """`Authorization: Bearer KEY` or `X-API-Key: KEY`."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    return bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key")


def _in_cookie(headers: Headers) -> str:
    """The key in the cookie, where a browser says that a page of this very origin asks; else an empty text.

    (SameSite=Strict alone lets in pages of other ports and of neighbouring host names.)
    """
    if headers.get("sec-fetch-site") != "same-origin":
        return ""
    return unquote(cookie_parser("; ".join(headers.getlist("cookie"))).get(COOKIE, ""))


def refuse_other_origins(headers: Headers) -> None:
    """HttpError `forbidden` where a browser says that a page of another origin asks."""
    if headers.get("sec-fetch-site", "same-origin") in ("cross-site", "same-site"):
        raise HttpError("forbidden", "A page of another origin needs an API key in a header for this.")


def set_cookie(answer: Response, request: Request, key: str, *, remember: bool) -> None:
    """Let the browser present the key, which no script can read, in what our page asks."""
    # behind a proxy that says nothing of its TLS, the page's own address does
    over_tls = request.url.scheme == "https" or request.headers.get("origin", "").startswith("https:")
    answer.set_cookie(
        COOKIE,
        quote(key, safe=""),
        max_age=round(REMEMBERED_S) if remember else None,
        httponly=True,
        samesite="strict",
        secure=over_tls,
    )


def drop_cookie(answer: Response) -> None:
    answer.delete_cookie(COOKIE, httponly=True, samesite="strict")


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


Anyone = Annotated[Grant, Security(_granted)]
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
