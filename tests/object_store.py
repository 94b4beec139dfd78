"""A real server of S3's protocol, moto's, as a process of its own; and a way to it that can be cut."""

import atexit
import contextlib
import functools
import hashlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

BUCKET = "clasp-tests"
SECRET = "not-to-be-shown"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""By which this process, and those that it starts, may use the server."""


class ObjectStore:
    """Keeps what it is given in memory until this process ends. Makes one empty bucket."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        # found by everything that is started from here; the server takes any
        os.environ |= ENVIRONMENT
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-p", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        atexit.register(self.process.kill)

        import boto3
        from botocore.exceptions import BotoCoreError

        self.client: Any = boto3.session.Session().client("s3", endpoint_url=self.endpoint)
        deadline = time.monotonic() + 60
        while True:
            try:
                self.client.create_bucket(Bucket=BUCKET)
                return
            except BotoCoreError:
                assert time.monotonic() < deadline, "moto's server does not start"
                time.sleep(0.1)

    def settings(self, data_dir: Path) -> dict[str, object]:
        """Of a library in this data directory: it has a prefix of its own."""
        return {"audio_store": f"s3://{BUCKET}/{_prefix(data_dir)}", "s3_endpoint": self.endpoint}

    def keys(self, data_dir: Path) -> set[str]:
        """Of the library's objects, below its prefix."""
        start = _prefix(data_dir) + "/"
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=start)
        return {item["Key"].removeprefix(start) for page in pages for item in page.get("Contents", ())}

    def clear(self, data_dir: Path) -> None:
        """Remove them all."""
        for key in self.keys(data_dir):
            self.client.delete_object(Bucket=BUCKET, Key=f"{_prefix(data_dir)}/{key}")

    def content(self, data_dir: Path, key: str) -> bytes:
        content: bytes = self.client.get_object(Bucket=BUCKET, Key=f"{_prefix(data_dir)}/{key}")[
            "Body"
        ].read()
        return content


def _prefix(data_dir: Path) -> str:
    return "of/" + hashlib.sha256(str(data_dir.resolve()).encode()).hexdigest()[:12]


@functools.cache
def object_store() -> ObjectStore:
    """The one of this process, started when it is first asked for."""
    return ObjectStore()


class Way:
    """A port that leads to another one, while it is `open`."""

    def __init__(self, to: int) -> None:
        self._to = to
        self._listening: socket.socket | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._connections: list[socket.socket] = []

    def open(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=[self._listening], daemon=True).start()

    def close(self) -> None:
        """Also of all connections that there are: from now on they are refused."""
        if self._listening is not None:
            with contextlib.suppress(OSError):
                self._listening.shutdown(socket.SHUT_RDWR)
            self._listening.close()
        while self._connections:
            with contextlib.suppress(OSError):
                self._connections.pop().shutdown(socket.SHUT_RDWR)

    def _accept(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listening.accept()
                self._connections.append(near)
                threading.Thread(target=self._carry, args=[near], daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._to)) as far:
            while True:
                for source in select.select([near, far], [], [])[0]:
                    data = source.recv(1 << 16)
                    if not data:
                        return
                    (far if source is near else near).sendall(data)
