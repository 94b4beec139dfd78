"""Ingestion: every recording ends ready or failed with a reason, and none spoils or delays another."""

import io
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from clasp_core import ingest, sandbox
from clasp_core.catalog import EmbeddedSegment, Recording
from clasp_core.errors import DiskFull, InvalidAudio, NotReady, SilentAudio
from clasp_core.ingest import Ingester, Timings, embed_recording
from clasp_core.leases import MAX_ATTEMPTS
from clasp_core.library import Library, Question, mean_vector
from clasp_core.models import SpeechEncoder, TextEncoder
from clasp_core.types import Embeddings, Waveform
from tests.audio_files import encode, hostile, speech, tone
from tests.core.doubles import (
    DIM,
    MODEL,
    LetterTextEncoder,
    SpectralSpeechEncoder,
    SpellingSpeechEncoder,
    processes,
    random_vectors,
    upload,
    wav_bytes,
)

MAX_DURATION_S = 300.0


@pytest.fixture(scope="module", autouse=True)
def no_zygote_left() -> Iterator[None]:
    yield
    sandbox.stop()


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    opened = Library(tmp_path, model=MODEL, dim=DIM)
    yield opened
    opened.close()


class Watched(SpectralSpeechEncoder):
    """Does something before it encodes."""

    def __init__(self, before: Callable[[Sequence[Waveform]], object]) -> None:
        super().__init__()
        self._before = before

    def encode(self, waveforms: Sequence[Waveform], pictured: Sequence[Waveform] | None = None) -> Embeddings:
        self._before(waveforms)
        return super().encode(waveforms)


def ingester(library: Library, encoder: SpeechEncoder | None = None) -> Ingester:
    return Ingester(library, encoder or SpectralSpeechEncoder(), max_duration_s=MAX_DURATION_S)


def finish(library: Library, encoder: SpeechEncoder | None = None) -> None:
    """Process until nothing waits."""
    worker = ingester(library, encoder)
    for _ in range(100):
        if not worker.step():
            return
    raise AssertionError("something waits for ever")


def state(library: Library, recording_id: str) -> tuple[str, str | None]:
    recording = library.catalog.get(recording_id)
    return recording.status, recording.error_code


def found(library: Library, vector: Embeddings, limit: int = 10) -> list[str]:
    (hits,) = library.search(vector[None], [Question(limit)])
    return [hit.recording.id for hit in hits]


def pitch(waveform: Waveform) -> float:
    """The strongest frequency, Hz."""
    return float(np.abs(np.fft.rfft(waveform)).argmax() * 16_000 / len(waveform))


# --- what becomes of a recording


def test_a_recording_becomes_ready_with_its_duration_and_segments(library: Library) -> None:
    """What a client reads of its recording is true, and a search by its own vector finds the very span."""
    content = encode(speech(25.0), 16_000)
    upload(library, content, "speech")
    upload(library, wav_bytes(300.0, seconds=0.75), "short")
    finish(library)
    ready, short = library.catalog.get("speech"), library.catalog.get("short")
    assert (ready.status, ready.model, ready.duration_s) == ("ready", MODEL, pytest.approx(25.0, abs=0.001))
    assert (short.status, short.segments, short.duration_s) == ("ready", 1, pytest.approx(0.75, abs=0.001))

    expected = embed_recording(SpectralSpeechEncoder(), io.BytesIO(content), max_duration_s=MAX_DURATION_S)
    assert ready.segments == len(expected) > 1
    spans = library.catalog.spans([(ready.key, ordinal) for ordinal in range(len(expected))], model=MODEL)
    assert [spans[ready.key, i] for i in range(len(expected))] == [
        (s.start_s, s.end_s, None) for s in expected
    ]
    assert all(0 <= start < end <= 25.0 for start, end, _ in spans.values())
    for segment in expected:
        ((hit, *_),) = library.search(segment.vector[None], [Question(1)])
        assert hit.recording.id == "speech"
        assert (hit.segments[0].start_s, hit.segments[0].end_s) == (segment.start_s, segment.end_s)
        assert hit.score == pytest.approx(1.0, abs=1e-5)


def test_what_was_heard_is_stored_with_each_segment(library: Library) -> None:
    """A hit shows the words of its very span; and an upload's language is what a recogniser is told, though
    recordings in several languages are embedded in one batch."""
    langs = {"low": "fa", "high": None, "higher": "zh-Hant"}
    heights = {"low": 300.0, "high": 700.0, "higher": 1200.0}
    for name, lang in langs.items():
        upload(library, wav_bytes(heights[name]), name, lang=lang)
    finish(library, SpellingSpeechEncoder())
    for name, lang in langs.items():
        query = SpectralSpeechEncoder().encode([tone(0.5, frequency=heights[name])[:, 0]])
        ((hit,),) = library.search(query, [Question(1)])
        assert hit.recording.id == name
        assert [segment.transcript for segment in hit.segments] == [f"{heights[name]:.0f} Hz ({lang})"]


@pytest.mark.parametrize("name", ["silent wav", "random bytes", "empty", "nan", "film without sound"])
def test_what_cannot_be_heard_fails_with_its_reason(library: Library, name: str) -> None:
    """The uploader learns why, at once and for good; the worker goes on."""
    content, code = hostile()[name]
    upload(library, content, "bad")
    upload(library, wav_bytes(), "good")
    finish(library)
    assert state(library, "bad") == ("failed", code)
    assert library.catalog.get("bad").error_detail
    assert state(library, "good") == ("ready", None)


def test_a_recording_beyond_the_limit_fails_though_its_beginning_was_embedded(library: Library) -> None:
    """Whether a recording is too long is known at its end only; half of it must not be found."""
    upload(library, encode(tone(60.0), 16_000), "long")
    worker = Ingester(library, SpectralSpeechEncoder(), max_duration_s=40.0)
    worker.step()
    assert state(library, "long") == ("failed", "audio_too_long")
    assert library.catalog.last_change()[0] == 0


def test_bad_recordings_among_good_ones_change_nothing_for_them(library: Library) -> None:
    """Eight are embedded together; each must come out as if it had been alone."""
    contents = {f"tone-{frequency}": wav_bytes(float(frequency)) for frequency in range(200, 3200, 250)}
    bad = {name.replace(" ", "-"): content for name, (content, _) in hostile().items()}
    names = [*contents, *bad]
    random.Random(0).shuffle(names)
    for name in names:
        upload(library, (contents | bad)[name], name)
    finish(library)
    assert library.catalog.counts() == {"ready": len(contents), "failed": len(bad)}
    for name, content in contents.items():
        (alone,) = embed_recording(SpectralSpeechEncoder(), io.BytesIO(content), max_duration_s=10)
        assert found(library, alone.vector, limit=1) == [name]


def test_a_long_recording_does_not_hold_back_those_before_it(library: Library) -> None:
    """Somebody uploads a lecture after a voice message: the message is searchable while the lecture is still
    being embedded, though one lease took both."""
    seen: list[tuple[str, str]] = []
    upload(library, wav_bytes(300.0), "message")
    upload(library, encode(tone(280.0), 16_000), "lecture")
    upload(library, wav_bytes(600.0), "behind")
    finish(
        library, Watched(lambda _: seen.append((state(library, "message")[0], state(library, "lecture")[0])))
    )
    assert seen[0] == ("processing", "processing")
    assert ("ready", "processing") in seen
    assert len(seen) >= 3
    assert library.catalog.counts() == {"ready": 3}


def test_a_recording_whose_bytes_are_missing_says_so_and_can_be_sent_again(library: Library) -> None:
    """A lost file is nobody's fault who can read the message; doing what it says must help."""
    recording = upload(library, wav_bytes(), "lost")
    library.store.remove(recording.sha256)
    finish(library)
    assert state(library, "lost") == ("failed", "processing_failed")
    detail = library.catalog.get("lost").error_detail
    assert detail is not None
    assert "missing" in detail
    assert "upload it again" in detail
    upload(library, wav_bytes())
    finish(library)
    assert state(library, "lost") == ("ready", None)


def test_a_recording_deleted_at_work_does_not_come_back(library: Library) -> None:
    """Delete was acknowledged while the encoder was busy with it."""
    upload(library, wav_bytes(300.0), "gone")
    upload(library, wav_bytes(600.0), "kept")
    deleted = iter(["gone"])
    finish(library, Watched(lambda _: [library.delete(name) for name in deleted]))
    assert library.catalog.counts() == {"ready": 1}
    assert found(library, random_vectors(0, 1)[0]) == ["kept"]


# --- when the machinery fails


def test_an_encoder_that_fails_on_one_recording_fails_that_one_alone(library: Library) -> None:
    """A bug that one recording wakes must cost that recording, a bounded number of attempts, and nothing
    else: not its neighbours in the batch, not the queue behind it."""
    attempts: list[float] = []

    def break_on_1000_hz(waveforms: Sequence[Waveform]) -> None:
        if any(abs(pitch(waveform) - 1000) < 1 for waveform in waveforms):
            attempts.append(1000)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    for frequency in (300, 1000, 500, 700, 1500):
        upload(library, wav_bytes(float(frequency)), f"{frequency}")
    finish(library, Watched(break_on_1000_hz))
    assert state(library, "1000") == ("failed", "processing_failed")
    assert len(attempts) == MAX_ATTEMPTS
    assert library.catalog.counts() == {"ready": 4, "failed": 1}


def test_an_encoder_that_answers_nan_does_not_stop_the_searches(library: Library) -> None:
    """A vector that the index would refuse must never reach it: every later search would stumble over it."""

    class Unsteady(SpectralSpeechEncoder):
        def encode(
            self, waveforms: Sequence[Waveform], pictured: Sequence[Waveform] | None = None
        ) -> Embeddings:
            vectors = super().encode(waveforms)
            vectors[[abs(pitch(waveform) - 1000) < 1 for waveform in waveforms]] = np.nan
            return vectors

    for frequency in (300, 1000, 500):
        upload(library, wav_bytes(float(frequency)), f"{frequency}")
    finish(library, Unsteady())
    assert state(library, "1000") == ("failed", "processing_failed")
    assert sorted(found(library, random_vectors(0, 1)[0])) == ["300", "500"]


def test_recordings_wait_while_no_decoder_can_be_started(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine without memory for a minute must not fail all that waits: nothing is wrong with it."""
    upload(library, wav_bytes(), "patient")
    sandbox.stop()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/bin/false")
        worker = ingester(library)
        for _ in range(MAX_ATTEMPTS + 2):
            assert worker.step() == 0
    assert state(library, "patient") == ("pending", None)
    assert library.catalog.get("patient").attempts == 0
    finish(library)
    assert state(library, "patient") == ("ready", None)


class FullDisk:
    """A library's catalogue on a disk that is full for the first calls of each kind."""

    def __init__(self, library: Library, refusals: int) -> None:
        self._catalog = library.catalog
        self.left = dict.fromkeys(("lease", "complete", "fail", "release"), refusals)

    def __getattr__(self, name: str) -> Callable[..., object]:
        def call(*arguments: object, **more: object) -> object:
            if self.left.get(name, 0):
                self.left[name] -= 1
                raise DiskFull("The disk that holds the catalogue is full.")
            return getattr(self._catalog, name)(*arguments, **more)

        return call


def test_what_finds_no_room_on_the_disk_waits(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is not the recordings' fault: nothing is embedded twice, no attempt is counted, and what
    failed does so with its own reason."""
    monkeypatch.setattr(ingest, "WITHOUT_ROOM_S", 0.01)
    embedded = []
    encoder = Watched(lambda waveforms: embedded.extend(waveforms))
    upload(library, wav_bytes(), "good")
    upload(library, b"no audio", "bad")
    queue = FullDisk(library, refusals=2)
    worker = Ingester(library, encoder, max_duration_s=MAX_DURATION_S, queue=queue)  # type: ignore[arg-type]
    steps = [worker.step() for _ in range(4)]
    assert steps == [0, 0, 2, 0]
    assert not any(queue.left.values())
    good, bad = library.catalog.get("good"), library.catalog.get("bad")
    assert (good.status, bad.status, bad.error_code) == ("ready", "failed", "undecodable_audio")
    assert (good.attempts, bad.attempts, len(embedded)) == (1, 1, 1)


def test_work_that_another_took_over_is_not_committed(library: Library) -> None:
    """A worker that was thought dead finishes late: the recording is the other's by now."""
    upload(library, wav_bytes(), "one")

    def lose_it(_: object) -> None:
        library.catalog.extend_leases(worker.owner, -1)
        assert len(library.catalog.lease("other", limit=1, lease_s=60)) == 1

    worker = ingester(library, Watched(lose_it))
    worker.step()
    assert state(library, "one") == ("processing", None)
    assert library.catalog.last_change()[0] == 0
    library.catalog.release("other")
    finish(library)
    assert state(library, "one") == ("ready", None)


def test_a_lease_lasts_as_long_as_the_work(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedding an hour of audio outlasts any fixed lease; the worker says that it is alive."""
    monkeypatch.setattr(ingest, "LEASE_S", 2.0)
    stolen: list[Recording] = []

    def outlast_the_lease(_: object) -> None:
        end = time.monotonic() + 2.6
        while time.monotonic() < end:
            stolen.extend(library.catalog.lease("thief", limit=1, lease_s=60))
            time.sleep(0.02)

    upload(library, wav_bytes(), "long-work")
    finish(library, Watched(outlast_the_lease))
    assert stolen == []
    assert state(library, "long-work") == ("ready", None)


def hang_at_work(data_dir: Path, working: Connection) -> None:
    ingest.LEASE_S = 0.5
    library = Library(data_dir, model=MODEL, dim=DIM)

    def hang(_: object) -> None:
        working.send("working")
        threading.Event().wait()

    ingester(library, Watched(hang)).step()


def test_the_work_of_a_killed_worker_is_done_by_the_next(library: Library, tmp_path: Path) -> None:
    """kill -9, out of memory, a pulled plug: what it had leased is picked up when the lease runs out, and
    counted, so that a recording that kills its workers is found out."""
    upload(library, wav_bytes(), "one")
    context = processes()
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=hang_at_work, args=(tmp_path, writer))
    process.start()
    assert reader.recv() == "working"
    assert ingester(library).step() == 0
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    eventually(lambda: ingester(library).step() == 1)
    assert state(library, "one") == ("ready", None)
    assert library.catalog.get("one").attempts == 2


def test_what_killed_a_worker_is_alone_where_work_goes_on(library: Library) -> None:
    """A worker that leases on must not take a recording that may kill it along with those of others: they
    would count as suspects, too."""
    batches: list[int] = []
    for number in range(20):
        upload(library, wav_bytes(200.0 + 50 * number, seconds=0.2), f"{number}")
    assert [taken.id for taken in library.catalog.lease("dies", limit=1, lease_s=-1)] == ["0"]
    worker = ingester(library, Watched(lambda waveforms: batches.append(len(waveforms))))
    assert worker.step(on=True) == 19
    assert state(library, "0") == ("processing", None)
    assert worker.step(on=True) == 1
    assert batches == [8, 8, 3, 1]
    assert library.catalog.counts() == {"ready": 20}


# --- stopping


def test_stop_gives_back_what_is_being_processed_without_counting_it(library: Library) -> None:
    """Deploying ten times in an hour must neither wait for a lecture nor use up anybody's attempts."""
    upload(library, encode(tone(280.0), 16_000), "lecture")
    upload(library, wav_bytes(), "message")
    for _ in range(MAX_ATTEMPTS + 1):
        batches: list[int] = []
        worker = ingester(library, Watched(lambda _: (batches.append(1), worker.stop())))  # noqa: B023
        worker.run()
        assert len(batches) == 1, "it went on after it was told to stop"
        assert library.catalog.counts() == {"pending": 2}
    assert library.catalog.get("lecture").attempts == 0
    finish(library)
    assert library.catalog.counts() == {"ready": 2}


def test_a_running_worker_takes_what_comes_and_stops_when_told(library: Library) -> None:
    """The everyday life of a worker thread: idle, a recording, idle, the end."""
    worker = ingester(library)
    thread = threading.Thread(target=worker.run, args=(0.01,))
    thread.start()
    for name in ("first", "second"):
        upload(library, wav_bytes(300.0 if name == "first" else 600.0), name)
        eventually(lambda name=name: state(library, name)[0] == "ready")  # type: ignore[misc]
    worker.stop()
    thread.join(20)
    assert not thread.is_alive()


def test_workers_side_by_side_embed_each_recording_once(library: Library) -> None:
    """More workers are for more speed; a recording embedded twice is a recording not embedded."""
    embedded: list[int] = []
    for number in range(30):
        upload(library, wav_bytes(200.0 + 50 * number, seconds=0.2), f"{number}")
    workers = [
        ingester(library, Watched(lambda waveforms: embedded.append(len(waveforms)))) for _ in range(3)
    ]
    threads = [threading.Thread(target=worker.run, args=(0.01,)) for worker in workers]
    for thread in threads:
        thread.start()
    eventually(lambda: library.catalog.counts() == {"ready": 30})
    for worker, thread in zip(workers, threads, strict=True):
        worker.stop()
        thread.join()
    assert sum(embedded) == 30
    assert library.catalog.last_change()[0] == 30


def test_it_reports_the_audio_it_worked_on(library: Library) -> None:
    """The figure operators size their machines by: seconds of audio, and of work by stage."""
    reports: list[Timings] = []
    for frequency in (300.0, 600.0, 900.0):
        upload(library, wav_bytes(frequency, seconds=0.5))
    worker = Ingester(library, SpectralSpeechEncoder(), max_duration_s=MAX_DURATION_S, observe=reports.append)
    began = time.perf_counter()
    assert worker.step() == 3
    took = time.perf_counter() - began
    (report,) = reports
    assert (report.recordings, report.audio) == (3, pytest.approx(1.5))
    assert min(report.decode, report.embed, report.commit) > 0
    assert report.decode + report.embed + report.commit <= took


# --- without a library


def test_a_question_that_is_given_up_is_not_embedded_to_its_end(tmp_path: Path) -> None:
    """Its asker has gone, and others wait for the model."""
    batches: list[int] = []
    encoder = Watched(lambda waveforms: batches.append(len(waveforms)))
    content = io.BytesIO(encode(speech(300.0), 16_000))
    with pytest.raises(NotReady):
        embed_recording(encoder, content, max_duration_s=600, given_up=lambda: len(batches) == 2)
    assert len(batches) == 2


def test_embedding_one_recording_needs_no_library(tmp_path: Path) -> None:
    """A recording as the question: from a path or an open file the same unit vectors, and the same errors."""
    path = tmp_path / "speech.wav"
    path.write_bytes(encode(speech(25.0), 16_000))
    encoder = SpectralSpeechEncoder()
    segments = embed_recording(encoder, path, max_duration_s=60)
    with path.open("rb") as file:
        again = embed_recording(encoder, file, max_duration_s=60)
    assert [(s.start_s, s.end_s, s.vector.tobytes()) for s in segments] == [
        (s.start_s, s.end_s, s.vector.tobytes()) for s in again
    ]
    assert all(np.linalg.norm(segment.vector) == pytest.approx(1, abs=1e-5) for segment in segments)
    heard = embed_recording(SpellingSpeechEncoder(), path, max_duration_s=60, lang="fa")
    assert [(s.start_s, s.vector.tobytes()) for s in heard] == [
        (s.start_s, s.vector.tobytes()) for s in segments
    ]
    assert all(segment.transcript is not None and "(fa)" in segment.transcript for segment in heard)
    with pytest.raises(SilentAudio):
        embed_recording(encoder, io.BytesIO(hostile()["silent wav"][0]), max_duration_s=60)
    with pytest.raises(InvalidAudio):
        embed_recording(encoder, io.BytesIO(b"not audio"), max_duration_s=60)


def test_the_mean_vector_weighs_segments_by_their_length() -> None:
    """One vector for a whole recording: unit length, and nearer to what it talks about longest."""
    axes = np.eye(DIM, dtype=np.float32)
    segments = [EmbeddedSegment(0.0, 3.0, axes[0]), EmbeddedSegment(5.0, 9.0, axes[1])]
    vector = mean_vector(segments)
    assert vector.dtype == np.float32
    assert vector.tolist() == pytest.approx([0.6, 0.8] + [0] * (DIM - 2))
    several = [EmbeddedSegment(i, i + 1.5, row) for i, row in enumerate(random_vectors(0, 20))]
    assert np.linalg.norm(mean_vector(several)) == pytest.approx(1, abs=1e-6)


# --- the doubles of this folder


def test_the_encoders_of_these_tests_keep_the_promises_of_real_ones() -> None:
    """What is tested with them holds for the models only as far as they behave alike."""
    speech_encoder: SpeechEncoder = SpectralSpeechEncoder()
    text_encoder: TextEncoder = LetterTextEncoder()
    waveforms = [tone(seconds, frequency=300.0 * seconds)[:, 0] for seconds in (0.2, 1.0, 3.0)]
    texts = ["سلام", "hello", "你好", ""]
    for together, alone in (
        (speech_encoder.encode(waveforms), [speech_encoder.encode([waveform])[0] for waveform in waveforms]),
        (text_encoder.encode(texts), [text_encoder.encode([text])[0] for text in texts]),
    ):
        assert together.shape == (len(alone), DIM)
        assert together.dtype == np.float32
        assert np.linalg.norm(together, axis=1) == pytest.approx(1, abs=1e-5)
        assert np.stack(alone) == pytest.approx(together, abs=1e-6)
        assert len(np.unique(together, axis=0)) == len(together)


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


class Pictured(SpectralSpeechEncoder):
    """Needs each segment at 22,050 Hz too, and keeps what it was given."""

    picture_rate = 22_050

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[int, int]] = []

    def encode(self, waveforms: Sequence[Waveform], pictured: Sequence[Waveform] | None = None) -> Embeddings:
        assert pictured is not None
        self.given += [
            (len(waveform), len(second)) for waveform, second in zip(waveforms, pictured, strict=True)
        ]
        return super().encode(waveforms)


def test_an_encoder_gets_the_second_rate_it_asks_for(library: Library, tmp_path: Path) -> None:
    """The paper's picture is made of 22,050 Hz, decoded from the original, for every segment there is."""
    path = tmp_path / "speech.flac"
    path.write_bytes(encode(speech(40.0, 44_100), 44_100, "flac"))
    encoder = Pictured()
    upload(library, path.read_bytes(), "long")
    finish(library, encoder)
    assert state(library, "long")[0] == "ready"
    in_library = list(encoder.given)
    assert len(in_library) > 1
    for samples, second in in_library:
        assert second == pytest.approx(samples * 22_050 / 16_000, abs=2)
    encoder.given.clear()
    with path.open("rb") as file:
        embed_recording(encoder, file, max_duration_s=60)
    assert encoder.given == in_library
