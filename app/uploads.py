"""Receiving recordings: a request's body, multipart or raw, or what a URL in it answers, streamed into the
audio store under a limit.

The size is enforced as bytes arrive, before they are written; nothing is spooled elsewhere first, and
no file name or path of the client's is used for anything. There is no limit to how long it takes, but a
client must go on sending.
"""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any

import anyio
import orjson
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import HttpError
from app.fetching import Fetcher
from clasp_core.errors import InvalidField
from clasp_core.store import AudioStore, Upload
from clasp_core.tracing import span
from clasp_core.types import Seconds

FILE_FIELDS = ("file", "audio")
MAX_FIELD_BYTES = 64 * 1024
MAX_PARTS = 16
STREAMED = frozenset({"/audio", "/search/audio"})
SMALL = {"/session": 16 * 1024}
"""Bytes of what is read of anybody, before a key is known."""
"""Where recordings arrive."""
MAX_JSON_BYTES = 4 << 20
"""Several times what the largest acceptable POST /search needs."""
MIN_BYTES_PER_S = 1024
"""What a client must send on average, once it has been waited for as long as it may send nothing."""
_WRITE_BYTES = 1 << 20
_MAX_OVERHEAD_BYTES = 1 << 20
"""What a multipart body may hold besides the file."""

_SIGNATURES = (
    (0, b"RIFF", "audio/wav"),
    (0, b"fLaC", "audio/flac"),
    (0, b"OggS", "audio/ogg"),
    (0, b"ID3", "audio/mpeg"),
    (0, b"\xff\xfb", "audio/mpeg"),
    (0, b"\xff\xf3", "audio/mpeg"),
    (0, b"\xff\xf1", "audio/aac"),
    (0, b"FORM", "audio/aiff"),
    (4, b"ftyp", "audio/mp4"),
    (0, b"\x1aE\xdf\xa3", "audio/webm"),
)


@dataclass(frozen=True, slots=True)
class Received:
    """A sealed upload, the form's other fields as text, and the media type its first bytes show."""

    upload: Upload
    fields: dict[str, str]
    media_type: str | None


class UrlBody(BaseModel):
    """A recording that is to be fetched, and what is said of it."""

    model_config = ConfigDict(extra="forbid")

    url: Annotated[
        str,
        Field(max_length=8192, description="https, of a host that the operator allows (`CLASP_URL_HOSTS`)."),
    ]
    id: Annotated[str | None, Field(description="The recording's id; by default a new UUID.")] = None
    lang: Annotated[str | None, Field(description="BCP 47 tag of what is spoken.")] = None
    collection: Annotated[
        str | None,
        Field(description="By default `default`; or the one that the key is for, if it is for one."),
    ] = None
    metadata: Annotated[dict[str, Any] | None, Field(description="Kept and returned as it is.")] = None


class BodyLimit:
    """ASGI middleware: a body that is read whole before it is looked at must not be of any size.

    Recordings are not: `receive` streams them under a limit of its own.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix("/v1") if scope["type"] == "http" else None
        if path is None or path in STREAMED:
            await self._app(scope, receive, send)
            return
        received, most = 0, min(self._max_bytes, SMALL.get(path, self._max_bytes))

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > most:
                raise HTTPException(413, f"A JSON body may have at most {most} bytes.")
            return message

        await self._app(scope, limited, send)


@asynccontextmanager
async def receive(
    request: Request,
    store: AudioStore,
    max_bytes: int,
    idle_s: Seconds,
    *,
    expect: Callable[[int, int], None] | None = None,
    fetcher: Fetcher | None = None,
) -> AsyncIterator[Received]:
    """Stream the recording into the store; what the block does not place is removed when it ends.

    `expect` is told how many bytes at least and at most the recording has, before any is read and now and
    then while it is not known; what it raises is the end. Without it the recording is not to be kept.
    Without a `fetcher`, a URL is no recording.

    Raises HttpError: `unsupported_media_type`, `upload_too_large`, `empty_upload`, `malformed_request`,
    `upload_interrupted`; `request_timeout` where nothing comes for `idle_s`, or all too little; for a URL
    what `Fetcher.fetch` raises. And DiskFull.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    declared_type = kind.decode("latin-1").lower()
    declared = request.headers.get("content-length", "")
    least, most = 0, max_bytes
    if declared.isdigit() and declared_type != "application/json":  # whose length is not the recording's
        least = int(declared)
        if declared_type == "multipart/form-data":
            least = max(0, least - _MAX_OVERHEAD_BYTES)
        if least > max_bytes:
            raise _too_large(max_bytes)
        most = min(most, int(declared))
    if expect is not None:
        await run_in_threadpool(expect, least, most)
    with store.receive(to_keep=expect is not None) as upload:

        def keep(data: bytes) -> None:
            upload.write(data)
            if expect is not None and upload.size_bytes > least:
                expect(upload.size_bytes, most)

        sink: _RawSink
        body = _timely(request.stream(), idle_s)
        source: AbstractAsyncContextManager[AsyncIterator[bytes]] = nullcontext(body)
        if declared_type == "multipart/form-data":
            sink = _FormSink(options.get(b"boundary", b""))
        elif declared_type.startswith(("audio/", "video/")) or declared_type == "application/octet-stream":
            sink = _RawSink()
        elif declared_type == "application/json" and fetcher is not None:
            fetcher.require_on()
            url, fields = await _url_body(body)
            sink = _RawSink(fields)
            source = _fetched(fetcher, url, request)
        else:
            raise HttpError(
                "unsupported_media_type",
                "Send the recording as multipart/form-data with a part named file, or as the body with"
                " Content-Type: audio/*.",
            )
        with span("receive"):
            try:
                async with source as pieces:
                    async for data in pieces:
                        sink.feed(data)
                        if upload.size_bytes + len(sink.pending) > max_bytes:
                            raise _too_large(max_bytes)
                        if len(sink.pending) >= _WRITE_BYTES:
                            await run_in_threadpool(keep, sink.take())
            except ClientDisconnect:
                raise _interrupted() from None
            sink.end()
            await run_in_threadpool(_finish, upload, sink.take())
        if upload.size_bytes == 0:
            raise HttpError("empty_upload", "The uploaded file is empty.")
        yield Received(upload, sink.fields, _media_type(sink.head))


async def _url_body(body: AsyncIterator[bytes]) -> tuple[str, dict[str, str]]:
    """The URL, and the other fields as a form would have them."""
    read = b""
    try:
        async for data in body:
            read += data
            if len(read) > MAX_JSON_BYTES:
                raise HttpError("upload_too_large", f"A JSON body may have at most {MAX_JSON_BYTES} bytes.")
        fields = UrlBody.model_validate(orjson.loads(read))
        given = {name: value for name, value in fields if value is not None}
        if "metadata" in given:
            given["metadata"] = orjson.dumps(given["metadata"]).decode()
    except ClientDisconnect:
        raise _interrupted() from None
    except orjson.JSONDecodeError:
        raise HttpError("malformed_request", "The body is not valid JSON.") from None
    except orjson.JSONEncodeError:
        raise InvalidField("metadata is nested too deeply.") from None
    except ValidationError as error:
        raise RequestValidationError(
            [item | {"loc": ("body", *item["loc"])} for item in error.errors()]
        ) from None
    return given.pop("url"), given


@asynccontextmanager
async def _fetched(fetcher: Fetcher, url: str, request: Request) -> AsyncIterator[AsyncIterator[bytes]]:
    """What the URL answers, for as long as somebody waits for it."""
    async with fetcher.fetch(url) as pieces:

        async def watched() -> AsyncIterator[bytes]:
            async for data in pieces:
                if await request.is_disconnected():
                    raise ClientDisconnect
                yield data

        yield watched()


async def _timely(chunks: AsyncIterator[bytes], idle_s: Seconds) -> AsyncIterator[bytes]:
    """The same, with HttpError `request_timeout` where they do not come. Only time that is spent waiting for
    the client counts, and none of our own."""
    received, waited_s = 0, 0.0
    while True:
        began = time.monotonic()
        try:
            with anyio.fail_after(idle_s):
                data = await anext(chunks)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise _too_slow(f"Nothing was sent for {idle_s:g} s") from None
        waited_s += time.monotonic() - began
        received += len(data)
        if waited_s > idle_s and received < MIN_BYTES_PER_S * waited_s:
            raise _too_slow(f"Less than {MIN_BYTES_PER_S} bytes a second were sent")
        yield data


def _too_slow(what: str) -> HttpError:
    return HttpError("request_timeout", f"{what}; nothing of it was kept.", {"Connection": "close"})


def _finish(upload: Upload, rest: bytes) -> None:
    upload.write(rest)
    upload.seal()


def _interrupted() -> HttpError:
    return HttpError("upload_interrupted", "The connection was closed before the upload ended.")


def _too_large(max_bytes: int) -> HttpError:
    return HttpError("upload_too_large", f"The upload is larger than the {max_bytes} bytes accepted here.")


def _media_type(head: bytes) -> str | None:
    """What a recording is served as: by its content, since the declared type is the client's word."""
    return next((kind for at, mark, kind in _SIGNATURES if head[at : at + len(mark)] == mark), None)


class _RawSink:
    """A body that is the recording."""

    def __init__(self, fields: dict[str, str] | None = None) -> None:
        self.pending = bytearray()
        self.fields = fields or {}
        self.head = b""

    def feed(self, data: bytes) -> None:
        self.pending += data

    def take(self) -> bytes:
        """What has come in since the last time."""
        taken = bytes(self.pending)
        self.pending.clear()
        if len(self.head) < 16:
            self.head += taken[:16]
        return taken

    def end(self) -> None:
        pass


class _FormSink(_RawSink):
    """A multipart/form-data body (RFC 7578): one file part, and small text fields."""

    def __init__(self, boundary: bytes) -> None:
        super().__init__()
        if not boundary:
            raise _malformed("the multipart boundary is missing")
        self._header_name = b""
        self._header_value = b""
        self._headers: dict[bytes, bytes] = {}
        self._name = ""
        self._field = bytearray()
        self._parts = 0
        self._has_file = False
        self._begun = False
        self._complete = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )

    def feed(self, data: bytes) -> None:
        if not self._begun:
            # after a line's end the parser would ignore anything, as far as it comes in one piece
            data = data.lstrip(b"\r\n")
            self._begun = bool(data)
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _malformed(str(error)) from None

    def end(self) -> None:
        if not self._complete:
            raise _malformed("the body ends before its last boundary")
        if not self._has_file:
            raise HttpError("invalid_input", "The form has no part named file.")

    def _on_part_begin(self) -> None:
        self._parts += 1
        self._headers = {}
        if self._parts > MAX_PARTS:
            raise _malformed(f"more than {MAX_PARTS} parts")

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._field = bytearray()
        if self._name in FILE_FIELDS:
            if self._has_file:
                raise _malformed("more than one recording; send one request for each")
            self._has_file = True

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name in FILE_FIELDS:
            self.pending += data[start:end]
        else:
            self._field += data[start:end]
            if len(self._field) > MAX_FIELD_BYTES:
                raise _malformed(f"the field {self._name!r} is larger than {MAX_FIELD_BYTES} bytes")

    def _on_part_end(self) -> None:
        if self._name not in FILE_FIELDS:
            try:
                self.fields[self._name] = self._field.decode()
            except UnicodeDecodeError:
                raise _malformed(f"the field {self._name!r} is not UTF-8") from None

    def _on_end(self) -> None:
        self._complete = True


def _malformed(reason: str) -> HttpError:
    return HttpError("malformed_request", f"The multipart body cannot be read: {reason}.")
