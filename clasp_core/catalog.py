"""The truth: recordings, segments, vectors and the order of changes, in one SQL database.

A recording's status is also its job: `pending` until a worker leases it, `processing` while the lease
lasts, then `ready` or `failed`. Every transition is one transaction. Whoever keeps a replica (the
vector index) follows `changes`: each row says "this recording is not what it was", in commit order.

Every vector is stored under the fingerprint of its model, and one model is the active one: what is
`ready` is so by its vectors. `Reindexing` is how a library comes to have another.

Collections are apart, so that they can belong to tenants who may know nothing of each other: what takes
`within`, the collections that the caller may see (None: all), neither finds nor tells anything of others.
"""

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import alembic.command
import alembic.config
import alembic.util
import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from clasp_core.errors import (
    AmbiguousId,
    DataDamaged,
    DataMismatch,
    DiskFull,
    IdConflict,
    IdempotencyMismatch,
    ProcessingFailed,
    QueueFull,
    QuotaExceeded,
    RecordingNotFound,
)
from clasp_core.faults import fault
from clasp_core.filters import SQL_FUNCTION, Filter, holds
from clasp_core.limits import FREELY, Admission, Held
from clasp_core.types import Embeddings, Seconds

T = TypeVar("T")
Status = Literal["pending", "processing", "ready", "failed"]

MAX_ATTEMPTS = 5
"""A recording that was being processed when its worker died this many times is not tried again."""
RETIRED_KEPT_S: Seconds = 600.0
"""How long a model's vectors outlive their use: services that have yet to follow a switch answer by them."""
TOLERABLE = 10
"""Recordings that a switch may lose by trouble of ours: so many, or a tenth of all if that is more."""
ONCE_KEPT_S: Seconds = 86_400.0
"""How long a registration is remembered by the name its request had."""
FOLLOW_WITHIN_S: Seconds = 10.0
"""How long arrivals wait after a switch, so that all services can follow before anything is ready that those
which have not yet would miss."""

_UNIT_WITHIN = 1e-3
"""How far from 1 the length of a vector may be."""

_key = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_tables = sa.MetaData()
_recordings = sa.Table(
    "recordings",
    _tables,
    sa.Column("key", _key, primary_key=True),
    sa.Column("id", sa.Text),
    sa.Column("collection", sa.Text),
    sa.Column("sha256", sa.Text),
    sa.Column("size_bytes", sa.BigInteger),
    sa.Column("media_type", sa.Text),
    sa.Column("lang", sa.Text),
    sa.Column("metadata", sa.JSON),
    sa.Column("created_at", sa.DateTime),
    sa.Column("status", sa.Text),
    sa.Column("duration_s", sa.Float),
    sa.Column("segments", sa.Integer),
    sa.Column("model", sa.Text),
    sa.Column("error_code", sa.Text),
    sa.Column("error_detail", sa.Text),
    sa.Column("attempts", sa.Integer),
    sa.Column("lease_owner", sa.Text),
    sa.Column("lease_until", sa.Float),
    sa.Column("uploaded_by", sa.Text),
)
_segments = sa.Table(
    "segments",
    _tables,
    sa.Column("recording", _key, primary_key=True),
    sa.Column("model", sa.Text, primary_key=True),
    sa.Column("ordinal", sa.Integer, primary_key=True),
    sa.Column("start_s", sa.Float),
    sa.Column("end_s", sa.Float),
    sa.Column("vector", sa.LargeBinary),
    sa.Column("transcript", sa.Text),
)
_changes = sa.Table(
    "changes",
    _tables,
    sa.Column("seq", _key, primary_key=True),
    sa.Column("recording", _key),
    sa.Column("token", sa.Text),
    sa.Column("model", sa.Text),
)
_models = sa.Table(
    "models",
    _tables,
    sa.Column("fingerprint", sa.Text, primary_key=True),
    sa.Column("name", sa.Text),
    sa.Column("dim", sa.Integer),
    sa.Column("state", sa.Text),
    sa.Column("hold_until", sa.Float),
    sa.Column("kept_until", sa.Float),
)
_reindexing = sa.Table(
    "reindexing",
    _tables,
    sa.Column("recording", _key, primary_key=True),
    sa.Column("model", sa.Text, primary_key=True),
    sa.Column("status", sa.Text),
    sa.Column("duration_s", sa.Float),
    sa.Column("segments", sa.Integer),
    sa.Column("error_code", sa.Text),
    sa.Column("error_detail", sa.Text),
    sa.Column("attempts", sa.Integer),
    sa.Column("lease_owner", sa.Text),
    sa.Column("lease_until", sa.Float),
)
_once = sa.Table(
    "once",
    _tables,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("request", sa.Text),
    sa.Column("recording", _key),
    sa.Column("id", sa.Text),
    sa.Column("created", sa.Boolean),
    sa.Column("created_at", sa.DateTime),
    sa.Column("kept_until", sa.Float),
)


@dataclass(frozen=True, slots=True)
class Recording:
    """One uploaded recording and what became of it.

    `key` orders recordings by arrival and is never used twice; no answer shows it, since it counts what all
    tenants have. `id` is the name the world knows, one recording's in its collection.
    `metadata` is the caller's JSON object. `model` is the fingerprint of the model its vectors are by.
    """

    key: int
    id: str
    collection: str
    sha256: str
    size_bytes: int
    media_type: str | None
    lang: str | None
    metadata: Mapping[str, Any]
    created_at: datetime
    status: Status
    duration_s: Seconds | None
    segments: int | None
    model: str | None
    error_code: str | None
    error_detail: str | None
    attempts: int


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model that vectors are stored by. `name` is what `open_model` knows it as, or "" if nobody said."""

    fingerprint: str
    name: str
    dim: int

    def titled(self) -> str:
        """For people."""
        return f"{self.name} ({self.fingerprint})" if self.name else self.fingerprint


@dataclass(frozen=True, slots=True)
class NewRecording:
    """What an upload says of itself."""

    id: str
    collection: str
    sha256: str
    size_bytes: int
    media_type: str | None
    lang: str | None
    metadata: Mapping[str, Any]


class Once(NamedTuple):
    """A request that is to be done once, however often it is sent: its name, and a digest of what it says."""

    name: str
    request: str


@dataclass(frozen=True, slots=True)
class EmbeddedSegment:
    """A segment as it is stored: seconds from the start of its recording, its unit vector (dim,), and what
    is said in it where the model writes that down.

    ValueError for any other vector: one NaN committed would stop every replica at that change.
    """

    start_s: Seconds
    end_s: Seconds
    vector: NDArray[np.float32]
    transcript: str | None = None

    def __post_init__(self) -> None:
        if not abs(float(np.linalg.norm(self.vector)) - 1) < _UNIT_WITHIN:
            raise ValueError("a segment's vector is not finite and of unit length")


class Span(NamedTuple):
    """Where a stored segment is in its recording, and what is said there, if its model wrote it down."""

    start_s: Seconds
    end_s: Seconds
    transcript: str | None


class Place(NamedTuple):
    """Where a recording stands in a list, newest first. It says no more than the recording itself."""

    created_at: datetime
    id: str
    collection: str


@dataclass(frozen=True, slots=True)
class Changes:
    """The part of the change sequence up to `seq`: these recordings changed, and these are their vectors now.

    `owners` (n,) holds the recording key and `ordinals` (n,) the place in its recording of each row of
    `vectors` (n, dim). A changed recording without rows is not (or no longer) searchable.
    """

    seq: int
    recordings: frozenset[int]
    owners: NDArray[np.int64]
    ordinals: NDArray[np.int64]
    vectors: Embeddings
    token: str = ""
    """A random mark of change `seq`: another history has another, though it has as many changes."""
    damaged: frozenset[int] = frozenset()
    """Those of the recordings without rows of which what is stored is no unit vector of `dim` any more."""


_RECORDING_COLUMNS = [_recordings.c[field] for field in Recording.__dataclass_fields__]


class Catalog:
    """Thread-safe, and safe to open from several processes at once."""

    def __init__(self, url: str | sa.URL, *, upgrade: bool = True, create: bool = True) -> None:
        """Open, creating or upgrading the schema. DataMismatch where a newer version wrote it, DataDamaged
        where nobody can read it, or there is nothing and it is not to `create`.

        Without `upgrade` it is left as it is, for `copy_to` and `has_content` only: an older service may
        be at work in it.
        """
        self._engine = _create_engine(url)
        self._jobs = _Jobs(_recordings, _recordings.c.key, sa.true())
        if upgrade:
            _migrate(url, create)

    def close(self) -> None:
        self._engine.dispose()

    def check(self) -> None:
        """Raise DataDamaged where the catalogue contradicts itself, an index its table say.

        SQLite only. Reads everything, in about a second for a gigabyte that is in memory; what no other
        part of the file tells (a language, metadata, most bits of a vector) may be damaged unnoticed.
        """
        if self._engine.dialect.name == "sqlite":
            with self._read() as db:
                found = db.exec_driver_sql("PRAGMA integrity_check(1)").scalars().all()
            if found != ["ok"]:
                raise _damaged(self._engine, found[0])

    # --- recordings

    def register(
        self,
        new: NewRecording,
        place: Callable[[], None],
        *,
        within: Set[str] | None = None,
        once: Once | None = None,
        admission: Admission = FREELY,
    ) -> tuple[Recording, bool]:
        """Make a pending recording, or find the one of its collection that has these bytes already.

        Returns (recording, created). `place` stores the bytes; it runs under the write lock, before the
        row exists, so no row is ever without its bytes and no sweep can take them between. A recording
        that failed with `processing_failed` is tried afresh when its bytes come again. Raises IdConflict
        where the id belongs to another recording that the caller may see; QuotaExceeded or QueueFull where
        its `admission` leaves no room for a new one; DiskFull.

        Of the requests that are `once` the same, within ONCE_KEPT_S, only the first that succeeds does
        anything; the others get what it got: its recording as it is now, or, if that was deleted since, a
        `failed` one that says so, of which nothing was kept but its id and its time. IdempotencyMismatch
        where a request of that name said something else.
        """
        with self._write() as db:
            if once is not None and (before := self._done_before(db, once, new)) is not None:
                return before
            recording, created = self._register(db, new, place, within, admission)
            if once is not None:
                _remember(db, once, recording, created)
            return recording, created

    def _register(
        self,
        db: sa.Connection,
        new: NewRecording,
        place: Callable[[], None],
        within: Set[str] | None,
        admission: Admission,
    ) -> tuple[Recording, bool]:
        same = (_recordings.c.collection == new.collection) & (_recordings.c.sha256 == new.sha256)
        if (found := _one(db, same)) is not None:
            place()
            if found.error_code == ProcessingFailed.code:
                self._set(db, found.key, status="pending", attempts=0, error_code=None, error_detail=None)
            return self._by_key(db, found.key), False
        if _exists(db, _named(new.id, within)):
            raise IdConflict(f"The id {new.id!r} belongs to another recording.")
        _admit(db, admission, new.size_bytes)
        place()
        values = {field: getattr(new, field) for field in NewRecording.__dataclass_fields__}
        values["metadata"] = dict(new.metadata)
        now = datetime.now(UTC).replace(tzinfo=None)
        values |= {"status": "pending", "attempts": 0, "created_at": now, "uploaded_by": admission.key}
        insert = sa.insert(_recordings).values(values)
        row = db.execute(insert.returning(_recordings.c.key)).one()
        fault("catalog.registered")
        return self._by_key(db, row.key), True

    def _done_before(self, db: sa.Connection, once: Once, new: NewRecording) -> tuple[Recording, bool] | None:
        row = db.execute(sa.select(_once).where(_once.c.name == once.name)).one_or_none()
        if row is None or row.kept_until < time.time():
            return None
        if row.request != once.request:
            raise IdempotencyMismatch("The key was used for another request: other bytes, or other fields.")
        found = _one(db, _recordings.c.key == row.recording)
        if found is None:
            said = {field: getattr(new, field) for field in NewRecording.__dataclass_fields__} | {
                "id": row.id
            }
            found = Recording(
                **said,
                key=row.recording,
                created_at=row.created_at,
                status="failed",
                duration_s=None,
                segments=None,
                model=None,
                error_code=RecordingNotFound.code,
                error_detail="The recording was deleted since.",
                attempts=0,
            )
        return found, row.created

    def forget_done(self) -> None:
        """Drop what was remembered of requests that were to be done once, where its time is over."""
        with self._read() as db:
            if not _exists(db, _once.c.kept_until < time.time()):
                return
        with self._write() as db:
            db.execute(sa.delete(_once).where(_once.c.kept_until < time.time()))

    def expect(self, least: int, most: int, admission: Admission, *, within: Set[str] | None = None) -> None:
        """Raise what `register` would for a recording of which `least` to `most` bytes are still to come.

        Not so where it may prove to be one that is there, since some recording that the caller may see has as
        many bytes: that is known when they have come.
        """
        if admission.is_free:
            return
        with self._read() as db:
            try:
                _admit(db, admission, least)
            except (QuotaExceeded, QueueFull):
                if not _exists(db, _recordings.c.size_bytes.between(least, most) & _inside(within)):
                    raise

    def held(self) -> dict[str, Held]:
        """What each API key that uploaded anything, by its id, has in the library."""
        uploader = _recordings.c.uploaded_by
        query = sa.select(uploader, *_HELD).where(uploader.is_not(None)).group_by(uploader)
        with self._read() as db:
            return {key: Held(*held) for key, *held in db.execute(query)}

    def get(self, recording_id: str, *, within: Set[str] | None = None) -> Recording:
        """Raises RecordingNotFound, and AmbiguousId where several collections have such a one."""
        with self._read() as db:
            return _only(db, recording_id, within)

    def by_key(self, keys: Sequence[int]) -> dict[int, Recording]:
        """Those of the recordings that (still) exist and are ready."""
        found: dict[int, Recording] = {}
        with self._read() as db:
            for some in _chunks(keys):
                wanted = _recordings.c.key.in_(some) & (_recordings.c.status == "ready")
                rows = db.execute(sa.select(*_RECORDING_COLUMNS).where(wanted))
                found |= {row.key: _recording(row) for row in rows}
        return found

    def page(
        self,
        *,
        collection: str | None,
        status: str | None,
        before: Place | None,
        limit: int,
        within: Set[str] | None = None,
        wanted: Filter | None = None,
    ) -> list[Recording]:
        """Up to `limit` recordings, newest first, of those `wanted` that stand behind `before`."""
        place = [_recordings.c[field] for field in Place._fields]
        query = sa.select(*_RECORDING_COLUMNS).where(_inside(within)).limit(limit)
        if wanted is not None:
            query = query.where(self._meant(wanted, None))
        query = query.order_by(*(column.desc() for column in place))
        if collection is not None:
            query = query.where(_recordings.c.collection == collection)
        if status is not None:
            query = query.where(_recordings.c.status == status)
        if before is not None:
            last = [sa.literal(value, column.type) for value, column in zip(before, place, strict=True)]
            query = query.where(sa.tuple_(*place) < sa.tuple_(*last))
        with self._read() as db:
            return [_recording(row) for row in db.execute(query)]

    def amend(
        self,
        recording_id: str,
        change: Callable[[Recording], tuple[str | None, Mapping[str, Any]]],
        *,
        within: Set[str] | None = None,
    ) -> Recording:
        """Give a recording the `lang` and `metadata` that `change` makes of what it is; nobody writes
        meanwhile.

        What `change` raises leaves all as it was. Its vectors, its status and its place in lists stay.
        Raises as `get` does.
        """
        with self._write() as db:
            found = _only(db, recording_id, within)
            lang, metadata = change(found)
            self._set(db, found.key, lang=lang, metadata=dict(metadata))
            return self._by_key(db, found.key)

    def delete(
        self,
        recording_id: str,
        *,
        within: Set[str] | None = None,
        check: Callable[[Recording], None] | None = None,
    ) -> Recording:
        """Remove a recording with its segments, unless `check` raises. Raises as `get` does."""
        with self._write() as db:
            found = _only(db, recording_id, within)
            if check is not None:
                check(found)
            _delete(db, [found.key])
        return found

    def delete_some(
        self, wanted: Filter, *, status: str | None, after: int, limit: int
    ) -> tuple[int, list[str]]:
        """Remove the first `limit` recordings with a key above `after` that pass a filter and have that
        status.

        All of them or, if it fails, none. Returns the last one's key (`after` if there was none) and the
        sha256s.
        """
        query = sa.select(_recordings.c.key, _recordings.c.sha256).order_by(_recordings.c.key).limit(limit)
        query = query.where((_recordings.c.key > after) & self._meant(wanted, status))
        with self._write() as db:
            rows = db.execute(query).all()
            _delete(db, [row.key for row in rows])
        return (rows[-1].key if rows else after), [row.sha256 for row in rows]

    def count(self, wanted: Filter, *, status: str | None) -> int:
        """How many recordings pass a filter and have that status, or any."""
        with self._read() as db:
            query = sa.select(sa.func.count()).select_from(_recordings).where(self._meant(wanted, status))
            return int(db.execute(query).scalar_one())

    def sweep(self, sha256s: Sequence[str], remove: Callable[[str], None]) -> None:
        """Call `remove` for each content that no recording has, while nobody can register it."""
        for some in _chunks(sha256s):
            with self._write() as db:
                used = sa.select(_recordings.c.sha256).where(_recordings.c.sha256.in_(some))
                for sha256 in set(some) - set(db.execute(used).scalars()):
                    remove(sha256)

    def has_content(self, sha256: str) -> bool:
        """Whether some recording has these bytes."""
        with self._read() as db:
            return _exists(db, _recordings.c.sha256 == sha256)

    def counts(self) -> dict[str, int]:
        """Recordings by status; statuses without any are absent."""
        query = sa.select(_recordings.c.status, sa.func.count()).group_by(_recordings.c.status)
        with self._read() as db:
            return {status: count for status, count in db.execute(query)}

    def failures(self) -> dict[str, int]:
        """Failed recordings by the code of their error."""
        query = sa.select(_recordings.c.error_code, sa.func.count()).group_by(_recordings.c.error_code)
        with self._read() as db:
            found = db.execute(query.where(_recordings.c.status == "failed"))
            return {code or "processing_failed": count for code, count in found}

    def oldest_pending(self) -> datetime | None:
        """When the recording that has waited longest arrived (UTC), or None where none waits."""
        query = sa.select(sa.func.min(_recordings.c.created_at)).where(_recordings.c.status == "pending")
        with self._read() as db:
            waiting: datetime | None = db.execute(query).scalar_one()
        return waiting

    # --- models

    def active(self) -> StoredModel | None:
        """The model that this library is searched with; None before it was first opened with one."""
        with self._read() as db:
            return _active(db)

    def adopt(self, model: StoredModel) -> StoredModel:
        """Make this the active model where nothing is ready by another; returns which is active now."""
        with self._read() as db:
            if _active(db) == model:
                return model
        with self._write() as db:
            active = _active(db)
            if active is not None and active.fingerprint == model.fingerprint:
                model = model if model.name else active
            elif active is not None and _exists(db, _recordings.c.status == "ready"):
                return active
            _activate(db, model)
            return model

    def reindexing(self, model: StoredModel) -> "Reindexing":
        """The way of this library to that model."""
        return Reindexing(self, model)

    def keep(self, fingerprint: str) -> None:
        """Say that somebody still answers by a model that may have been retired."""
        retired = (_models.c.fingerprint == fingerprint) & (_models.c.state == "retired")
        with self._write() as db:
            db.execute(sa.update(_models).where(retired).values(kept_until=time.time() + RETIRED_KEPT_S))

    def forget_retired(self) -> None:
        """Drop the vectors of models that were retired and that nobody said to use for RETIRED_KEPT_S."""
        unused = (_models.c.state == "retired") & (_models.c.kept_until < time.time())
        with self._read() as db:
            forgotten = db.execute(sa.select(_models.c.fingerprint).where(unused)).scalars().all()
            last = db.execute(sa.select(sa.func.max(_recordings.c.key))).scalar_one() if forgotten else None
        for fingerprint in forgotten:
            still = (_models.c.fingerprint == fingerprint) & unused
            for first in range(0, (last or 0) + 1, _AT_ONCE):
                with self._write() as db:
                    if not _exists(db, still):  # somebody has begun to go back to it
                        return
                    for table in (_segments, _reindexing):
                        here = table.c.recording.between(first, first + _AT_ONCE - 1)
                        db.execute(sa.delete(table).where(here & (table.c.model == fingerprint)))
                fault("catalog.retiring")
            with self._write() as db:
                db.execute(sa.delete(_models).where(still))

    # --- jobs

    def lease(self, owner: str, *, limit: int, lease_s: Seconds, model: str | None = None) -> list[Recording]:
        """Take up to `limit` recordings to process; `processing` and ours until the lease runs out.

        A recording whose worker died is leased alone, and after those that no worker died of: one that
        kills its worker takes no others with it, and a worker that is killed again and again does not
        spend all attempts of one recording; after MAX_ATTEMPTS such deaths it fails with `processing_failed`.
        Raises DataMismatch where `model`, the one whose vectors are to be made, is not the active one.
        """
        with self._write() as db:
            active = _active(db)
            if model is not None and active is not None and active.fingerprint != model:
                raise DataMismatch(
                    f"The library was switched to another model, {active.titled()}. Set CLASP_MODEL to that."
                )
            if _exists(db, _models.c.hold_until > time.time()):  # a switch is near, or was just now
                return []
            return _leased(db, self._jobs.lease(db, owner, limit, lease_s))

    def extend_leases(self, owner: str, lease_s: Seconds) -> None:
        """Say that `owner` is alive and still at work on everything it leased."""
        with self._write() as db:
            self._jobs.extend(db, owner, lease_s)

    def release(self, owner: str, *, died: bool = False) -> None:
        """Give back what `owner` has leased; without counting an attempt, unless it `died` at work."""
        with self._write() as db:
            self._jobs.release(db, owner, died)

    def forget_leases(self) -> None:
        """Give back what anybody has leased, for whatever model: in a copy, where nobody is at work."""
        with self._write() as db:
            self._jobs.release(db, None, died=False)
            _Jobs(_reindexing, _reindexing.c.recording, sa.true()).release(db, None, died=False)

    def complete(
        self, key: int, owner: str, *, duration_s: Seconds, model: str, segments: Sequence[EmbeddedSegment]
    ) -> bool:
        """Store a recording's segments and make it ready, unless the lease was lost or it was deleted.

        Where `model` is not the active one the recording goes back to waiting, for a worker that has that.
        """
        with self._write() as db:
            active = _active(db)
            if active is None or active.fingerprint != model:
                attempts = _recordings.c.attempts - 1
                self._jobs.finish(db, key, owner, status="pending", attempts=attempts)
                return False
            if not self._jobs.finish(
                db, key, owner, status="ready", duration_s=duration_s, model=model, segments=len(segments)
            ):
                return False
            _store(db, key, model, segments)
            _note_change(db, [key])
            fault("catalog.completed")
            return True

    def fail(self, key: int, owner: str, *, code: str, detail: str) -> bool:
        """Record why a recording cannot be indexed, unless the lease was lost or it was deleted."""
        with self._write() as db:
            return self._jobs.finish(db, key, owner, status="failed", error_code=code, error_detail=detail)

    # --- what a replica follows

    def last_change(self) -> tuple[int, str]:
        """The point that the change sequence has reached: its newest number and that change's token."""
        query = sa.select(_changes.c.seq, _changes.c.token).order_by(_changes.c.seq.desc()).limit(1)
        with self._read() as db:
            row = db.execute(query).one_or_none()
        return (0, "") if row is None else (int(row.seq), row.token)

    def holds(self, point: tuple[int, str]) -> bool:
        """Whether this sequence went through that point; not so if it was put back to an earlier state."""
        seq, token = point
        query = sa.select(_changes.c.token).where(_changes.c.seq == seq)
        with self._read() as db:
            return seq == 0 or db.execute(query).scalar_one_or_none() == token

    def changes(self, after: int, *, limit: int, model: str, dim: int) -> Changes | None:
        """The next `limit` changes after number `after`; None if there are none.

        With them come the vectors of those recordings as they are now, where they are by `model`. A
        change that a later one makes needless is left out, and so is one of another model's vectors.
        """
        later = _changes.alias()
        ours = [table.c.model.is_(None) | (table.c.model == model) for table in (_changes, later)]
        again = (later.c.recording == _changes.c.recording) & (later.c.seq > _changes.c.seq) & ours[1]
        query = sa.select(_changes).where((_changes.c.seq > after) & ours[0] & ~sa.exists().where(again))
        newest = sa.select(_changes).where(_changes.c.seq > after).order_by(_changes.c.seq.desc()).limit(1)
        with self._read() as db:
            end = db.execute(newest).one_or_none()
            if end is None:
                return None
            upto = query.where(_changes.c.seq <= end.seq).order_by(_changes.c.seq)
            rows = db.execute(upto.limit(limit)).all()
            end = rows[-1] if len(rows) == limit else end
            keys = frozenset(row.recording for row in rows)
            wanted = (_segments.c.model == model) & _segments.c.recording.in_(keys)
            ready = (_recordings.c.key == _segments.c.recording) & (_recordings.c.status == "ready")
            columns = (_segments.c.recording, _segments.c.ordinal, _segments.c.vector)
            found = db.execute(sa.select(*columns).where(wanted & ready)).all()
        lost = bytes(4 * dim)
        stored = b"".join(row.vector if len(row.vector) == len(lost) else lost for row in found)
        vectors = np.frombuffer(stored, "<f4").reshape(-1, dim)
        owners = np.array([row.recording for row in found], np.int64)
        with np.errstate(over="ignore", invalid="ignore"):  # a flipped bit makes 1e38 of a number, or a NaN
            damaged = owners[~(np.abs(np.linalg.norm(vectors, axis=1) - 1) < _UNIT_WITHIN)]
        whole = ~np.isin(owners, damaged)
        return Changes(
            seq=end.seq,
            token=end.token,
            recordings=keys,
            owners=owners[whole],
            ordinals=np.array([row.ordinal for row in found], np.int64)[whole],
            vectors=vectors[whole],
            damaged=frozenset(damaged.tolist()),
        )

    def embed_anew(self, keys: Set[int], model: str) -> None:
        """Let ready recordings wait for a worker again, and forget the vectors that `model` has of them."""
        with self._write() as db:
            for some in _chunks(sorted(keys)):
                ready = _recordings.c.key.in_(some) & (_recordings.c.status == "ready")
                afresh = {"status": "pending", "attempts": 0, "model": None, "segments": None}
                db.execute(sa.update(_recordings).where(ready).values(afresh))
                theirs = _segments.c.recording.in_(some) & (_segments.c.model == model)
                db.execute(sa.delete(_segments).where(theirs))
            _note_change(db, sorted(keys))

    def spans(self, segments: Sequence[tuple[int, int]], *, model: str) -> dict[tuple[int, int], Span]:
        """A model's segments, each named by (recording key, ordinal), as far as they are there."""
        named = sa.tuple_(_segments.c.recording, _segments.c.ordinal).in_(segments)
        columns = [_segments.c[name] for name in ("recording", "ordinal", *Span._fields)]
        with self._read() as db:
            rows = db.execute(sa.select(*columns).where(named & (_segments.c.model == model)))
            return {(row.recording, row.ordinal): Span(*row[2:]) for row in rows}

    def matching(self, wanted: Filter) -> NDArray[np.int64]:
        """Keys of the ready recordings that pass a filter, ascending."""
        # sorted here: asked for them in order, SQLite walks all that is ready rather than a few collections
        query = sa.select(_recordings.c.key).where(self._meant(wanted, "ready"))
        with self._read() as db:
            return np.sort(np.array(db.execute(query).scalars().all(), np.int64))

    # --- copies

    def copy_to(self, path: Path) -> None:
        """Write what is committed at this moment to a new file, while others go on reading and writing.

        SQLite only. Nothing of what was deleted is in it, as there may be in the pages of a file that
        are free. It is not on disk yet when this returns.
        """
        with _intact(self._engine), closing(self._engine.raw_connection()) as db:
            db.cursor().execute("VACUUM INTO ?", (str(path),))

    # --- inside

    @contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        """One consistent snapshot."""
        with _intact(self._engine), self._engine.connect() as db, db.begin():
            yield db

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        """Sole writer, durable when the block ends. Raises DiskFull, and nothing is written then."""
        engine = self._engine
        try:
            with _intact(engine), engine.connect().execution_options(clasp_write=True) as db, db.begin():
                yield db
        except sa.exc.OperationalError as error:
            if _is_for_lack_of_room(error):
                raise DiskFull("The disk that holds the catalogue is full.") from error
            raise

    def _meant(self, wanted: Filter, status: str | None) -> sa.ColumnElement[bool]:
        """That a recording passes a filter and has that status, or any."""
        passes = wanted.where(_recordings, self._engine.dialect.name)
        return passes if status is None else (_recordings.c.status == status) & passes

    def _by_key(self, db: sa.Connection, key: int) -> Recording:
        found = _one(db, _recordings.c.key == key)
        assert found is not None
        return found

    def _set(self, db: sa.Connection, key: int, **values: object) -> None:
        db.execute(sa.update(_recordings).where(_recordings.c.key == key).values(**values))


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a re-index has come: of `total` ready recordings, the model has `embedded` some, and `left`
    are still to be tried."""

    embedded: int
    left: int
    total: int


class Reindexing:
    """The ready recordings as a queue of work for a model that is to become the active one, and the switch.

    While it goes on the active model's vectors answer, and recordings come and go. What is embedded
    stays embedded whoever is killed; any number of processes may share the work, in the manner of
    `Catalog`'s own leases, of which `Ingester` therefore need not know which it holds. The work of each
    recording that failed is kept, with its reason, until the switch makes the recording itself so.
    """

    def __init__(self, catalog: Catalog, model: StoredModel) -> None:
        self.model = model
        self.completed = 0
        """Recordings embedded through this object."""
        self.holding = False
        """Whether arrivals wait while this object leases: under steady uploads there is no other end."""
        self._catalog = catalog
        self._jobs = _Jobs(_reindexing, _reindexing.c.recording, _reindexing.c.model == model.fingerprint)

    def lease(self, owner: str, *, limit: int, lease_s: Seconds, model: str | None = None) -> list[Recording]:
        """As `Catalog.lease`: up to `limit` ready recordings that the model has no vectors of."""
        assert model in (None, self.model.fingerprint)
        with self._catalog._write() as db:
            if self._is_active(db):
                return []
            self._announce(db)
            self._hold(db, lease_s)
            keys = self._jobs.lease(db, owner, limit, lease_s)
            if not keys and self._enqueue(db):
                fault("reindex.enqueued")
                keys = self._jobs.lease(db, owner, limit, lease_s)
            return _leased(db, keys)

    def extend_leases(self, owner: str, lease_s: Seconds) -> None:
        with self._catalog._write() as db:
            self._jobs.extend(db, owner, lease_s)
            self._hold(db, lease_s)

    def release(self, owner: str, *, died: bool = False) -> None:
        with self._catalog._write() as db:
            self._jobs.release(db, owner, died)

    def complete(
        self, key: int, owner: str, *, duration_s: Seconds, model: str, segments: Sequence[EmbeddedSegment]
    ) -> bool:
        """Store a recording's segments by this model; searches see them from the switch on."""
        assert model == self.model.fingerprint
        with self._catalog._write() as db:
            if not self._jobs.finish(
                db, key, owner, status="ready", duration_s=duration_s, segments=len(segments)
            ):
                return False
            _store(db, key, model, segments)
            _note_change(db, [key], model)
            fault("reindex.completed")
        self.completed += 1
        return True

    def fail(self, key: int, owner: str, *, code: str, detail: str) -> bool:
        """Record why this model cannot have the recording; it goes on being found until the switch."""
        with self._catalog._write() as db:
            return self._jobs.finish(db, key, owner, status="failed", error_code=code, error_detail=detail)

    def progress(self) -> Progress:
        with self._catalog._read() as db:
            total, jobs = self._counts(db)
        embedded = jobs.get("ready", 0)
        return Progress(embedded, total - embedded - jobs.get("failed", 0), total)

    def _counts(self, db: sa.Connection) -> tuple[int, dict[str, int]]:
        """Ready recordings; and jobs by status, of which no other recording has any."""
        ready = sa.select(sa.func.count()).where(_recordings.c.status == "ready")
        jobs = sa.select(_reindexing.c.status, sa.func.count()).where(self._jobs.scope)
        by_status = {status: count for status, count in db.execute(jobs.group_by(_reindexing.c.status))}
        return int(db.execute(ready).scalar_one()), by_status

    def is_done(self) -> bool:
        """Whether the model is the active one already."""
        with self._catalog._read() as db:
            return self._is_active(db)

    def switch(self) -> dict[str, str] | None:
        """Make the model the active one, unless a ready recording is yet to be tried by it: then None.

        In one transaction each recording becomes what this model made of it: `ready`, or `failed` with
        the reason; what the model before could not have, for reasons of ours, waits to be tried anew, and
        so does what is being embedded by it at this moment. Returns (id: reason) of those that failed.
        Raises ProcessingFailed where that would be all of them, or many, for reasons of ours (a broken
        installation, a disk that is not mounted): the next run tries those anew.
        """
        with self._catalog._write() as db:
            if self._is_active(db):
                _retire_others(db, self.model)
                return {}
            if _exists(db, (_recordings.c.status == "ready") & ~self._tried):
                return None
            ours = self._jobs.scope & (_reindexing.c.error_code == ProcessingFailed.code)
            lost = db.execute(sa.select(sa.func.count()).where(ours)).scalar_one()
            total, jobs = self._counts(db)
            if not lost or (lost <= max(TOLERABLE, total // 10) and jobs.get("ready")):
                return self._switch(db)
            db.execute(sa.delete(_reindexing).where(ours))
        raise ProcessingFailed(
            f"{lost} of {total} recordings could not be embedded by {self.model.titled()}, for reasons that"
            " are not theirs; the log has them. The library stays with the model that it has. Run it again"
            " to try them anew."
        )

    def _switch(self, db: sa.Connection) -> dict[str, str]:
        ready, update = _recordings.c.status == "ready", sa.update(_recordings)
        job = (_reindexing.c.recording == _recordings.c.key) & self._jobs.scope
        ours = _recordings.c.error_code == ProcessingFailed.code
        afresh = {"status": "pending", "attempts": 0, "error_code": None, "error_detail": None}
        db.execute(update.where((_recordings.c.status == "failed") & ours).values(afresh))
        at_work = (_recordings.c.status == "processing") & _recordings.c.lease_owner.is_not(None)
        free = {"lease_owner": None, "lease_until": None}
        back = {"status": "pending", "attempts": _recordings.c.attempts - 1} | free
        db.execute(update.where(at_work).values(back))

        query = sa.select(_recordings.c.key, _recordings.c.id, _reindexing.c.error_detail)
        failures = db.execute(query.where(ready & job & (_reindexing.c.status == "failed"))).all()
        taken = ("status", "duration_s", "segments", "error_code", "error_detail")
        made = {name: _reindexing.c[name] for name in taken} | {"model": self.model.fingerprint}
        db.execute(update.where(ready & job).values(made))
        still_ready = sa.select(_recordings.c.key).where(ready)
        of_others = _reindexing.c.recording.not_in(still_ready)
        db.execute(sa.delete(_reindexing).where(self._jobs.scope | of_others))
        _note_change(db, [row.key for row in failures])
        _activate(db, self.model)
        hold_until = time.time() + FOLLOW_WITHIN_S
        db.execute(sa.update(_models).where(self._row).values(hold_until=hold_until))
        _retire_others(db, self.model)
        fault("reindex.switching")
        return {row.id: row.error_detail for row in failures}

    @property
    def _row(self) -> sa.ColumnElement[bool]:
        return _models.c.fingerprint == self.model.fingerprint

    @property
    def _tried(self) -> sa.ColumnElement[bool]:
        """That the model has vectors of a recording, or a reason why not."""
        job = (_reindexing.c.recording == _recordings.c.key) & self._jobs.scope
        return sa.exists().where(job & _reindexing.c.status.in_(("ready", "failed")))

    def _is_active(self, db: sa.Connection) -> bool:
        active = _active(db)
        return active is not None and active.fingerprint == self.model.fingerprint

    def _announce(self, db: sa.Connection) -> None:
        if not _exists(db, self._row & (_models.c.state == "coming")):
            _put(db, self.model, "coming")

    def _hold(self, db: sa.Connection, hold_s: Seconds) -> None:
        if self.holding:
            coming = self._row & (_models.c.state == "coming")
            db.execute(sa.update(_models).where(coming).values(hold_until=time.time() + hold_s))

    def _enqueue(self, db: sa.Connection) -> bool:
        """Make jobs of ready recordings that have none; those that arrived since the last time, mostly."""
        total, jobs = self._counts(db)
        if total == sum(jobs.values()):
            return False
        job = (_reindexing.c.recording == _recordings.c.key) & self._jobs.scope
        model, pending, none = sa.literal(self.model.fingerprint), sa.literal("pending"), sa.literal(0)
        query = sa.select(_recordings.c.key, model, pending, none).where(_recordings.c.status == "ready")
        query = query.where(~sa.exists().where(job)).order_by(_recordings.c.key).limit(10 * _AT_ONCE)
        columns = ["recording", "model", "status", "attempts"]
        return db.execute(sa.insert(_reindexing).from_select(columns, query)).rowcount > 0


class _Jobs:
    """Leases on rows of one table. Each function runs inside a writing transaction of the catalogue."""

    def __init__(self, table: sa.Table, key: "sa.Column[int]", scope: sa.ColumnElement[bool]) -> None:
        self.scope = scope
        self._table = table
        self._key = key

    def lease(self, db: sa.Connection, owner: str, limit: int, lease_s: Seconds) -> list[int]:
        """Keys of what is `owner`'s from now on."""
        now, job = time.time(), self._table.c
        expired = (job.status == "processing") & (job.lease_until < now)
        db.execute(
            sa.update(self._table)
            .where(self.scope & expired & (job.attempts >= MAX_ATTEMPTS))
            .values(
                status="failed",
                error_code=ProcessingFailed.code,
                error_detail=f"Processing was cut short {MAX_ATTEMPTS} times; upload it again to retry.",
                lease_owner=None,
                lease_until=None,
            )
        )
        free = (job.status == "pending") | expired
        query = sa.select(self._key.label("key"), job.attempts).where(self.scope & free)
        taken = _without_suspects(db.execute(query.order_by(job.attempts, self._key).limit(limit)).all())
        db.execute(
            sa.update(self._table)
            .where(self.scope & self._key.in_(taken))
            .values(
                status="processing",
                lease_owner=owner,
                lease_until=now + lease_s,
                attempts=job.attempts + 1,
            )
        )
        return taken

    def extend(self, db: sa.Connection, owner: str, lease_s: Seconds) -> None:
        db.execute(sa.update(self._table).where(self._held(owner)).values(lease_until=time.time() + lease_s))

    def release(self, db: sa.Connection, owner: str | None, died: bool) -> None:
        db.execute(
            sa.update(self._table)
            .where(self._held(owner))
            .values(
                # an expired lease rather than `pending`: `lease` then applies the limit of attempts
                lease_until=0.0 if died else None,
                status="processing" if died else "pending",
                lease_owner=None,
                attempts=self._table.c.attempts - (0 if died else 1),
            )
        )

    def finish(self, db: sa.Connection, key: int, owner: str, **values: object) -> bool:
        """Whether `owner` held it; if so it is what `values` say."""
        done = db.execute(
            sa.update(self._table)
            .where(self._held(owner) & (self._key == key))
            .values(**values, lease_owner=None, lease_until=None)
        )
        return done.rowcount == 1

    def _held(self, owner: str | None) -> sa.ColumnElement[bool]:
        """What is leased by `owner`, or by anybody."""
        job = self._table.c
        theirs = job.lease_owner.is_not(None) if owner is None else job.lease_owner == owner
        return self.scope & theirs & (job.status == "processing")


def _chunks(values: Sequence[T]) -> Iterator[Sequence[T]]:
    """Few enough at a time for one statement's parameters, and for the write lock not to be felt."""
    return (values[start : start + _AT_ONCE] for start in range(0, len(values), _AT_ONCE))


_AT_ONCE = 1000


def _note_change(db: sa.Connection, keys: Sequence[int], model: str | None = None) -> None:
    """Append to the change sequence, in the transaction that makes the change.

    `model` is the one that alone is concerned, if it is one: replicas of others have nothing to do.
    """
    if keys:
        rows = [{"recording": key, "token": secrets.token_hex(8), "model": model} for key in keys]
        db.execute(sa.insert(_changes), rows)


def _remember(db: sa.Connection, once: Once, recording: Recording, created: bool) -> None:
    db.execute(sa.delete(_once).where(_once.c.name == once.name))
    about = {"recording": recording.key, "id": recording.id, "created_at": recording.created_at}
    kept_until = time.time() + ONCE_KEPT_S
    row = {"name": once.name, "request": once.request, "created": created, "kept_until": kept_until}
    db.execute(sa.insert(_once).values(row | about))


def _delete(db: sa.Connection, keys: Sequence[int]) -> None:
    for table, column in ((_segments, "recording"), (_reindexing, "recording"), (_recordings, "key")):
        db.execute(sa.delete(table).where(table.c[column].in_(keys)))
    _note_change(db, keys)
    fault("catalog.deleted")


def _store(db: sa.Connection, key: int, model: str, segments: Sequence[EmbeddedSegment]) -> None:
    """Make these the vectors that `model` has of a recording."""
    old = (_segments.c.recording == key) & (_segments.c.model == model)
    db.execute(sa.delete(_segments).where(old))
    if segments:
        rows = [
            {
                "recording": key,
                "model": model,
                "ordinal": ordinal,
                "start_s": segment.start_s,
                "end_s": segment.end_s,
                "vector": segment.vector.astype("<f4").tobytes(),
                "transcript": segment.transcript,
            }
            for ordinal, segment in enumerate(segments)
        ]
        db.execute(sa.insert(_segments), rows)


def _active(db: sa.Connection) -> StoredModel | None:
    columns = (_models.c.fingerprint, _models.c.name, _models.c.dim)
    row = db.execute(sa.select(*columns).where(_models.c.state == "active")).one_or_none()
    return None if row is None else StoredModel(*row)


def _activate(db: sa.Connection, model: StoredModel) -> None:
    others = (_models.c.state == "active") & (_models.c.fingerprint != model.fingerprint)
    _retire(db, others)
    _put(db, model, "active")


def _put(db: sa.Connection, model: StoredModel, state: str) -> None:
    row = {"fingerprint": model.fingerprint, "name": model.name, "dim": model.dim, "state": state}
    known = _models.c.fingerprint == model.fingerprint
    if not db.execute(sa.update(_models).where(known).values(row)).rowcount:
        db.execute(sa.insert(_models).values(row))


def _retire(db: sa.Connection, which: sa.ColumnElement[bool]) -> None:
    retired = {"state": "retired", "kept_until": time.time() + RETIRED_KEPT_S, "hold_until": None}
    db.execute(sa.update(_models).where(which).values(retired))


def _retire_others(db: sa.Connection, model: StoredModel) -> None:
    """Give up the re-indexes to other models at which nobody is at work. One that goes on says so again."""
    alive = sa.select(_reindexing.c.model).where(_reindexing.c.lease_until > time.time())
    left = (_models.c.state == "coming") & (_models.c.fingerprint != model.fingerprint)
    _retire(db, left & _models.c.fingerprint.not_in(alive))


_HELD = (
    sa.func.count(),
    sa.func.coalesce(sa.func.sum(_recordings.c.size_bytes), 0),
    sa.func.coalesce(sa.func.sum(_recordings.c.duration_s), 0.0),
)


def _admit(db: sa.Connection, admission: Admission, size_bytes: int) -> None:
    """Raises QuotaExceeded or QueueFull where one more recording, of so many bytes, is too much."""
    if admission.is_counted:
        row = db.execute(sa.select(*_HELD).where(_recordings.c.uploaded_by == admission.key)).one()
        admission.quota.check(Held(*row), size_bytes)
    if admission.max_pending:
        waiting = sa.select(_recordings.c.key).where(_recordings.c.status == "pending")
        if db.execute(waiting.limit(1).offset(admission.max_pending - 1)).first() is not None:
            raise QueueFull(
                f"{admission.max_pending} recordings are waiting to be embedded; send it again later."
            )


def _is_for_lack_of_room(error: sa.exc.OperationalError) -> bool:
    """SQLITE_FULL, or PostgreSQL's class of it."""
    cause = error.orig
    code = getattr(cause, "sqlite_errorcode", None)
    return code == sqlite3.SQLITE_FULL or getattr(cause, "sqlstate", None) == "53100"


def _exists(db: sa.Connection, condition: sa.ColumnElement[bool]) -> bool:
    """Whether there is such a row, in the table that the condition is about."""
    return bool(db.execute(sa.select(sa.exists().where(condition))).scalar_one())


def _leased(db: sa.Connection, keys: Sequence[int]) -> list[Recording]:
    chosen = _recordings.c.key.in_(keys)
    rows = db.execute(sa.select(*_RECORDING_COLUMNS).where(chosen).order_by(_recordings.c.key))
    return [_recording(row) for row in rows]


def _without_suspects(candidates: Sequence[Any]) -> list[int]:
    """Keys to lease together: the first alone if it has failed before, else all that never have."""
    if candidates and candidates[0].attempts:
        return [candidates[0].key]
    return [candidate.key for candidate in candidates if not candidate.attempts]


def _inside(within: Set[str] | None) -> sa.ColumnElement[bool]:
    """That a recording is in one of the collections that may be seen."""
    return sa.true() if within is None else _recordings.c.collection.in_(sorted(within))


def _named(recording_id: str, within: Set[str] | None) -> sa.ColumnElement[bool]:
    return (_recordings.c.id == recording_id) & _inside(within)


def _only(db: sa.Connection, recording_id: str, within: Set[str] | None) -> Recording:
    rows = db.execute(sa.select(*_RECORDING_COLUMNS).where(_named(recording_id, within)).limit(2)).all()
    if not rows:
        raise RecordingNotFound(f"There is no recording {recording_id!r}.")
    if len(rows) > 1:
        raise AmbiguousId(f"Several collections have a recording {recording_id!r}; name the collection.")
    return _recording(rows[0])


def _one(db: sa.Connection, condition: sa.ColumnElement[bool]) -> Recording | None:
    row = db.execute(sa.select(*_RECORDING_COLUMNS).where(condition)).one_or_none()
    return None if row is None else _recording(row)


def _recording(row: Any) -> Recording:  # noqa: ANN401 - SQLAlchemy rows are untyped
    return Recording(**row._mapping)


_WRITERS = 0x636C617370
"""PostgreSQL's name of the lock that every writing transaction holds: "clasp"."""


def _create_engine(url: str | sa.URL, *, migrating: bool = False) -> sa.Engine:
    """`migrating` leaves SQLite's foreign keys unheeded, which can only be said outside of a transaction: to
    change a table there is to make another in its place, and to drop one deletes all that points at it."""
    # errors go into the log, and a statement's values are questions, metadata and transcripts
    engine = sa.create_engine(url, hide_parameters=True)
    if engine.dialect.name != "sqlite":
        # elsewhere writers do not exclude each other by themselves, and leases, sweeps and the order
        # of changes depend on it
        @sa.event.listens_for(engine, "begin")
        def _on_begin_elsewhere(db: sa.Connection) -> None:
            if db.get_execution_options().get("clasp_write", False):
                db.execute(sa.select(sa.func.pg_advisory_xact_lock(_WRITERS)))

        return engine

    # pysqlite's own transaction control begins too late (PEP 249); we begin explicitly instead, and
    # writers take the lock at once, since a read transaction cannot be upgraded safely under load.
    @sa.event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _: object) -> None:  # noqa: ANN401
        connection.isolation_level = None
        heeded = "foreign_keys=OFF" if migrating else "foreign_keys=ON"
        for pragma in ("busy_timeout=60000", "journal_mode=WAL", "synchronous=FULL", heeded):
            connection.execute(f"PRAGMA {pragma}")
        connection.create_function(SQL_FUNCTION, 2, holds, deterministic=True)

    @sa.event.listens_for(engine, "begin")
    def _on_begin(db: sa.Connection) -> None:
        write = db.get_execution_options().get("clasp_write", False)
        db.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


_UNREADABLE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT}


@contextmanager
def _intact(engine: sa.Engine, *, opening: bool = False) -> Iterator[None]:
    """What SQLite says of a damaged file, as DataDamaged. A table that is not there is a damaged one, too, as
    long as we are `opening`; other trouble, with the disk or with permissions, is then an OSError."""
    try:
        yield
    except (json.JSONDecodeError, UnicodeDecodeError) as error:  # of a row
        raise _damaged(engine, str(error)) from error
    except (sa.exc.DatabaseError, sqlite3.DatabaseError) as error:
        reason = error.orig if isinstance(error, sa.exc.DatabaseError) else error
        if not isinstance(reason, sqlite3.Error):
            raise
        code = getattr(reason, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF
        undecodable = "Could not decode to UTF-8" in str(reason)
        if code in _UNREADABLE or undecodable or (opening and code == sqlite3.SQLITE_ERROR):
            raise _damaged(engine, str(reason)) from error
        if opening:
            raise OSError(f"the catalogue {engine.url.database} cannot be opened: {reason}") from error
        raise


def _damaged(engine: sa.Engine, reason: str) -> DataDamaged:
    return DataDamaged(
        f"The catalogue {engine.url.database} is damaged ({' '.join(reason.split())}). Restore the library"
        " from a backup (clasp restore) to another CLASP_DATA_DIR, and keep this one until that is done."
    )


_migrating = threading.Lock()
"""Alembic keeps what it is migrating in module globals."""


def _migrate(url: str | sa.URL, create: bool) -> None:
    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    engine = _create_engine(url, migrating=True)
    try:
        with (
            _intact(engine, opening=True),
            engine.connect().execution_options(clasp_write=True) as db,
            db.begin(),
            _migrating,
        ):
            if not create and not sa.inspect(db).has_table(_recordings.name):
                raise _damaged(engine, "it is empty")
            config.attributes["connection"] = db
            alembic.command.upgrade(config, "head")
            for table in _tables.sorted_tables:  # a column whose name is damaged is met here, and not later
                db.execute(sa.select(table).limit(0))
            fault("catalog.migrated")
    except alembic.util.CommandError as error:
        raise DataMismatch(
            f"The catalogue was written by a newer version of this program ({error}). Use that version, or"
            " another CLASP_DATA_DIR."
        ) from error
    finally:
        engine.dispose()
