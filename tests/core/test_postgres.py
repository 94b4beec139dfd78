"""The catalogue in PostgreSQL, where many write at the same moment: what must then hold all the same.

What any catalogue must do is in `test_catalog`, which runs on both kinds.
"""

import itertools
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from clasp_core.access import Keys
from clasp_core.backup import backup, restore
from clasp_core.catalog import Catalog, NewRecording, Once, StoredModel
from clasp_core.database import CHANGES, RECORDINGS, create_engine, lock
from clasp_core.errors import (
    BackupFailed,
    DatabaseUnavailable,
    DataMismatch,
    IdConflict,
    InvalidInput,
    QueueFull,
    QuotaExceeded,
    RecordingNotFound,
)
from clasp_core.filters import Filter
from clasp_core.library import Library, Question
from clasp_core.limits import Admission, Quota
from clasp_core.reindex import Reindexing
from tests.core.doubles import (
    DIM,
    MODEL,
    STORED_MODEL,
    add,
    random_vectors,
    register,
    segments_of,
    upload,
)
from tests.postgres import catalogue_url

WRITERS = 8


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    with catalogue_url("postgresql", tmp_path) as url:
        yield url


@pytest.fixture
def catalog(url: str) -> Iterator[Catalog]:
    with closing(Catalog(url)) as opened:
        opened.adopt(STORED_MODEL)
        yield opened


def together(*works: Callable[[], object]) -> list[BaseException | None]:
    """Do all at the same moment; what each raised."""
    start = threading.Barrier(len(works))
    raised: list[BaseException | None] = [None] * len(works)

    def run(number: int, work: Callable[[], object]) -> None:
        start.wait()
        try:
            work()
        except Exception as error:
            raised[number] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "somebody waits for ever"
    return raised


def new(recording_id: str, sha256: str, collection: str = "default") -> NewRecording:
    return NewRecording(recording_id, collection, sha256, 10, None, None, {})


def test_what_is_sent_at_the_same_moment_is_registered_once(catalog: Catalog) -> None:
    """Retries of one upload reach different replicas at once: there must be one recording, and no error."""
    for turn in range(5):
        sha256 = f"{turn:064x}"
        answers = []

        def send(sha256: str = sha256, turn: int = turn) -> None:
            answers.append(catalog.register(new(f"id-{turn}", sha256), lambda: None))  # noqa: B023

        assert together(*[send] * WRITERS) == [None] * WRITERS
        assert sorted(created for _, created in answers) == [False] * (WRITERS - 1) + [True]
        assert len({recording.key for recording, _ in answers}) == 1

        conflicts = together(
            *(
                lambda n=n, turn=turn: catalog.register(new(f"same-{turn}", f"{turn}-{n}"), lambda: None)
                for n in range(WRITERS)
            )
        )
        assert sorted(map(type, conflicts), key=str) == [type(None)] + [IdConflict] * (WRITERS - 1)

        once = Once(f"name-{turn}", "what it says")
        keys: set[int] = set()
        raised = together(
            *(
                lambda n=n, turn=turn, once=once, keys=keys: keys.add(
                    catalog.register(new(f"once-{turn}-{n}", f"once {turn} {n}"), lambda: None, once=once)[
                        0
                    ].key
                )
                for n in range(WRITERS)
            )
        )
        assert raised == [None] * WRITERS
        assert len(keys) == 1


def test_limits_are_exact_whoever_else_uploads(catalog: Catalog) -> None:
    """A bound that holds only for those who come one by one is none."""
    counter = itertools.count()

    def send(admission: Admission) -> None:
        number = next(counter)
        catalog.register(new(f"{number}", f"{number:064x}"), lambda: None, admission=admission)

    for most in (3, 20):
        queue = Admission(max_pending=most)
        refused = [error for _ in range(4) for error in together(*[lambda: send(queue)] * WRITERS) if error]  # noqa: B023
        assert catalog.counts() == {"pending": most}
        assert {type(error) for error in refused} == {QueueFull}

    mine = Admission(key="mine", quota=Quota(size_bytes=115))
    refused = [error for _ in range(3) for error in together(*[lambda: send(mine)] * WRITERS) if error]
    assert catalog.held()["mine"].recordings == 11
    assert type(catalog.held()["mine"].size_bytes) is int
    assert {type(error) for error in refused} == {QuotaExceeded}


def test_a_slow_store_holds_up_nobody_else(catalog: Catalog) -> None:
    """Bytes may go to another machine while a recording is registered; others must get on meanwhile."""
    stored = threading.Event()
    slow = threading.Thread(
        target=lambda: catalog.register(new("slow", "ab" * 32), lambda: bool(stored.wait(30)))
    )
    slow.start()
    try:
        time.sleep(0.1)
        assert slow.is_alive()
        limited = Admission(max_pending=10, key="mine", quota=Quota(recordings=10))
        began = time.monotonic()
        catalog.register(new("quick", "ab" + "cd" * 31), lambda: None, admission=limited)
        (leased,) = catalog.lease("worker", limit=8, lease_s=60)
        assert catalog.complete(
            leased.key, "worker", duration_s=1, model=MODEL, segments=segments_of(random_vectors(0, 1))
        )
        catalog.amend("quick", lambda before: ("fa", {}))
        catalog.delete("quick")
        catalog.sweep(["cd" * 32], lambda sha256: None)
        assert time.monotonic() - began < 5
    finally:
        stored.set()
        slow.join()
    assert catalog.counts() == {"pending": 1}


def test_no_sweep_takes_what_is_being_registered(catalog: Catalog) -> None:
    """Else a recording that was acknowledged has no bytes."""
    bytes_there: set[str] = set()
    over = threading.Event()

    def sweep() -> None:
        while not over.is_set():
            catalog.sweep(
                [f"{number:064x}" for number in range(40)],
                lambda *unused: bytes_there.difference_update(unused),
            )

    def send(first: int) -> None:
        for number in range(first, 40, 4):
            sha256 = f"{number:064x}"

            def place(sha256: str = sha256) -> None:
                bytes_there.add(sha256)
                time.sleep(0.002)

            catalog.register(new(f"{number}", sha256), place)

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        raised = together(*(lambda first=first: send(first) for first in range(4)))
    finally:
        over.set()
        sweeper.join()
    assert raised == [None] * 4
    assert len(bytes_there) == 40


def test_a_follower_misses_no_change(catalog: Catalog, url: str) -> None:
    """An index that reads on from the last number it saw never comes back: a change with a smaller number
    that becomes visible later would be lost in it for good. Everybody writes at once here, deletes too."""
    for number in range(120):
        register(catalog, f"{number}")
    over = threading.Event()
    seen: list[int] = []
    ready: set[int] = set()

    def follow() -> None:
        with closing(Catalog(url)) as own:
            seq = 0
            while True:
                last = over.is_set()
                while changes := own.changes(seq, limit=7, model=MODEL, dim=DIM):
                    seq = changes.seq
                    seen.append(seq)
                    owners = set(changes.owners.tolist())
                    ready.difference_update(changes.recordings)
                    ready.update(owners)
                if last:
                    return

    follower = threading.Thread(target=follow)
    follower.start()
    done: list[int] = []

    def work(owner: str) -> None:
        with closing(Catalog(url)) as own:
            while leased := own.lease(owner, limit=3, lease_s=60):
                for recording in leased:
                    made = segments_of(random_vectors(recording.key, 2))
                    if own.complete(recording.key, owner, duration_s=2, model=MODEL, segments=made):
                        done.append(recording.key)

    def delete(first: int) -> None:
        for number in range(first, 120, 10):
            with suppress(RecordingNotFound):
                catalog.delete(f"{number}")

    def delete_some() -> None:
        some = Filter(ids=frozenset({f"{n}" for n in range(5, 120, 10)}))
        catalog.delete_some(some, status=None, after=0, limit=99)

    workers = [lambda n=n: work(f"worker-{n}") for n in range(5)]
    try:
        deleters = [lambda: delete(0), lambda: delete(0), delete_some, delete_some]
        raised = together(*workers, *deleters)
    finally:
        over.set()
        follower.join()
    assert raised == [None] * 9
    assert len(done) == len(set(done)), "something was leased twice"
    assert seen == sorted(seen)
    assert ready == {recording.key for recording in catalog.page(status="ready", limit=1000)}
    assert len(ready) == 96


def test_a_switch_in_the_midst_of_work_loses_nothing(catalog: Catalog) -> None:
    """A recording made ready by the old model after the switch has counted would be ready without a vector of
    the new one: nobody would find it again."""
    other = StoredModel("00ther0000000000", "other", DIM)
    for turn in range(2):
        target = (other, STORED_MODEL)[turn % 2]
        current = (STORED_MODEL, other)[turn % 2]
        for number in range(10):
            register(catalog, f"{turn}-{number}")
        queue = Reindexing(catalog, target)
        over = threading.Event()

        def work(owner: str, current: StoredModel = current) -> None:
            with suppress(DataMismatch):
                while not over.is_set():  # noqa: B023
                    for one in catalog.lease(owner, limit=2, lease_s=60, model=current.fingerprint):
                        made = segments_of(random_vectors(one.key, 1))
                        catalog.complete(
                            one.key, owner, duration_s=1, model=current.fingerprint, segments=made
                        )

        def reindex(owner: str, queue: Reindexing = queue) -> None:
            while queue.switch() is None:
                for one in queue.lease(owner, limit=8, lease_s=60):
                    made = segments_of(random_vectors(one.key, 1))
                    queue.complete(one.key, owner, duration_s=1, model=queue.model.fingerprint, segments=made)
            over.set()  # noqa: B023

        def delete(turn: int = turn) -> None:
            catalog.delete(f"{turn}-0")
            catalog.forget_retired()

        raised = together(
            lambda: work("a"), lambda: work("b"), lambda: reindex("c"), lambda: reindex("d"), delete
        )
        assert raised == [None] * 5
        with catalog.database.writing() as db:  # do not wait for services to follow
            db.execute(sa.text("UPDATE models SET hold_until = NULL"))
        while leased := catalog.lease("rest", limit=8, lease_s=60):
            for one in leased:
                made = segments_of(random_vectors(one.key, 1))
                catalog.complete(one.key, "rest", duration_s=1, model=target.fingerprint, segments=made)
        ready = catalog.page(status="ready", limit=1000)
        assert len(ready) == 9 * (turn + 1)
        assert {one.model for one in ready} == {target.fingerprint}
        vectors = catalog.vectors([(one.key, 0) for one in ready], model=target.fingerprint)
        assert len(vectors) == len(ready)


def test_one_key_has_a_name(catalog: Catalog) -> None:
    """Logs tell keys by their names."""
    keys = Keys(catalog)
    raised = together(*[lambda: keys.create("same", ["read"])] * 4)
    assert sorted(map(type, raised), key=str) == [type(None)] + [InvalidInput] * 3


def test_numbers_of_changes_wait_for_those_before(catalog: Catalog) -> None:
    """Who has the end of the sequence and is slow to commit holds up those behind, and is not overtaken."""
    recording = register(catalog, "one")
    with catalog.database.writing() as db:
        lock(db, "changes")
        late = threading.Thread(target=lambda: catalog.delete("one"))
        late.start()
        late.join(0.2)
        assert late.is_alive()
        db.execute(sa.insert(CHANGES).values(recording=0, token="first"))
    late.join(10)
    changes = catalog.changes(0, limit=10, model=MODEL, dim=DIM)
    assert changes is not None
    assert (changes.seq, changes.recordings) == (2, {0, recording.key})


def test_a_lost_connection_is_another_s_trouble_once_at_most(catalog: Catalog) -> None:
    """A database that was restarted: who was writing is told to come again, and nothing of it is there; who
    comes next does not notice."""

    def write() -> None:
        with catalog.database.writing() as db:
            db.execute(sa.insert(CHANGES).values(recording=1, token="x"))
            _end_connections(catalog)
            db.execute(sa.insert(CHANGES).values(recording=2, token="y"))

    with pytest.raises(DatabaseUnavailable):
        write()
    assert catalog.last_change() == (0, "")
    register(catalog, "next")
    _end_connections(catalog)
    assert catalog.get("next").status == "pending"


def test_whoever_waits_is_told_at_once(catalog: Catalog, url: str) -> None:
    """And again after its connection was lost; meanwhile it asks the database nothing."""
    with closing(Catalog(url)) as worker:
        never = threading.Event()
        worker.wait_for_work(never, 0.05)  # begins to listen, so that what came before counts as news
        for turn in range(2):
            sender = threading.Timer(0.3, lambda turn=turn: register(catalog, f"{turn}"))
            sender.start()
            began = time.monotonic()
            worker.wait_for_work(never, 0.05)
            assert 0.25 < time.monotonic() - began < 2
            sender.join()
            _end_connections(catalog)
            worker.wait_for_work(never, 0.05)  # notices that, and the next listens anew
            worker.wait_for_work(never, 0.05)
        stopping = threading.Event()
        stopping.set()
        began = time.monotonic()
        worker.wait_for_work(stopping, 0.05)
        assert time.monotonic() - began < 1


def test_errors_say_nothing_of_what_rows_hold(catalog: Catalog) -> None:
    """PostgreSQL repeats values in its errors, and errors go into the log: ids, questions, transcripts."""
    register(catalog, "confidential-id", sha256="confidential-sha")
    values = {"id": "confidential-id", "collection": "default", "sha256": "confidential-sha", "size_bytes": 1}
    values |= {"metadata": {}, "status": "pending", "attempts": 0, "created_at": datetime(2026, 1, 1)}

    def write() -> None:
        with catalog.database.writing() as db:
            db.execute(sa.insert(RECORDINGS).values(values))

    with pytest.raises(RuntimeError) as raised:
        write()
    told = "".join(traceback.format_exception(raised.value))
    assert "confidential" not in told
    assert "23505" in told


def test_a_password_is_told_to_nobody(url: str) -> None:
    """A URL with a password that leads nowhere: what is said of it names the place, not the password."""
    wrong = sa.make_url(url).set(password="hush-hush", database="nowhere")
    with pytest.raises(DatabaseUnavailable) as raised:
        Catalog(wrong)
    told = "".join(traceback.format_exception(raised.value))
    assert "hush" not in told
    assert "nowhere" in raised.value.detail


def test_a_backup_holds_it_and_gives_it_back(url: str, tmp_path: Path) -> None:
    """Whoever moves to several machines needs backups no less, and a way there, and back to one machine."""
    data_dir, place = tmp_path / "data", tmp_path / "backup"
    with closing(Library(data_dir, model=MODEL, dim=DIM, name="spectral", database_url=url)) as library:
        vectors = random_vectors(0, 2)
        add(library, "one", vectors, lang="fa", metadata={"نام": [1, None, 0.5]})
        add(library, "gone", random_vectors(1, 2))
        library.delete("gone")
        upload(library, b"waits", "waits")
        _, secret = Keys(library.catalog).create("reader", ["read"], ["default"])
        before = library.catalog.page(limit=10)
        newest = library.catalog.last_change()
        outcome = backup(data_dir, place, database_url=url)
    assert outcome.manifest.recordings == {"ready": 1, "pending": 1}
    with pytest.raises(BackupFailed, match="holds a library"):
        restore(place, tmp_path / "nowhere", database_url=url)
    with catalogue_url("postgresql", tmp_path) as another:
        for number, target in enumerate([another, None]):
            new_dir = tmp_path / f"restored-{number}"
            restore(place, new_dir, database_url=target)
            with closing(
                Library(new_dir, model=MODEL, dim=DIM, name="spectral", database_url=target)
            ) as library:
                assert library.catalog.page(limit=10) == before
                assert library.catalog.last_change() == newest
                ((best, *_),) = library.search(vectors[:1], [Question()])
                assert (best.recording.id, best.score) == ("one", pytest.approx(1))
                (grant,) = Keys(library.catalog).authenticate([secret])
                assert grant is not None
                assert grant.collections == {"default"}
                library.tidy()
                with library.store.open(before[0].sha256) as file:
                    assert file.read() == b"waits"
                assert upload(library, b"new").key > before[0].key, "a key was given out a second time"


def _end_connections(catalog: Catalog) -> None:
    """Of everybody in this database, but nobody else's."""
    others = "datname = current_database() AND pid <> pg_backend_pid()"
    killer = create_engine(catalog.database._engine.url)
    with killer.connect() as db:
        db.exec_driver_sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
    killer.dispose()
