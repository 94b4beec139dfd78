"""Decodes audio from strangers where a broken decoder can do no harm: `audio.decode` in a limited process.

Owns the processes, their limits and the pipe; formats and refusals are `clasp_core.audio`'s.

The parent keeps one *zygote*, a process that has imported the decoders and forgone the network. For each
recording the zygote forks a child, which costs milliseconds. The child holds five descriptors (three of
them /dev/null) and cannot open a sixth, has little memory and CPU time, and sends frames through a pipe:

    one byte of kind, four bytes of length (big-endian), payload
    A  float32 samples        E  JSON {code, detail}, the end        Z  JSON of an AudioInfo, the end

What comes through the pipe is believed no more than the file was.
"""

import atexit
import contextlib
import io
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import numpy as np

from clasp_core import audio, confinement
from clasp_core.audio import AudioFile, AudioInfo, AudioStream
from clasp_core.errors import AudioTooLong, InvalidAudio, NonFiniteAudio, NotReady, UndecodableAudio
from clasp_core.types import SAMPLING_RATE, Seconds, Waveform

DEFAULT_MEMORY_BYTES = 1 << 30

_FRAME = struct.Struct(">cI")
_REQUEST = struct.Struct("=cqdqqq")  # b"F" for fork or b"K" for kill, the child to kill, limits
_ANSWER = struct.Struct("=q")  # to a fork: the child's process id, or 0
_LARGEST_NOTE = 64 * 1024


class _Limits(NamedTuple):
    max_duration_s: Seconds
    sampling_rate: int
    memory_bytes: int
    cpu_s: int


def decode(
    file: AudioFile,
    *,
    max_duration_s: Seconds,
    sampling_rate: int = SAMPLING_RATE,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    deadline_s: Seconds | None = None,
) -> AudioStream:
    """Do what `audio.decode` does, and raise what it raises, in a process of its own.

    memory_bytes: address space the decoder may take beyond its own code.
    deadline_s: time to wait for the decoder, all blocks together, not counting the caller's own work
        between blocks; by default 60 s plus half of `max_duration_s`.

    A decoder that crashes, hangs or breaks a limit is UndecodableAudio; if no process can be started,
    NotReady. Closing or dropping the stream ends its process. Any number of threads may decode at once, each
    its own stream. The file's position moves; files without a descriptor are copied to a temporary file.
    """
    deadline_s = 60 + max_duration_s / 2 if deadline_s is None else deadline_s
    # Decoding runs at hundreds of times real time; twenty leaves room for slow machines.
    limits = _Limits(max_duration_s, sampling_rate, memory_bytes, cpu_s=10 + int(max_duration_s / 20))
    return AudioStream(_decode(file, limits, deadline_s))


def _decode(file: AudioFile, limits: _Limits, deadline_s: Seconds) -> Generator[Waveform, None, AudioInfo]:
    reader, writer = os.pipe()
    child = None
    try:
        try:
            with _with_descriptor(file) as opened:
                zygote, child = _fork(opened.fileno(), writer, limits)
        finally:
            os.close(writer)
        return (yield from _received(_Pipe(reader, deadline_s), limits))
    finally:
        os.close(reader)
        if child is not None:
            with _lock:
                zygote.kill(child)


def _received(pipe: "_Pipe", limits: _Limits) -> Generator[Waveform, None, AudioInfo]:
    """The child's answer, checked: a decoder that was taken over could write anything."""
    total, rate, most = 0, limits.sampling_rate, limits.max_duration_s
    while True:
        kind, length = _FRAME.unpack(pipe.read(_FRAME.size))
        if kind == b"A" and 0 < length <= 4 * audio.BLOCK_S * rate and length % 4 == 0:
            samples = np.frombuffer(pipe.read(length), np.float32)
            total += len(samples)
            if total > most * rate + 1:
                raise AudioTooLong(f"The recording is longer than the limit of {most:g} s.")
            if not np.isfinite(samples).all():
                raise NonFiniteAudio("The samples contain NaN or infinity.")
            yield samples
        elif kind in (b"E", b"Z") and length <= _LARGEST_NOTE:
            try:
                note = json.loads(pipe.read(length))
                if kind == b"E":
                    raise _REFUSALS[note["code"]](str(note["detail"]))
                return AudioInfo(
                    duration_s=total / rate,
                    sampling_rate=int(note["sampling_rate"]),
                    channels=int(note["channels"]),
                    codec=str(note["codec"]),
                    warnings=tuple(map(str, note["warnings"])),
                )
            except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as exc:
                raise _broken() from exc
        else:
            raise _broken()


def _refusals(cls: type[InvalidAudio]) -> Iterator[tuple[str, type[InvalidAudio]]]:
    yield cls.code, cls
    for narrower in cls.__subclasses__():
        yield from _refusals(narrower)


_REFUSALS = dict(_refusals(InvalidAudio))


def _broken() -> UndecodableAudio:
    return UndecodableAudio(
        "Decoding the file broke the decoder or its limits; convert it to WAV or FLAC and send that."
    )


class _Pipe:
    """The reading end of a child's pipe, under a deadline that runs only while somebody waits here."""

    def __init__(self, descriptor: int, deadline_s: Seconds) -> None:
        self._descriptor = descriptor
        self._left_s = deadline_s
        self._poll = select.poll()  # not select(), which fails on descriptors above 1023
        self._poll.register(descriptor, select.POLLIN)

    def read(self, size: int) -> bytearray:
        """Exactly `size` bytes. UndecodableAudio when the child is gone or too slow."""
        buffer = bytearray(size)
        rest = memoryview(buffer)
        began = time.monotonic()
        while rest:
            left_s = self._left_s - (time.monotonic() - began)
            if left_s <= 0 or not self._poll.poll(left_s * 1000):
                raise UndecodableAudio(
                    "Decoding the file took too long; convert it to WAV or FLAC and send that."
                )
            count = os.readv(self._descriptor, [rest])
            if not count:
                raise _broken()
            rest = rest[count:]
        self._left_s -= time.monotonic() - began
        return buffer


@contextlib.contextmanager
def _with_descriptor(file: AudioFile) -> Iterator[BinaryIO]:
    if isinstance(file, (str, os.PathLike)):
        with Path(file).open("rb") as opened:
            yield opened
        return
    try:
        file.fileno()
    except (AttributeError, io.UnsupportedOperation):
        with tempfile.TemporaryFile() as copy:
            file.seek(0)
            shutil.copyfileobj(file, copy)
            copy.flush()
            yield copy
    else:
        file.flush()
        yield file


# --- the parent's side of the zygote


class _Zygote:
    """The helper process, a Python running `program`. `fork` and `kill` are called under `_lock` only."""

    def __init__(self, program: Sequence[str] = ("-m", __name__)) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-P", *program, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=confinement.bare_environment(),
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the parent, whose end ends the zygote
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def fork(self, source: int, sink: int, limits: _Limits) -> int:
        """The new child's process id. OSError or EOFError: the zygote is gone. NotReady: it cannot fork."""
        socket.send_fds(self._socket, [_REQUEST.pack(b"F", 0, *limits)], [source, sink])
        answer = self._socket.recv(_ANSWER.size)
        if not answer:
            raise EOFError
        (child,) = _ANSWER.unpack(answer)
        if not child:
            raise NotReady("No process could be started to decode the file; try again later.")
        return int(child)

    def kill(self, child: int) -> None:
        """End a child that may have ended already; the zygote knows, so no stranger's id is ever hit."""
        with contextlib.suppress(OSError):
            self._socket.sendall(_REQUEST.pack(b"K", child, 0, 0, 0, 0))

    def abandon(self) -> None:
        """Let go of a zygote that belongs to the process this one was forked from."""
        self._socket.close()
        self._process.returncode = 0

    def stop(self) -> None:
        self._socket.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


_lock = threading.RLock()  # re-entrant: the garbage collector may close a stream inside a locked region
_zygote: _Zygote | None = None


def _fork(source: int, sink: int, limits: _Limits) -> tuple[_Zygote, int]:
    """A child of the zygote of this process, started on first use and again after its death."""
    global _zygote
    with _lock:
        for _ in range(2):
            try:
                _zygote = _zygote or _Zygote()
                return _zygote, _zygote.fork(source, sink, limits)
            except (OSError, EOFError):
                stop()
        raise NotReady("The helper process that decodes audio does not start; try again later.")


def stop() -> None:
    """End this process's zygote, and with it every decode under way. The next `decode` starts another."""
    global _zygote
    with _lock:
        zygote, _zygote = _zygote, None
        if zygote:
            zygote.stop()


def _after_fork() -> None:
    global _lock, _zygote
    _lock = threading.RLock()
    if _zygote:
        _zygote.abandon()
    _zygote = None


atexit.register(stop)
os.register_at_fork(after_in_child=_after_fork)


# --- in the zygote


def _serve(parent: socket.socket) -> None:
    """Fork a child for every request until the parent is gone, then end those still running."""
    children: set[int] = set()
    try:
        while True:
            # Requests are of one size, so a read never takes part of the next one, nor its descriptors.
            request, descriptors, _, _ = socket.recv_fds(parent, _REQUEST.size, 2)
            children -= _ended(children)
            if not request:
                return
            kind, child, *limits = _REQUEST.unpack(request)
            if kind == b"K":
                if child in children:
                    os.kill(child, signal.SIGKILL)
                continue
            try:
                child = os.fork()
            except OSError:
                child = 0
            else:
                if not child:
                    _be_child(descriptors[0], descriptors[1], _Limits(*limits))
                children.add(child)
            for descriptor in descriptors:
                os.close(descriptor)
            parent.sendall(_ANSWER.pack(child))
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)


def _ended(children: set[int]) -> set[int]:
    return {child for child in children if os.waitpid(child, os.WNOHANG)[0]}


def _be_child(source: int, sink: int, limits: _Limits) -> NoReturn:
    """Decode `source` into `sink` within the limits, and exit. The zygote's own stack is never unwound."""
    try:
        source, sink = _confine(source, sink, limits)
        with open(source, "rb") as file:  # noqa: PTH123 - a descriptor
            _answer(file, sink, limits)
    finally:
        os._exit(0)


def _confine(source: int, sink: int, limits: _Limits) -> tuple[int, int]:
    """Give up what decoding does not need. Returns the descriptors under their new numbers."""
    confinement.die_with_parent()
    os.nice(5)
    os.dup2(0, 2)  # decoders complain to stderr, in words the uploader chose
    # Move both out of the way of the target numbers first; then nothing else stays open.
    source, sink = os.dup(source), os.dup(sink)
    source, sink = os.dup2(source, 3), os.dup2(sink, 4)
    os.closerange(5, 4096)

    confinement.limit(
        descriptors=5,  # no sixth descriptor: neither files nor sockets can be opened
        memory_bytes=limits.memory_bytes,
        cpu_s=limits.cpu_s,
    )
    return source, sink


def _answer(file: BinaryIO, sink: int, limits: _Limits) -> None:
    def send(kind: bytes, payload: bytes) -> None:
        rest = memoryview(_FRAME.pack(kind, len(payload)) + payload)
        while rest:
            rest = rest[os.write(sink, rest) :]

    try:
        stream = audio.decode(file, max_duration_s=limits.max_duration_s, sampling_rate=limits.sampling_rate)
        for block in stream:
            send(b"A", block.tobytes())
        send(b"Z", json.dumps(asdict(stream.info)).encode())
    except InvalidAudio as refusal:
        send(b"E", json.dumps({"code": refusal.code, "detail": refusal.detail}).encode())


def _warm_up() -> None:
    """Decode a scrap by each decoder, so that children find every module imported that they may not open."""
    scrap = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", 0, b"WAVE", b"fmt ", 16, 1, 2, 8000, 32000, 4, 16, b"data", 8000
    )
    for file in (scrap + bytes(8000), scrap, b"neither"):
        with contextlib.suppress(InvalidAudio):
            list(audio.decode(io.BytesIO(file), max_duration_s=1))


def _main() -> None:
    # Ctrl-C in a terminal reaches the whole group: the parent decides what ends, or half a recording, decoded
    # as its decoder was killed, would count as a damaged one
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _warm_up()
    confinement.drop_rights()
    with socket.socket(fileno=int(sys.argv[1])) as parent:
        _serve(parent)


if __name__ == "__main__":
    _main()
