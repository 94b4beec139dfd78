"""A small HTTP server that answers what it was told to, in that order, and may break off in the middle."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType


@dataclass(frozen=True)
class Answer:
    """What comes back for one request."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    sent: int | None = None
    """After so many bytes of the body the connection ends; -1: before anything of the answer."""


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    at: float
    """By `time.monotonic`."""


@dataclass
class Moody:
    """As a context manager it serves at `url`."""

    answers: list[Answer] = field(default_factory=list)
    """What is left to answer; then connections are closed without a word."""
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> "Moody":
        moody = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self._body()
                headers = {name.lower(): value for name, value in self.headers.items()}
                moody.requests.append(Request(self.command, self.path, headers, body, time.monotonic()))
                answer = moody.answers.pop(0) if moody.answers else Answer(sent=-1)
                self.close_connection = answer.sent is not None
                if answer.sent == -1:
                    return
                self.send_response(answer.status)
                length = {} if answer.status == 204 else {"Content-Length": str(len(answer.body))}
                for name, value in (length | dict(answer.headers)).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer.body[: answer.sent])

            do_GET = do_POST = do_PATCH = do_DELETE = answer

            def _body(self) -> bytes:
                if "Content-Length" in self.headers:
                    return self.rfile.read(int(self.headers["Content-Length"]))
                pieces = []
                while self.headers.get("Transfer-Encoding") == "chunked":
                    size = int(self.rfile.readline(), 16)
                    pieces.append(self.rfile.read(size))
                    self.rfile.readline()
                    if not size:
                        break
                return b"".join(pieces)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass  # clients that leave are what tests are about

        self._server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
