"""What survives a power cut: files put in place whole, folders that know of them; and who may write there."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clasp_core.errors import DiskFull
from clasp_core.faults import fault


def place(temporary: Path, final: Path) -> None:
    """Give a finished file its name: after any crash, `final` is the old file or the new, whole."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    fault("durability.synced")
    temporary.replace(final)
    fault("durability.placed")
    sync_folder(final.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """A small file's content, UTF-8 where it is text: after any crash the old one or the new, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    place(temporary, path)


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def needing_room() -> Iterator[None]:
    """Raises DiskFull where the disk, or somebody's share of it, is full."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull("The disk that holds the recordings is full.") from error
        raise


@contextmanager
def locked(path: Path, otherwise: Exception, *, shared: bool = False) -> Iterator[None]:
    """Hold a file or a folder that exists: alone, or `shared` with others who only read what it stands for.

    Raises `otherwise` at once where somebody else holds it. A process that has ended, however, holds nothing.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise otherwise from error
        yield
    finally:
        os.close(descriptor)
