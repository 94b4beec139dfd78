"""What survives a power cut: files put in place whole, and folders that know of them."""

import os
from pathlib import Path


def place(temporary: Path, final: Path) -> None:
    """Give a finished file its name: after any crash, `final` is the old file or the new, whole."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(final)
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
