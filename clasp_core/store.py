"""The uploaded bytes, as files named by their content.

Owns one folder and the rule that a file under its final name is complete and on disk. Which
recording has which bytes is the catalogue's business; it decides, under its write lock, when a file
is placed and when it may go.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from clasp_core.durability import needing_room, sync_folder
from clasp_core.encoders.weights import sha256_of
from clasp_core.errors import DiskFull
from clasp_core.faults import fault
from clasp_core.types import Seconds


class Upload:
    """Bytes being received: a temporary file, hashed while it is written.

    Use as a context manager; what has not been placed in the store when it closes is removed. Every step
    raises DiskFull where less than `min_free_bytes` would be left to others.
    """

    def __init__(self, path: Path, min_free_bytes: int = 0) -> None:
        self.path = path
        self.size_bytes = 0
        self._hash = hashlib.sha256()
        self._min_free_bytes = min_free_bytes
        self._check_room()
        with needing_room():
            self._file = path.open("xb")

    def write(self, data: bytes) -> None:
        self._check_room()
        with needing_room():
            self._file.write(data)
        self._hash.update(data)
        self.size_bytes += len(data)
        fault("store.receiving")

    def seal(self) -> None:
        """Everything written is on disk when this returns. Writing is over."""
        with needing_room():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        fault("store.sealed")

    def _check_room(self) -> None:
        if self._min_free_bytes and shutil.disk_usage(self.path.parent).free < self._min_free_bytes:
            raise DiskFull(
                f"The disk that holds the recordings has less than {self._min_free_bytes} bytes left."
            )

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> "Upload":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # there may be no room for what it holds, and nobody wants that
            self._file.close()
        self.path.unlink(missing_ok=True)


class AudioStore:
    """Files `<root>/ab/cdef...` by sha256, and `<root>/incoming/` for what is still arriving."""

    def __init__(self, root: Path, min_free_bytes: int = 0) -> None:
        """`min_free_bytes` are left on the disk: for the catalogue, which must take what is made of
        recordings, and that some are deleted."""
        self._root = root
        self._min_free_bytes = min_free_bytes
        self._incoming = root / "incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)

    def receive(self, *, to_keep: bool = True) -> Upload:
        """Raises DiskFull. What is not `to_keep`, but only looked at, may use the last of the room."""
        return Upload(self._incoming / secrets.token_hex(16), self._min_free_bytes if to_keep else 0)

    def place(self, upload: Upload) -> None:
        """Give a sealed upload its final name, durably. The same bytes may be there already: they are then
        replaced, since to be quicker would tell that somebody has them."""
        target = self._path(upload.sha256)
        with needing_room():
            target.parent.mkdir(exist_ok=True)
            upload.path.rename(target)
            fault("store.renamed")
            sync_folder(target.parent)
            sync_folder(self._root)
        fault("store.placed")

    def open(self, sha256: str) -> BinaryIO:
        """The stored bytes for reading. FileNotFoundError where there are none."""
        return self._path(sha256).open("rb")

    def is_intact(self, sha256: str) -> bool:
        """Whether the stored bytes are those that were placed, by reading them. Raises as `open` does."""
        return sha256_of(self._path(sha256)) == sha256

    def path(self, sha256: str) -> Path:
        """Where the bytes are, for serving a file; the name holds nothing a client chose."""
        return self._path(sha256)

    def remove(self, sha256: str) -> None:
        self._path(sha256).unlink(missing_ok=True)
        fault("store.removed")

    def stored(self) -> Iterator[str]:
        """sha256 of every stored file."""
        for folder in self._root.iterdir():
            if len(folder.name) == 2:
                yield from (folder.name + file.name for file in folder.iterdir())

    def discard_abandoned(self, older_than_s: Seconds = 3600.0) -> None:
        """Remove arrivals that nobody has written to for a while: their uploads were never acknowledged."""
        for path in self._incoming.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > older_than_s:
                    path.unlink()

    def _path(self, sha256: str) -> Path:
        return self._root / stored_as(sha256)


def stored_as(sha256: str) -> str:
    """The path of a stored file under the root of its store."""
    return f"{sha256[:2]}/{sha256[2:]}"
