"""Clients that are gone, slow or too many: what is done for them ends, and the others notice nothing.

`Deadline` is about requests, `Connection` about what uvicorn leaves to a proxy in front of it. Uploads have
rules of their own (`app.uploads`): they may take long, as long as they go on.
"""

import asyncio
import http
import math
from typing import Any

import anyio
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.errors import problem
from app.uploads import STREAMED
from clasp_core.types import Seconds

_READING = frozenset({"/search", "/search/audio", "/session"})
"""Where a body changes nothing."""
MAX_HEAD_BYTES = 128 << 10
"""What a request may have before its body. An address is legible up to 64 KiB."""
CLIENT_GONE = 499
"""What the log and the metrics call the answer that nobody was there to get; nginx's number."""


class Deadline:
    """ASGI middleware: what only reads is given up when it takes too long or the client has gone.

    Too long is 503 `deadline_exceeded`, or 408 `request_timeout` where it was the body that did not come; a
    recording to search by may take longer to come, and has the time from then on. What changes something is
    left to end, so that its answer is true.
    """

    def __init__(self, app: ASGIApp, timeout_s: Seconds) -> None:
        self._app = app
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, is_get = scope["path"].removeprefix("/v1"), scope["method"] in ("GET", "HEAD")
        if not is_get and path not in _READING:
            await self._app(scope, receive, send)
            return
        arrived, gone = asyncio.Event(), asyncio.Event()
        asked = begun = complete = False
        work = anyio.CancelScope()

        async def received() -> Message:
            nonlocal asked
            if is_get and not asked:
                asked = True
                return {"type": "http.request", "body": b"", "more_body": False}
            if is_get or arrived.is_set():
                await gone.wait()
                return {"type": "http.disconnect"}
            message = await receive()
            if message["type"] == "http.disconnect":
                gone.set()
            elif not message.get("more_body", False):
                arrived.set()
                if path in STREAMED:
                    work.deadline = anyio.current_time() + self._timeout_s
            return message

        async def watch() -> None:
            if not is_get:  # whose body, if it has one, means nothing
                await arrived.wait()
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()
            if not complete:  # uvicorn says so of every request in the end
                work.cancel()

        async def watched(message: Message) -> None:
            nonlocal begun, complete
            begun = True
            work.deadline = math.inf
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        if is_get or path not in STREAMED:
            work.deadline = anyio.current_time() + self._timeout_s
        watching = asyncio.create_task(watch())
        try:
            with work:
                await self._app(scope, received, watched)
        finally:
            watching.cancel()
        if begun or not work.cancelled_caught:
            return
        if gone.is_set():
            await send({"type": "http.response.start", "status": CLIENT_GONE, "headers": []})
            await send({"type": "http.response.body"})
        elif not arrived.is_set() and not is_get:
            detail = f"The body did not come within {self._timeout_s:g} s."
            await problem("request_timeout", detail, headers={"Connection": "close"})(scope, receive, send)
        else:
            detail = f"There was no answer within {self._timeout_s:g} s; ask again in a moment."
            await problem("deadline_exceeded", detail)(scope, receive, send)


class Connection(HttpToolsProtocol):
    """uvicorn's connection, which is ended where its client neither asks nor takes the answer for `idle_s`.

    A request's head must be there so long after the connection was made, or after its first byte; and of an
    answer, some tens of kilobytes must be taken in that time. What comes beyond `most` connections is
    answered 503 `not_ready` before it says anything. What is no HTTP, or has a head beyond MAX_HEAD_BYTES
    (which uvicorn would collect, ever more slowly, whatever its size), is answered 400 `malformed_request`.
    """

    def __init__(self, *args: Any, idle_s: Seconds, most: int, **more: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **more)
        self._idle_s = idle_s
        self._most = most
        self._asking: asyncio.TimerHandle | None = None
        self._in_head, self._head_bytes = False, 0
        self._taking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._most:
            transport.write(_REFUSAL)
            transport.close()
        else:
            self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._asking is None and (self.cycle is None or self.cycle.response_complete):
            self._await_head()
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("")

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def send_400_response(self, msg: str) -> None:
        if self.cycle is None or self.cycle.response_complete:  # else it would be in the middle of an answer
            self.transport.write(_NOT_HTTP)
        self.transport.close()

    def on_headers_complete(self) -> None:
        _stop(self._asking)
        self._asking = None
        self._in_head = False
        super().on_headers_complete()

    def pause_writing(self) -> None:
        self._taking = self.loop.call_later(self._idle_s, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        _stop(self._taking)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        _stop(self._asking)
        _stop(self._taking)
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._asking = self.loop.call_later(self._idle_s, self.transport.abort)


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def _as_bytes(answer: Response) -> bytes:
    phrase = http.HTTPStatus(answer.status_code).phrase.encode()
    head = b"".join(b"%b: %b\r\n" % header for header in answer.raw_headers)
    return b"HTTP/1.1 %d %b\r\n%b\r\n%b" % (answer.status_code, phrase, head, bytes(answer.body))


_CLOSE = {"Connection": "close"}
_REFUSAL = _as_bytes(problem("not_ready", "Too many connections; try again in a moment.", headers=_CLOSE))
_NOT_HTTP = _as_bytes(
    problem(
        "malformed_request",
        "This is no HTTP request, or its address has 64 KiB or more, or its head 128 KiB.",
        headers=_CLOSE,
    )
)
