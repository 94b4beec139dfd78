"""The catalogue: every transition a recording can make, who may make it, and that none is ever lost."""

import itertools
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from clasp_core.catalog import (
    ONCE_KEPT_S,
    Catalog,
    EmbeddedSegment,
    NewRecording,
    Once,
    Place,
    Recording,
)
from clasp_core.errors import AmbiguousId, DataMismatch, IdConflict, IdempotencyMismatch, RecordingNotFound
from clasp_core.filters import Condition, Filter
from clasp_core.leases import MAX_ATTEMPTS
from tests.core.doubles import (
    DIM,
    MODEL,
    STORED_MODEL,
    complete,
    processes,
    random_vectors,
    register,
    segments_of,
)
from tests.postgres import catalogue_url, postgres_url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of an empty database of each kind: a catalogue is the same in all of them."""
    with catalogue_url(request.param, tmp_path) as url:
        yield url


@pytest.fixture
def catalog(url: str) -> Iterator[Catalog]:
    opened = Catalog(url)
    opened.adopt(STORED_MODEL)
    yield opened
    opened.close()


def ids(recordings: list[Recording]) -> list[str]:
    return [recording.id for recording in recordings]


# --- registering


def test_a_registered_recording_comes_back_as_it_was_given(catalog: Catalog) -> None:
    """What a client says of a recording is the client's: it is returned unchanged, in any script."""
    new = NewRecording(
        id="گفتگو",
        collection="radio",
        sha256="a" * 64,
        size_bytes=5 * 2**32,
        media_type="audio/wav",
        lang="fa-IR",
        metadata={"نام": "سعدی", "year": 1258, "nested": {"a": [1, None, True, 0.5]}},
    )
    recording, created = catalog.register(new, lambda: None)
    assert created
    assert recording == catalog.get("گفتگو")
    assert all(
        getattr(recording, field) == getattr(new, field) for field in NewRecording.__dataclass_fields__
    )
    assert (recording.status, recording.attempts, recording.segments) == ("pending", 0, None)


def test_the_same_bytes_again_are_the_first_recording(catalog: Catalog) -> None:
    """A client that lost our answer sends again; it must get its recording, not a second one."""
    first = register(catalog, "first", sha256="same")
    second = NewRecording("second", "default", "same", 1, None, None, {})
    assert catalog.register(second, lambda: None) == (first, False)
    assert catalog.counts() == {"pending": 1}


def test_the_same_bytes_in_two_collections_are_two_recordings(catalog: Catalog) -> None:
    """Collections are apart: what one holds must not decide what another can."""
    one = register(catalog, "one", sha256="same", collection="a")
    two = register(catalog, "two", sha256="same", collection="b")
    assert one.key != two.key
    catalog.delete("one")
    assert catalog.get("two") == two


@pytest.mark.parametrize("collection", ["default", "another"])
def test_an_id_names_one_recording_in_all_collections(catalog: Catalog, collection: str) -> None:
    """A URL holds the id only, so an id that could mean two recordings would lose one of them."""
    register(catalog, "taken")
    placed: list[bool] = []
    with pytest.raises(IdConflict):
        catalog.register(
            NewRecording("taken", collection, "other bytes", 1, None, None, {}), lambda: placed.append(True)
        )
    assert not placed, "bytes were stored for a recording that was refused"
    assert catalog.counts() == {"pending": 1}


def test_a_tenant_s_ids_are_its_own(catalog: Catalog) -> None:
    """Who sees only some collections is neither stopped by an id of another nor given its recording; who
    sees both says which is meant, rather than being given, or deleting, the wrong one."""
    theirs = register(catalog, "call-1", collection="theirs")
    new = NewRecording("call-1", "ours", "other bytes", 1, None, None, {})
    with pytest.raises(IdConflict):
        catalog.register(new, lambda: None)
    ours, created = catalog.register(new, lambda: None, within={"ours"})
    assert created
    assert catalog.get("call-1", within={"ours"}) == ours
    assert catalog.get("call-1", within={"theirs", "third"}) == theirs
    for lookup in (catalog.get, catalog.delete):
        with pytest.raises(AmbiguousId):
            lookup("call-1")
        with pytest.raises(RecordingNotFound):
            lookup("call-1", within={"third"})
        with pytest.raises(RecordingNotFound):
            lookup("call-1", within=frozenset())
    assert catalog.delete("call-1", within={"ours"}) == ours
    assert catalog.get("call-1") == theirs


def test_what_is_to_be_done_once_is_remembered_for_a_day(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name and the recording are one transaction: a request that failed leaves no name, and one that
    was done is known whoever asks, until its day is over and housekeeping has dropped it."""
    new = NewRecording("one", "default", "bytes", 1, None, None, {})
    once = Once("a name", "what it says")

    def a_day_passes() -> None:
        now = time.time() + ONCE_KEPT_S + 1
        monkeypatch.setattr(time, "time", lambda: now)

    def disk_full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        catalog.register(new, disk_full, once=once)
    first = catalog.register(new, lambda: None, once=once)
    assert first[1]
    assert catalog.register(new, disk_full, once=once) == first, "the bytes are there already"
    with pytest.raises(IdempotencyMismatch):
        catalog.register(new, disk_full, once=Once("a name", "something else"))
    catalog.forget_done()
    assert catalog.register(new, disk_full, once=once) == first
    a_day_passes()
    assert catalog.register(new, lambda: None, once=Once("a name", "something else")) == (first[0], False)
    assert catalog.register(new, lambda: None, once=Once("another", "")) == (first[0], False)
    a_day_passes()
    catalog.forget_done()
    assert catalog.register(new, lambda: None, once=Once("another", "and another")) == (first[0], False)


def test_bytes_that_cannot_be_stored_leave_no_recording(catalog: Catalog) -> None:
    """A full disk must not leave a record of a recording that nobody has."""

    def disk_full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        catalog.register(NewRecording("lost", "default", "bytes", 1, None, None, {}), disk_full)
    with pytest.raises(RecordingNotFound):
        catalog.get("lost")
    assert register(catalog, "lost").status == "pending"


def test_what_does_not_exist_is_not_found(catalog: Catalog) -> None:
    """Asking for or deleting a stranger is an answer of its own, not a crash."""
    with pytest.raises(RecordingNotFound):
        catalog.get("nobody")
    with pytest.raises(RecordingNotFound):
        catalog.delete("nobody")


def test_a_key_is_never_used_twice(catalog: Catalog) -> None:
    """The index knows a recording by its key: a second owner of a key would inherit its vectors."""
    newest = register(catalog, "newest")
    catalog.delete("newest")
    assert register(catalog, "next").key > newest.key


def test_one_id_registered_from_many_threads_is_one_recording(catalog: Catalog) -> None:
    """Two uploads in the same instant are the everyday case of a retrying client."""
    start = threading.Barrier(8)
    outcomes: list[str] = []

    def upload(number: int) -> None:
        start.wait()
        try:
            new = NewRecording("same id", "default", f"bytes {number % 2}", 1, None, None, {})
            outcomes.append("created" if catalog.register(new, lambda: None)[1] else "found")
        except IdConflict:
            outcomes.append("conflict")

    run_together([threading.Thread(target=upload, args=(number,)) for number in range(8)])
    assert sorted(outcomes) == ["conflict"] * 4 + ["created"] + ["found"] * 3


# --- paging


def test_pages_neither_skip_nor_repeat_while_rows_come_and_go(catalog: Catalog) -> None:
    """A backup walks the pages for minutes; what was there throughout must be seen exactly once."""
    for number in range(20):
        register(catalog, f"{number}")
    seen: list[str] = []
    before = None
    while page := catalog.page(before=before, limit=3):
        seen += ids(page)
        last = page[-1]
        before = Place(last.created_at, last.id, last.collection)
        register(catalog, f"new {last.key}")
        catalog.delete(last.id)
        if last.key > 5:
            catalog.delete(f"{last.key - 4}")  # one that a later page would have begun or ended with
    stayed = {recording.id for recording in catalog.page(limit=99)}
    assert len(seen) == len(set(seen))
    assert {name for name in stayed if not name.startswith("new")} <= set(seen)
    assert seen == sorted(seen, key=int, reverse=True)


def test_pages_hold_only_what_was_asked_for(catalog: Catalog) -> None:
    """The listing of one collection, or of what failed, is how operators look for trouble."""
    for number in range(6):
        register(catalog, f"{number}", collection="even" if number % 2 == 0 else "odd")
    (leased,) = catalog.lease("me", limit=1, lease_s=60)
    catalog.fail(leased.key, "me", code="silent_audio", detail="Silence.")
    everything = {"before": None, "limit": 10}
    assert ids(catalog.page(wanted=Filter(collection="even"), **everything)) == ["4", "2", "0"]
    assert ids(catalog.page(status="failed", **everything)) == ["0"]
    assert ids(catalog.page(wanted=Filter(collection="odd"), status="failed", **everything)) == []
    assert ids(catalog.page(wanted=Filter(within=frozenset({"odd", "none"})), **everything)) == [
        "5",
        "3",
        "1",
    ]
    assert ids(catalog.page(wanted=Filter(collection="odd", within=frozenset({"even"})), **everything)) == []


def test_counts_and_the_longest_wait(catalog: Catalog) -> None:
    """The two numbers an operator watches: how much is where, and for how long nothing has moved."""
    assert catalog.counts() == {}
    assert catalog.oldest_pending() is None
    first = register(catalog, "first")
    register(catalog, "second")
    assert catalog.oldest_pending() == first.created_at
    complete_first = catalog.lease("me", limit=1, lease_s=60)
    assert ids(complete_first) == ["first"]
    assert catalog.counts() == {"pending": 1, "processing": 1}
    assert catalog.oldest_pending() == catalog.get("second").created_at


# --- leases


def test_a_lease_gives_the_oldest_first_and_each_once(catalog: Catalog) -> None:
    """First come, first served; and no recording is worth embedding twice."""
    for number in range(5):
        register(catalog, f"{number}")
    assert ids(catalog.lease("a", limit=2, lease_s=60)) == ["0", "1"]
    assert ids(catalog.lease("b", limit=2, lease_s=60)) == ["2", "3"]
    assert ids(catalog.lease("a", limit=2, lease_s=60)) == ["4"]
    assert catalog.lease("b", limit=2, lease_s=60) == []


def test_a_completed_recording_is_ready_with_its_segments(catalog: Catalog) -> None:
    """What the worker found is what searches and clients see, to the last bit."""
    recording = register(catalog, "one")
    vectors = random_vectors(0, 3)
    assert complete(catalog, recording, vectors)
    done = catalog.get("one")
    assert (done.status, done.duration_s, done.segments, done.model) == ("ready", 3.0, 3, MODEL)
    changes = catalog.changes(0, limit=10, model=MODEL, dim=DIM)
    assert changes is not None
    assert changes.vectors[np.argsort(changes.ordinals)].tobytes() == vectors.tobytes()
    named = [(recording.key, 1), (recording.key, 9)]
    assert catalog.spans(named, model=MODEL) == {(recording.key, 1): (1.0, 2.0, None)}
    assert catalog.spans(named, model="another") == catalog.spans([], model=MODEL) == {}


def test_a_failed_recording_says_why_and_is_not_tried_again(catalog: Catalog) -> None:
    """The uploader reads the reason; the worker has no use for a second look at the same bytes."""
    recording = register(catalog, "silence")
    catalog.lease("me", limit=1, lease_s=60)
    assert catalog.fail(recording.key, "me", code="silent_audio", detail="Nothing can be heard.")
    failed = catalog.get("silence")
    assert (failed.status, failed.error_code) == ("failed", "silent_audio")
    assert failed.error_detail == "Nothing can be heard."
    assert catalog.lease("me", limit=1, lease_s=60) == []
    same = NewRecording("silence", "default", recording.sha256, 1, None, None, {})
    assert catalog.register(same, lambda: None) == (failed, False)


def test_an_expired_lease_passes_on_and_its_first_owner_is_refused(catalog: Catalog) -> None:
    """A worker that hung and woke must not overwrite the work of the one that replaced it."""
    recording = register(catalog, "one")
    catalog.lease("first", limit=1, lease_s=-1)
    assert ids(catalog.lease("second", limit=1, lease_s=60)) == ["one"]
    late = {"duration_s": 1.0, "model": MODEL, "segments": segments_of(random_vectors(1, 1))}
    assert not catalog.complete(recording.key, "first", **late)
    assert not catalog.fail(recording.key, "first", code="late", detail="late")
    assert catalog.get("one").status == "processing"
    segments = segments_of(random_vectors(2, 2))
    assert catalog.complete(recording.key, "second", duration_s=2.0, model=MODEL, segments=segments)
    assert not catalog.complete(recording.key, "first", **late)
    assert (catalog.get("one").segments, catalog.last_change()[0]) == (2, 1)


def test_an_extended_lease_stays_with_its_owner(catalog: Catalog) -> None:
    """A long recording takes longer than one lease; its worker is alive and must keep it."""
    register(catalog, "long")
    register(catalog, "other")
    catalog.lease("slow", limit=1, lease_s=-1)
    catalog.extend_leases("slow", 60)
    assert ids(catalog.lease("other worker", limit=5, lease_s=60)) == ["other"]


def test_an_expired_lease_cannot_be_extended_after_another_took_it(catalog: Catalog) -> None:
    """Saying "I am alive" gives nothing back that was lost."""
    register(catalog, "one")
    catalog.lease("first", limit=1, lease_s=-1)
    catalog.lease("second", limit=1, lease_s=-1)
    catalog.extend_leases("first", 60)
    assert ids(catalog.lease("third", limit=1, lease_s=60)) == ["one"]


def test_a_recording_that_kills_its_workers_is_given_up(catalog: Catalog) -> None:
    """One file that crashes the decoder must not crash it for ever."""
    register(catalog, "poison")
    for _ in range(MAX_ATTEMPTS):
        assert ids(catalog.lease("victim", limit=8, lease_s=-1)) == ["poison"]
    assert catalog.lease("survivor", limit=8, lease_s=60) == []
    failed = catalog.get("poison")
    assert (failed.status, failed.error_code) == ("failed", "processing_failed")
    assert failed.error_detail is not None
    assert str(MAX_ATTEMPTS) in failed.error_detail


def test_a_given_up_recording_is_tried_afresh_when_it_comes_again(catalog: Catalog) -> None:
    """The deaths may have been ours (no memory, a bug since mended): sending again is the way to retry."""
    recording = register(catalog, "poison")
    for _ in range(MAX_ATTEMPTS):
        catalog.lease("victim", limit=1, lease_s=-1)
    catalog.lease("survivor", limit=1, lease_s=60)
    again, created = catalog.register(
        NewRecording("any id", "default", recording.sha256, 1, None, None, {}), lambda: None
    )
    assert (again.id, again.status, again.attempts, created) == ("poison", "pending", 0, False)
    assert complete(catalog, again, random_vectors(0, 1))
    assert (catalog.get("poison").status, catalog.get("poison").error_code) == ("ready", None)


def test_after_a_death_each_suspect_is_tried_alone(catalog: Catalog) -> None:
    """Of eight recordings in a dead worker's hands one did it; the other seven must not fail with it."""
    for number in range(4):
        register(catalog, f"{number}")
    assert len(catalog.lease("victim", limit=8, lease_s=60)) == 4
    catalog.release("victim", died=True)
    register(catalog, "innocent")
    poison = "1"
    for _ in range(20):
        leased = catalog.lease("worker", limit=8, lease_s=60)
        if not leased:
            break
        assert len(leased) == 1 or poison not in ids(leased)
        if ids(leased) == [poison]:
            catalog.release("worker", died=True)
        else:
            for recording in leased:
                assert catalog.complete(recording.key, "worker", duration_s=0.0, model=MODEL, segments=[])
    assert catalog.counts() == {"ready": 4, "failed": 1}
    assert catalog.get(poison).attempts == MAX_ATTEMPTS


def test_giving_back_does_not_count(catalog: Catalog) -> None:
    """A service restarted a hundred times in a day must not give up on what waits."""
    register(catalog, "patient")
    register(catalog, "patient too")
    for _ in range(3 * MAX_ATTEMPTS):
        assert len(catalog.lease("worker", limit=8, lease_s=60)) == 2
        catalog.release("worker")
        assert catalog.counts() == {"pending": 2}
    assert catalog.get("patient").attempts == 0


def test_giving_back_touches_nobody_elses_work(catalog: Catalog) -> None:
    """Workers stop at different times."""
    register(catalog, "mine")
    catalog.lease("me", limit=1, lease_s=60)
    register(catalog, "theirs")
    catalog.lease("they", limit=1, lease_s=60)
    catalog.release("me")
    assert (catalog.get("mine").status, catalog.get("theirs").status) == ("pending", "processing")


def test_a_recording_deleted_at_work_stays_deleted(catalog: Catalog) -> None:
    """The worker finishes minutes after the delete was acknowledged, and must not bring it back."""
    recording = register(catalog, "gone")
    catalog.lease("me", limit=1, lease_s=60)
    catalog.delete("gone")
    segments = segments_of(random_vectors(0, 1))
    assert not catalog.complete(recording.key, "me", duration_s=1.0, model=MODEL, segments=segments)
    assert not catalog.fail(recording.key, "me", code="x", detail="x")
    changes = catalog.changes(0, limit=10, model=MODEL, dim=DIM)
    assert changes is not None
    assert len(changes.vectors) == 0
    assert catalog.spans([(recording.key, 0)], model=MODEL) == {}


@pytest.mark.parametrize(
    "vector", [[np.nan] * DIM, [np.inf] + [0] * (DIM - 1), [0] * DIM, [1] * DIM], ids=["nan", "inf", "0", "4"]
)
def test_a_vector_that_no_index_would_take_cannot_be_stored(vector: list[float]) -> None:
    """Replicas apply changes in order, so one bad row would stop every search of the library for good."""
    with pytest.raises(ValueError, match="unit length"):
        EmbeddedSegment(0.0, 1.0, np.array(vector, np.float32))


def lease_everything(url: str, owner: str, go: Event, taken: "Queue[list[str]]") -> None:
    catalog = Catalog(url)
    go.wait()
    mine: list[str] = []
    while leased := catalog.lease(owner, limit=3, lease_s=60):
        mine += ids(leased)
    taken.put(mine)


def test_processes_that_lease_together_never_share_a_recording(catalog: Catalog, url: str) -> None:
    """Any number of workers may run; two with one recording would waste the dearest thing we do."""
    for number in range(60):
        register(catalog, f"{number}")
    context = processes()
    go, taken = context.Event(), context.Queue()
    workers = [
        context.Process(target=lease_everything, args=(url, f"worker {n}", go, taken)) for n in range(3)
    ]
    for worker in workers:
        worker.start()
    go.set()
    hands = [taken.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(itertools.chain(*hands), key=int) == [str(number) for number in range(60)]


# --- changes


def test_changes_come_in_order_and_can_be_read_again(catalog: Catalog) -> None:
    """A replica that crashed in the middle reads the same changes again and must arrive at the same place."""
    recordings = [register(catalog, f"{number}") for number in range(5)]
    for number, recording in enumerate(recordings):
        complete(catalog, recording, random_vectors(number, 1 + number % 2))
    catalog.delete("1")
    assert catalog.last_change()[0] == 6

    seen: list[frozenset[int]] = []
    after = 0
    while changes := catalog.changes(after, limit=2, model=MODEL, dim=DIM):
        again = catalog.changes(after, limit=2, model=MODEL, dim=DIM)
        assert again is not None
        assert (again.seq, again.recordings) == (changes.seq, changes.recordings)
        assert again.vectors.tobytes() == changes.vectors.tobytes()
        seen.append(changes.recordings)
        after = changes.seq
    keys = [recording.key for recording in recordings]
    assert seen == [frozenset({keys[0], keys[2]}), frozenset(keys[3:5]), frozenset({keys[1]})]
    assert after == catalog.last_change()[0]


def test_changes_show_recordings_as_they_are_now(catalog: Catalog) -> None:
    """A replica that starts late must not meet what was deleted since: deleted recordings have no vectors."""
    kept, gone = register(catalog, "kept"), register(catalog, "gone")
    complete(catalog, kept, random_vectors(1, 2))
    complete(catalog, gone, random_vectors(2, 2))
    catalog.delete("gone")
    changes = catalog.changes(0, limit=10, model=MODEL, dim=DIM)
    assert changes is not None
    assert changes.recordings == {kept.key, gone.key}
    assert set(changes.owners.tolist()) == {kept.key}
    assert catalog.changes(changes.seq, limit=10, model=MODEL, dim=DIM) is None


# --- filters


def test_all_parts_of_a_filter_must_hold(catalog: Catalog) -> None:
    """A filter narrows: each thing it says takes recordings away."""
    for number, (collection, lang, speaker) in enumerate(
        itertools.product("ab", ("fa", "fa-IR", None), "st")
    ):
        recording = register(
            catalog, f"{number}", collection=collection, lang=lang, metadata={"speaker": speaker}
        )
        complete(catalog, recording, random_vectors(number, 1))
    register(catalog, "pending", collection="a", lang="fa", metadata={"speaker": "s"})

    def found(wanted: Filter) -> list[str]:
        keys = catalog.matching(wanted)
        assert sorted(keys) == list(keys)
        named = catalog.by_key(keys.tolist())
        return [named[key].id for key in keys.tolist()]

    fa, by_s, by_t = frozenset({"fa"}), Condition.of("speaker", "eq", "s"), Condition.of("speaker", "eq", "t")
    assert len(found(Filter())) == 12
    assert found(Filter(collection="a", langs=fa)) == ["0", "1"]
    assert found(Filter(collection="b", metadata=(by_t,))) == ["7", "9", "11"]
    assert found(Filter(collection="a", langs=fa, metadata=(by_s,))) == ["0"]
    assert found(Filter(collection="c")) == []
    assert found(Filter(within=frozenset({"a", "c"}), langs=fa)) == ["0", "1"]
    assert found(Filter(collection="a", within=frozenset({"b"}))) == []
    assert found(Filter(metadata=(by_s, by_t))) == []


# --- the file itself


def test_a_newer_schema_is_refused(catalog: Catalog, url: str) -> None:
    """An older program would misread what a newer one wrote, and break it by writing."""
    register(catalog, "one")
    with catalog.database.writing() as db:
        db.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    catalog.close()
    with pytest.raises(DataMismatch, match="newer version"):
        Catalog(url)


def test_what_was_committed_is_there_after_reopening(url: str) -> None:
    """The catalogue is the truth; a restart is no event in it."""
    first = Catalog(url)
    first.adopt(STORED_MODEL)
    complete(first, register(first, "one"), random_vectors(0, 2))
    first.close()
    second = Catalog(url)
    assert second.get("one").status == "ready"
    assert second.last_change()[0] == 1
    second.close()


def open_and_register(url: str, name: str, go: Event, done: "Queue[str]") -> None:
    go.wait()
    catalog = Catalog(url)
    register(catalog, name, sha256=name)
    done.put(name)


def test_processes_may_open_a_fresh_directory_together(tmp_path: Path) -> None:
    """The service and its workers start in the same instant, the first time as every time."""
    context = processes()
    for url in [*(f"sqlite:///{tmp_path / f'{attempt}.sqlite3'}" for attempt in range(2)), postgres_url()]:
        go, done = context.Event(), context.Queue()
        names = [f"{number}" for number in range(4)]
        openers = [context.Process(target=open_and_register, args=(url, name, go, done)) for name in names]
        for opener in openers:
            opener.start()
        go.set()
        assert sorted(done.get(timeout=60) for _ in openers) == names
        for opener in openers:
            opener.join()
            assert opener.exitcode == 0
        catalog = Catalog(url)
        assert catalog.counts() == {"pending": 4}
        catalog.close()


def test_threads_may_open_catalogues_together(tmp_path: Path) -> None:
    """Alembic migrates one database at a time in a process; that is not the caller's business."""
    opened: list[Catalog] = []
    start = threading.Barrier(6)

    def open_one(number: int) -> None:
        start.wait()
        opened.append(Catalog(f"sqlite:///{tmp_path / f'{number % 3}.sqlite3'}"))

    run_together([threading.Thread(target=open_one, args=(number,)) for number in range(6)])
    assert len(opened) == 6
    for catalog in opened:
        assert catalog.counts() == {}
        catalog.close()


def write_until_killed(url: str, life: int, acknowledgements: Connection) -> None:
    """Registers, leases and completes as fast as it can, and says of each recording when it is done."""
    catalog = Catalog(url)
    catalog.adopt(STORED_MODEL)
    segments = segments_of(random_vectors(life, 2))
    for number in itertools.count():
        name = f"{life}-{number}"
        register(catalog, name, sha256=name)
        acknowledgements.send((name, "pending"))
        for leased in catalog.lease(name, limit=50, lease_s=-1):
            assert catalog.complete(leased.key, name, duration_s=2.0, model=MODEL, segments=segments)
            acknowledgements.send((leased.id, "ready"))


def test_nothing_acknowledged_is_lost_by_kill_9(url: str) -> None:
    """An answer of 202 is a promise. Whatever moment the process dies at, each recording it acknowledged is
    there once, each one it called ready has its segments and its change, and the file is sound."""
    context = processes()
    acknowledged: dict[str, str] = {}
    for life in range(10 if url.startswith("sqlite") else 4):
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=write_until_killed, args=(url, life, writer))
        process.start()
        writer.close()
        for _ in range(1 + life):
            name, status = reader.recv()
            acknowledged[name] = status
        time.sleep(0.0005 * life)  # to die at another moment each time
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        try:
            while True:
                name, status = reader.recv()
                acknowledged[name] = status
        except (EOFError, OSError):
            reader.close()

    catalog = Catalog(url)
    catalog.database.check()
    with catalog.database.reading() as db:
        if catalog.database.dialect == "sqlite":
            assert db.execute(sa.text("PRAGMA foreign_key_check")).fetchall() == []
        kept = db.execute(sa.text("SELECT id FROM recordings")).scalars().all()
    assert len(kept) == len(set(kept))
    assert set(acknowledged) <= set(kept)
    assert len(set(kept) - set(acknowledged)) <= 10, "more than one recording a life was not acknowledged"
    assert "ready" in acknowledged.values()

    changes = catalog.changes(0, limit=10**6, model=MODEL, dim=DIM)
    assert changes is not None
    ready = catalog.page(status="ready", limit=10**6)
    assert {name for name, status in acknowledged.items() if status == "ready"} <= set(ids(ready))
    assert sorted(changes.owners.tolist()) == sorted(2 * [recording.key for recording in ready])
    assert changes.recordings == {recording.key for recording in ready}
    catalog.close()


def run_together(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
