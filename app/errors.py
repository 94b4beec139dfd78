"""What the world sees of an error: one table from error codes to statuses, one body, for every layer.

Bodies are `application/problem+json` (RFC 9457) with the extensions `code` (stable, from the table
below) and `request_id`; 422 answers add `errors`, each with a JSON pointer and a reason.
"""

import http
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.telemetry import request_id
from clasp_core.errors import ClaspError

_log = structlog.get_logger()

STATUS_OF: dict[str, int] = {
    # --- raised by the core; an unlisted code takes its base class's status
    "invalid_input": 422,
    "empty_query": 422,
    "invalid_language": 422,
    "invalid_field": 422,
    "invalid_manifest": 422,
    "invalid_backup": 422,
    "invalid_audio": 422,
    "undecodable_audio": 415,
    "empty_audio": 422,
    "silent_audio": 422,
    "non_finite_audio": 422,
    "audio_too_long": 413,
    "recording_not_found": 404,
    "recording_not_ready": 409,
    "no_waveform": 404,
    "id_conflict": 409,
    "ambiguous_id": 409,
    "idempotency_mismatch": 422,
    "not_calibrated": 422,
    "extra_missing": 503,
    "model_unavailable": 503,
    "weights_mismatch": 503,
    "invalid_checkpoint": 503,
    "unsafe_checkpoint": 503,
    "data_mismatch": 503,
    "data_damaged": 500,
    "index_unavailable": 503,
    "voice_unavailable": 503,
    "backup_failed": 500,
    "processing_failed": 500,
    "quota_exceeded": 403,
    "queue_full": 503,
    "disk_full": 507,
    "not_ready": 503,
    "store_unavailable": 503,
    "database_unavailable": 503,
    # --- raised by this layer
    "unauthorized": 401,
    "forbidden": 403,
    "rate_limited": 429,
    "collection_required": 422,
    "malformed_request": 400,
    "idempotency_in_flight": 409,
    "precondition_failed": 412,
    "empty_upload": 422,
    "upload_too_large": 413,
    "upload_interrupted": 400,
    "request_timeout": 408,
    "deadline_exceeded": 503,
    "unsupported_media_type": 415,
    "url_not_allowed": 403,
    "url_failed": 502,
    "url_timeout": 504,
    "range_not_satisfiable": 416,
    "not_found": 404,
    "method_not_allowed": 405,
    "internal_error": 500,
}
RETRY_AFTER_S = 2
QUEUE_RETRY_AFTER_S = 30
"""A queue that is full has hours of work before it."""


class Problem(JSONResponse):
    """An error's answer, which leaves its code in the request's scope for the log and the metrics."""

    media_type = "application/problem+json"

    def __init__(self, body: dict[str, Any], status: int, headers: dict[str, str]) -> None:
        super().__init__(body, status, headers)
        self.code: str = body["code"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["code"] = self.code
        await super().__call__(scope, receive, send)


class HttpError(Exception):
    """An error that only HTTP can have. `code` must stand in `STATUS_OF`."""

    def __init__(self, code: str, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.headers = headers or {}


def problem(
    code: str,
    detail: str,
    *,
    status: int | None = None,
    headers: dict[str, str] | None = None,
    errors: list[dict[str, str]] | None = None,
    **members: object,
) -> JSONResponse:
    """The answer of an error; `members` are further ones of its body (RFC 9457, 3.2)."""
    status = status or STATUS_OF[code]
    body: dict[str, Any] = {
        "type": f"urn:clasp:problem:{code}",
        "title": http.HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "code": code,
        "request_id": request_id(),
    }
    if errors:
        body["errors"] = errors
    body |= members
    headers = dict(headers or {})
    if status in (429, 503):
        after_s = QUEUE_RETRY_AFTER_S if code == "queue_full" else RETRY_AFTER_S
        headers.setdefault("Retry-After", str(after_s))
    return Problem(body, status, headers)


def install(app: FastAPI) -> None:
    """Make every error of this application answer in the one form."""

    @app.exception_handler(ClaspError)
    async def _core(_: Request, error: ClaspError) -> JSONResponse:
        return problem(error.code, error.detail)

    @app.exception_handler(HttpError)
    async def _ours(_: Request, error: HttpError) -> JSONResponse:
        return problem(error.code, error.detail, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def _validation(_: Request, error: RequestValidationError) -> JSONResponse:
        errors = [{"pointer": _pointer(item["loc"]), "reason": item["msg"]} for item in error.errors()]
        if any(item["type"] == "json_invalid" for item in error.errors()):
            return problem("malformed_request", "The body is not valid JSON.", errors=errors)
        fields = ", ".join(item["pointer"] for item in errors)
        return problem("invalid_input", f"Not acceptable: {fields}.", errors=errors)

    @app.exception_handler(HTTPException)
    async def _starlette(request: Request, error: HTTPException) -> JSONResponse:
        codes = {
            404: "not_found",
            405: "method_not_allowed",
            413: "upload_too_large",
            416: "range_not_satisfiable",
        }
        code = codes.get(
            error.status_code, "malformed_request" if error.status_code < 500 else "internal_error"
        )
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = ", ".join(_methods(request))
        return problem(code, str(error.detail), status=error.status_code, headers=headers)

    app.add_middleware(_Bugs)


class _Bugs:
    """ASGI middleware: what nobody expected is logged, and answered unless an answer has begun.

    Not an exception handler: Starlette calls the one for Exception outside of all middleware, where the
    request's id is gone, and the server then drops the connection.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except ClaspError as error:  # of another middleware: Starlette's handlers are within
            if begun or scope["type"] != "http":
                raise
            await problem(error.code, error.detail)(scope, receive, send)
        except Exception as error:
            if begun or scope["type"] != "http":
                raise
            if isinstance(error, ClaspError):  # of a middleware: who asks could not be looked up, say
                await problem(error.code, error.detail)(scope, receive, send)
                return
            _log.error("unexpected error", exc_info=error)
            detail = "An unexpected error occurred. This is a bug; the log has the details."
            await problem("internal_error", detail)(scope, receive, send)


_METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")


def _methods(request: Request) -> list[str]:
    """All that an address has (RFC 9110, 10.2.1): a route is for one method, and knows no other."""
    return [method for method in _METHODS if _has(request, method)]


def _has(request: Request, method: str) -> bool:
    asked = {**request.scope, "method": method}
    return any(route.matches(asked)[0] is Match.FULL for route in request.app.routes)


def _pointer(location: tuple[int | str, ...]) -> str:
    return "/" + "/".join(str(part).replace("~", "~0").replace("/", "~1") for part in location)
