"""When a request is to be done: only if the record is still what its sender saw (RFC 9110, 13), and only once
(`Idempotency-Key`, draft-ietf-httpapi-idempotency-key-header)."""

import hashlib
import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from starlette.responses import Response

from app.errors import HttpError
from clasp_core.errors import InvalidField

MAX_KEY_CHARACTERS = 255
_ENTITY_TAG = re.compile(r'(W/)?("[\x21\x23-\x7e\x80-\xff]*")')
_QUOTED = re.compile(r'"((?:[^"\\]|\\["\\])*)"')
"""RFC 8941, 3.3.3."""


def etag_of(representation: bytes) -> str:
    """A strong validator: another representation has another."""
    return f'"{hashlib.sha256(representation).hexdigest()[:32]}"'


def is_among(etag: str, header: Sequence[str]) -> bool:
    """Whether `If-None-Match` names this strong ETag, or a weak one of the same text."""
    return _names_any(header) or any(etag == tag for _, tag in _tags(header))


def unless_known(
    content: bytes, media_type: str, headers: Mapping[str, str], if_none_match: Sequence[str]
) -> Response:
    """An answer of this content, with its ETag; 304 in its place where `If-None-Match` names that."""
    headers = {**headers, "ETag": etag_of(content)}
    if is_among(headers["ETag"], if_none_match):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=media_type)


def require(etag: str, if_match: Sequence[str]) -> None:
    """HttpError `precondition_failed` where `If-Match` does not name this ETag, as a strong one."""
    if not _names_any(if_match) and ("", etag) not in _tags(if_match):
        raise HttpError("precondition_failed", "The record is not (any more) what If-Match says.")


def _names_any(header: Sequence[str]) -> bool:
    return any(value.strip() == "*" for value in header)


def _tags(header: Sequence[str]) -> list[tuple[str, str]]:
    return [pair for value in header for pair in _ENTITY_TAG.findall(value)]


def operation_name(asker: str | None, header: Sequence[str]) -> str | None:
    """What a request that carries an `Idempotency-Key` is called; None without one.

    Each asker (the name of an API key; None for all who need none) has names of its own. The key is a
    string as the draft has it, `"in quotes"`, or the same without them, as most send it. InvalidField for
    another.
    """
    if not header:
        return None
    key = header[0].strip()
    if quoted := _QUOTED.fullmatch(key):
        key = re.sub(r"\\(.)", r"\1", quoted[1])
    elif key.startswith('"'):
        key = ""
    if len(header) > 1 or not 0 < len(key) <= MAX_KEY_CHARACTERS or not (key.isascii() and key.isprintable()):
        raise InvalidField(
            f"Idempotency-Key must be one text of 1 to {MAX_KEY_CHARACTERS} printable ASCII characters."
        )
    return hashlib.sha256(json.dumps([asker, key]).encode()).hexdigest()


class InFlight:
    """The operations that this process is at. What it did not finish when it died is nobody's business:
    what was committed is in the catalogue, under the operation's name."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    @asynccontextmanager
    async def only(self, name: str | None) -> AsyncIterator[None]:
        """HttpError `idempotency_in_flight` while another is at the operation of that name."""
        if name is None:
            yield
            return
        if name in self._names:
            raise HttpError(
                "idempotency_in_flight",
                "A request with this Idempotency-Key is being worked on; ask again when it is done.",
                {"Retry-After": "1"},
            )
        self._names.add(name)
        try:
            yield
        finally:
            self._names.remove(name)
