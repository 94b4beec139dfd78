"""A small Hugging Face hub on a free port: files by commit, redirects, ranges, and ways to misbehave."""

import hashlib
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote, urlsplit

FIRST, SECOND = "1" * 40, "2" * 40
LARGE = (".safetensors", ".bin", ".pt")


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None


@dataclass
class Hub:
    """What is published, what was asked, and what goes wrong. As a context manager it serves."""

    files: dict[tuple[str, str, str], bytes] = field(default_factory=dict)
    """Content by repository, commit and name."""
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    web: dict[str, bytes] = field(default_factory=dict)
    """Plain files by path."""
    requests: list[Request] = field(default_factory=list)
    sent_bytes: int = 0
    stop_after: list[int] = field(default_factory=list)
    """How many bytes to send of the next large files before the connection breaks."""
    stall_after: int | None = None
    """After how many bytes a large file gets stuck for good."""
    stalled: threading.Event = field(default_factory=threading.Event)
    damage: bool = False
    """Send other bytes than were announced."""
    ignore_ranges: bool = False

    def __enter__(self) -> "Hub":
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._over = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()

    def publish(self, repository: str, commit: str, branch: str | None = None, **files: bytes) -> None:
        """Names are keywords: `__` stands for a dot, `___` for a slash."""
        for name, content in files.items():
            self.files[repository, commit, name.replace("___", "/").replace("__", ".")] = content
        if branch:
            self.branches[repository, branch] = commit

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(handler.path).path).lstrip("/")
        self.requests.append(Request(handler.command, path, handler.headers.get("Range")))
        if path.startswith("cdn/"):
            digest = path.removeprefix("cdn/")
            (content,) = {c for c in self.files.values() if hashlib.sha256(c).hexdigest() == digest}
            self._send(handler, content, digest, large=True)
        elif path in self.web:
            self._send(handler, self.web[path], hashlib.md5(self.web[path]).hexdigest() + "-2", large=True)
        else:
            self._resolve(handler, path)

    def _resolve(self, handler: BaseHTTPRequestHandler, path: str) -> None:
        repository, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        if repository in self.renamed:
            handler.send_response(307)
            handler.send_header("Location", f"/{self.renamed[repository]}/resolve/{rest}")
            handler.end_headers()
            return
        commit = self.branches.get((repository, revision), revision)
        content = self.files.get((repository, commit, name))
        if content is None:
            handler.send_response(404)
            handler.end_headers()
        elif name.endswith(LARGE):
            digest = hashlib.sha256(content).hexdigest()
            handler.send_response(302)
            handler.send_header("Location", f"{self.endpoint}/cdn/{digest}")
            handler.send_header("X-Repo-Commit", commit)
            handler.send_header("X-Linked-Etag", f'"{digest}"')
            handler.send_header("X-Linked-Size", str(len(content)))
            handler.end_headers()
        else:
            self._send(handler, content, hashlib.sha1(content).hexdigest(), commit=commit)

    def _send(
        self,
        handler: BaseHTTPRequestHandler,
        content: bytes,
        etag: str,
        *,
        commit: str | None = None,
        large: bool = False,
    ) -> None:
        start = 0
        if (wanted := handler.headers.get("Range")) and not self.ignore_ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if commit:
            handler.send_header("X-Repo-Commit", commit)
        handler.send_header("ETag", f'"{etag}"')
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        if handler.command == "HEAD":
            return
        body = content[start:]
        if large and self.damage:
            body = bytes(len(body))
        if large and self.stop_after:
            body = body[: self.stop_after.pop(0)]
        if large and self.stall_after is not None:
            body = body[: self.stall_after]
        self.sent_bytes += len(body)
        handler.wfile.write(body)
        if large and self.stall_after is not None:
            handler.wfile.flush()
            self.stalled.set()
            self._over.wait(60)
