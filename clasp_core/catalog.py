"""The truth: recordings, segments, vectors and the order of changes, in one SQL database.

A recording's status is also its job: `pending` until a worker leases it, `processing` while the lease
lasts, then `ready` or `failed`. Every transition is one transaction. Whoever keeps a replica (the
vector index) follows `changes`: each row says "this recording is not what it was", in commit order.

Every vector is stored under the fingerprint of its model, and one model is the active one: what is
`ready` is so by its vectors. `clasp_core.reindex` is how a library comes to have another.

Collections are apart, so that they can belong to tenants who may know nothing of each other: what takes
`within`, the collections that the caller may see (None: all), neither finds nor tells anything of others.
"""

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.dialects import postgresql, sqlite

from clasp_core.database import (
    CHANGES,
    LIBRARY,
    MODELS,
    ONCE,
    RECORDINGS,
    REINDEXING,
    SEGMENTS,
    TURNS,
    WAVEFORMS,
    Database,
    exists,
    lock,
)
from clasp_core.errors import (
    AmbiguousId,
    DataMismatch,
    IdConflict,
    IdempotencyMismatch,
    NoWaveform,
    ProcessingFailed,
    QueueFull,
    QuotaExceeded,
    RecordingNotFound,
)
from clasp_core.faults import fault
from clasp_core.filters import EVERYTHING, Filter
from clasp_core.leases import Leases
from clasp_core.limits import FREELY, Admission, Held
from clasp_core.peaks import Peaks
from clasp_core.types import Embeddings, Seconds

T = TypeVar("T")
Status = Literal["pending", "processing", "ready", "failed"]

RETIRED_KEPT_S: Seconds = 600.0
"""How long a model's vectors outlive their use: services that have yet to follow a switch answer by them."""
ONCE_KEPT_S: Seconds = 86_400.0
"""How long a registration is remembered by the name its request had."""

_UNIT_WITHIN = 1e-3
"""How far from 1 the length of a vector may be."""


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


class CollectionSummary(NamedTuple):
    """What is in a collection: recordings of any status, of which some are `ready` or `failed`; the length of
    those that were decoded, in seconds; and how many segments of them can be found."""

    name: str
    recordings: int
    ready: int
    failed: int
    duration_s: Seconds
    segments: int


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
    collections: tuple[str, ...] = ()
    """The collection that each row's recording is in."""
    seen: int = 0
    """The newest change there was when the vectors were read, `seq` or later. Of two readings of a recording,
    the one with the larger number is the later; with the same, they are the same."""


_RECORDING_COLUMNS = [RECORDINGS.c[field] for field in Recording.__dataclass_fields__]


class Catalog:
    """Thread-safe, and safe to open from several processes at once."""

    def __init__(self, url: str | sa.URL, *, upgrade: bool = True, create: bool = True) -> None:
        """Open, creating or upgrading the schema. DataMismatch where a newer version wrote it, DataDamaged
        where nobody can read it, or there is nothing and it is not to `create`.

        Without `upgrade` it is left as it is, for `database.copy_to` and `has_content` only: an older
        service may be at work in it.
        """
        self.database = Database(url, upgrade=upgrade, create=create)
        self._jobs = Leases(RECORDINGS, RECORDINGS.c.key, sa.true())

    def close(self) -> None:
        self.database.close()

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

        Returns (recording, created). `place` stores the bytes; it runs before the row exists and keeps sweeps
        of them out, so no row is ever without its bytes. Where this raises they may be there already, and
        are to be swept. A recording
        that failed with `processing_failed` is tried afresh when its bytes come again. Raises IdConflict
        where the id belongs to another recording that the caller may see; QuotaExceeded or QueueFull where
        its `admission` leaves no room for a new one; DiskFull.

        Of the requests that are `once` the same, within ONCE_KEPT_S, only the first that succeeds does
        anything; the others get what it got: its recording as it is now, or, if that was deleted since, a
        `failed` one that says so, of which nothing was kept but its id and its time. IdempotencyMismatch
        where a request of that name said something else.
        """
        names = [f"id {new.id}", f"bytes {new.sha256}", *([] if once is None else [f"once {once.name}"])]
        with self.database.writing() as db:
            lock(db, _bucket(new.sha256), shared=True)
            lock(db, *names)
            if once is not None and (before := self._done_before(db, once, new)) is not None:
                return before
            recording, created = self._register(db, new, place, within, admission)
            if once is not None:
                _remember(db, once, recording, created)
        self.database.tell()
        return recording, created

    def _register(
        self,
        db: sa.Connection,
        new: NewRecording,
        place: Callable[[], None],
        within: Set[str] | None,
        admission: Admission,
    ) -> tuple[Recording, bool]:
        same = (RECORDINGS.c.collection == new.collection) & (RECORDINGS.c.sha256 == new.sha256)
        if (found := _one(db, same, to_change=True)) is not None:
            place()
            if found.error_code == ProcessingFailed.code:
                self._set(db, found.key, status="pending", attempts=0, error_code=None, error_detail=None)
            return self._by_key(db, found.key), False
        if exists(db, _named(new.id, within)):
            raise IdConflict(f"The id {new.id!r} belongs to another recording.")
        _admit(db, admission, new.size_bytes)
        place()
        _admit_alone(db, admission, new.size_bytes)
        values = {field: getattr(new, field) for field in NewRecording.__dataclass_fields__}
        values["metadata"] = dict(new.metadata)
        now = datetime.now(UTC).replace(tzinfo=None)
        values |= {"status": "pending", "attempts": 0, "created_at": now, "uploaded_by": admission.key}
        insert = sa.insert(RECORDINGS).values(values)
        row = db.execute(insert.returning(RECORDINGS.c.key)).one()
        fault("catalog.registered")
        return self._by_key(db, row.key), True

    def _done_before(self, db: sa.Connection, once: Once, new: NewRecording) -> tuple[Recording, bool] | None:
        row = db.execute(sa.select(ONCE).where(ONCE.c.name == once.name)).one_or_none()
        if row is None or row.kept_until < time.time():
            return None
        if row.request != once.request:
            raise IdempotencyMismatch("The key was used for another request: other bytes, or other fields.")
        found = _one(db, RECORDINGS.c.key == row.recording)
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
        with self.database.reading() as db:
            if not exists(db, ONCE.c.kept_until < time.time()):
                return
        with self.database.writing() as db:
            db.execute(sa.delete(ONCE).where(ONCE.c.kept_until < time.time()))

    def expect(self, least: int, most: int, admission: Admission, *, within: Set[str] | None = None) -> None:
        """Raise what `register` would for a recording of which `least` to `most` bytes are still to come.

        Not so where it may prove to be one that is there, since some recording that the caller may see has as
        many bytes: that is known when they have come.
        """
        if admission.is_free:
            return
        with self.database.reading() as db:
            try:
                _admit(db, admission, least)
            except (QuotaExceeded, QueueFull):
                if not exists(db, RECORDINGS.c.size_bytes.between(least, most) & _inside(within)):
                    raise

    def held(self) -> dict[str, Held]:
        """What each API key that uploaded anything, by its id, has in the library."""
        uploader = RECORDINGS.c.uploaded_by
        query = sa.select(uploader, *_HELD).where(uploader.is_not(None)).group_by(uploader)
        with self.database.reading() as db:
            return {key: Held(*held) for key, *held in db.execute(query)}

    def get(self, recording_id: str, *, within: Set[str] | None = None) -> Recording:
        """Raises RecordingNotFound, and AmbiguousId where several collections have such a one."""
        with self.database.reading() as db:
            return _only(db, recording_id, within)

    def waveform(self, recording_id: str, *, within: Set[str] | None = None) -> tuple[Recording, Peaks]:
        """A recording with its peaks. Raises as `get` does, and NoWaveform."""
        with self.database.reading() as db:
            recording = _only(db, recording_id, within)
            query = sa.select(WAVEFORMS).where(WAVEFORMS.c.recording == recording.key)
            row = db.execute(query).one_or_none()
        if row is None:
            raise NoWaveform(f"No waveform of the recording {recording_id!r} was kept.")
        return recording, Peaks(row.step_s, np.frombuffer(row.levels, np.uint8))

    def by_key(self, keys: Sequence[int]) -> dict[int, Recording]:
        """Those of the recordings that (still) exist and are ready."""
        found: dict[int, Recording] = {}
        with self.database.reading() as db:
            for some in _chunks(keys):
                wanted = RECORDINGS.c.key.in_(some) & (RECORDINGS.c.status == "ready")
                rows = db.execute(sa.select(*_RECORDING_COLUMNS).where(wanted))
                found |= {row.key: _recording(row) for row in rows}
        return found

    def page(
        self,
        *,
        wanted: Filter = EVERYTHING,
        status: str | None = None,
        before: Place | None = None,
        limit: int,
    ) -> list[Recording]:
        """Up to `limit` recordings behind `before`, newest first: those `wanted` with that status, or any."""
        place = [RECORDINGS.c[field] for field in Place._fields]
        query = sa.select(*_RECORDING_COLUMNS).where(self._meant(wanted, status)).limit(limit)
        query = query.order_by(*(column.desc() for column in place))
        if before is not None:
            last = [sa.literal(value, column.type) for value, column in zip(before, place, strict=True)]
            query = query.where(sa.tuple_(*place) < sa.tuple_(*last))
        with self.database.reading() as db:
            return [_recording(row) for row in db.execute(query)]

    def amend(
        self,
        recording_id: str,
        change: Callable[[Recording], tuple[str | None, Mapping[str, Any]]],
        *,
        within: Set[str] | None = None,
    ) -> Recording:
        """Give a recording the `lang` and `metadata` that `change` makes of what it is; nobody changes it
        meanwhile.

        What `change` raises leaves all as it was. Its vectors, its status and its place in lists stay.
        Raises as `get` does.
        """
        with self.database.writing() as db:
            found = _only(db, recording_id, within, to_change=True)
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
        with self.database.writing() as db:
            lock(db, MODEL_LOCK, shared=True)
            found = _only(db, recording_id, within, to_change=True)
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
        query = sa.select(RECORDINGS.c.key, RECORDINGS.c.sha256).order_by(RECORDINGS.c.key).limit(limit)
        query = query.where((RECORDINGS.c.key > after) & self._meant(wanted, status))
        with self.database.writing() as db:
            lock(db, MODEL_LOCK, shared=True)
            rows = db.execute(query.with_for_update()).all()
            _delete(db, [row.key for row in rows])
        return (rows[-1].key if rows else after), [row.sha256 for row in rows]

    def count(self, wanted: Filter, *, status: str | None) -> int:
        """How many recordings pass a filter and have that status, or any."""
        with self.database.reading() as db:
            query = sa.select(sa.func.count()).select_from(RECORDINGS).where(self._meant(wanted, status))
            return int(db.execute(query).scalar_one())

    def sweep(self, sha256s: Sequence[str], remove: Callable[..., None]) -> None:
        """Call `remove` with the contents that no recording has, while nobody can register them."""
        for some in _chunks(sorted(sha256s)):  # so that each chunk keeps out few of those who store bytes
            with self.database.writing() as db:
                lock(db, *map(_bucket, some))
                if unused := set(some) - set(db.execute(_USED, {"some": some}).scalars()):
                    remove(*unused)

    def has_content(self, sha256: str) -> bool:
        """Whether some recording has these bytes."""
        with self.database.reading() as db:
            return exists(db, RECORDINGS.c.sha256 == sha256)

    def find(self, collection: str, sha256: str) -> Recording | None:
        """The recording of a collection that has these bytes, if there is one."""
        same = (RECORDINGS.c.collection == collection) & (RECORDINGS.c.sha256 == sha256)
        with self.database.reading() as db:
            return _one(db, same)

    def sizes(self, collection: str) -> set[int]:
        """How many bytes recordings of a collection have: what has another number is none of them."""
        query = sa.select(RECORDINGS.c.size_bytes).where(RECORDINGS.c.collection == collection).distinct()
        with self.database.reading() as db:
            return set(db.execute(query).scalars())

    def size_bytes(self) -> int:
        """Bytes of all recordings, as they were uploaded."""
        with self.database.reading() as db:
            return int(db.execute(sa.select(sa.func.sum(RECORDINGS.c.size_bytes))).scalar_one() or 0)

    def at_work(self) -> int:
        """How many workers hold a lease; those that wait for work hold none."""
        leased = (RECORDINGS.c.status == "processing") & (RECORDINGS.c.lease_until > time.time())
        query = sa.select(sa.func.count(RECORDINGS.c.lease_owner.distinct())).where(leased)
        with self.database.reading() as db:
            return int(db.execute(query).scalar_one())

    def counts(self) -> dict[str, int]:
        """Recordings by status; statuses without any are absent."""
        query = sa.select(RECORDINGS.c.status, sa.func.count()).group_by(RECORDINGS.c.status)
        with self.database.reading() as db:
            return {status: count for status, count in db.execute(query)}

    def collections(self, *, within: Set[str] | None = None) -> list[CollectionSummary]:
        """All that have a recording, by name."""
        column, count = RECORDINGS.c.collection, sa.func.count()
        query = sa.select(
            column,
            count,
            count.filter(RECORDINGS.c.status == "ready"),
            count.filter(RECORDINGS.c.status == "failed"),
            sa.func.coalesce(sa.func.sum(RECORDINGS.c.duration_s), 0.0),
            sa.func.coalesce(sa.func.sum(RECORDINGS.c.segments), 0),
        )
        query = query.where(_inside(within)).group_by(column)
        with self.database.reading() as db:
            return sorted(CollectionSummary(*row) for row in db.execute(query))

    def failures(self) -> dict[str, int]:
        """Failed recordings by the code of their error."""
        query = sa.select(RECORDINGS.c.error_code, sa.func.count()).group_by(RECORDINGS.c.error_code)
        with self.database.reading() as db:
            found = db.execute(query.where(RECORDINGS.c.status == "failed"))
            return {code or "processing_failed": count for code, count in found}

    def oldest_pending(self) -> datetime | None:
        """When the recording that has waited longest arrived (UTC), or None where none waits."""
        # by keys, of which there is an index for each status: for the least time PostgreSQL goes through all
        query = sa.select(RECORDINGS.c.created_at).where(RECORDINGS.c.status == "pending")
        with self.database.reading() as db:
            row = db.execute(query.order_by(RECORDINGS.c.key).limit(1)).first()
        return None if row is None else row.created_at

    # --- models

    def active(self) -> StoredModel | None:
        """The model that this library is searched with; None before it was first opened with one."""
        with self.database.reading() as db:
            return active_model(db)

    def adopt(self, model: StoredModel) -> StoredModel:
        """Make this the active model where nothing is ready by another; returns which is active now."""
        with self.database.reading() as db:
            if active_model(db) == model:
                return model
        with self.database.writing() as db:
            lock(db, MODEL_LOCK)
            active = active_model(db)
            if active is not None and active.fingerprint == model.fingerprint:
                model = model if model.name else active
            elif active is not None and exists(db, RECORDINGS.c.status == "ready"):
                return active
            activate(db, model)
            return model

    def keep(self, fingerprint: str) -> None:
        """Say that somebody still answers by a model that may have been retired."""
        retired = (MODELS.c.fingerprint == fingerprint) & (MODELS.c.state == "retired")
        with self.database.writing() as db:
            db.execute(sa.update(MODELS).where(retired).values(kept_until=time.time() + RETIRED_KEPT_S))

    def forget_retired(self) -> None:
        """Drop the vectors of models that were retired and that nobody said to use for RETIRED_KEPT_S."""
        unused = (MODELS.c.state == "retired") & (MODELS.c.kept_until < time.time())
        with self.database.reading() as db:
            forgotten = db.execute(sa.select(MODELS.c.fingerprint).where(unused)).scalars().all()
            last = db.execute(sa.select(sa.func.max(RECORDINGS.c.key))).scalar_one() if forgotten else None
        for fingerprint in forgotten:
            still = (MODELS.c.fingerprint == fingerprint) & unused
            for first in range(0, (last or 0) + 1, AT_ONCE):
                with self.database.writing() as db:
                    of_model = sa.select(MODELS.c.fingerprint).where(still).with_for_update()
                    if db.execute(of_model).first() is None:  # somebody has begun to go back to it
                        return
                    recordings = sa.select(RECORDINGS.c.key).order_by(RECORDINGS.c.key)
                    near = RECORDINGS.c.key.between(first, first + AT_ONCE - 1)
                    db.execute(recordings.where(near).with_for_update(read=True, key_share=True)).all()
                    for table in (SEGMENTS, REINDEXING):
                        here = table.c.recording.between(first, first + AT_ONCE - 1)
                        db.execute(sa.delete(table).where(here & (table.c.model == fingerprint)))
                fault("catalog.retiring")
            with self.database.writing() as db:
                db.execute(sa.delete(MODELS).where(still))

    def known_models(self) -> frozenset[str]:
        """Fingerprints of the models that have, or are to have, vectors here."""
        with self.database.reading() as db:
            return frozenset(db.execute(sa.select(MODELS.c.fingerprint)).scalars())

    # --- what is shared with other libraries and processes

    def identity(self) -> str:
        """A random name, of this library alone and for good: made at first use, and left out of backups."""
        query = sa.select(LIBRARY.c.id)
        with self.database.reading() as db:
            found: str | None = db.execute(query).scalar_one_or_none()
        if found is None:
            with self.database.writing() as db:
                lock(db, "library")
                found = db.execute(query).scalar_one_or_none()
                if found is None:
                    found = secrets.token_hex(6)
                    db.execute(sa.insert(LIBRARY).values(row=1, id=found))
        return found

    def forget_identity(self) -> None:
        """Let a copy be another library."""
        with self.database.writing() as db:
            db.execute(sa.delete(LIBRARY))

    def take_turn(self, name: str, owner: str, lease_s: Seconds) -> bool:
        """Whether it is `owner`'s turn to do what is called so, for `lease_s` from now: nobody else's is."""
        now, mine = time.time(), TURNS.c.owner == owner
        turn = {"name": name, "owner": owner, "until": now + lease_s}
        taken = sa.update(TURNS).where((TURNS.c.name == name) & (mine | (TURNS.c.until < now))).values(turn)
        with self.database.writing() as db:
            lock(db, f"turn {name}")
            if db.execute(taken).rowcount:
                return True
            if exists(db, TURNS.c.name == name):
                return False
            db.execute(sa.insert(TURNS).values(turn))
            return True

    def end_turn(self, name: str, owner: str) -> None:
        with self.database.writing() as db:
            db.execute(sa.delete(TURNS).where((TURNS.c.name == name) & (TURNS.c.owner == owner)))

    # --- jobs

    def lease(
        self,
        owner: str,
        *,
        limit: int,
        lease_s: Seconds,
        model: str | None = None,
        suspects: bool = True,
    ) -> list[Recording]:
        """Take up to `limit` recordings to process; `processing` and ours until the lease runs out.

        A recording whose worker died is leased alone, and after those that no worker died of: one that
        kills its worker takes no others with it, and a worker that is killed again and again does not
        spend all attempts of one recording; after MAX_ATTEMPTS such deaths it fails with `processing_failed`.
        Without `suspects` none of those is given: for who is at work on others.
        Raises DataMismatch where `model`, the one whose vectors are to be made, is not the active one.
        """
        with self.database.writing() as db:
            lock(db, MODEL_LOCK, shared=True)
            active = active_model(db)
            if model is not None and active is not None and active.fingerprint != model:
                raise DataMismatch(
                    f"The library was switched to another model, {active.titled()}. Set CLASP_MODEL to that."
                )
            if exists(db, MODELS.c.hold_until > time.time()):  # a switch is near, or was just now
                return []
            return leased(db, self._jobs.lease(db, owner, limit, lease_s, suspects))

    def extend_leases(self, owner: str, lease_s: Seconds) -> None:
        """Say that `owner` is alive and still at work on everything it leased."""
        with self.database.writing() as db:
            lock(db, MODEL_LOCK, shared=True)
            self._jobs.extend(db, owner, lease_s)

    def release(self, owner: str, *, died: bool = False) -> None:
        """Give back what `owner` has leased; without counting an attempt, unless it `died` at work."""
        with self.database.writing() as db:
            lock(db, MODEL_LOCK, shared=True)
            self._jobs.release(db, owner, died)
        self.database.tell()

    def wait_for_work(self, stopping: threading.Event, poll_s: Seconds) -> None:
        """Return when `lease` may give something, or when this is `stopping`: after `poll_s`, or where
        somebody tells. From one thread only."""
        self.database.await_news(stopping, poll_s)

    def forget_leases(self) -> None:
        """Give back what anybody has leased, for whatever model: in a copy, where nobody is at work."""
        with self.database.writing() as db:
            self._jobs.release(db, None, died=False)
            Leases(REINDEXING, REINDEXING.c.recording, sa.true()).release(db, None, died=False)

    def complete(
        self,
        key: int,
        owner: str,
        *,
        duration_s: Seconds,
        model: str,
        segments: Sequence[EmbeddedSegment],
        peaks: Peaks | None = None,
    ) -> bool:
        """Store a recording's segments and peaks and make it ready, unless the lease was lost or it was
        deleted.

        Where `model` is not the active one the recording goes back to waiting, for a worker that has that.
        """
        with self.database.writing() as db:
            lock(db, MODEL_LOCK, shared=True)
            active = active_model(db)
            if active is None or active.fingerprint != model:
                attempts = RECORDINGS.c.attempts - 1
                self._jobs.finish(db, key, owner, status="pending", attempts=attempts)
                return False
            if not self._jobs.finish(
                db, key, owner, status="ready", duration_s=duration_s, model=model, segments=len(segments)
            ):
                return False
            store_vectors(db, key, model, segments)
            store_peaks(db, key, peaks)
            note_change(db, [key])
            fault("catalog.completed")
            return True

    def fail(self, key: int, owner: str, *, code: str, detail: str) -> bool:
        """Record why a recording cannot be indexed, unless the lease was lost or it was deleted."""
        with self.database.writing() as db:
            return self._jobs.finish(db, key, owner, status="failed", error_code=code, error_detail=detail)

    # --- what a replica follows

    def last_change(self) -> tuple[int, str]:
        """The point that the change sequence has reached: its newest number and that change's token."""
        query = sa.select(CHANGES.c.seq, CHANGES.c.token).order_by(CHANGES.c.seq.desc()).limit(1)
        with self.database.reading() as db:
            row = db.execute(query).one_or_none()
        return (0, "") if row is None else (int(row.seq), row.token)

    def holds(self, point: tuple[int, str]) -> bool:
        """Whether this sequence went through that point; not so if it was put back to an earlier state."""
        seq, token = point
        query = sa.select(CHANGES.c.token).where(CHANGES.c.seq == seq)
        with self.database.reading() as db:
            return seq == 0 or db.execute(query).scalar_one_or_none() == token

    def changes(self, after: int, *, limit: int, model: str, dim: int) -> Changes | None:
        """The next `limit` changes after number `after`; None if there are none.

        With them come the vectors of those recordings as they are now, where they are by `model`. A
        change that a later one makes needless is left out, and so is one of another model's vectors.
        """
        later = CHANGES.alias()
        ours = [table.c.model.is_(None) | (table.c.model == model) for table in (CHANGES, later)]
        again = (later.c.recording == CHANGES.c.recording) & (later.c.seq > CHANGES.c.seq) & ours[1]
        query = sa.select(CHANGES).where((CHANGES.c.seq > after) & ours[0] & ~sa.exists().where(again))
        newest = sa.select(CHANGES).where(CHANGES.c.seq > after).order_by(CHANGES.c.seq.desc()).limit(1)
        with self.database.reading() as db:
            end = db.execute(newest).one_or_none()
            if end is None:
                return None
            seen = end.seq
            upto = query.where(CHANGES.c.seq <= end.seq).order_by(CHANGES.c.seq)
            rows = db.execute(upto.limit(limit)).all()
            end = rows[-1] if len(rows) == limit else end
            keys = frozenset(row.recording for row in rows)
            wanted = (SEGMENTS.c.model == model) & SEGMENTS.c.recording.in_(keys)
            ready = (RECORDINGS.c.key == SEGMENTS.c.recording) & (RECORDINGS.c.status == "ready")
            columns = (SEGMENTS.c.recording, SEGMENTS.c.ordinal, SEGMENTS.c.vector, RECORDINGS.c.collection)
            found = db.execute(sa.select(*columns).where(wanted & ready)).all()
        lost = bytes(4 * dim)
        stored = b"".join(row.vector if len(row.vector) == len(lost) else lost for row in found)
        vectors = np.frombuffer(stored, "<f4").reshape(-1, dim)
        owners = np.array([row.recording for row in found], np.int64)
        damaged = owners[_damaged(vectors)]
        whole = ~np.isin(owners, damaged)
        return Changes(
            seq=end.seq,
            token=end.token,
            recordings=keys,
            owners=owners[whole],
            ordinals=np.array([row.ordinal for row in found], np.int64)[whole],
            vectors=vectors[whole],
            damaged=frozenset(damaged.tolist()),
            collections=tuple(row.collection for row, is_whole in zip(found, whole, strict=True) if is_whole),
            seen=seen,
        )

    def embed_anew(self, keys: Set[int], model: str) -> None:
        """Let ready recordings wait for a worker again, and forget the vectors that `model` has of them."""
        with self.database.writing() as db:
            lock(db, MODEL_LOCK, shared=True)
            for some in _chunks(sorted(keys)):
                ready = RECORDINGS.c.key.in_(some) & (RECORDINGS.c.status == "ready")
                here = sa.select(RECORDINGS.c.key).where(ready).order_by(RECORDINGS.c.key)
                db.execute(here.with_for_update()).all()
                afresh = {"status": "pending", "attempts": 0, "model": None, "segments": None}
                db.execute(sa.update(RECORDINGS).where(ready).values(afresh))
                theirs = SEGMENTS.c.recording.in_(some) & (SEGMENTS.c.model == model)
                db.execute(sa.delete(SEGMENTS).where(theirs))
            note_change(db, sorted(keys))

    def spans(self, segments: Sequence[tuple[int, int]], *, model: str) -> dict[tuple[int, int], Span]:
        """A model's segments, each named by (recording key, ordinal), as far as they are there."""
        return {named: Span(*row) for named, row in self._of_segments(segments, _SPANS, model)}

    def vectors(
        self, segments: Sequence[tuple[int, int]], *, model: str
    ) -> dict[tuple[int, int], NDArray[np.float32]]:
        """A model's unit vectors of these segments, each named by (recording key, ordinal), bit for bit as
        they were committed: those of ready recordings, as far as they are there and whole."""
        found = {
            named: np.frombuffer(stored[: len(stored) // 4 * 4], "<f4")
            for named, (stored,) in self._of_segments(segments, _VECTORS, model)
        }
        by_length: dict[int, list[tuple[int, int]]] = {}
        for named, vector in found.items():
            by_length.setdefault(len(vector), []).append(named)
        for alike in by_length.values():  # of one length, unless something is damaged
            damaged = _damaged(np.stack([found[named] for named in alike]))
            for place in np.flatnonzero(damaged):
                del found[alike[place]]
        return found

    def _of_segments(
        self, segments: Sequence[tuple[int, int]], query: sa.Select[Any], model: str
    ) -> Iterator[tuple[tuple[int, int], Sequence[Any]]]:
        """What one of those queries asks of a model's segments that are there."""
        with self.database.reading() as db:
            for some in _chunks(segments):
                numbers = [recording * _PLACES + ordinal for recording, ordinal in some]
                recordings = list({recording for recording, _ in some})
                these = {"recordings": recordings, "numbers": numbers, "of_model": model}
                for row in db.execute(query, these).all():
                    yield (row[0], row[1]), row[2:]

    def embedded(self, key: int, *, model: str) -> list[EmbeddedSegment]:
        """What a model made of a recording, in order, as far as it is there and whole."""
        here = (SEGMENTS.c.recording == key) & (SEGMENTS.c.model == model)
        with self.database.reading() as db:
            ordinals = db.execute(sa.select(SEGMENTS.c.ordinal).where(here).order_by(SEGMENTS.c.ordinal))
            named = [(key, ordinal) for ordinal in ordinals.scalars()]
        spans, vectors = self.spans(named, model=model), self.vectors(named, model=model)
        return [
            EmbeddedSegment(spans[one].start_s, spans[one].end_s, vectors[one], spans[one].transcript)
            for one in named
            if one in spans and one in vectors
        ]

    def matching(self, wanted: Filter) -> NDArray[np.int64]:
        """Keys of the ready recordings that pass a filter, ascending."""
        # sorted here: asked for them in order, SQLite walks all that is ready rather than a few collections
        query = sa.select(RECORDINGS.c.key).where(self._meant(wanted, "ready"))
        with self.database.reading() as db:
            return np.sort(np.array(db.execute(query).scalars().all(), np.int64))

    # --- inside

    def _meant(self, wanted: Filter, status: str | None) -> sa.ColumnElement[bool]:
        """That a recording passes a filter and has that status, or any."""
        passes = wanted.where(RECORDINGS, self.database.dialect)
        return passes if status is None else (RECORDINGS.c.status == status) & passes

    def _by_key(self, db: sa.Connection, key: int) -> Recording:
        found = _one(db, RECORDINGS.c.key == key)
        assert found is not None
        return found

    def _set(self, db: sa.Connection, key: int, **values: object) -> None:
        db.execute(sa.update(RECORDINGS).where(RECORDINGS.c.key == key).values(**values))


def _damaged(vectors: Embeddings) -> NDArray[np.bool_]:
    """Which of these (n, dim) are no unit vectors."""
    with np.errstate(over="ignore", invalid="ignore"):  # a flipped bit makes 1e38 of a number, or a NaN
        whole: NDArray[np.bool_] = np.abs(np.linalg.norm(vectors, axis=1) - 1) < _UNIT_WITHIN
    return ~whole


def _chunks(values: Sequence[T]) -> Iterator[Sequence[T]]:
    """Few enough at a time for one statement's parameters, and for the write lock not to be felt."""
    return (values[start : start + AT_ONCE] for start in range(0, len(values), AT_ONCE))


AT_ONCE = 1000
_PLACES = 1 << 20
"""More than a recording has segments."""


_USED = sa.select(RECORDINGS.c.sha256).where(RECORDINGS.c.sha256.in_(sa.bindparam("some", expanding=True)))


def _asking_segments(*columns: "sa.Column[Any]") -> sa.Select[Any]:
    """For those columns of segments by their numbers. Made once: to make it, and to find that it was made
    before, takes SQLAlchemy longer than SQLite takes to answer."""
    # SQLite has no index for pairs in a list, but one for the first of them
    of = SEGMENTS.c.recording.in_(sa.bindparam("recordings", expanding=True))
    number = SEGMENTS.c.recording * _PLACES + SEGMENTS.c.ordinal
    these = number.in_(sa.bindparam("numbers", expanding=True))
    here = of & (SEGMENTS.c.model == sa.bindparam("of_model")) & these
    return sa.select(SEGMENTS.c.recording, SEGMENTS.c.ordinal, *columns).where(here)


_SPANS = _asking_segments(*(SEGMENTS.c[name] for name in Span._fields))
_VECTORS = _asking_segments(SEGMENTS.c.vector).where(
    (RECORDINGS.c.key == SEGMENTS.c.recording) & (RECORDINGS.c.status == "ready")
)


def note_change(db: sa.Connection, keys: Sequence[int], model: str | None = None) -> None:
    """Append to the change sequence, in the transaction that makes the change.

    Last of all in it: nobody else's change is committed from here to its end, so that changes are numbered
    in the order in which they can be seen. `model` is the one that alone is concerned, if it is one:
    replicas of others have nothing to do.
    """
    if keys:
        lock(db, "changes")
        rows = [{"recording": key, "token": secrets.token_hex(8), "model": model} for key in keys]
        db.execute(sa.insert(CHANGES), rows)


def _remember(db: sa.Connection, once: Once, recording: Recording, created: bool) -> None:
    db.execute(sa.delete(ONCE).where(ONCE.c.name == once.name))
    about = {"recording": recording.key, "id": recording.id, "created_at": recording.created_at}
    kept_until = time.time() + ONCE_KEPT_S
    row = {"name": once.name, "request": once.request, "created": created, "kept_until": kept_until}
    db.execute(sa.insert(ONCE).values(row | about))


def _delete(db: sa.Connection, keys: Sequence[int]) -> None:
    for table in (SEGMENTS, REINDEXING, WAVEFORMS):
        db.execute(sa.delete(table).where(table.c.recording.in_(keys)))
    db.execute(sa.delete(RECORDINGS).where(RECORDINGS.c.key.in_(keys)))
    note_change(db, keys)
    fault("catalog.deleted")


def store_vectors(db: sa.Connection, key: int, model: str, segments: Sequence[EmbeddedSegment]) -> None:
    """Make these the vectors that `model` has of a recording."""
    old = (SEGMENTS.c.recording == key) & (SEGMENTS.c.model == model)
    db.execute(sa.delete(SEGMENTS).where(old))
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
        db.execute(sa.insert(SEGMENTS), rows)


def store_peaks(db: sa.Connection, key: int, peaks: Peaks | None) -> None:
    """Keep what a recording's waveform is drawn from, if it is given: by whatever model, it is the same."""
    if peaks is not None:
        row = {"recording": key, "step_s": peaks.step_s, "levels": peaks.levels.tobytes()}
        insert = sqlite.insert if db.dialect.name == "sqlite" else postgresql.insert
        made: Any = insert(WAVEFORMS).values(row)
        # not deleted before: two re-indexes, to different models, may be here at once
        db.execute(made.on_conflict_do_update(index_elements=["recording"], set_=row))


def active_model(db: sa.Connection) -> StoredModel | None:
    columns = (MODELS.c.fingerprint, MODELS.c.name, MODELS.c.dim)
    row = db.execute(sa.select(*columns).where(MODELS.c.state == "active")).one_or_none()
    return None if row is None else StoredModel(*row)


def activate(db: sa.Connection, model: StoredModel) -> None:
    others = (MODELS.c.state == "active") & (MODELS.c.fingerprint != model.fingerprint)
    _retire(db, others)
    put_model(db, model, "active")


def put_model(db: sa.Connection, model: StoredModel, state: str) -> None:
    row = {"fingerprint": model.fingerprint, "name": model.name, "dim": model.dim, "state": state}
    known = MODELS.c.fingerprint == model.fingerprint
    if not db.execute(sa.update(MODELS).where(known).values(row)).rowcount:
        db.execute(sa.insert(MODELS).values(row))


def _retire(db: sa.Connection, which: sa.ColumnElement[bool]) -> None:
    retired = {"state": "retired", "kept_until": time.time() + RETIRED_KEPT_S, "hold_until": None}
    db.execute(sa.update(MODELS).where(which).values(retired))


def retire_others(db: sa.Connection, model: StoredModel) -> None:
    """Give up the re-indexes to other models at which nobody is at work. One that goes on says so again."""
    alive = sa.select(REINDEXING.c.model).where(REINDEXING.c.lease_until > time.time())
    left = (MODELS.c.state == "coming") & (MODELS.c.fingerprint != model.fingerprint)
    _retire(db, left & MODELS.c.fingerprint.not_in(alive))


MODEL_LOCK = "model"
"""Shared by whoever changes many recordings, or by what the active model is; a switch has it alone."""


def _bucket(sha256: str) -> str:
    """One of 256, so that a sweep of much takes few locks."""
    return f"content {sha256[:2]}"


_HELD = (
    sa.func.count(),
    # PostgreSQL makes a decimal of the sum of integers of 64 bits
    sa.cast(sa.func.coalesce(sa.func.sum(RECORDINGS.c.size_bytes), 0), sa.BigInteger),
    sa.func.coalesce(sa.func.sum(RECORDINGS.c.duration_s), 0.0),
)


def _admit(db: sa.Connection, admission: Admission, size_bytes: int) -> None:
    """Raises QuotaExceeded or QueueFull where one more recording, of so many bytes, is too much."""
    _check_quota(db, admission, size_bytes)
    if admission.max_pending and _waiting(db, admission.max_pending):
        raise QueueFull(
            f"{admission.max_pending} recordings are waiting to be embedded; send it again later."
        )


def _admit_alone(db: sa.Connection, admission: Admission, size_bytes: int) -> None:
    """The same, and to the end of this transaction nobody takes what was left. Those that register at the
    same moment wait here for each other, and therefore not before they have to."""
    if admission.is_counted and lock(db, f"key {admission.key}"):
        _check_quota(db, admission, size_bytes)
    calm = admission.max_pending - AT_THE_SAME_MOMENT
    near = admission.max_pending and (calm <= 0 or _waiting(db, calm))
    if near and lock(db, "queue"):
        _admit(db, Admission(max_pending=admission.max_pending), size_bytes)


def _check_quota(db: sa.Connection, admission: Admission, size_bytes: int) -> None:
    if admission.is_counted:
        row = db.execute(sa.select(*_HELD).where(RECORDINGS.c.uploaded_by == admission.key)).one()
        admission.quota.check(Held(*row), size_bytes)


AT_THE_SAME_MOMENT = 1000
"""More recordings than all services together register at once: as long as so many may still wait, none need
be counted alone."""


def _waiting(db: sa.Connection, least: int) -> bool:
    """Whether so many recordings wait to be embedded."""
    waiting = sa.select(RECORDINGS.c.key).where(RECORDINGS.c.status == "pending")
    return db.execute(waiting.limit(1).offset(least - 1)).first() is not None


def leased(db: sa.Connection, keys: Sequence[int]) -> list[Recording]:
    chosen = RECORDINGS.c.key.in_(keys)
    rows = db.execute(sa.select(*_RECORDING_COLUMNS).where(chosen).order_by(RECORDINGS.c.key))
    return [_recording(row) for row in rows]


def _inside(within: Set[str] | None) -> sa.ColumnElement[bool]:
    """That a recording is in one of the collections that may be seen."""
    return sa.true() if within is None else RECORDINGS.c.collection.in_(sorted(within))


def _named(recording_id: str, within: Set[str] | None) -> sa.ColumnElement[bool]:
    return (RECORDINGS.c.id == recording_id) & _inside(within)


def _only(
    db: sa.Connection, recording_id: str, within: Set[str] | None, *, to_change: bool = False
) -> Recording:
    query = sa.select(*_RECORDING_COLUMNS).where(_named(recording_id, within)).limit(2)
    rows = db.execute(query.with_for_update() if to_change else query).all()
    if not rows:
        raise RecordingNotFound(f"There is no recording {recording_id!r}.")
    if len(rows) > 1:
        raise AmbiguousId(f"Several collections have a recording {recording_id!r}; name the collection.")
    return _recording(rows[0])


def _one(
    db: sa.Connection, condition: sa.ColumnElement[bool], *, to_change: bool = False
) -> Recording | None:
    query = sa.select(*_RECORDING_COLUMNS).where(condition)
    row = db.execute(query.with_for_update() if to_change else query).one_or_none()
    return None if row is None else _recording(row)


def _recording(row: Any) -> Recording:  # noqa: ANN401 - SQLAlchemy rows are untyped
    return Recording(**row._mapping)
