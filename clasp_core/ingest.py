"""The worker's side of a library: lease recordings, decode, segment, embed, commit.

One `Ingester` is one worker; any number may work on the same library, in any processes.
"""

import contextvars
import io
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar
from uuid import uuid4

import numpy as np

from clasp_core import sandbox
from clasp_core.catalog import EmbeddedSegment, Recording
from clasp_core.errors import (
    ClaspError,
    DatabaseUnavailable,
    DataDamaged,
    DataMismatch,
    DiskFull,
    InvalidAudio,
    NotReady,
    ProcessingFailed,
    SilentAudio,
    StoreUnavailable,
)
from clasp_core.faults import fault
from clasp_core.library import Library
from clasp_core.models import Heard, SpeechEncoder, TranscribingEncoder
from clasp_core.peaks import PeakMeter, Peaks
from clasp_core.segmenting import SegmentConfig, split, with_pictured
from clasp_core.tracing import record, span
from clasp_core.types import SAMPLING_RATE, Seconds, Segment, Waveform

_log = logging.getLogger(__name__)
T = TypeVar("T")

LEASE_S: Seconds = 20.0
AFTER_FAILURE_S: Seconds = 0.5
"""Pause after an unexpected error, so that trouble of the machine does not use up all attempts at once."""
WITHOUT_ROOM_S: Seconds = 0.5
"""Pause before what a full disk did not take is written again; ten times as long before more is leased, so
that whoever has done the work writes it first."""
WITHOUT_STORE_S: Seconds = 2.0
"""Pause before more is leased where recordings' bytes could not be had."""
TOGETHER = 8
"""Recordings leased, and segments embedded, at once."""


@dataclass(slots=True)
class Timings:
    """What some recordings cost: seconds of work in each stage, and how much there was to do.

    Decoding and segmenting run beside embedding, so together the stages may be longer than it took.
    """

    decode: Seconds = 0.0
    segment: Seconds = 0.0
    embed: Seconds = 0.0
    commit: Seconds = 0.0
    audio: Seconds = 0.0
    """Of decoded sound."""
    recordings: int = 0
    batches: list[int] = field(default_factory=list)
    """Segments that were embedded together, each time."""
    waits: list[Seconds] = field(default_factory=list)
    """From arrival to `ready`, of each recording that came so far."""


@dataclass(slots=True)
class _Job:
    """A recording at work: what is embedded of it so far."""

    recording: Recording
    segments: list[EmbeddedSegment] = field(default_factory=list)
    peaks: PeakMeter = field(default_factory=PeakMeter)
    samples: int = 0
    error: ClaspError | None = None
    cut: int = 0
    """Segments that were made of it so far."""
    ended: bool = False
    """Whether there will be no more."""
    decode: Seconds = 0.0
    segment: Seconds = 0.0


class Queue(Protocol):
    """Where an `Ingester` gets recordings and leaves what it made of them: see `Catalog`."""

    def lease(
        self,
        owner: str,
        *,
        limit: int,
        lease_s: Seconds,
        model: str | None = None,
        suspects: bool = True,
    ) -> list[Recording]: ...
    def extend_leases(self, owner: str, lease_s: Seconds) -> None: ...
    def release(self, owner: str, *, died: bool = False) -> None: ...
    def fail(self, key: int, owner: str, *, code: str, detail: str) -> bool: ...
    def complete(
        self,
        key: int,
        owner: str,
        *,
        duration_s: Seconds,
        model: str,
        segments: Sequence[EmbeddedSegment],
        peaks: Peaks | None = None,
    ) -> bool: ...


class Ingester:
    """Embeds a library's pending recordings, or those of another queue that are to have the library's model.

    Use from one thread; `stop` may be called from any. `alive` is called at each look at the queue, after
    each batch of segments, and while results wait for room: silent for minutes, it hangs. Both it and
    `observe` may be called on another thread, one at a time.
    """

    def __init__(
        self,
        library: Library,
        encoder: SpeechEncoder,
        *,
        max_duration_s: Seconds,
        segmenting: SegmentConfig | None = None,
        owner: str | None = None,
        queue: Queue | None = None,
        observe: Callable[[Timings], None] = lambda timings: None,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self.owner = owner or uuid4().hex
        self._library = library
        self._queue: Queue = queue or library.catalog
        self._encoder = encoder
        self._max_duration_s = max_duration_s
        self._segmenting = segmenting or SegmentConfig()
        self._observe = observe
        self._tell_alive = alive
        self._telling = threading.Lock()
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Finish or give back what is being processed, then return from `run`."""
        self._stopping.set()

    def run(self, poll_s: Seconds = 0.2) -> None:
        """Process recordings as they come, until stopped. Raises as `step` does."""
        while not self._stopping.is_set():
            if not self.step(on=True):
                self._library.catalog.wait_for_work(self._stopping, poll_s)

    def step(self, *, on: bool = False) -> int:
        """Process what one lease gives; the number of recordings finished (0: none was waiting).

        To go `on` is to lease more meanwhile, as long as something waits: so that the next recordings are
        decoded already when the encoder has done with these.

        Raises DataMismatch where the library has another model by now.
        """
        self._alive()
        model = self._library.model
        try:
            leased = self._queue.lease(self.owner, limit=TOGETHER, lease_s=LEASE_S, model=model)
        except (DiskFull, DatabaseUnavailable) as error:
            _log.warning("recordings wait until the catalogue can be written", extra={"reason": error.detail})
            self._stopping.wait(10 * WITHOUT_ROOM_S)
            return 0
        if not leased:
            return 0
        fault("ingest.leased")
        with _Heartbeat(self._extend, LEASE_S / 4):
            try:
                # what its worker died of before is tried alone
                alone = any(recording.attempts > 1 for recording in leased)
                return self._process(leased, on=on and not alone)
            except (DiskFull, DatabaseUnavailable):
                return 0  # stopped before there was room, or a database; the leases run out
            except StoreUnavailable as error:
                _log.warning("recordings wait for the audio store", extra={"reason": error.detail})
                self._written(lambda: self._queue.release(self.owner))
                self._stopping.wait(WITHOUT_STORE_S)
                return 0
            except NotReady:
                # the machine's trouble, not the recordings': they wait, and no attempt is counted
                _log.exception("processing is not possible now")
                self._written(lambda: self._queue.release(self.owner))
                return 0
            except Exception:
                # counted against the recordings, which are tried alone from now on, a bounded number of times
                _log.exception("processing failed", extra={"recordings": [item.id for item in leased]})
                self._written(lambda: self._queue.release(self.owner, died=True))
                self._stopping.wait(AFTER_FAILURE_S)
        return len(leased)

    def _alive(self) -> None:
        with self._telling:
            self._tell_alive()

    def _more(self) -> list[Recording]:
        """What else waits, and nobody died of, for an encoder that is at work already."""
        with suppress(DiskFull, DatabaseUnavailable, DataMismatch):  # the next step will tell
            return self._queue.lease(
                self.owner, limit=TOGETHER, lease_s=LEASE_S, model=self._library.model, suspects=False
            )
        return []

    def _written(self, write: Callable[[], T]) -> T:
        """What `write` gives, once there is room for it, and a database: a full disk is no reason to lose
        what was made, or to count an attempt. Raises what it raises where this is to stop before."""
        told = False
        while True:
            try:
                return write()
            except (DiskFull, DatabaseUnavailable) as error:
                if not told:
                    _log.warning(
                        "results wait until the catalogue can be written", extra={"reason": error.detail}
                    )
                told = True
                self._alive()
                if self._stopping.wait(WITHOUT_ROOM_S):
                    raise

    def _extend(self) -> None:
        # the lease may run out, but nobody else can be given it either
        with suppress(DiskFull, DatabaseUnavailable):
            self._queue.extend_leases(self.owner, LEASE_S)

    def _process(self, leased: Sequence[Recording], *, on: bool) -> int:
        """Segments of all recordings flow through the encoder together, in order; memory holds two batches of
        them. A recording is committed as soon as its last segment is embedded, on a thread of its own: what
        waits for a disk does not keep the encoder waiting. The number of those begun.
        """
        begun: list[_Job] = []
        open_jobs: deque[_Job] = deque()
        timings = Timings()
        committed: Future[None] | None = None

        def jobs() -> Iterator[_Job]:
            some = leased
            while some and not self._stopping.is_set():
                for recording in some:
                    job = _Job(recording)
                    begun.append(job)
                    open_jobs.append(job)
                    yield job
                some = self._more() if on else []

        def finished() -> Iterator[_Job]:
            while open_jobs and open_jobs[0].ended and len(open_jobs[0].segments) == open_jobs[0].cut:
                yield open_jobs.popleft()

        with (
            span("ingest", recordings=len(leased)),
            ThreadPoolExecutor(1, "committer") as aside,
            closing(_ahead(self._cut(jobs()))) as batches,
        ):
            for batch in batches:
                if batch:
                    mark = time.perf_counter()
                    fault("ingest.decoded")
                    langs = [job.recording.lang for job, _ in batch]
                    with span("embed", segments=len(batch)):
                        embedded = _embed(self._encoder, [segment for _, segment in batch], langs)
                    for (job, _), segment in zip(batch, embedded, strict=True):
                        job.segments.append(segment)
                    fault("ingest.embedded")
                    timings.batches.append(len(batch))
                    timings.embed += time.perf_counter() - mark
                self._alive()
                if self._stopping.is_set():
                    open_jobs.clear()  # given back
                    break
                if done := list(finished()):
                    if committed is not None:
                        committed.result()
                    context = contextvars.copy_context()
                    committed = aside.submit(context.run, self._commit_all, done, timings)
                    timings = Timings()
            if committed is not None:
                committed.result()
            self._commit_all(finished(), timings)
        self._written(lambda: self._queue.release(self.owner))
        return len(begun)

    def _cut(self, jobs: Iterator[_Job]) -> Iterator[list[tuple[_Job, Segment]]]:
        """The segments of jobs, as many together as are embedded at once; fewer, even none, at the end and
        after as many recordings that have none, which wait to be told so."""
        batch: list[tuple[_Job, Segment]] = []
        without = 0
        for job in jobs:
            for segment in self._segments(job):
                job.cut += 1
                batch.append((job, segment))
                if len(batch) == TOGETHER:
                    yield batch
                    batch, without = [], 0
            job.ended = True
            without += not job.cut
            if without == TOGETHER:
                yield batch
                batch, without = [], 0
        if batch:
            yield batch

    def _segments(self, job: _Job) -> Iterator[Segment]:
        """A job's segments; a recording that cannot be decoded ends early, with its reason kept."""
        began = time.perf_counter()

        def decoded(seconds: Seconds) -> None:
            job.decode += seconds
            job.segment -= seconds  # segmenting is what asks for the next block

        def segmented(seconds: Seconds) -> None:
            job.segment += seconds

        def blocks(path: Path, sampling_rate: int) -> Iterator[Waveform]:
            made = sandbox.decode(path, max_duration_s=self._max_duration_s, sampling_rate=sampling_rate)
            for block in _timed(made, decoded):
                if sampling_rate == SAMPLING_RATE:
                    job.samples += len(block)
                    job.peaks.add(block)
                yield block

        try:
            with self._library.store.verified(job.recording.sha256) as path:
                segments = _segments(self._encoder.picture_rate, partial(blocks, path), self._segmenting)
                yield from _timed(segments, segmented)
        except DataDamaged as error:
            job.error = ProcessingFailed(error.detail)
        except InvalidAudio as error:
            job.error = error
        except FileNotFoundError:
            job.error = ProcessingFailed("The stored bytes of this recording are missing; upload it again.")
        record("decode", began, time.perf_counter(), recording=job.recording.id)

    def _commit_all(self, jobs: Iterable[_Job], timings: Timings) -> None:
        for job in jobs:
            self._commit(job, timings)
        if timings.recordings or timings.batches:
            self._observe(timings)

    def _commit(self, job: _Job, timings: Timings) -> None:
        mark = time.perf_counter()
        with span("commit", recording=job.recording.id):
            if self._settle(job):
                arrived = job.recording.created_at.replace(tzinfo=UTC)
                timings.waits.append(max(0.0, (datetime.now(UTC) - arrived).total_seconds()))
        timings.commit += time.perf_counter() - mark
        timings.decode += job.decode
        timings.segment += job.segment
        timings.audio += job.samples / SAMPLING_RATE
        timings.recordings += 1

    def _settle(self, job: _Job) -> bool:
        """Make a recording `ready` or `failed`; whether it is ready."""
        key, error = job.recording.key, job.error
        if error is None and not job.segments:
            error = SilentAudio("Nothing can be heard in this recording.")
        if error is not None:
            _log.info("recording failed", extra={"recording": job.recording.id, "code": error.code})
            code, detail = error.code, error.detail
            self._written(lambda: self._queue.fail(key, self.owner, code=code, detail=detail))
            return False
        fault("ingest.committing")
        duration_s = job.samples / SAMPLING_RATE
        done = self._written(
            lambda: self._queue.complete(
                key,
                self.owner,
                duration_s=duration_s,
                model=self._library.model,
                segments=job.segments,
                peaks=job.peaks.peaks(),
            )
        )
        fault("ingest.committed")
        if done:
            extent = {"duration_s": round(duration_s, 2), "segments": len(job.segments)}
            _log.info("recording ready", extra={"recording": job.recording.id, **extent})
        return done


def embed_recording(
    encoder: SpeechEncoder,
    recording: Path | BinaryIO,
    *,
    max_duration_s: Seconds,
    segmenting: SegmentConfig | None = None,
    lang: str | None = None,
    given_up: Callable[[], bool] = lambda: False,
) -> list[EmbeddedSegment]:
    """The segments of one recording that belongs to no library, as an `Ingester` would embed them.

    `lang` is what is spoken, as an upload may say it, for an encoder that can use it. Raises InvalidAudio
    where it cannot be decoded or nothing can be heard; NotReady where, between two batches, it is `given_up`.
    """
    segments = recording_segments(
        encoder.picture_rate, recording, max_duration_s=max_duration_s, segmenting=segmenting
    )
    embedded: list[EmbeddedSegment] = []
    with closing(_ahead(_batches(segments))) as batches:
        for batch in batches:
            if given_up():
                raise NotReady("Nobody waits for this recording any more.")
            embedded += _embed(encoder, batch, [lang] * len(batch))
    if not embedded:
        raise SilentAudio("Nothing can be heard in this recording.")
    return embedded


def recording_segments(
    picture_rate: int | None,
    recording: Path | BinaryIO,
    *,
    max_duration_s: Seconds,
    segmenting: SegmentConfig | None = None,
) -> Iterator[Segment]:
    """The segments of one recording that belongs to no library, for an encoder of that `picture_rate`.

    Raises InvalidAudio where it cannot be decoded; then or after some segments.
    """
    content = recording if isinstance(recording, Path) else _content(recording)

    def blocks(sampling_rate: int) -> Iterator[Waveform]:
        file = content if isinstance(content, Path) else io.BytesIO(content)
        return sandbox.decode(file, max_duration_s=max_duration_s, sampling_rate=sampling_rate)

    return _segments(picture_rate, blocks, segmenting or SegmentConfig())


def _content(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read()


def _segments(
    picture_rate: int | None, blocks: Callable[[int], Iterator[Waveform]], segmenting: SegmentConfig
) -> Iterator[Segment]:
    """A recording's segments as an encoder needs them, from its `blocks` at any sampling rate.

    The paper takes the waveform at 16 kHz and the picture at 22,050 Hz, each resampled from the original
    (reference: `librosa.load` and `librosa.resample` of the same file), hence a second decoding.
    """
    segments = split(blocks(SAMPLING_RATE), segmenting)
    if picture_rate is None:
        return segments
    return with_pictured(segments, blocks(picture_rate), picture_rate)


def hear(encoder: SpeechEncoder, segments: Sequence[Segment], langs: Sequence[str | None]) -> Heard:
    """What an encoder of either kind makes of segments; `langs` are what is spoken in them, where known."""
    waveforms = [segment.waveform for segment in segments]
    if isinstance(encoder, TranscribingEncoder):
        return encoder.hear(waveforms, langs)
    pictured = [segment.pictured for segment in segments if segment.pictured is not None]
    return Heard(encoder.encode(waveforms, pictured or None), [None] * len(segments))


def _embed(
    encoder: SpeechEncoder, segments: Sequence[Segment], langs: Sequence[str | None]
) -> list[EmbeddedSegment]:
    heard = hear(encoder, segments, langs)
    return [
        EmbeddedSegment(segment.start_s, segment.end_s, vector, transcript)
        for segment, vector, transcript in zip(segments, heard.vectors, heard.transcripts, strict=True)
    ]


def _batches(segments: Iterator[T]) -> Iterator[list[T]]:
    while batch := list(islice(segments, TOGETHER)):
        yield batch


def _timed(items: Iterable[T], add: Callable[[Seconds], None]) -> Iterator[T]:
    """The same items; `add` is told the seconds that making each took."""
    iterator = iter(items)
    while True:
        began = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        finally:
            add(time.perf_counter() - began)
        yield item


def _ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The same items, each made on another thread while the one before it is in use.

    So a file is decoded and listened to on the CPU while a GPU embeds what was heard before. One item is
    made or kept ready, no more. What goes wrong in the making is raised here; closing this ends the making.
    """
    ready: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()
    wanted = threading.Semaphore(1)
    over = threading.Event()

    def make() -> None:
        try:
            while wanted.acquire() and not over.is_set():
                ready.put((next(items),))
        except StopIteration:
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    # in the caller's context: what is logged there carries the same request or worker
    maker = threading.Thread(target=contextvars.copy_context().run, args=(make,), name="decoder", daemon=True)
    maker.start()
    try:
        while (made := ready.get()) is not None:
            if isinstance(made, BaseException):
                raise made
            wanted.release()
            yield made[0]
    finally:
        over.set()
        wanted.release()
        maker.join()


def warm_up(encoder: SpeechEncoder) -> None:
    """Embed noise as long as the longest segment: memory and speed are then what they will stay."""

    def noise(sampling_rate: int) -> Waveform:
        samples = round(SegmentConfig().max_s * sampling_rate)
        return np.random.default_rng(0).normal(0, 0.1, samples).astype(np.float32)

    pictured = None if encoder.picture_rate is None else [noise(encoder.picture_rate)]
    encoder.encode([noise(SAMPLING_RATE)], pictured)


class _Heartbeat:
    """Calls something every few seconds, on a thread of its own, while the block runs."""

    def __init__(self, beat: Callable[[], None], every_s: Seconds) -> None:
        self._beat = beat
        self._every_s = every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._over.wait(self._every_s):
            self._beat()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
