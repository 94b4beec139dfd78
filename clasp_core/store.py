"""The uploaded bytes, named by their content: what every store of them does, and the one that is a folder.

A store owns the rule that what has its final name is complete and durable. Which recording has which
bytes is the catalogue's business; it decides, under its write lock, when bytes are placed and when they
may go. Uploads arrive in a local file, whatever the store; `clasp_core.s3` is the other one.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol

from clasp_core.durability import needing_room, sync_folder
from clasp_core.encoders.weights import sha256_of
from clasp_core.errors import DataDamaged, DiskFull
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
        self.named = False
        """Whether there may be bytes under their final name because of this upload."""
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


class Displaced(Exception):
    """What `prepare` brought was swept away before it was placed: prepare it again."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes that are there: how many, since when (seconds since 1970), and a way to read them."""

    size_bytes: int
    modified_at: float
    open: Callable[[], BinaryIO]
    """Gives a file that can be read from any position; see `AudioStore.open`."""


class AudioStore(Protocol):
    """Where recordings' bytes are. Thread-safe; any number of processes may use the same one.

    What is not on this machine may raise StoreUnavailable from every method.
    """

    def receive(self, *, to_keep: bool = True) -> Upload:
        """A local file for arriving bytes. Raises DiskFull. What is not `to_keep`, but only looked at, may
        use the last of the room."""
        ...

    def prepare(self, upload: Upload) -> None:
        """All of placing a sealed upload that takes long. To be done before the catalogue's lock is taken."""
        ...

    def place(self, upload: Upload) -> None:
        """Give a prepared upload its final name, durably and quickly; under the catalogue's lock. The same
        bytes may be there already: they are then replaced, since to be quicker would tell that somebody
        has them. Raises Displaced where it must be prepared again."""
        ...

    def find(self, sha256: str) -> Stored:
        """FileNotFoundError where there are none."""
        ...

    def open(self, sha256: str) -> BinaryIO:
        """The stored bytes for reading, without a descriptor perhaps. Raises as `find`, also later where they
        are removed meanwhile."""
        ...

    def verified(self, sha256: str) -> AbstractContextManager[Path]:
        """A local path of the stored bytes, read once and found to be those that were placed. It may be
        opened several times, by this process. Raises as `find`, and DataDamaged."""
        ...

    def where(self, sha256: str) -> str:
        """Where the bytes are, for operators; the name holds nothing a client chose."""
        ...

    def remove(self, *sha256s: str) -> None:
        """Under the catalogue's lock. What is not there is no error."""
        ...

    def stored(self) -> Iterator[str]:
        """sha256 of all that is stored, as it is found."""
        ...

    def discard_abandoned(self, older_than_s: Seconds = 3600.0) -> None:
        """Remove arrivals that nobody has written to for a while: their uploads were never acknowledged."""
        ...

    def trouble(self) -> str | None:
        """What is wrong with the store, in a sentence that anybody may read, or None. Raises nothing."""
        ...


class FolderStore:
    """Files `<root>/ab/cdef...` by sha256, and `<root>/incoming/` for what is still arriving."""

    def __init__(self, root: Path, min_free_bytes: int = 0) -> None:
        """`min_free_bytes` are left on the disk: for the catalogue, which must take what is made of
        recordings, and that some are deleted."""
        self._root = root
        self._min_free_bytes = min_free_bytes
        self._incoming = root / INCOMING
        self._incoming.mkdir(parents=True, exist_ok=True)

    def receive(self, *, to_keep: bool = True) -> Upload:
        return receive(self._incoming, self._min_free_bytes if to_keep else 0)

    def prepare(self, upload: Upload) -> None:
        """Nothing: a sealed upload is on the same disk."""

    def place(self, upload: Upload) -> None:
        target = self._path(upload.sha256)
        upload.named = True
        with needing_room():
            target.parent.mkdir(exist_ok=True)
            upload.path.rename(target)
            fault("store.renamed")
            sync_folder(target.parent)
            sync_folder(self._root)
        fault("store.placed")

    def find(self, sha256: str) -> Stored:
        path = self._path(sha256)
        stat = path.stat()
        return Stored(stat.st_size, stat.st_mtime, lambda: path.open("rb"))

    def open(self, sha256: str) -> BinaryIO:
        return self._path(sha256).open("rb")

    @contextmanager
    def verified(self, sha256: str) -> Iterator[Path]:
        path = self._path(sha256)
        if sha256_of(path) != sha256:
            raise damaged()
        yield path

    def path(self, sha256: str) -> Path:
        """Where the bytes are; the name holds nothing a client chose."""
        return self._path(sha256)

    def where(self, sha256: str) -> str:
        return str(self._path(sha256))

    def remove(self, *sha256s: str) -> None:
        for sha256 in sha256s:
            self._path(sha256).unlink(missing_ok=True)
            fault("store.removed")

    def stored(self) -> Iterator[str]:
        # a Path for each takes longer than the list of them
        for folder in os.listdir(self._root):  # noqa: PTH208
            if len(folder) == 2:
                names = os.listdir(self._root / folder)  # noqa: PTH208
                yield from (folder + name for name in names)

    def discard_abandoned(self, older_than_s: Seconds = 3600.0) -> None:
        discard_older(self._incoming, older_than_s)

    def trouble(self) -> str | None:
        """None: what is wrong with the disk, others look at."""
        return None

    def _path(self, sha256: str) -> Path:
        return self._root / stored_as(sha256)


INCOMING = "incoming"
"""Folder of what is still arriving."""


def receive(folder: Path, min_free_bytes: int) -> Upload:
    """An upload into a new file of a folder. Raises DiskFull."""
    return Upload(folder / secrets.token_hex(16), min_free_bytes)


def discard_older(folder: Path, older_than_s: Seconds) -> None:
    """Remove the files of a folder that nobody has written to for so long."""
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > older_than_s:
                path.unlink()


def damaged() -> DataDamaged:
    return DataDamaged("The stored bytes of this recording are damaged; upload it again.")


def stored_as(sha256: str) -> str:
    """The path of a stored file under the root of its store."""
    return f"{sha256[:2]}/{sha256[2:]}"
