"""A small web server with an authority of its own for certificates, on 127.0.0.2, that can misbehave.

Not on 127.0.0.1: tests let a `Fetcher` connect here, and still see it refuse the loopback address proper.
"""

import contextlib
import ssl
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import parse_qs, urlsplit

import trustme

ADDRESS = "127.0.0.2"
NAMES = ("files.test", "other.test", "*.below.test")


@dataclass(frozen=True)
class Request:
    sni: str | None
    path: str
    headers: dict[str, str]


@dataclass
class Web:
    """What was asked, and the paths that answer. As a context manager it serves."""

    files: dict[str, bytes] = field(default_factory=dict)
    """By path. Besides: /redirect?to=, /status/N, /endless, /silent, /packed, /short, /unbounded."""
    requests: list[Request] = field(default_factory=list)
    open: int = 0
    """How many answers of /endless are being sent."""

    def __enter__(self) -> "Web":
        web = self
        self.authority = trustme.CA()
        self._over = threading.Event()
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.authority.issue_cert(*NAMES).configure_cert(tls)
        names: dict[int, str | None] = {}
        tls.sni_callback = lambda connection, name, _: names.__setitem__(id(connection), name)

        class Handler(BaseHTTPRequestHandler):
            def setup(self) -> None:
                self.request.settimeout(20)
                self.request = tls.wrap_socket(self.request, server_side=True)
                self.sni = names.get(id(self.request))
                super().setup()

            def finish(self) -> None:
                with contextlib.suppress(OSError):
                    super().finish()
                self.request.close()

            def do_GET(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                web.requests.append(Request(self.sni, self.path, headers))
                web.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass  # clients that leave, or do not like the certificate, are what tests are about

        self._server = Server((ADDRESS, 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()

    def url(self, path: str, host: str = "files.test") -> str:
        return f"https://{host}:{self.port}{path}"

    @property
    def trusting(self) -> ssl.SSLContext:
        """What a client needs to believe this server."""
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        return context

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = urlsplit(handler.path)
        if path.path in self.files:
            self._send(handler, 200, self.files[path.path])
        elif path.path == "/redirect":
            headers = {"Location": parse_qs(path.query)["to"][0], "Set-Cookie": "a=1"}
            self._send(handler, 302, b"elsewhere", headers)
        elif path.path.startswith("/status/"):
            self._send(handler, int(path.path.removeprefix("/status/")), b"inside information")
        elif path.path == "/packed":
            self._send(handler, 200, b"packed", {"Content-Encoding": "gzip"})
        elif path.path == "/short":
            self._send(handler, 200, b"short", {"Content-Length": "6"})
        elif path.path == "/unbounded":
            handler.send_response(200)
            handler.end_headers()
            handler.wfile.write(b"until the end")
        elif path.path == "/silent":
            self._over.wait(20)
        elif path.path == "/endless":
            handler.send_response(200)
            handler.send_header("Content-Length", "1000000000")
            handler.end_headers()
            self.open += 1
            try:
                while not self._over.is_set():
                    handler.wfile.write(bytes(100))
                    time.sleep(0.05)
            finally:
                self.open -= 1

    def _send(
        self,
        handler: BaseHTTPRequestHandler,
        status: int,
        content: bytes,
        headers: dict[str, str] | None = None,
    ) -> None:
        handler.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)
