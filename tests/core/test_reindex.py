"""Another model while the library is in use: answers by one at a time, nothing lost, whoever is killed."""

import contextlib
import functools
import io
import random
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import alembic.command
import alembic.config
import numpy as np
import pytest
import sqlalchemy as sa

from clasp_core import catalog as catalog_module
from clasp_core import ingest, sandbox
from clasp_core import reindex as reindex_module
from clasp_core.catalog import StoredModel
from clasp_core.database import WAVEFORMS
from clasp_core.errors import DataMismatch, ProcessingFailed
from clasp_core.ingest import Ingester, embed_recording
from clasp_core.leases import MAX_ATTEMPTS
from clasp_core.library import Hit, Library, Question
from clasp_core.reindex import Outcome, Reindexer, Reindexing
from clasp_core.types import Embeddings, Waveform
from tests.audio_files import hostile
from tests.core.doubles import (
    DIM,
    MODEL,
    SpectralSpeechEncoder,
    SpellingSpeechEncoder,
    add,
    complete,
    processes,
    random_vectors,
    register,
    segments_of,
    upload,
    wav_bytes,
)

OLD = StoredModel(MODEL, "old", DIM)
NEW = StoredModel("fedcba9876543210", "new", 24)
MAX_DURATION_S = 60.0


@pytest.fixture(scope="module", autouse=True)
def no_zygote_left() -> Iterator[None]:
    yield
    sandbox.stop()


@pytest.fixture(autouse=True)
def nobody_has_to_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Except in the test of it, arrivals do not wait after a switch."""
    monkeypatch.setattr(reindex_module, "FOLLOW_WITHIN_S", 0.0)


@pytest.fixture
def opened() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as libraries:
        yield libraries


@pytest.fixture
def open_as(tmp_path: Path, opened: contextlib.ExitStack) -> Callable[..., Library]:
    """Opens the one data directory by a model, as one more process would."""

    def open_one(model: StoredModel, *, reindex: bool = False) -> Library:
        library = Library(tmp_path, model=model.fingerprint, name=model.name, dim=model.dim, reindex=reindex)
        opened.callback(library.catalog.close)
        return library

    return open_one


Opener = Callable[..., Library]


class Watched(SpectralSpeechEncoder):
    """Does something before it encodes."""

    def __init__(self, dim: int, before: Callable[[Sequence[Waveform]], object]) -> None:
        super().__init__(dim)
        self._before = before

    def encode(self, waveforms: Sequence[Waveform], pictured: Sequence[Waveform] | None = None) -> Embeddings:
        self._before(waveforms)
        return super().encode(waveforms)


def reindexer(
    library: Library, before: Callable[[Sequence[Waveform]], object] = lambda waveforms: None
) -> Reindexer:
    dim = library.stored_model.dim
    return Reindexer(library, lambda: Watched(dim, before), max_duration_s=MAX_DURATION_S)


def reindex(open_as: Opener, model: StoredModel = NEW) -> Outcome:
    return reindexer(open_as(model, reindex=True)).run(poll_s=0.02)


def ingest_all(library: Library) -> None:
    worker = Ingester(library, SpectralSpeechEncoder(library.stored_model.dim), max_duration_s=MAX_DURATION_S)
    while worker.step():
        pass


def fill(library: Library, names: Sequence[str]) -> dict[str, bytes]:
    """Tones of different height, embedded by the library's model."""
    contents = {name: tone_of(name) for name in names}
    for name, content in contents.items():
        upload(library, content, name)
    ingest_all(library)
    return contents


def tone_of(name: str) -> bytes:
    """A tone whose height is the number in its name."""
    return wav_bytes(100.0 + 37 * int(name.partition("-")[2]), seconds=0.3)


@functools.cache
def vector(content: bytes, model: StoredModel) -> Embeddings:
    """What the model makes of one tone."""
    encoder = SpectralSpeechEncoder(model.dim)
    (segment,) = embed_recording(encoder, io.BytesIO(content), max_duration_s=MAX_DURATION_S)
    return segment.vector


def search(library: Library, query: Embeddings, limit: int = 1000) -> list[Hit]:
    (hits,) = library.search(query[None], [Question(limit)])
    return hits


def check_answers(library: Library, contents: dict[str, bytes]) -> None:
    """That exactly these are found, each with the cosine and the span that the library's model gives it."""
    model = library.stored_model
    query = random_vectors(1, 1, model.dim)[0]
    hits = search(library, query)
    expected = {name: float(query @ vector(content, model)) for name, content in contents.items()}
    assert {hit.recording.id: hit.score for hit in hits} == pytest.approx(expected, abs=1e-5)
    assert [len(hit.segments) for hit in hits] == [1] * len(contents)


def stored(folder: Path) -> dict[str, list[str]]:
    """Fingerprints of the models that each recording has vectors of, one for each vector."""
    with contextlib.closing(sqlite3.connect(folder / "catalog.sqlite3")) as db:
        rows = db.execute(
            "SELECT id, segments.model FROM segments JOIN recordings ON key = recording"
        ).fetchall()
    found: dict[str, list[str]] = {}
    for name, model in rows:
        found.setdefault(name, []).append(model)
    return found


def forget_at_once(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the time that retired vectors are kept for were over."""
    with monkeypatch.context() as patch:
        now = time.time()
        patch.setattr(catalog_module.time, "time", lambda: now + 3 * catalog_module.RETIRED_KEPT_S)
        library.catalog.forget_retired()


# --- the way of a library to another model


def test_a_library_has_another_model_after_it(
    open_as: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is for: every recording found by the new model and by it alone, with its own facts, and
    nothing left behind of the old one."""
    old = open_as(OLD)
    contents = fill(old, [f"tone-{number}" for number in range(20)])
    upload(old, hostile()["silent wav"][0], "silent")
    ingest_all(old)
    upload(old, tone_of("tone-99"), "waiting")
    outcome = reindex(open_as)
    assert outcome == Outcome("switched", 20)

    new = open_as(NEW)
    check_answers(new, contents)
    assert new.catalog.counts() == {"ready": 20, "failed": 1, "pending": 1}
    assert new.catalog.get("silent").error_code == "silent_audio"
    ready = new.catalog.get("tone-3")
    assert (ready.model, ready.segments, ready.duration_s) == (NEW.fingerprint, 1, pytest.approx(0.3))
    ingest_all(new)
    check_answers(new, contents | {"waiting": tone_of("tone-99")})
    forget_at_once(new, monkeypatch)
    assert stored(tmp_path) == {name: [NEW.fingerprint] for name in [*contents, "waiting"]}


def test_what_an_older_version_indexed_gets_a_waveform(open_as: Opener) -> None:
    """Every recording is decoded on the way: it would be a pity to have to upload them anew for that."""
    old = open_as(OLD)
    fill(old, ["tone-1"])
    made = old.catalog.waveform("tone-1")[1].levels.tobytes()
    assert len(made) == 6
    with old.catalog.database.writing() as db:
        db.execute(sa.delete(WAVEFORMS))
    reindex(open_as)
    assert open_as(NEW).catalog.waveform("tone-1")[1].levels.tobytes() == made


def test_a_second_run_finds_nothing_to_do(open_as: Opener) -> None:
    """People run it twice; the second time must be quick, change nothing and say so."""
    fill(open_as(OLD), ["tone-1", "tone-2"])
    reindex(open_as)
    point = open_as(NEW).catalog.last_change()
    library = open_as(NEW, reindex=True)
    again = Reindexer(library, lambda: pytest.fail("loaded"), max_duration_s=MAX_DURATION_S)
    assert again.run() == Outcome("nothing to do")
    assert open_as(NEW).catalog.last_change() == point


def test_an_empty_library_is_switched_at_once(open_as: Opener) -> None:
    """Whoever prepares a machine may do things in any order."""
    open_as(OLD)
    assert reindex(open_as) == Outcome("switched", 0)
    fill(open_as(NEW), ["tone-1"])
    with pytest.raises(DataMismatch):
        open_as(OLD)


def test_a_mismatch_names_both_ways_out(open_as: Opener) -> None:
    """Whoever starts the service with the wrong model set reads which one is right, and what else helps."""
    fill(open_as(OLD), ["tone-1"])
    with pytest.raises(DataMismatch) as refused:
        open_as(NEW)
    for words in ("another model", "CLASP_MODEL=old", "`clasp reindex --model new`", MODEL, NEW.fingerprint):
        assert words in str(refused.value)
    with pytest.raises(DataMismatch) as refused:  # the same name means other weights now: no setting helps
        open_as(StoredModel(NEW.fingerprint, "old", NEW.dim))
    assert "CLASP_MODEL" not in str(refused.value)
    assert "`clasp reindex --model old`" in str(refused.value)


def test_the_name_kept_is_the_last_one_it_was_opened_by(open_as: Opener) -> None:
    """A model folder moves; a service that follows a switch later must find it where it is."""
    fill(open_as(OLD), ["tone-1"])
    open_as(StoredModel(MODEL, "/moved/old", DIM))
    library = open_as(StoredModel(MODEL, "", DIM))
    active = library.catalog.active()
    assert active == StoredModel(MODEL, "/moved/old", DIM)


# --- while it is in use


def test_answers_are_the_old_model_s_until_the_switch(open_as: Opener) -> None:
    """While it goes on people search, upload and delete as ever. All of it is true afterwards, too."""
    old = open_as(OLD)
    contents = fill(old, [f"tone-{number}" for number in range(24)])
    numbers = iter(range(100, 200))

    def live_on(_: object) -> None:
        number = next(numbers)
        if number < 103:
            contents.update(fill(old, [f"tone-{number}"]))
            for name in (f"tone-{number - 100}", f"tone-{number - 80}"):  # done already, and still to come
                old.delete(name)
                del contents[name]
        check_answers(old, contents)

    outcome = reindexer(open_as(NEW, reindex=True), live_on).run(poll_s=0.02)
    assert outcome.result == "switched"
    assert next(numbers) > 103
    check_answers(open_as(NEW), contents)


def test_who_has_yet_to_follow_goes_on_answering(
    open_as: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service takes seconds to load the new model: until then its answers are whole and by the old one,
    without what was deleted, also while it says again and again that it needs the old vectors."""
    old = open_as(OLD)
    contents = fill(old, [f"tone-{number}" for number in range(6)])
    check_answers(old, contents)
    reindex(open_as)
    assert not old.is_current()
    check_answers(old, contents)
    old.delete("tone-2")
    contents.pop("tone-2")
    check_answers(old, contents)
    with monkeypatch.context() as patch:
        now = time.time()
        patch.setattr(catalog_module.time, "time", lambda: now + 0.9 * catalog_module.RETIRED_KEPT_S)
        old.catalog.keep(MODEL)
        patch.setattr(catalog_module.time, "time", lambda: now + 1.5 * catalog_module.RETIRED_KEPT_S)
        old.catalog.forget_retired()
    check_answers(old, contents)
    old.save_index()
    assert not (tmp_path / "index").exists(), "the place of the new model's snapshot was taken"
    forget_at_once(old, monkeypatch)
    assert {model for models in stored(tmp_path).values() for model in models} == {NEW.fingerprint}


def test_the_old_model_s_workers_commit_nothing_more(open_as: Opener) -> None:
    """A worker that was in the middle of it when the switch came: what it made can be compared with nothing
    any more, so its recording waits for a worker of the new model, and none of its attempts is used up."""
    old = open_as(OLD)
    contents = fill(old, ["tone-1", "tone-2"])
    contents["tone-3"] = tone_of("tone-3")
    contents["tone-4"] = tone_of("tone-4")
    upload(old, contents["tone-3"], "tone-3")
    seen: list[Outcome] = []

    def switch_meanwhile(_: object) -> None:
        seen.append(reindex(open_as))
        assert old.catalog.counts() == {"ready": 2, "pending": 1}, "it waits for a worker that gives up first"
        upload(old, contents["tone-4"], "tone-4")

    late = Ingester(old, Watched(DIM, switch_meanwhile), max_duration_s=MAX_DURATION_S)
    assert late.step() == 1
    assert seen == [Outcome("switched", 2)]
    assert old.catalog.counts() == {"ready": 2, "pending": 2}
    assert old.catalog.get("tone-3").attempts == 0
    with pytest.raises(DataMismatch, match="switched to another model, new"):
        late.step()

    # one that leased after the switch, without asking for which model
    (leased, _) = old.catalog.lease("careless", limit=9, lease_s=60)
    segments = segments_of(random_vectors(1, 1))
    assert not old.catalog.complete(leased.key, "careless", duration_s=1, model=MODEL, segments=segments)
    assert (old.catalog.get("tone-3").status, old.catalog.get("tone-3").attempts) == ("pending", 0)
    old.catalog.release("careless")
    new = open_as(NEW)
    ingest_all(new)
    check_answers(new, contents)


def test_the_end_comes_under_steady_uploads(open_as: Opener) -> None:
    """Where something arrives with every step, there would always be one more to embed before the switch."""
    old = open_as(OLD)
    contents = fill(old, ["tone-1"])
    worker = Ingester(old, SpectralSpeechEncoder(), max_duration_s=MAX_DURATION_S)
    numbers = iter(range(2, 40))

    def another_arrives(_: object) -> None:
        name = f"tone-{next(numbers)}"
        contents[name] = tone_of(name)
        upload(old, contents[name], name)
        worker.step()

    assert reindexer(open_as(NEW, reindex=True), another_arrives).run(poll_s=0.02).result == "switched"
    new = open_as(NEW)
    ingest_all(new)
    check_answers(new, contents)


def test_arrivals_wait_until_all_could_follow(open_as: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two services: one has followed and could embed at once what the other could not find yet."""
    monkeypatch.setattr(reindex_module, "FOLLOW_WITHIN_S", 0.5)
    old = open_as(OLD)
    fill(old, ["tone-1"])
    upload(old, tone_of("tone-2"), "tone-2")
    began = time.monotonic()
    reindex(open_as)
    new = open_as(NEW)
    while not new.catalog.lease("worker", limit=1, lease_s=60):
        time.sleep(0.01)
    assert time.monotonic() - began >= 0.5


def test_arrivals_do_not_wait_for_ever_for_a_run_that_died(open_as: Opener) -> None:
    """It may be killed at the very moment that it held the uploads back."""
    old = open_as(OLD)
    complete(old.catalog, register(old.catalog, "one"), random_vectors(1, 1))
    register(old.catalog, "two")
    died = Reindexing(open_as(NEW, reindex=True).catalog, NEW)
    died.holding = True
    assert len(died.lease("dying", limit=1, lease_s=0.3)) == 1
    assert old.catalog.lease("worker", limit=1, lease_s=60) == []
    time.sleep(0.35)
    assert len(old.catalog.lease("worker", limit=1, lease_s=60)) == 1


# --- what cannot be embedded


def pitch(waveform: Waveform) -> float:
    """The strongest frequency, Hz."""
    return float(np.abs(np.fft.rfft(waveform)).argmax() * 16_000 / len(waveform))


def test_what_the_new_model_cannot_have_fails_at_the_switch_with_its_reason(open_as: Opener) -> None:
    """It must not keep all others from the new model for ever; until then it is found."""
    old = open_as(OLD)
    contents = fill(old, [f"tone-{number}" for number in range(6)])
    broken = 100.0 + 37 * 3

    def break_on_one(waveforms: Sequence[Waveform]) -> None:
        check_answers(old, contents)
        if any(abs(pitch(waveform) - broken) < 4 for waveform in waveforms):
            raise RuntimeError("out of memory")

    old.store.remove(old.catalog.get("tone-5").sha256)
    outcome = reindexer(open_as(NEW, reindex=True), break_on_one).run(poll_s=0.02)
    assert outcome.embedded == 4
    assert outcome.failed.keys() == {"tone-3", "tone-5"}
    assert str(MAX_ATTEMPTS) in outcome.failed["tone-3"]
    assert "missing" in outcome.failed["tone-5"]
    new = open_as(NEW)
    check_answers(new, {name: contents[name] for name in contents.keys() - outcome.failed.keys()})
    failed = new.catalog.get("tone-3")
    assert (failed.status, failed.error_code, failed.segments) == ("failed", "processing_failed", None)
    assert failed.error_detail == outcome.failed["tone-3"]
    check_answers(old, {name: contents[name] for name in contents.keys() - outcome.failed.keys()})
    assert len(old.refresh()) == 4
    upload(new, contents["tone-3"])
    ingest_all(new)
    check_answers(new, {name: contents[name] for name in contents.keys() - {"tone-5"}})


def test_what_the_old_model_could_not_have_for_our_reasons_is_tried_by_the_new(open_as: Opener) -> None:
    """Deaths of workers may have been the old model's doing; silence stays silence."""
    old = open_as(OLD)
    contents = fill(old, ["tone-1"])
    upload(old, hostile()["silent wav"][0], "silent")
    ingest_all(old)
    upload(old, tone_of("tone-2"), "poison")
    for _ in range(MAX_ATTEMPTS + 1):
        old.catalog.lease("victim", limit=1, lease_s=-1)
    assert old.catalog.get("poison").error_code == "processing_failed"
    reindex(open_as)
    new = open_as(NEW)
    ingest_all(new)
    check_answers(new, contents | {"poison": tone_of("tone-2")})
    assert new.catalog.get("silent").status == "failed"


def test_many_that_are_lost_put_off_the_switch(open_as: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk with half of the recordings is not mounted at the moment: nothing wrong with them, and they
    are searched as before until it is."""
    monkeypatch.setattr(reindex_module, "TOLERABLE", 3)
    old = open_as(OLD)
    contents = fill(old, [f"tone-{number}" for number in range(20)])
    paths = [old.store.path(old.catalog.get(f"tone-{number}").sha256) for number in range(4)]
    for path in paths:
        path.rename(path.with_suffix(".away"))
    with pytest.raises(ProcessingFailed, match="4 of 20 recordings"):
        reindex(open_as)
    check_answers(old, contents)
    for path in paths[:2]:
        path.with_suffix(".away").rename(path)
    outcome = reindex(open_as)
    assert (outcome.result, outcome.embedded) == ("switched", 2)
    assert outcome.failed.keys() == {"tone-2", "tone-3"}


def test_trouble_in_the_middle_fails_no_recording(open_as: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU falls off the bus after half of the work. What is left is nobody's fault, and is done later."""
    monkeypatch.setattr(ingest, "AFTER_FAILURE_S", 0.0)
    old = open_as(OLD)
    contents = fill(old, [f"tone-{number}" for number in range(30)])
    batches: list[int] = []

    def fall_off(waveforms: Sequence[Waveform]) -> None:
        batches.append(len(waveforms))
        if len(batches) > 2:
            raise RuntimeError("CUDA error: device lost")

    with pytest.raises(ProcessingFailed, match="Nothing more"):
        reindexer(open_as(NEW, reindex=True), fall_off).run(poll_s=0.02)
    check_answers(old, contents)
    assert reindex(open_as) == Outcome("switched", 14)
    check_answers(open_as(NEW), contents)


@pytest.mark.parametrize("count", [2, 12])
def test_a_model_that_can_embed_nothing_is_not_switched_to(
    open_as: Opener, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """A broken installation would else turn a whole library into failures. It is searched as before, and a
    run on a mended machine begins afresh."""
    monkeypatch.setattr(ingest, "AFTER_FAILURE_S", 0.0)
    old = open_as(OLD)
    contents = fill(old, [f"tone-{number}" for number in range(count)])

    def never(_: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available")

    with pytest.raises(ProcessingFailed, match="embedded"):
        reindexer(open_as(NEW, reindex=True), never).run(poll_s=0.02)
    assert old.is_current()
    check_answers(old, contents)
    assert old.catalog.counts() == {"ready": count}
    if count == 2:
        assert reindex(open_as) == Outcome("switched", 2)
        check_answers(open_as(NEW), contents)


# --- stopping, sharing, going back


def test_a_stopped_run_is_gone_on_with(open_as: Opener) -> None:
    """Ctrl-C in the middle of an hour's work costs the batch in hand."""
    old = open_as(OLD)
    contents = fill(old, [f"tone-{number}" for number in range(20)])
    batches: list[int] = []

    def stop_at_the_second(waveforms: Sequence[Waveform]) -> None:
        batches.append(len(waveforms))
        if len(batches) == 2:
            first.stop()

    first = reindexer(open_as(NEW, reindex=True), stop_at_the_second)
    stopped = first.run()
    assert stopped == Outcome("stopped", 8)
    check_answers(old, contents)
    assert reindex(open_as) == Outcome("switched", 12)
    check_answers(open_as(NEW), contents)


def test_runs_side_by_side_share_the_work(open_as: Opener) -> None:
    """Two machines are twice as fast, and each of them says at the end that the library is switched."""
    contents = fill(open_as(OLD), [f"tone-{number}" for number in range(30)])
    runs = [reindexer(open_as(NEW, reindex=True)) for _ in range(3)]
    outcomes: list[Outcome] = []
    threads = [threading.Thread(target=lambda run=run: outcomes.append(run.run(poll_s=0.02))) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(outcome.embedded for outcome in outcomes) == 30
    assert len(outcomes) == 3
    assert any(outcome.result == "switched" for outcome in outcomes)
    check_answers(open_as(NEW), contents)


def test_there_and_back_again(open_as: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new model disappoints. Whoever slept through both switches, or starts from a snapshot that is older
    than both, must find what came and went in between."""
    asleep = open_as(OLD)
    contents = fill(asleep, [f"tone-{number}" for number in range(6)])
    check_answers(asleep, contents)
    asleep.save_index()
    snapshots = shutil.copytree(tmp_path / "index", tmp_path / "kept")
    reindex(open_as)
    new = open_as(NEW)
    contents |= fill(new, ["tone-50"])
    new.delete("tone-1")
    del contents["tone-1"]
    check_answers(asleep, {name: contents[name] for name in contents.keys() - {"tone-50"}})
    forget_at_once(new, monkeypatch)
    assert reindex(open_as, OLD) == Outcome("switched", 6)
    check_answers(asleep, contents)
    shutil.rmtree(tmp_path / "index", ignore_errors=True)
    shutil.copytree(snapshots, tmp_path / "index")
    check_answers(open_as(OLD), contents)


def test_transcripts_come_and_go_with_the_model_that_writes_them(open_as: Opener) -> None:
    """After a switch a hit shows what the new model heard, nothing where that writes nothing down, and never
    the words of the one before."""
    contents = fill(open_as(OLD), ["tone-3", "tone-9"])

    def transcripts(model: StoredModel) -> dict[str, str | None]:
        library = open_as(model)
        check_answers(library, contents)
        hits = search(library, random_vectors(1, 1, model.dim)[0])
        return {hit.recording.id: hit.segments[0].transcript for hit in hits}

    assert transcripts(OLD) == {"tone-3": None, "tone-9": None}
    spelling = Reindexer(
        open_as(NEW, reindex=True), lambda: SpellingSpeechEncoder(NEW.dim), max_duration_s=MAX_DURATION_S
    )
    assert spelling.run() == Outcome("switched", 2)
    assert transcripts(NEW) == {"tone-3": "210 Hz (None)", "tone-9": "430 Hz (None)"}
    reindex(open_as, OLD)
    assert transcripts(OLD) == {"tone-3": None, "tone-9": None}


@pytest.mark.timeout(60)
def test_two_ways_at_once_do_not_hinder_each_other(open_as: Opener) -> None:
    """Somebody tries two models. The second to arrive has the last word, also on what the first lost."""
    third = StoredModel("3" * 16, "third", 8)
    old = open_as(OLD)
    contents = fill(old, [f"tone-{number}" for number in range(12)])
    batches: list[int] = []

    def overtake(_: object) -> None:
        batches.append(1)
        if len(batches) == 2:
            path = old.store.path(old.catalog.get("tone-0").sha256)  # which this run has done already
            path.rename(path.with_suffix(".away"))
            outcome = reindex(open_as)
            assert (outcome.result, outcome.failed.keys()) == ("switched", {"tone-0"})

    last = reindexer(open_as(third, reindex=True), overtake).run(poll_s=0.02)
    assert last == Outcome("switched", 12)
    del contents["tone-0"]
    new = open_as(third)
    ingest_all(new)
    check_answers(new, contents)


def test_a_way_that_was_given_up_leaves_nothing(
    open_as: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a library's vectors of a model that nobody wants any more are only a waste of disk."""
    fill(open_as(OLD), ["tone-1", "tone-2"])
    given_up = open_as(NEW, reindex=True)
    worker = Ingester(
        given_up,
        SpectralSpeechEncoder(NEW.dim),
        max_duration_s=MAX_DURATION_S,
        queue=Reindexing(given_up.catalog, NEW),
    )
    assert worker.step() == 2
    assert len(stored(tmp_path)["tone-1"]) == 2
    assert reindex(open_as, OLD) == Outcome("nothing to do")
    with monkeypatch.context() as patch:
        later = time.time() + 2 * catalog_module.RETIRED_KEPT_S
        patch.setattr(catalog_module.time, "time", lambda: later)
        assert reindex(open_as, OLD) == Outcome("nothing to do")
    assert stored(tmp_path) == {"tone-1": [MODEL], "tone-2": [MODEL]}
    assert reindex(open_as) == Outcome("switched", 2)


# --- killed at any moment


def reindex_until_killed(data_dir: Path, parent: Connection) -> None:
    """Asks before each batch that it embeds, and says what it came to."""
    ingest.LEASE_S = 0.6
    reindex_module.FOLLOW_WITHIN_S = 0.0
    library = Library(data_dir, model=NEW.fingerprint, name=NEW.name, dim=NEW.dim, reindex=True)

    def ask(_: object) -> None:
        parent.send("batch")
        parent.recv()

    parent.send(reindexer(library, ask).run(poll_s=0.05).result)


@pytest.mark.timeout(120)
def test_kill_9_at_any_moment_costs_nothing(
    open_as: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power fails again and again while an archive is embedded anew, and life goes on meanwhile. Every search
    finds all that is there, by one model; in the end each recording has vectors of the new one only."""
    monkeypatch.setattr(ingest, "LEASE_S", 0.6)
    chance = random.Random(5)
    old = open_as(OLD)
    contents = fill(old, [f"tone-{number}" for number in range(50)])
    numbers = iter(range(100, 1000))
    context = processes()

    def live_on() -> None:
        if not old.is_current():
            return
        if chance.random() < 0.5:
            with contextlib.suppress(DataMismatch):
                name = f"tone-{next(numbers)}"
                contents[name] = tone_of(name)
                fill(old, [name])
        gone = chance.choice(sorted(contents))
        old.delete(gone)
        del contents[gone]
        there = {item.id for item in old.page(status="ready", limit=1000)[0]}
        check_answers(old, {name: contents[name] for name in there})
        assert there == contents.keys() or not old.is_current()

    cut_short = 0
    for life in range(6):
        ours, theirs = context.Pipe()
        process = context.Process(target=reindex_until_killed, args=(tmp_path, theirs))
        process.start()
        theirs.close()
        batches = chance.choice([1, 1, 2]) if life < 5 else 1000
        while ours.recv() == "batch" and batches:
            if life < 5 or chance.random() < 0.2:
                live_on()
            batches -= 1
            ours.send("go")
        if life < 5:
            time.sleep(chance.uniform(0.0, 0.04))
            process.kill()
        process.join()
        live_on()
        cut_short += old.is_current()
    assert process.exitcode == 0
    assert cut_short >= 3, "most kills came after the switch"
    assert not old.is_current()
    new = open_as(NEW)
    ingest_all(new)
    check_answers(new, contents)
    forget_at_once(new, monkeypatch)
    assert stored(tmp_path) == {name: [NEW.fingerprint] for name in contents}
    with contextlib.closing(sqlite3.connect(tmp_path / "catalog.sqlite3")) as db:
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
        assert db.execute("SELECT count(*) FROM reindexing").fetchone() == (0,)


def switch_in_a_loop(data_dir: Path, alive: Connection) -> None:
    """There and back, as fast as the catalogue lets it, without audio."""
    catalog = catalog_module.Catalog(f"sqlite:///{data_dir / 'catalog.sqlite3'}")
    alive.send("begun")
    while True:
        active = catalog.active()
        way = Reindexing(catalog, NEW if active == OLD else OLD)
        while way.switch() is None:
            for leased in way.lease("one", limit=2, lease_s=0):
                segments = segments_of(random_vectors(leased.key, 2, way.model.dim))
                done = way.complete(
                    leased.key, "one", duration_s=2, model=way.model.fingerprint, segments=segments
                )
                assert done


def test_a_switch_happens_entirely_or_not_at_all(open_as: Opener, tmp_path: Path) -> None:
    """The process dies in the middle of the transaction: afterwards the active model has vectors of every
    ready recording, each with its own facts, and a new replica finds them all."""
    library = open_as(OLD)
    for number in range(10):
        add(library, f"{number}", random_vectors(number, 2))
    library.catalog.close()
    context = processes()
    active = set()
    for life in range(12):
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=switch_in_a_loop, args=(tmp_path, writer))
        process.start()
        assert reader.recv() == "begun"
        time.sleep(0.05 + 0.013 * life)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        catalog = catalog_module.Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite3'}")
        model = catalog.active()
        catalog.close()
        assert model in (OLD, NEW)
        active.add(model)
        library = open_as(model)
        assert library.catalog.counts() == {"ready": 10}
        hits = search(library, random_vectors(99, 1, model.dim)[0])
        assert len(hits) == 10
        assert {(hit.recording.model, len(hit.segments)) for hit in hits} == {(model.fingerprint, 2)}
    assert active == {OLD, NEW}, "no switch was seen"


# --- what an earlier version wrote


@pytest.fixture
def written_by_0001(tmp_path: Path) -> dict[str, Embeddings]:
    """A catalogue as the first schema had it: three ready recordings, two others, one deleted."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'catalog.sqlite3'}")
    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(catalog_module.__file__).parent / "migrations"))
    with engine.begin() as db:
        config.attributes["connection"] = db
        alembic.command.upgrade(config, "0001")
    engine.dispose()
    vectors = {name: random_vectors(number, 3) for number, name in enumerate(["a", "b", "c"])}
    with contextlib.closing(sqlite3.connect(tmp_path / "catalog.sqlite3")) as db:
        for key, name in enumerate([*vectors, "failed", "waiting"], 1):
            status = name if name == "failed" else "pending" if name == "waiting" else "ready"
            model = MODEL if status == "ready" else None
            db.execute(
                "INSERT INTO recordings (key, id, collection, sha256, size_bytes, metadata, created_at,"
                " status, duration_s, segments, model, attempts) VALUES"
                " (?, ?, 'default', ?, 1, '{}', '2025-01-01 00:00:00', ?, 3.0, 3, ?, 1)",
                (key, name, f"{key:064x}", status, model),
            )
            for ordinal, row in enumerate(vectors.get(name, ())):
                values = (key, ordinal, float(ordinal), ordinal + 1.0, row.astype("<f4").tobytes())
                db.execute("INSERT INTO segments VALUES (?, ?, ?, ?, ?)", values)
        db.execute("UPDATE sqlite_sequence SET seq = 9 WHERE name = 'recordings'")
        for seq, key in enumerate([1, 2, 9, 3, 9], 1):
            db.execute("INSERT INTO changes VALUES (?, ?, ?)", (seq, key, f"token {seq}"))
        db.commit()
    return vectors


def test_what_an_earlier_version_wrote_is_searched(
    open_as: Opener, written_by_0001: dict[str, Embeddings]
) -> None:
    """An upgrade keeps every vector; it only learns which model they are by, from the recordings."""
    library = open_as(OLD)
    assert library.catalog.active() == OLD
    assert library.catalog.counts() == {"ready": 3, "failed": 1, "pending": 1}
    for name, vectors in written_by_0001.items():
        for ordinal, row in enumerate(vectors):
            best = search(library, row)[0]
            assert (best.recording.id, best.score) == (name, pytest.approx(1.0, abs=1e-6))
            assert (best.segments[0].start_s, best.segments[0].transcript) == (float(ordinal), None)
    complete(library.catalog, library.catalog.get("waiting"), random_vectors(9, 1))
    assert len(search(library, random_vectors(9, 1)[0])) == 4


@pytest.mark.usefixtures("written_by_0001")
def test_an_upgrade_gives_no_key_twice(open_as: Opener, tmp_path: Path) -> None:
    """Replicas know recordings by their keys: a second life of one would bring back what was deleted. And
    what pointed at the recordings' old table points at the new one."""
    library = open_as(OLD)
    assert register(library.catalog, "next", sha256="next").key == 10
    with contextlib.closing(sqlite3.connect(tmp_path / "catalog.sqlite3")) as db:
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
        targets = db.execute("SELECT \"table\" FROM pragma_foreign_key_list('segments')").fetchall()
        assert targets == [("recordings",)]


@pytest.mark.usefixtures("written_by_0001")
def test_what_an_earlier_version_wrote_is_still_refused_to_another_model(open_as: Opener) -> None:
    """Nobody said the model's name then, so the line tells it by its fingerprint."""
    with pytest.raises(DataMismatch, match=f"by {MODEL}; .*`clasp reindex --model new`"):
        open_as(NEW)
    assert open_as(OLD).catalog.active() == OLD
