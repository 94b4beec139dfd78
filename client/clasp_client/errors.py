"""What can go wrong, as the questions that callers ask:

ClaspError
├── ConnectionFailed             no answer: nobody there, or the connection broke
│   └── TimedOut                 ... or none came in time
├── UnexpectedAnswer             an answer, but not one of clasp-search's
├── RecordingFailed              it was uploaded, and then could not be indexed; has the `record`
├── NotReadyInTime               it may become searchable later; has the `record`
└── ServiceError                 the service said no: `status`, `code`, `detail`, `request_id`, `retry_after`
    ├── InvalidRequest           400, 422 and other 4xx: the same request will never do
    │   ├── TooLarge             413
    │   └── UnsupportedMedia     415
    ├── Unauthorized             401: no key, or not a valid one
    ├── Forbidden                403: the key may not
    │   └── QuotaExceeded        code `quota_exceeded`: ... store any more
    ├── NotFound                 404
    ├── Conflict                 409: the id is another recording's, or several have it
    ├── PreconditionFailed       412: somebody else changed the record
    ├── RateLimited              429
    └── ServerError              5xx
        └── Unavailable          502, 503, 504, 507: the same request may do later

`docs/errors.md` of the service lists the codes. No message holds an API key.
"""

from collections.abc import Mapping
from typing import Any

from clasp_client.answers import Record


class ClaspError(Exception):
    """All of them."""


class ConnectionFailed(ClaspError):
    """There was no (whole) answer. Whether the request was done is not known."""


class TimedOut(ConnectionFailed):
    """There was no answer in time."""


class UnexpectedAnswer(ClaspError):
    """What answered does not speak as clasp-search does: a wrong address, or a proxy's own page."""


class RecordingFailed(ClaspError):
    """The recording cannot be indexed; `record.error` says why."""

    def __init__(self, record: Record) -> None:
        error = record.error
        super().__init__(
            f"{record.id}: {error.detail} ({error.code})" if error else f"{record.id} cannot be indexed"
        )
        self.record = record


class NotReadyInTime(ClaspError, TimeoutError):
    """The recording is kept, and still waits to be indexed."""

    def __init__(self, record: Record, seconds: float) -> None:
        super().__init__(f"{record.id} is still {record.status} after {seconds:g} s")
        self.record = record


class ServiceError(ClaspError):
    """An answer with an error's status."""

    def __init__(
        self,
        status: int,
        *,
        code: str | None = None,
        detail: str = "",
        request_id: str | None = None,
        retry_after: float | None = None,
        errors: tuple[Mapping[str, Any], ...] = (),
    ) -> None:
        reasons = "; ".join(f"{error.get('pointer')}: {error.get('reason')}" for error in errors)
        super().__init__(
            f"{status} {code or 'without a code'}: {detail}" + (f" ({reasons})" if reasons else "")
        )
        self.status = status
        self.code = code
        """Stable, for programs; None where it was not the service that answered, but a proxy, say."""
        self.detail = detail
        """A sentence for people."""
        self.request_id = request_id
        """What the service's log calls the request."""
        self.retry_after = retry_after
        """Seconds after which the service wants to be asked again, if it said so."""
        self.errors = errors
        """Where a request's form was wrong: a `pointer` and a `reason` each."""


class InvalidRequest(ServiceError): ...


class TooLarge(InvalidRequest): ...


class UnsupportedMedia(InvalidRequest): ...


class Unauthorized(ServiceError): ...


class Forbidden(ServiceError): ...


class QuotaExceeded(Forbidden): ...


class NotFound(ServiceError): ...


class Conflict(ServiceError): ...


class PreconditionFailed(ServiceError): ...


class RateLimited(ServiceError): ...


class ServerError(ServiceError): ...


class Unavailable(ServerError): ...


_BY_CODE: dict[str | None, type[ServiceError]] = {"quota_exceeded": QuotaExceeded}
_BY_STATUS: dict[int, type[ServiceError]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    412: PreconditionFailed,
    413: TooLarge,
    415: UnsupportedMedia,
    429: RateLimited,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
    507: Unavailable,
}


def error_class(status: int, code: str | None) -> type[ServiceError]:
    """The narrowest class for an error's answer."""
    general = InvalidRequest if 400 <= status < 500 else ServerError
    return _BY_CODE.get(code) or _BY_STATUS.get(status, general)
