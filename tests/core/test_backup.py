"""Backups: whole whoever writes or is killed meanwhile, not believed when damaged, put back as they were."""

import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clasp_core.backup import LOCK, MANIFEST, backup, read_manifest, restore, verify
from clasp_core.catalog import store_peaks
from clasp_core.errors import BackupFailed, DataMismatch, InvalidBackup
from clasp_core.library import Library, Question
from clasp_core.peaks import Peaks
from tests.core.doubles import (
    DIM,
    MODEL,
    STORED_MODEL,
    add,
    complete,
    processes,
    random_vectors,
    segments_of,
    upload,
)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "index_data"


@pytest.fixture
def library(data_dir: Path) -> Iterator[Library]:
    """Three ready recordings, two of which have the same bytes."""
    with closing(Library(data_dir, model=MODEL, dim=DIM, name="spectral")) as one:
        add(one, "a", random_vectors(1, 2), metadata={"title": "گلستان"})
        add(one, "b", random_vectors(2, 1))
        again = upload(one, b"b", "b-too", collection="other")
        assert complete(one.catalog, again, random_vectors(2, 1))
        yield one


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where the backup goes."""
    return tmp_path / "backup"


def state(data_dir: Path) -> dict[str, Any]:
    """All that is true of a library: its rows, and the bytes of each recording."""
    with closing(sqlite3.connect(data_dir / "catalog.sqlite3")) as db:
        db.row_factory = sqlite3.Row
        recordings = [dict(row) for row in db.execute("SELECT * FROM recordings ORDER BY key")]
        segments = [tuple(row) for row in db.execute("SELECT * FROM segments ORDER BY recording, ordinal")]
        models = [tuple(row) for row in db.execute("SELECT fingerprint, name, dim, state FROM models")]
    stored = data_dir / "audio"
    bytes_of = {
        row["id"]: (stored / row["sha256"][:2] / row["sha256"][2:]).read_bytes() for row in recordings
    }
    return {"recordings": recordings, "segments": segments, "models": models, "bytes": bytes_of}


def restored(place: Path, to: Path) -> dict[str, Any]:
    """What is there after a restore; the place itself is removed again."""
    restore(place, to)
    assert {path.name for path in to.iterdir()} == {"audio", "catalog.sqlite3"}
    found = state(to)
    shutil.rmtree(to)
    return found


def ids(found: dict[str, Any]) -> set[str]:
    return {row["id"] for row in found["recordings"]}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def files_of(place: Path) -> list[Path]:
    return [place / file.path for file in read_manifest(place).files]


def is_tidy(place: Path) -> bool:
    """Whether there is nothing in a backup but what its manifest names."""
    named = {file.path for file in read_manifest(place).files}
    return files(place) == named | {MANIFEST, LOCK}


# --- there and back


def test_a_library_is_the_same_after_there_and_back(library: Library, place: Path, tmp_path: Path) -> None:
    """Moving to another machine: every record, byte and vector, and the same
    answers, with nothing embedded anew."""
    with library.catalog.database.writing() as db:
        first = library.page()[0][0]
        store_peaks(db, first.key, Peaks(0.05, np.arange(40, dtype=np.uint8)))
    waiting = upload(library, b"waiting", "waiting")
    outcome = backup(library_dir := tmp_path / "index_data", place)
    manifest = outcome.manifest
    assert (outcome.copied, outcome.removed, outcome.dropped) == (3, 0, ())
    assert (manifest.model, manifest.recordings) == (STORED_MODEL, {"ready": 3, "pending": 1})
    assert is_tidy(place)
    assert verify(place) == manifest
    assert restored(place, tmp_path / "again") == state(library_dir)

    assert restore(place, tmp_path / "new") == manifest
    with closing(Library(tmp_path / "new", model=MODEL, dim=DIM)) as new:
        questions = [Question(), Question(limit=1)]
        vectors = random_vectors(1, 2)
        assert new.search(vectors, questions) == library.search(vectors, questions)
        assert new.catalog.waveform(first.id)[1].levels.tobytes() == bytes(range(40))
        assert [leased.id for leased in new.catalog.lease("me", limit=9, lease_s=60)] == [waiting.id]


def test_what_was_being_embedded_waits_in_the_copy(library: Library, place: Path, tmp_path: Path) -> None:
    """Its worker is not there to end it; and the interruption must not count as a death of that worker."""
    upload(library, b"at-work", "at-work")
    (leased,) = library.catalog.lease("worker", limit=1, lease_s=600)
    backup(tmp_path / "index_data", place)
    restore(place, tmp_path / "new")
    with closing(Library(tmp_path / "new", model=MODEL, dim=DIM)) as new:
        (again,) = new.catalog.lease("another", limit=1, lease_s=60)
        assert (again.id, again.attempts) == ("at-work", leased.attempts)
    segments = segments_of(random_vectors(3, 1))
    assert library.catalog.complete(leased.key, "worker", duration_s=1.0, model=MODEL, segments=segments)


def test_only_what_is_new_is_copied(library: Library, data_dir: Path, place: Path, tmp_path: Path) -> None:
    """Backups that cost the whole library each time are not made every night; and what was deleted must go
    from them, too."""
    backup(data_dir, place)
    assert (again := backup(data_dir, place)).copied == 0
    assert again.removed == 0
    times = {path: path.stat().st_mtime_ns for path in files_of(place)[:-1]}
    library.delete("a")
    library.delete("b")
    add(library, "c", random_vectors(4, 1))
    outcome = backup(data_dir, place)
    assert (outcome.copied, outcome.copied_bytes, outcome.removed) == (1, 1, 1)
    assert is_tidy(place)
    kept = [path for path in files_of(place) if path in times]
    assert len(kept) == 1, "the bytes that 'b-too' still has"
    assert kept[0].stat().st_mtime_ns == times[kept[0]]
    assert restored(place, tmp_path / "new") == state(data_dir)


def test_nothing_of_a_deleted_recording_is_left(
    library: Library, data_dir: Path, place: Path, tmp_path: Path
) -> None:
    """Databases keep deleted rows in free pages; a copy that is carried elsewhere must not."""
    secret = random_vectors(99, 1)
    add(library, "secret", secret)
    library.delete("secret")
    backup(data_dir, place)
    assert not any(secret.tobytes() in path.read_bytes() for path in files_of(place))


def test_an_empty_library_is_a_library(data_dir: Path, place: Path, tmp_path: Path) -> None:
    """The first night's backup runs before the first upload."""
    Library(data_dir, model=MODEL, dim=DIM).close()
    backup(data_dir, place)
    verify(place)
    assert restored(place, tmp_path / "new")["recordings"] == []


# --- while others write


def test_what_is_deleted_while_it_is_made_may_be_missing_and_the_rest_is_whole(
    library: Library, data_dir: Path, place: Path, tmp_path: Path
) -> None:
    """Between the copy of the catalogue and that of the bytes anything may go and come: no record without its
    bytes, none lost that nobody deleted."""
    for number in range(8):
        add(library, f"more-{number}", random_vectors(number, 1))
    began_with = ids(state(data_dir))
    deleted: list[str] = []

    def meddle(done: int, total: int) -> None:
        if done == 1:
            for name in ("a", "b", "more-0", "more-7"):
                library.delete(name)
                deleted.append(name)
            upload(library, b"more-0", "as-it-was")
            upload(library, b"new", "new")

    outcome = backup(data_dir, place, observe=meddle)
    assert outcome.dropped
    assert set(outcome.dropped) <= set(deleted)
    assert "more-0" not in outcome.dropped, "its bytes are there again"
    verify(place)
    found = restored(place, tmp_path / "new")
    assert ids(found) == began_with - set(outcome.dropped)
    assert found["bytes"] == {name: b"b" if name == "b-too" else name.encode() for name in ids(found)}
    assert {row[0] for row in found["segments"]} == {row["key"] for row in found["recordings"]}
    assert restored_after(library, data_dir, place, tmp_path) == state(data_dir)


def restored_after(library: Library, data_dir: Path, place: Path, tmp_path: Path) -> dict[str, Any]:
    """By a backup that nobody meddled with."""
    assert backup(data_dir, place).dropped == ()
    return restored(place, tmp_path / "new")


def test_bytes_the_library_lost_or_spoilt_are_told_from_deleted_ones(
    library: Library, data_dir: Path, place: Path
) -> None:
    """A backup that silently leaves out what the disk has lost replaces the last good copy one night."""
    backup(data_dir, place)
    added = add(library, "c", random_vectors(5, 1))
    stored = library.store.path(added.sha256)
    stored.write_bytes(b"C")
    with pytest.raises(BackupFailed, match=f"{stored}.*'c'.*damaged"):
        backup(data_dir, place)
    stored.unlink()
    with pytest.raises(BackupFailed, match=f"{stored}.*'c'.*missing"):
        backup(data_dir, place)
    stored.mkdir()
    with pytest.raises(BackupFailed, match=f"directory: {stored}"):
        backup(data_dir, place)
    assert sum(verify(place).recordings.values()) == 3
    library.catalog.delete("c")
    stored.rmdir()
    backup(data_dir, place)


def test_one_at_a_time(library: Library, data_dir: Path, place: Path, tmp_path: Path) -> None:
    """The second cron job begins before the first ends; they would clear away each other's files."""

    def second(done: int, total: int) -> None:
        for use in (lambda: backup(data_dir, place), lambda: verify(place)):
            with pytest.raises(BackupFailed, match="at work"):
                use()

    backup(data_dir, place, observe=second)

    def third(done: int, total: int) -> None:
        with pytest.raises(BackupFailed, match="at work"):
            backup(data_dir, place)
        with pytest.raises(BackupFailed, match="at work"):
            restore(place, tmp_path / "new")

    restore(place, tmp_path / "new", observe=third)


def test_a_service_started_in_the_middle_of_a_restore_keeps_its_uploads(
    library: Library, data_dir: Path, place: Path, tmp_path: Path
) -> None:
    """A supervisor restarts it at once; what it then acknowledges must not be replaced."""
    backup(data_dir, place)

    def start(done: int, total: int) -> None:
        if done == total:
            with closing(Library(tmp_path / "new", model=MODEL, dim=DIM)) as eager:
                add(eager, "kept", random_vectors(1, 1))

    with pytest.raises(BackupFailed, match="not empty"):
        restore(place, tmp_path / "new", observe=start)
    assert ids(state(tmp_path / "new")) == {"kept"}


# --- killed


ALL = range(1, 1000)
STEPS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "sqlite3.connect"}


def _die_at(number: int, folder: str, call: Callable[..., object], *arguments: object) -> None:
    """In a process of its own: die before the given one of all steps that change names in the folder."""
    steps = 0

    def step(event: str, about: tuple[object, ...]) -> None:
        nonlocal steps
        if event in STEPS and any(folder in str(one) for one in about):
            steps += 1
            if steps == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(step)
    call(*arguments)


def killed_at_steps(
    which: range, folder: Path, call: Callable[..., object], *arguments: object
) -> Iterator[None]:
    """Yields after each death, until one run comes through."""
    context = processes(__name__)
    for number in which:
        process = context.Process(target=_die_at, args=(number, str(folder), call, *arguments))
        process.start()
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL)
        yield
        if process.exitcode == 0:
            return


def test_a_backup_killed_anywhere_leaves_the_last_one_or_the_next(
    library: Library, data_dir: Path, place: Path, tmp_path: Path
) -> None:
    """The night of the power cut is the night before the backup is needed."""
    backup(data_dir, place)
    earlier = state(data_dir)
    shutil.copytree(place, tmp_path / "earlier")
    library.delete("a")
    add(library, "c", random_vectors(4, 1))
    later = state(data_dir)
    left = []
    for _ in killed_at_steps(ALL, place, backup, data_dir, place):
        verify(place)
        left.append(restored(place, tmp_path / "new"))
        backup(data_dir, place)
        assert is_tidy(place)
        shutil.rmtree(place)
        shutil.copytree(tmp_path / "earlier", place)
    changed = left.index(later)
    assert left == [earlier] * changed + [later] * (len(left) - changed)
    assert changed > 10


def test_a_first_backup_that_is_killed_is_none(library: Library, data_dir: Path, place: Path) -> None:
    """Half a backup that restores is worse than none; and it must not be in the way of the next."""
    for _ in killed_at_steps(ALL[2::4], place, backup, data_dir, place):
        if (place / MANIFEST).exists():
            verify(place)
        else:
            with pytest.raises(InvalidBackup, match="not a complete backup"):
                verify(place)
        backup(data_dir, place)
        assert is_tidy(place)
        shutil.rmtree(place)


def test_a_killed_restore_is_no_library_until_it_is_whole(
    library: Library, data_dir: Path, place: Path, tmp_path: Path
) -> None:
    """Whoever starts a service on half a library deletes the other half as bytes of no recording."""
    backup(data_dir, place)
    whole = state(data_dir)
    new = tmp_path / "new"
    begun_anew = 0
    for _ in killed_at_steps(ALL, new, restore, place, new):
        if not (new / "catalog.sqlite3").exists():
            restore(place, new)
            begun_anew += 1
        assert state(new) == whole
        shutil.rmtree(new)
    assert begun_anew > 10


# --- damaged


def damages(path: Path) -> Iterator[str]:
    """Do to a file what disks and people do, one after the other; it is whole again in the end."""
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    yield "a flipped bit"
    path.write_bytes(content[:-1])
    yield "cut"
    path.write_bytes(content + b"\0")
    yield "longer"
    path.write_bytes(b"")
    yield "empty"
    path.unlink()
    yield "gone"
    path.mkdir()
    yield "a folder"
    path.rmdir()
    path.write_bytes(content)


def test_a_damaged_backup_is_refused_by_name(library: Library, data_dir: Path, place: Path) -> None:
    """Whoever restores needs to know which file to fetch from another copy, and must not get a library that
    has a hole in it."""
    backup(data_dir, place)
    for path in files_of(place):
        for _ in damages(path):
            with pytest.raises(InvalidBackup, match=str(path.relative_to(place))):
                verify(place)
            with pytest.raises(InvalidBackup, match=str(path.relative_to(place))):
                restore(place, data_dir.with_name("new"))
            assert not data_dir.with_name("new").exists()
    verify(place)
    first, second, *_ = files_of(place)
    first.unlink()
    second.unlink()
    with pytest.raises(InvalidBackup, match=rf"{first.name} is missing; .*{second.name} is missing"):
        verify(place)


def test_a_file_that_cannot_be_read_is_named(library: Library, data_dir: Path, place: Path) -> None:
    """A dying disk says only "input/output error", and the answer is to know which file it was."""
    backup(data_dir, place)
    unreadable = Path("/proc/self/mem")
    if not unreadable.exists():
        pytest.skip("no file here fails to be read")
    for path in files_of(place):
        content = path.read_bytes()
        path.unlink()
        path.symlink_to(unreadable)
        for use in (lambda: verify(place), lambda: restore(place, data_dir.with_name("new"))):
            with pytest.raises(BackupFailed, match=f"Input/output error: {path}"):
                use()
        path.unlink()
        path.write_bytes(content)
    assert not data_dir.with_name("new").exists()
    verify(place)


def test_no_bit_of_the_manifest_may_change(library: Library, data_dir: Path, place: Path) -> None:
    """It decides what is believed, so it must not be believed itself."""
    backup(data_dir, place)
    intact = verify(place)
    path = place / MANIFEST
    content = path.read_bytes()
    chance = random.Random(1)
    for _ in range(200):
        changed = bytearray(content)
        changed[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        with suppress(InvalidBackup):
            assert read_manifest(place) == intact  # white space
    for _ in damages(path):
        with pytest.raises((InvalidBackup, BackupFailed), match=MANIFEST):
            restore(place, data_dir.with_name("new"))
    path.write_text("[" * 100_000)
    with pytest.raises(InvalidBackup, match=MANIFEST):
        verify(place)
    path.write_text(json.dumps({"format": 2, "anything": "else"}))
    with pytest.raises(InvalidBackup, match="newer version"):
        verify(place)


def test_a_truncated_file_is_copied_anew(
    library: Library, data_dir: Path, place: Path, tmp_path: Path
) -> None:
    """A backup repairs what it can see is broken, even its own manifest."""
    backup(data_dir, place)
    files_of(place)[0].write_bytes(b"")
    (place / MANIFEST).write_bytes(b"")
    assert backup(data_dir, place).copied == 1
    assert restored(place, tmp_path / "new") == state(data_dir)


# --- refused


def test_only_an_empty_data_directory_is_restored_to(
    library: Library, data_dir: Path, place: Path, tmp_path: Path
) -> None:
    """The library that is there, however old, is somebody's; but a checkout's note and a mounted volume's
    `lost+found` are nobody's."""
    backup(data_dir, place)
    before = state(data_dir)
    with pytest.raises(BackupFailed, match="not empty"):
        restore(place, data_dir)
    assert state(data_dir) == before
    new = tmp_path / "new"
    (new / "audio").mkdir(parents=True)
    with pytest.raises(BackupFailed, match="not empty, it holds audio"):
        restore(place, new)
    (new / "audio").rmdir()
    (new / "README.md").write_text("Everything lives here.")
    (new / "lost+found").mkdir()
    restore(place, new)
    assert state(new) == before


def test_a_folder_of_somebody_elses_is_not_backed_up_to(
    library: Library, data_dir: Path, place: Path
) -> None:
    """Files that no manifest names are removed from a backup; they had better be a backup's."""
    (place / "audio" / "en").mkdir(parents=True)
    (place / "audio" / "en" / "1.wav").write_bytes(b"mine")
    with pytest.raises(BackupFailed, match="folder of its own"):
        backup(data_dir, place)
    assert files(place) == {"audio/en/1.wav"}
    for inside in (data_dir, data_dir / "backup", data_dir.parent):
        with pytest.raises(BackupFailed, match="apart"):
            backup(data_dir, inside)
    assert not (data_dir / "backup").exists()


def test_a_catalogue_elsewhere(library: Library, data_dir: Path, place: Path, tmp_path: Path) -> None:
    """A catalogue in another SQLite file is backed up from there, and restored to where it belongs. (That of
    one in PostgreSQL is in test_postgres.)"""
    elsewhere = tmp_path / "elsewhere.sqlite3"
    library.catalog.database.copy_to(elsewhere)
    backup(data_dir, place, database_url=f"sqlite:///{elsewhere}")
    with pytest.raises(BackupFailed, match="CLASP_DATABASE_URL"):
        restore(place, tmp_path / "new", database_url=f"sqlite:///{elsewhere}")
    assert restored(place, tmp_path / "new") == state(data_dir)


def test_no_library_no_backup(tmp_path: Path, place: Path) -> None:
    """A mistyped data directory must not become an empty library that replaces the last backup."""
    with pytest.raises(BackupFailed, match="no library"):
        backup(tmp_path / "typo", place)
    assert list(tmp_path.iterdir()) == []
    for nothing in (place, tmp_path):
        with pytest.raises(InvalidBackup, match=MANIFEST):
            restore(nothing, tmp_path / "typo" if nothing == place else tmp_path.parent / "typo")


def test_an_older_library_is_not_upgraded_by_its_backup_and_a_newer_one_refused(
    data_dir: Path, place: Path, tmp_path: Path
) -> None:
    """A new program's cron job must not change the tables under the old service that still runs."""
    with closing(Library(data_dir, model=MODEL, dim=DIM)) as library:
        add(library, "a", random_vectors(1, 1))
    with closing(sqlite3.connect(data_dir / "catalog.sqlite3")) as db:
        db.execute("UPDATE alembic_version SET version_num = '0003'")
        for table in ("api_keys", "library", "once", "turns", "waveforms"):
            db.execute(f"DROP TABLE {table}")
        db.commit()
    before = state(data_dir)
    backup(data_dir, place)
    assert state(data_dir) == before
    restore(place, tmp_path / "new")
    with closing(Library(tmp_path / "new", model=MODEL, dim=DIM)) as new:
        assert len(new.refresh()) == 1
    with closing(sqlite3.connect(data_dir / "catalog.sqlite3")) as db:
        db.execute("UPDATE alembic_version SET version_num = '9999'")
        db.commit()
    with pytest.raises(DataMismatch, match="newer version"):
        backup(data_dir, place)
    verify(place)


# --- a full disk


def _with_little_room(most_bytes: int, call: Callable[..., object], *arguments: object) -> None:
    """In a process of its own, to which no file may grow larger than this."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    with pytest.raises(BackupFailed, match="was not"):
        call(*arguments)


@pytest.mark.parametrize("most_bytes", [1_000, 20_000, 150_000], ids=["nothing", "catalogue", "recording"])
def test_where_the_disk_is_full_nothing_looks_done(
    library: Library, data_dir: Path, place: Path, tmp_path: Path, most_bytes: int
) -> None:
    """Disks fill up while backups are made, by backups: the last one must outlive it."""
    backup(data_dir, place)
    verify(place)
    earlier = state(data_dir)
    shutil.copytree(place, tmp_path / "earlier")
    upload(library, bytes(200_000), "large")
    context = processes(__name__)

    def little_room(call: Callable[..., object], *arguments: object) -> None:
        process = context.Process(target=_with_little_room, args=(most_bytes, call, *arguments))
        process.start()
        process.join(60)
        assert process.exitcode == 0

    little_room(backup, data_dir, place)
    assert restored(place, tmp_path / "new") == earlier
    backup(data_dir, place)
    assert is_tidy(place)
    little_room(restore, place, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert restored(place, tmp_path / "new") == state(data_dir)
