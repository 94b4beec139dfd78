"""Recordings on their way: read from where they are as often as they must be sent, and written to where they
go. A piece at a time, whatever their length."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, TypeAlias
from uuid import uuid4

from clasp_client.errors import ClaspError, UnexpectedAnswer

Recording: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO
"""A path, the bytes, or a file that is open for reading bytes (from where it stands)."""
Progress: TypeAlias = Callable[[int, int | None], object]
"""Is told after each piece how many bytes of it have passed, and of how many (None: not known). An upload
that must be sent again begins anew at 0."""
PIECE_BYTES = 256 << 10


class Source:
    """A recording to be sent."""

    def __init__(
        self, recording: Recording, progress: Progress | None = None, form: Mapping[str, str] | None = None
    ) -> None:
        """With `form` as a multipart form that has these fields, too. Raises OSError where a path leads to no
        file that can be read, and TypeError for what is no recording."""
        self._recording = recording
        self._progress = progress
        self._pieces: Generator[bytes, None, None] | None = None
        self._start: int | None = 0
        self._begun = False
        size: int | None
        if isinstance(recording, str | os.PathLike):
            size = Path(recording).stat().st_size
            Path(recording).open("rb").close()  # says at once what is wrong
        elif isinstance(recording, bytes):
            size = len(recording)
        elif not hasattr(recording, "read"):
            raise TypeError(f"A recording is a path, bytes or an open file, not {type(recording).__name__}.")
        elif recording.seekable():
            self._start = recording.tell()
            size = recording.seek(0, os.SEEK_END) - self._start
        else:
            self._start = size = None
        self._size = size
        self._head, self._tail = b"", b""
        self.content_type = "application/octet-stream"  # the service looks for itself
        if form is not None:
            boundary = uuid4().hex
            self.content_type = f"multipart/form-data; boundary={boundary}"
            self._head = b"".join(
                _part(boundary, name) + value.encode() + b"\r\n" for name, value in form.items()
            )
            self._head += _part(boundary, 'file"; filename="recording')
            self._tail = f"\r\n--{boundary}--\r\n".encode()

    @property
    def length(self) -> int | None:
        """How many bytes are sent; None where that is known in the end only."""
        return None if self._size is None else len(self._head) + self._size + len(self._tail)

    @property
    def can_be_sent(self) -> bool:
        """Whether it can be read from its start (again)."""
        return self._start is not None or not self._begun

    def pieces(self) -> Iterator[bytes]:
        """What is to be sent, from the start. ClaspError where it is not (any more) as long as it was."""
        self.close()
        self._pieces = self._framed()
        return self._pieces

    def _framed(self) -> Generator[bytes, None, None]:
        self._begun = True
        self._passed = 0
        read = 0
        if self._head:
            yield self._head
        for piece in self._read():
            read += len(piece)
            yield piece
        if self._size is not None and read != self._size:
            raise ClaspError(f"The recording had {self._size} bytes, and then {read}: it changed on its way.")
        if self._tail:
            yield self._tail

    def _read(self) -> Iterator[bytes]:
        recording = self._recording
        if isinstance(recording, bytes):
            for start in range(0, len(recording), PIECE_BYTES):
                yield recording[start : start + PIECE_BYTES]
            return
        if isinstance(recording, str | os.PathLike):
            with Path(recording).open("rb") as file:
                yield from iter(lambda: file.read(PIECE_BYTES), b"")
            return
        if self._start is not None:
            recording.seek(self._start)
        yield from iter(lambda: recording.read(PIECE_BYTES), b"")

    def passed(self, piece: bytes) -> None:
        """This piece has been sent."""
        self._passed += len(piece)
        if self._progress is not None:
            of_recording = max(0, self._passed - len(self._head))
            self._progress(of_recording if self._size is None else min(of_recording, self._size), self._size)

    def close(self) -> None:
        """Sending has ended; what was opened here is closed."""
        if self._pieces is not None:
            with contextlib.suppress(ValueError):  # a thread reads, which nobody waits for any more
                self._pieces.close()


def _part(boundary: str, name: str) -> bytes:
    return f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode()


class Sink:
    """Where a recording's bytes go: a file that gets every byte once, however often the connection breaks."""

    def __init__(self, file: BinaryIO, sha256: str, size: int, progress: Progress | None = None) -> None:
        self.offset = 0
        """How many bytes are there."""
        self._file = file
        self._sha256 = sha256
        self._size = size
        self._progress = progress
        self._digest = hashlib.sha256()
        self._skip = 0

    def take_over(self) -> None:
        """What is in the file already is the beginning."""
        self._file.seek(0)
        while piece := self._file.read(PIECE_BYTES):
            self._digest.update(piece)
            self.offset += len(piece)

    @property
    def is_full(self) -> bool:
        return self.offset >= self._size

    def headers(self) -> dict[str, str]:
        """Ask for the rest, if it is still that of these bytes."""
        if not self.offset:
            return {}
        return {"Range": f"bytes={self.offset}-", "If-Range": f'"{self._sha256}"'}

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """An answer of success comes: the part that was asked for, or all of it again."""
        self._skip = self.offset if status == 200 else 0
        if status == 206 and not headers.get("content-range", "").startswith(f"bytes {self.offset}-"):
            raise UnexpectedAnswer("Another range of bytes was answered than the one asked for.")

    def write(self, piece: bytes) -> None:
        fresh = piece[self._skip :]
        self._skip -= len(piece) - len(fresh)
        self._file.write(fresh)
        self._digest.update(fresh)
        self.offset += len(fresh)

    def passed(self) -> None:
        if self._progress is not None:
            self._progress(self.offset, self._size)

    def check(self) -> None:
        """UnexpectedAnswer where these are not the recording's bytes."""
        if self._digest.hexdigest() != self._sha256:
            raise UnexpectedAnswer(
                "The bytes that came are not those of the recording (their sha256 differs)."
            )
