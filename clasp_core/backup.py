"""Backups: a copy of a library that is consistent though the library is in use, and the way back.

A backup is a folder of four kinds of things:

    manifest.json                  every file of the backup with its size and sha256, written last
    catalog-<sha256>.sqlite3       the catalogue as it was at one moment
    audio/                         the recordings it names, as the library itself stores them
    clasp-backup.lock              says whose folder this is, and who is at work in it

What the manifest names is the backup; without a manifest there is none. Files are named by their content
and put in place whole, and nothing that the manifest names is changed or removed before another manifest
stands: so a backup that is made anew costs only what is new, and one cut short leaves the last one as it was.
The vector index is not in it, being made from the catalogue at need.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import sqlalchemy as sa

from clasp_core.catalog import Catalog, Place, Recording, StoredModel
from clasp_core.durability import locked, place, sync_folder, write_whole
from clasp_core.encoders.weights import sha256_of
from clasp_core.errors import BackupFailed, InvalidBackup
from clasp_core.faults import fault
from clasp_core.library import AUDIO_FOLDER, CATALOG_FILE
from clasp_core.store import AudioStore, Upload, stored_as

FORMAT = 1
MANIFEST = "manifest.json"
LOCK = "clasp-backup.lock"
UNFINISHED = "unfinished"
"""Folder in a backup for what is being made; whatever is in it when nobody is at work is rubbish."""
RESTORING = ".restoring"
"""The same in a data directory."""
NOBODYS = frozenset({"README.md", "lost+found"})
"""What an empty data directory may hold: a checkout's note on it, and what file systems put into theirs."""

_CHUNK_BYTES = 1 << 20

Observer = Callable[[int, int], None]
"""Called with how many files are done, and how many there are."""


@dataclass(frozen=True, slots=True)
class File:
    """A file of a backup, by its path in it."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a backup holds. `created_at` is a time (UTC, ISO 8601): all acknowledged before it is in there.

    `recordings` counts them by status. `model` is the one that the library is searched with, None where
    it never was.
    """

    format: int
    version: str
    created_at: str
    model: StoredModel | None
    recordings: Mapping[str, int]
    catalog: File
    audio: tuple[File, ...]

    @property
    def files(self) -> tuple[File, ...]:
        return (*self.audio, self.catalog)

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A backup that was made: what it holds, and what had to be done for it.

    `copied` and `removed` count recordings' files; `dropped` are the ids of recordings that were deleted
    while the backup was being made, before their bytes were copied, and are not in it.
    """

    manifest: Manifest
    copied: int
    copied_bytes: int
    removed: int
    dropped: tuple[str, ...]


def backup(
    data_dir: Path,
    destination: Path,
    *,
    database_url: str | None = None,
    observe: Observer = lambda done, total: None,
) -> Outcome:
    """Copy a library, which others may be using, to a new folder or over an earlier backup of it.

    Holds every recording that was acknowledged when it began and is not deleted while it is made, with
    its bytes and vectors. Raises BackupFailed, also where bytes are not what the catalogue says, and while
    another backup is being made there. DataMismatch where a newer version wrote the library, or, in
    PostgreSQL, an older.
    """
    source = _catalog_url(data_dir, database_url)
    if _is_file(source) and not Path(source.database or "").is_file():
        raise BackupFailed(f"There is no library in {data_dir}: {source.database} does not exist.")
    _require_apart(data_dir, destination)
    with _explained(f"The backup to {destination} was not made"):
        _claim(destination)
        with _alone(destination / LOCK), _workplace(destination / UNFINISHED) as work:
            return _backup(source, AudioStore(data_dir / AUDIO_FOLDER), destination, work, observe)


def read_manifest(folder: Path) -> Manifest:
    """What a backup says it holds. Raises InvalidBackup for anything but a manifest as it was written."""
    try:
        fields = json.loads((folder / MANIFEST).read_bytes())
        if fields["format"] > FORMAT:
            raise InvalidBackup(f"{folder} was made by a newer version of this program. Use that one.")
        if fields.pop("sha256") != _digest(fields):
            raise ValueError("not as it was written")
        model = fields.pop("model")
        *audio, catalog = (File(**file) for file in fields.pop("files"))
        manifest = Manifest(
            **fields,
            model=None if model is None else StoredModel(**model),
            catalog=catalog,
            audio=tuple(audio),
        )
        # a manifest that was made with care must not name files elsewhere
        if [file.path for file in audio] != [_audio_path(file.sha256) for file in audio]:
            raise ValueError("not where recordings are")
        if catalog.path != _catalog_name(catalog.sha256):
            raise ValueError("not where the catalogue is")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InvalidBackup(f"{folder} is not a complete backup: it has no {MANIFEST}.") from error
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InvalidBackup(f"{folder / MANIFEST} is damaged.") from error
    return manifest


def verify(folder: Path, *, observe: Observer = lambda done, total: None) -> Manifest:
    """Read a whole backup. Raises InvalidBackup naming the files that are missing or damaged."""
    with _explained(f"{folder} was not verified"), _reading(folder / LOCK):
        manifest = read_manifest(folder)
        bad = []
        for done, file in enumerate(manifest.files, 1):
            if (problem := _problem(folder, file)) is not None:
                bad.append(problem)
            observe(done, len(manifest.files))
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise InvalidBackup(f"Of {folder}, {'; '.join(bad[:3])}{more}.")
    return manifest


def restore(
    folder: Path,
    data_dir: Path,
    *,
    database_url: str | None = None,
    observe: Observer = lambda done, total: None,
) -> Manifest:
    """Make a library of a backup, in a data directory that is empty or missing; with a `database_url` at
    PostgreSQL, its catalogue there, in a database that holds none.

    Every byte is verified, written aside, and on disk before the library appears. Raises InvalidBackup
    naming the file that is missing or damaged, and BackupFailed where the directory is not empty or cannot
    be written; there is no library then. What a killed restore leaves, the next one clears away.
    """
    target = _catalog_url(data_dir, database_url)
    if not _is_file(target):
        _require_empty_database(target)
    elif Path(target.database or "").resolve() != (data_dir / CATALOG_FILE).resolve():
        raise BackupFailed(f"Unset CLASP_DATABASE_URL: the catalogue is restored to {data_dir}.")
    _require_apart(data_dir, folder)
    with _explained(f"{folder} was not restored to {data_dir}"), _reading(folder / LOCK):
        manifest = read_manifest(folder)
        with _new_library(data_dir, target) as work:
            store = AudioStore(work / AUDIO_FOLDER)
            for done, file in enumerate(manifest.files, 1):
                with store.receive() as copy:
                    try:
                        _copy(folder / file.path, copy)
                    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
                        raise InvalidBackup(f"Of {folder}, {file.path} is missing.") from error
                    if (copy.sha256, copy.size_bytes) != (file.sha256, file.bytes):
                        raise InvalidBackup(f"Of {folder}, {file.path} is damaged.")
                    if file is manifest.catalog:
                        place(copy.path, work / CATALOG_FILE)
                    else:
                        store.place(copy)
                fault("restore.copied")
                observe(done, len(manifest.files))
    return manifest


# --- making


def _backup(source: sa.URL, store: AudioStore, destination: Path, work: Path, observe: Observer) -> Outcome:
    """The catalogue first, then the bytes it names: what is added meanwhile is not in the copy, and bytes
    that are gone meanwhile are those of recordings deleted meanwhile, which are then taken out of it."""
    created_at = datetime.now(UTC)
    kept = AudioStore(destination / AUDIO_FOLDER)
    kept.discard_abandoned(older_than_s=0)
    audio: list[File] = []
    dropped: list[str] = []
    copied = copied_bytes = 0
    with closing(Catalog(source, upgrade=False)) as live:
        live.database.copy_to(work / "snapshot.sqlite3")
        with closing(Catalog(_url(work / "snapshot.sqlite3"))) as catalog:
            catalog.forget_leases()
            fault("backup.copied")
            contents = _contents(catalog)
            for done, (sha256, recordings) in enumerate(contents.items(), 1):
                file = File(_audio_path(sha256), sha256, recordings[0].size_bytes)
                if not _has_size(kept.path(sha256), file.bytes):
                    if not _keep(store, kept, file, recordings[0].id, live):
                        for recording in recordings:
                            catalog.delete(recording.id, within={recording.collection})
                            dropped.append(recording.id)
                        continue
                    copied += 1
                    copied_bytes += file.bytes
                    fault("backup.kept")
                audio.append(file)
                observe(done, len(contents))
            model, counts = catalog.active(), catalog.counts()
            # once more, so that nothing of the dropped is left, and all is in one file without a log
            catalog.database.copy_to(work / CATALOG_FILE)
    manifest = Manifest(
        format=FORMAT,
        version=importlib.metadata.version("clasp-search"),
        created_at=created_at.isoformat(timespec="seconds"),
        model=model,
        recordings=counts,
        catalog=_place_catalog(work / CATALOG_FILE, destination),
        audio=tuple(audio),
    )
    sync_folder(destination)
    sync_folder(destination.parent)
    fault("backup.placed")
    fields = asdict(manifest)
    fields["files"] = [*fields.pop("audio"), fields.pop("catalog")]
    write_whole(destination / MANIFEST, json.dumps(fields | {"sha256": _digest(fields)}, indent=1))
    fault("backup.described")
    removed = _sweep(destination, kept, manifest)
    fault("backup.swept")
    return Outcome(manifest, copied, copied_bytes, removed, tuple(dropped))


def _contents(catalog: Catalog) -> dict[str, list[Recording]]:
    """Recordings by their bytes' sha256; some may have the same in different collections."""
    contents: dict[str, list[Recording]] = {}
    before = None
    while page := catalog.page(before=before, limit=1000):
        for recording in page:
            contents.setdefault(recording.sha256, []).append(recording)
        last = page[-1]
        before = Place(last.created_at, last.id, last.collection)
    return contents


def _keep(store: AudioStore, kept: AudioStore, file: File, recording_id: str, live: Catalog) -> bool:
    """Copy a recording's bytes into the backup; False where it was deleted meanwhile.

    Raises BackupFailed where the library itself lacks them, or has others.
    """
    damaged = f"{store.path(file.sha256)}, the bytes of recording {recording_id!r}"
    way_out = "Put that file back from an earlier backup, or delete the recording."
    while True:
        with kept.receive() as copy:
            # asked first: bytes are there before their row and go after it, so where there was a row
            # before and after we looked in vain, they are lost
            expected = live.has_content(file.sha256)
            try:
                _copy(store.path(file.sha256), copy)
            except FileNotFoundError as error:
                if not live.has_content(file.sha256):
                    return False
                if expected:
                    raise BackupFailed(f"{damaged}, are missing. {way_out}") from error
                continue
            if (copy.sha256, copy.size_bytes) != (file.sha256, file.bytes):
                raise BackupFailed(f"{damaged}, are damaged. {way_out}")
            kept.remove(file.sha256)  # of another size: damaged
            kept.place(copy)
            return True


def _place_catalog(made: Path, destination: Path) -> File:
    sha256, size = sha256_of(made), made.stat().st_size
    name = _catalog_name(sha256)
    place(made, destination / name)
    return File(name, sha256, size)


def _sweep(destination: Path, kept: AudioStore, manifest: Manifest) -> int:
    """Remove what the manifest does not name; returns how many recordings' files that were."""
    for path in destination.glob(_catalog_name("*")):
        if path.name != manifest.catalog.path:
            path.unlink()
    unnamed = set(kept.stored()) - {file.sha256 for file in manifest.audio}
    for sha256 in unnamed:
        kept.remove(sha256)
    return len(unnamed)


def _claim(destination: Path) -> None:
    """Make the folder ours, if it is nobody's: files that no manifest names will be removed from it."""
    destination.mkdir(parents=True, exist_ok=True)
    held = {path.name for path in destination.iterdir()} - {"lost+found"}
    if held and LOCK not in held:
        raise BackupFailed(f"{destination} holds something that is no backup. Give a folder of its own.")
    (destination / LOCK).touch()


# --- putting back


@contextmanager
def _new_library(data_dir: Path, catalog: sa.URL) -> Iterator[Path]:
    """A folder in which to make what an empty data directory is to hold; if all goes well, it then does.

    The catalogue comes last: bytes without one are nobody's.
    """
    is_new = not data_dir.exists()
    data_dir.mkdir(parents=True, exist_ok=True)
    try:
        with _alone(data_dir):
            cut_short = (data_dir / RESTORING).is_dir()
            _require_empty(data_dir, {RESTORING, AUDIO_FOLDER} if cut_short else set())
            if cut_short and (data_dir / AUDIO_FOLDER).exists():
                shutil.rmtree(data_dir / AUDIO_FOLDER)
            with _workplace(data_dir / RESTORING) as work:
                yield work
                _require_empty(data_dir, {RESTORING})  # a service may have been started here
                sync_folder(work / AUDIO_FOLDER)
                fault("restore.verified")
                (work / AUDIO_FOLDER).rename(data_dir / AUDIO_FOLDER)
                fault("restore.moved")
                if _is_file(catalog):
                    # unlike a rename, never over another
                    os.link(work / CATALOG_FILE, data_dir / CATALOG_FILE)
                else:
                    with closing(Catalog(catalog)) as filled:
                        filled.database.fill_from(work / CATALOG_FILE)
                fault("restore.linked")
                sync_folder(data_dir)
                sync_folder(data_dir.parent)
    except BaseException:
        if is_new:
            with suppress(OSError):
                data_dir.rmdir()
        raise


def _require_empty(data_dir: Path, allowed: set[str]) -> None:
    held = {path.name for path in data_dir.iterdir()} - NOBODYS - allowed
    if held:
        raise BackupFailed(
            f"{data_dir} is not empty, it holds {min(held)}. Give a data directory that is empty or missing."
        )


def _require_empty_database(url: sa.URL) -> None:
    with closing(Catalog(url)) as catalog, catalog.database.reading() as db:
        if not catalog.database.is_empty(db):
            raise BackupFailed(
                f"The database {url.database} holds a library already. Give CLASP_DATABASE_URL an empty one."
            )


# --- both


def _copy(source: Path, copy: Upload) -> None:
    with source.open("rb") as file:
        while data := _read(file):
            copy.write(data)
    copy.seal()


def _read(file: BinaryIO) -> bytes:
    """The next bytes. An OSError names the file, unlike one of writing, or of reading otherwise."""
    try:
        return file.read(_CHUNK_BYTES)
    except OSError as error:
        error.filename = file.name
        raise


def _problem(folder: Path, file: File) -> str | None:
    """What is wrong with a file of a backup, in words."""
    try:
        with (folder / file.path).open("rb") as opened:
            size, content = 0, hashlib.sha256()
            while data := _read(opened):
                size += len(data)
                content.update(data)
        if (size, content.hexdigest()) == (file.bytes, file.sha256):
            return None
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return f"{file.path} is missing"
    return f"{file.path} is damaged"


def _has_size(path: Path, size: int) -> bool:
    """Whether a file is there whole. Its content was verified when it was placed under its name."""
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _catalog_name(sha256: str) -> str:
    return f"catalog-{sha256[:16]}.sqlite3"


def _audio_path(sha256: str) -> str:
    if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
        raise ValueError("not a sha256")
    return f"{AUDIO_FOLDER}/{stored_as(sha256)}"


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _url(path: Path) -> sa.URL:
    return sa.URL.create("sqlite", database=str(path))


def _catalog_url(data_dir: Path, database_url: str | None) -> sa.URL:
    """Where the catalogue is."""
    return _url(data_dir / CATALOG_FILE) if database_url is None else sa.make_url(database_url)


def _is_file(catalog: sa.URL) -> bool:
    return catalog.get_backend_name() == "sqlite"


def _require_apart(data_dir: Path, folder: Path) -> None:
    here, there = data_dir.resolve(), folder.resolve()
    if here.is_relative_to(there) or there.is_relative_to(here):
        raise BackupFailed(f"The backup {folder} and the data directory {data_dir} must lie apart.")


def _alone(path: Path) -> AbstractContextManager[None]:
    """Be the only one at work in a folder, which this file stands for, or itself. Raises BackupFailed."""
    return locked(path, _at_work(path))


def _reading(lock: Path) -> AbstractContextManager[None]:
    """Have nobody change a backup. Raises BackupFailed where somebody is at it."""
    if not lock.is_file():  # a copy of a backup, made without this file: nobody else can be at work in it
        return nullcontext()
    return locked(lock, _at_work(lock), shared=True)


def _at_work(path: Path) -> BackupFailed:
    where = path if path.is_dir() else path.parent
    return BackupFailed(f"Another backup or restore is at work in {where}.")


@contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """An empty folder that is gone in the end."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _explained(what_failed: str) -> Iterator[None]:
    """Trouble with disks and databases as one line that says what was lost by it."""
    try:
        yield
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        raise BackupFailed(f"{what_failed}: {error.strerror or error}{where}") from error
    except (sqlite3.Error, sa.exc.DBAPIError) as error:
        reason = error.orig if isinstance(error, sa.exc.DBAPIError) else error
        raise BackupFailed(f"{what_failed}: the catalogue: {reason}") from error
