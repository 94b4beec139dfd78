"""The truth: recordings, segments, vectors and the order of changes, in one SQL database.

A recording's status is also its job: `pending` until a worker leases it, `processing` while the lease
lasts, then `ready` or `failed`. Every transition is one transaction. Whoever keeps a replica (the
vector index) follows `changes`: each row says "this recording is not what it was", in commit order.
"""

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import alembic.command
import alembic.config
import alembic.util
import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.dialects.postgresql import JSONB

from clasp_core.errors import DataMismatch, IdConflict, ProcessingFailed, RecordingNotFound
from clasp_core.types import Embeddings, Seconds

T = TypeVar("T")
Status = Literal["pending", "processing", "ready", "failed"]

MAX_ATTEMPTS = 5
"""A recording that was being processed when its worker died this many times is not tried again."""

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
)
_segments = sa.Table(
    "segments",
    _tables,
    sa.Column("recording", _key, primary_key=True),
    sa.Column("ordinal", sa.Integer, primary_key=True),
    sa.Column("start_s", sa.Float),
    sa.Column("end_s", sa.Float),
    sa.Column("vector", sa.LargeBinary),
)
_changes = sa.Table(
    "changes",
    _tables,
    sa.Column("seq", _key, primary_key=True),
    sa.Column("recording", _key),
    sa.Column("token", sa.Text),
)


@dataclass(frozen=True, slots=True)
class Recording:
    """One uploaded recording and what became of it.

    `key` orders recordings by arrival and is never used twice; `id` is the name the world knows.
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
class NewRecording:
    """What an upload says of itself."""

    id: str
    collection: str
    sha256: str
    size_bytes: int
    media_type: str | None
    lang: str | None
    metadata: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class EmbeddedSegment:
    """A segment as it is stored: seconds from the start of its recording, and its unit vector (dim,).

    ValueError for any other vector: one NaN committed would stop every replica at that change.
    """

    start_s: Seconds
    end_s: Seconds
    vector: NDArray[np.float32]

    def __post_init__(self) -> None:
        if not abs(float(np.linalg.norm(self.vector)) - 1) < 1e-3:
            raise ValueError("a segment's vector is not finite and of unit length")


@dataclass(frozen=True, slots=True)
class Filter:
    """Which recordings to search: those of which everything given here is true; by default all.

    `lang` is a canonical tag, compared whole; `metadata` pairs are top-level members and their values.
    """

    collection: str | None = None
    lang: str | None = None
    metadata: tuple[tuple[str, str | int | float | bool], ...] = ()


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


_RECORDING_COLUMNS = [_recordings.c[field] for field in Recording.__dataclass_fields__]


class Catalog:
    """Thread-safe, and safe to open from several processes at once."""

    def __init__(self, url: str) -> None:
        """Open, creating or upgrading the schema. DataMismatch where a newer version wrote it."""
        self._engine = _create_engine(url)
        with self._write() as db:
            _migrate(db)

    def close(self) -> None:
        self._engine.dispose()

    # --- recordings

    def register(self, new: NewRecording, place: Callable[[], None]) -> tuple[Recording, bool]:
        """Make a pending recording, or find the one that has these bytes already.

        Returns (recording, created). `place` stores the bytes, unless they are there; it runs under the
        write lock, before the row exists, so no row is ever without its bytes and no sweep can take them
        between. A recording that failed with `processing_failed` is tried afresh when its bytes come again.
        Raises IdConflict where the id belongs to another recording.
        """
        with self._write() as db:
            same = (_recordings.c.collection == new.collection) & (_recordings.c.sha256 == new.sha256)
            if (found := _one(db, same)) is not None:
                place()
                if found.error_code == ProcessingFailed.code:
                    self._set(db, found.key, status="pending", attempts=0, error_code=None, error_detail=None)
                return self._by_key(db, found.key), False
            if _one(db, _recordings.c.id == new.id) is not None:
                raise IdConflict(f"The id {new.id!r} belongs to another recording.")
            place()
            values = {field: getattr(new, field) for field in NewRecording.__dataclass_fields__}
            values["metadata"] = dict(new.metadata)
            now = datetime.now(UTC).replace(tzinfo=None)
            insert = sa.insert(_recordings).values(**values, status="pending", attempts=0, created_at=now)
            row = db.execute(insert.returning(_recordings.c.key)).one()
            return self._by_key(db, row.key), True

    def get(self, recording_id: str) -> Recording:
        """Raises RecordingNotFound."""
        with self._read() as db:
            found = _one(db, _recordings.c.id == recording_id)
        if found is None:
            raise RecordingNotFound(f"There is no recording {recording_id!r}.")
        return found

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
        self, *, collection: str | None, status: str | None, before: int | None, limit: int
    ) -> list[Recording]:
        """Up to `limit` recordings, newest first, of those older than the one with key `before`."""
        query = sa.select(*_RECORDING_COLUMNS).order_by(_recordings.c.key.desc()).limit(limit)
        if collection is not None:
            query = query.where(_recordings.c.collection == collection)
        if status is not None:
            query = query.where(_recordings.c.status == status)
        if before is not None:
            query = query.where(_recordings.c.key < before)
        with self._read() as db:
            return [_recording(row) for row in db.execute(query)]

    def delete(self, recording_id: str) -> Recording:
        """Remove a recording with its segments. Raises RecordingNotFound."""
        with self._write() as db:
            found = _one(db, _recordings.c.id == recording_id)
            if found is None:
                raise RecordingNotFound(f"There is no recording {recording_id!r}.")
            db.execute(sa.delete(_segments).where(_segments.c.recording == found.key))
            db.execute(sa.delete(_recordings).where(_recordings.c.key == found.key))
            _note_change(db, [found.key])
        return found

    def sweep(self, sha256s: Sequence[str], remove: Callable[[str], None]) -> None:
        """Call `remove` for each content that no recording has, while nobody can register it."""
        for some in _chunks(sha256s):
            with self._write() as db:
                used = sa.select(_recordings.c.sha256).where(_recordings.c.sha256.in_(some))
                for sha256 in set(some) - set(db.execute(used).scalars()):
                    remove(sha256)

    def counts(self) -> dict[str, int]:
        """Recordings by status; statuses without any are absent."""
        query = sa.select(_recordings.c.status, sa.func.count()).group_by(_recordings.c.status)
        with self._read() as db:
            return {status: count for status, count in db.execute(query)}

    def oldest_pending(self) -> datetime | None:
        """When the recording that has waited longest arrived (UTC), or None where none waits."""
        query = sa.select(sa.func.min(_recordings.c.created_at)).where(_recordings.c.status == "pending")
        with self._read() as db:
            waiting: datetime | None = db.execute(query).scalar_one()
        return waiting

    def other_models(self, fingerprint: str) -> list[str]:
        """Fingerprints, other than this one, of models that stored vectors are by."""
        query = sa.select(_recordings.c.model).distinct().where(_recordings.c.model != fingerprint)
        with self._read() as db:
            return sorted(db.execute(query).scalars())

    def embed_anew(self, fingerprint: str) -> int:
        """Drop the vectors that are by any other model; their recordings wait to be embedded again."""
        others = _recordings.c.model != fingerprint
        with self._write() as db:
            keys = db.execute(sa.select(_recordings.c.key).where(others)).scalars().all()
            db.execute(
                sa.delete(_segments).where(
                    _segments.c.recording.in_(sa.select(_recordings.c.key).where(others))
                )
            )
            db.execute(
                sa.update(_recordings)
                .where(others)
                .values(status="pending", model=None, segments=None, attempts=0, lease_owner=None)
            )
            _note_change(db, keys)
        return len(keys)

    # --- jobs

    def lease(self, owner: str, *, limit: int, lease_s: Seconds) -> list[Recording]:
        """Take up to `limit` recordings to process; `processing` and ours until the lease runs out.

        A recording whose worker died is leased alone, and after those that no worker died of: one that
        kills its worker takes no others with it, and a worker that is killed again and again does not
        spend all attempts of one recording; after MAX_ATTEMPTS such deaths it fails with `processing_failed`.
        """
        now = time.time()
        expired = (_recordings.c.status == "processing") & (_recordings.c.lease_until < now)
        free = (_recordings.c.status == "pending") | expired
        with self._write() as db:
            given_up = _recordings.c.attempts >= MAX_ATTEMPTS
            db.execute(
                sa.update(_recordings)
                .where(expired & given_up)
                .values(
                    status="failed",
                    error_code=ProcessingFailed.code,
                    error_detail=f"Processing was cut short {MAX_ATTEMPTS} times; upload it again to retry.",
                    lease_owner=None,
                    lease_until=None,
                )
            )
            query = sa.select(_recordings.c.key, _recordings.c.attempts).where(free)
            candidates = db.execute(
                query.order_by(_recordings.c.attempts, _recordings.c.key).limit(limit)
            ).all()
            taken = _without_suspects(candidates)
            chosen = _recordings.c.key.in_(taken)
            db.execute(
                sa.update(_recordings)
                .where(chosen)
                .values(
                    status="processing",
                    lease_owner=owner,
                    lease_until=now + lease_s,
                    attempts=_recordings.c.attempts + 1,
                )
            )
            rows = db.execute(sa.select(*_RECORDING_COLUMNS).where(chosen).order_by(_recordings.c.key))
            return [_recording(row) for row in rows]

    def extend_leases(self, owner: str, lease_s: Seconds) -> None:
        """Say that `owner` is alive and still at work on everything it leased."""
        with self._write() as db:
            db.execute(
                sa.update(_recordings)
                .where((_recordings.c.lease_owner == owner) & (_recordings.c.status == "processing"))
                .values(lease_until=time.time() + lease_s)
            )

    def release(self, owner: str, *, died: bool = False) -> None:
        """Give back what `owner` has leased; without counting an attempt, unless it `died` at work."""
        attempts = _recordings.c.attempts - (0 if died else 1)
        with self._write() as db:
            db.execute(
                sa.update(_recordings)
                .where((_recordings.c.lease_owner == owner) & (_recordings.c.status == "processing"))
                .values(
                    # an expired lease rather than `pending`: `lease` then applies the limit of attempts
                    lease_until=0.0 if died else None,
                    status="processing" if died else "pending",
                    lease_owner=None,
                    attempts=attempts,
                )
            )

    def complete(
        self, key: int, owner: str, *, duration_s: Seconds, model: str, segments: Sequence[EmbeddedSegment]
    ) -> bool:
        """Store a recording's segments and make it ready, unless the lease was lost or it was deleted."""
        with self._write() as db:
            if not self._finish(
                db, key, owner, status="ready", duration_s=duration_s, model=model, segments=len(segments)
            ):
                return False
            db.execute(sa.delete(_segments).where(_segments.c.recording == key))
            if segments:
                rows = [
                    {
                        "recording": key,
                        "ordinal": ordinal,
                        "start_s": segment.start_s,
                        "end_s": segment.end_s,
                        "vector": segment.vector.astype("<f4").tobytes(),
                    }
                    for ordinal, segment in enumerate(segments)
                ]
                db.execute(sa.insert(_segments), rows)
            _note_change(db, [key])
            return True

    def fail(self, key: int, owner: str, *, code: str, detail: str) -> bool:
        """Record why a recording cannot be indexed, unless the lease was lost or it was deleted."""
        with self._write() as db:
            return self._finish(db, key, owner, status="failed", error_code=code, error_detail=detail)

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

        With them come the vectors of those recordings as they are now, where they are by `model`.
        """
        with self._read() as db:
            query = sa.select(_changes).where(_changes.c.seq > after).order_by(_changes.c.seq).limit(limit)
            rows = db.execute(query).all()
            if not rows:
                return None
            keys = frozenset(row.recording for row in rows)
            ready = (_recordings.c.status == "ready") & (_recordings.c.model == model)
            ours = sa.select(_recordings.c.key).where(ready)
            wanted = _segments.c.recording.in_(keys) & _segments.c.recording.in_(ours)
            columns = (_segments.c.recording, _segments.c.ordinal, _segments.c.vector)
            found = db.execute(sa.select(*columns).where(wanted)).all()
        return Changes(
            seq=rows[-1].seq,
            token=rows[-1].token,
            recordings=keys,
            owners=np.array([row.recording for row in found], np.int64),
            ordinals=np.array([row.ordinal for row in found], np.int64),
            vectors=np.frombuffer(b"".join(row.vector for row in found), "<f4").reshape(-1, dim),
        )

    def spans(self, segments: Sequence[tuple[int, int]]) -> dict[tuple[int, int], tuple[Seconds, Seconds]]:
        """(start, end) seconds of segments named by (recording key, ordinal)."""
        wanted = sa.tuple_(_segments.c.recording, _segments.c.ordinal).in_(segments)
        query = sa.select(_segments.c.recording, _segments.c.ordinal, _segments.c.start_s, _segments.c.end_s)
        with self._read() as db:
            rows = db.execute(query.where(wanted))
            return {(row.recording, row.ordinal): (row.start_s, row.end_s) for row in rows}

    def matching(self, wanted: "Filter") -> NDArray[np.int64]:
        """Keys of the ready recordings that pass a filter, ascending."""
        query = (
            sa.select(_recordings.c.key).where(_recordings.c.status == "ready").order_by(_recordings.c.key)
        )
        if wanted.collection is not None:
            query = query.where(_recordings.c.collection == wanted.collection)
        if wanted.lang is not None:
            query = query.where(_recordings.c.lang == wanted.lang)
        for name, value in wanted.metadata:
            query = query.where(_member(name, value, self._engine.dialect.name))
        with self._read() as db:
            return np.array(db.execute(query).scalars().all(), np.int64)

    # --- inside

    @contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        """One consistent snapshot."""
        with self._engine.connect() as db, db.begin():
            yield db

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        """Sole writer, durable when the block ends."""
        with self._engine.connect().execution_options(clasp_write=True) as db, db.begin():
            yield db

    def _by_key(self, db: sa.Connection, key: int) -> Recording:
        found = _one(db, _recordings.c.key == key)
        assert found is not None
        return found

    def _set(self, db: sa.Connection, key: int, **values: object) -> None:
        db.execute(sa.update(_recordings).where(_recordings.c.key == key).values(**values))

    def _finish(self, db: sa.Connection, key: int, owner: str, **values: object) -> bool:
        mine = (_recordings.c.key == key) & (_recordings.c.lease_owner == owner)
        done = db.execute(
            sa.update(_recordings)
            .where(mine & (_recordings.c.status == "processing"))
            .values(**values, lease_owner=None, lease_until=None)
        )
        return done.rowcount == 1


def _chunks(values: Sequence[T]) -> Iterator[Sequence[T]]:
    """Few enough at a time for one statement's parameters, and for the write lock not to be felt."""
    return (values[start : start + 1000] for start in range(0, len(values), 1000))


def _note_change(db: sa.Connection, keys: Sequence[int]) -> None:
    """Append to the change sequence, in the transaction that makes the change."""
    if keys:
        db.execute(sa.insert(_changes), [{"recording": key, "token": secrets.token_hex(8)} for key in keys])


def _member(name: str, value: str | float | bool, dialect: str) -> sa.ColumnElement[bool]:
    """That a top-level member of the metadata has this value: 1 is 1.0, but neither true nor "1".

    Not by SQLAlchemy's `metadata[name]`: it builds a JSON path, in which SQLite finds no name that
    JSON had to escape ("نام" among them), and a comparison without types, in which "x" is 0.
    """
    if dialect == "postgresql":
        return sa.cast(_recordings.c.metadata, JSONB).contains({name: value})
    members = sa.func.json_each(_recordings.c.metadata).table_valued("key", "value", "type")
    if isinstance(value, bool):
        same = members.c.type == ("true" if value else "false")
    elif isinstance(value, str):
        same = (members.c.type == "text") & (members.c.value == value)
    else:
        number = float(value) if abs(value) >= 2**63 else value  # SQLite's integers have 64 bits
        same = members.c.type.in_(("integer", "real")) & (members.c.value == number)
    return sa.exists().where((members.c.key == name) & same)


def _without_suspects(candidates: Sequence[Any]) -> list[int]:
    """Keys to lease together: the first alone if it has failed before, else all that never have."""
    if candidates and candidates[0].attempts:
        return [candidates[0].key]
    return [candidate.key for candidate in candidates if not candidate.attempts]


def _one(db: sa.Connection, condition: sa.ColumnElement[bool]) -> Recording | None:
    row = db.execute(sa.select(*_RECORDING_COLUMNS).where(condition)).one_or_none()
    return None if row is None else _recording(row)


def _recording(row: Any) -> Recording:  # noqa: ANN401 - SQLAlchemy rows are untyped
    return Recording(**row._mapping)


_WRITERS = 0x636C617370
"""PostgreSQL's name of the lock that every writing transaction holds: "clasp"."""


def _create_engine(url: str) -> sa.Engine:
    engine = sa.create_engine(url)
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
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=60000"):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def _on_begin(db: sa.Connection) -> None:
        write = db.get_execution_options().get("clasp_write", False)
        db.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


_migrating = threading.Lock()
"""Alembic keeps what it is migrating in module globals."""


def _migrate(db: sa.Connection) -> None:
    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = db
    try:
        with _migrating:
            alembic.command.upgrade(config, "head")
    except alembic.util.CommandError as error:
        raise DataMismatch(
            f"The catalogue was written by a newer version of this program ({error}). Use that version, or"
            " another CLASP_DATA_DIR."
        ) from error
