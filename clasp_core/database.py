"""The SQL database under the catalogue: its tables, its transactions, and what a damaged or a full one says.

SQLite or PostgreSQL; the schema's history is `clasp_core.migrations`. What rows mean is the business of who
reads and writes them: `catalog`, `reindex`, `access`.

In SQLite writers exclude each other. In PostgreSQL they do not: whoever writes on the strength of what it has
read takes a `lock` by a name, or the rows themselves (FOR UPDATE), and all who take several do so in this
order, so that no two can wait for each other:

    content XX          recordings whose sha256 begins so: shared to store bytes, exclusive to sweep them
    id, bytes, once     of a registration, each by its value; taken together, sorted
    model               which model is the active one: shared to work by it, exclusive to make it another
    reindexing          who announces a model, or enqueues recordings for it
    rows                of `models`, then of `recordings` by ascending keys, then of what hangs on those
    key, queue          what a quota, or the bound of the queue, is counted under
    changes             the end of the change sequence: whoever has this waits for nobody any more

    library, turn N     taken alone: the row of the library's identity, and that of whose turn N is

The last but one is why numbers of changes are in the order of commits: PostgreSQL frees such locks once all
can see what was committed.
"""

import hashlib
import json
import logging
import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
import alembic.script
import alembic.util
import sqlalchemy as sa
from alembic.runtime.migration import MigrationContext

from clasp_core.errors import DatabaseUnavailable, DataDamaged, DataMismatch, DiskFull, ExtraMissing
from clasp_core.faults import fault
from clasp_core.filters import SQL_FUNCTION, holds
from clasp_core.types import Seconds


class _Text(sa.TypeDecorator[str]):
    """Text that a client may have sent, or a model written down: PostgreSQL has no U+0000, with which it
    would refuse the whole statement. No name has one, so that nothing is found by what is put in its place.
    """

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | None:
        if value is None or dialect.name == "sqlite":
            return value
        return value.replace("\0", "\ufffd")


_log = logging.getLogger(__name__)

_key = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TABLES = sa.MetaData()
RECORDINGS = sa.Table(
    "recordings",
    TABLES,
    sa.Column("key", _key, primary_key=True),
    sa.Column("id", _Text),
    sa.Column("collection", _Text),
    sa.Column("sha256", _Text),
    sa.Column("size_bytes", sa.BigInteger),
    sa.Column("media_type", _Text),
    sa.Column("lang", _Text),
    sa.Column("metadata", sa.JSON),
    sa.Column("created_at", sa.DateTime),
    sa.Column("status", _Text),
    sa.Column("duration_s", sa.Float),
    sa.Column("segments", sa.Integer),
    sa.Column("model", _Text),
    sa.Column("error_code", _Text),
    sa.Column("error_detail", _Text),
    sa.Column("attempts", sa.Integer),
    sa.Column("lease_owner", _Text),
    sa.Column("lease_until", sa.Float),
    sa.Column("uploaded_by", _Text),
)
SEGMENTS = sa.Table(
    "segments",
    TABLES,
    sa.Column("recording", _key, primary_key=True),
    sa.Column("model", _Text, primary_key=True),
    sa.Column("ordinal", sa.Integer, primary_key=True),
    sa.Column("start_s", sa.Float),
    sa.Column("end_s", sa.Float),
    sa.Column("vector", sa.LargeBinary),
    sa.Column("transcript", _Text),
)
WAVEFORMS = sa.Table(
    "waveforms",
    TABLES,
    sa.Column("recording", _key, primary_key=True),
    sa.Column("step_s", sa.Float),
    sa.Column("levels", sa.LargeBinary),
)
CHANGES = sa.Table(
    "changes",
    TABLES,
    sa.Column("seq", _key, primary_key=True),
    sa.Column("recording", _key),
    sa.Column("token", _Text),
    sa.Column("model", _Text),
)
MODELS = sa.Table(
    "models",
    TABLES,
    sa.Column("fingerprint", _Text, primary_key=True),
    sa.Column("name", _Text),
    sa.Column("dim", sa.Integer),
    sa.Column("state", _Text),
    sa.Column("hold_until", sa.Float),
    sa.Column("kept_until", sa.Float),
)
REINDEXING = sa.Table(
    "reindexing",
    TABLES,
    sa.Column("recording", _key, primary_key=True),
    sa.Column("model", _Text, primary_key=True),
    sa.Column("status", _Text),
    sa.Column("duration_s", sa.Float),
    sa.Column("segments", sa.Integer),
    sa.Column("error_code", _Text),
    sa.Column("error_detail", _Text),
    sa.Column("attempts", sa.Integer),
    sa.Column("lease_owner", _Text),
    sa.Column("lease_until", sa.Float),
)
ONCE = sa.Table(
    "once",
    TABLES,
    sa.Column("name", _Text, primary_key=True),
    sa.Column("request", _Text),
    sa.Column("recording", _key),
    sa.Column("id", _Text),
    sa.Column("created", sa.Boolean),
    sa.Column("created_at", sa.DateTime),
    sa.Column("kept_until", sa.Float),
)
API_KEYS = sa.Table(
    "api_keys",
    TABLES,
    sa.Column("id", _Text, primary_key=True),
    sa.Column("name", _Text),
    sa.Column("sha256", _Text),
    sa.Column("scopes", sa.JSON),
    sa.Column("collections", sa.JSON(none_as_null=True)),
    sa.Column("created_at", sa.DateTime),
    sa.Column("revoked_at", sa.DateTime),
    sa.Column("rate", _Text),
    sa.Column("max_recordings", sa.BigInteger),
    sa.Column("max_bytes", sa.BigInteger),
    sa.Column("max_hours", sa.Float),
)

_NUMBERED = ((RECORDINGS, "key"), (CHANGES, "seq"))
"""What is numbered, and never twice by the same number."""
_VERSION = sa.Table("alembic_version", sa.MetaData(), sa.Column("version_num", sa.Text))
_SQLITE_SEQUENCE = sa.Table(
    "sqlite_sequence", sa.MetaData(), sa.Column("name", sa.Text), sa.Column("seq", sa.Integer)
)

WAITING_LOOKS_EVERY_S: Seconds = 5.0
"""How often whoever waits to be told looks for itself: what tells is lost with a connection, or a process."""
_CHANNEL = "clasp_work"
LIBRARY = sa.Table(
    "library",
    TABLES,
    sa.Column("row", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("id", sa.Text),
)
TURNS = sa.Table(
    "turns",
    TABLES,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("owner", sa.Text),
    sa.Column("until", sa.Float),
)


class Database:
    """Thread-safe, and safe to open from several processes at once."""

    def __init__(self, url: str | sa.URL, *, upgrade: bool = True, create: bool = True) -> None:
        """Open, creating or upgrading the schema; without `upgrade` it is left as it is. Raises as
        `Catalog` does."""
        self._engine = create_engine(url)
        # one snapshot for all statements of a transaction, as SQLite has it of itself
        snapshot = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        self._reader = self._engine
        if self.dialect != "sqlite":
            self._reader = self._engine.execution_options(**snapshot)
        self._listening: Any = None
        if upgrade:
            _migrate(url, create)

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""
        return self._engine.dialect.name

    def close(self) -> None:
        self._stop_listening()
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """One consistent snapshot. Raises DatabaseUnavailable."""
        with _intact(self._engine), self._reader.connect() as db, db.begin():
            yield db

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """All or nothing, durable when the block ends.

        In SQLite the sole writer; in PostgreSQL only what is locked stays as it was read. Raises DiskFull,
        and nothing is written then; and DatabaseUnavailable, when nothing is written either, unless the
        connection was lost in the very moment of the commit: then all may be.
        """
        engine = self._engine
        try:
            with _intact(engine), engine.connect().execution_options(clasp_write=True) as db, db.begin():
                yield db
        except sa.exc.OperationalError as error:
            if _is_for_lack_of_room(error):
                raise DiskFull(_NO_ROOM) from error
            raise

    def tell(self) -> None:
        """Wake who waits in `await_news`, in whatever process. Not part of a transaction: PostgreSQL lets
        those that tell commit only one by one."""
        if self.dialect != "sqlite":
            with suppress(DatabaseUnavailable, DiskFull), self._engine.connect() as db:
                db.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql(f"NOTIFY {_CHANNEL}")

    def await_news(self, stopping: threading.Event, poll_s: Seconds) -> None:
        """Wait until somebody may have called `tell`, or this is `stopping`. From one thread only.

        In SQLite that is `poll_s`. In PostgreSQL a connection of its own listens; what was told since the
        last call is news, too, and so is everything once that connection is new.
        """
        if self.dialect == "sqlite":
            stopping.wait(poll_s)
            return
        import psycopg

        deadline = time.monotonic() + WAITING_LOOKS_EVERY_S
        try:
            if self._listening is None:
                pooled = self._engine.raw_connection()
                self._listening = pooled.driver_connection
                pooled.detach()  # it is never given to anybody else
                self._listening.autocommit = True
                self._listening.execute(f"LISTEN {_CHANNEL}")
                return
            while not stopping.is_set() and time.monotonic() < deadline:
                if any(self._listening.notifies(timeout=poll_s, stop_after=1)):
                    return
        except (psycopg.Error, sa.exc.SQLAlchemyError, DatabaseUnavailable):
            self._stop_listening()
            stopping.wait(poll_s)

    def _stop_listening(self) -> None:
        if self._listening is not None:
            with suppress(Exception):
                self._listening.close()
            self._listening = None

    def check(self) -> None:
        """Raise DataDamaged where the database contradicts itself, an index its table say.

        SQLite only. Reads everything, in about a second for a gigabyte that is in memory; what no other
        part of the file tells (a language, metadata, most bits of a vector) may be damaged unnoticed.
        """
        if self._engine.dialect.name == "sqlite":
            with self.reading() as db:
                found = db.exec_driver_sql("PRAGMA integrity_check(1)").scalars().all()
            if found != ["ok"]:
                raise _damaged(self._engine, found[0])

    def copy_to(self, path: Path) -> None:
        """Write what is committed at this moment to a new SQLite file; others go on reading and writing.

        Nothing of what was deleted is in it, as there may be in the pages of a file that are free. It is
        not on disk yet when this returns. From PostgreSQL only where the schema is this version's: else
        DataMismatch.
        """
        if self.dialect == "sqlite":
            with _intact(self._engine), closing(self._engine.raw_connection()) as db:
                db.cursor().execute("VACUUM INTO ?", (str(path),))
            return
        with closing(Database(_file_url(path))) as copy, self.reading() as here, copy.writing() as there:
            if not sa.inspect(here).has_table(_VERSION.name) or _revision(here) != _revision(there):
                raise DataMismatch(
                    "The catalogue's database is empty, or of another version of this program. Start the"
                    " service once with this version, which brings it up to date."
                )
            _copy_rows(here, there)
            there.execute(sa.delete(_SQLITE_SEQUENCE))
            for table, key in _NUMBERED:
                found = here.execute(sa.select(sa.func.pg_get_serial_sequence(table.name, key)))
                name = found.scalar_one().rpartition(".")[2]
                sequence = sa.table(name, sa.column("last_value"), sa.column("is_called"))
                last = here.execute(sa.select(sequence.c.last_value).where(sequence.c.is_called)).scalar()
                there.execute(sa.insert(_SQLITE_SEQUENCE).values(name=table.name, seq=last or 0))

    def fill_from(self, path: Path) -> None:
        """Take over all that is in a SQLite file that `copy_to` wrote, by this or an earlier version, in one
        transaction. PostgreSQL only, and empty; DataMismatch where it is not."""
        with closing(Database(_file_url(path))) as copy, copy.reading() as there, self.writing() as here:
            lock(here, "schema")
            if not self.is_empty(here):
                raise DataMismatch("The catalogue's database holds a library already.")
            _copy_rows(there, here)
            for table, key in _NUMBERED:
                query = sa.select(_SQLITE_SEQUENCE.c.seq).where(_SQLITE_SEQUENCE.c.name == table.name)
                if last := there.execute(query).scalar_one_or_none():
                    sequence = sa.func.pg_get_serial_sequence(table.name, key)
                    here.execute(sa.select(sa.func.setval(sequence, last)))

    def is_empty(self, db: sa.Connection) -> bool:
        """Whether nothing was ever stored here."""
        return not any(db.execute(sa.select(table).limit(1)).first() for table in TABLES.sorted_tables)


def exists(db: sa.Connection, condition: sa.ColumnElement[bool]) -> bool:
    """Whether there is such a row, in the table that the condition is about."""
    return bool(db.execute(sa.select(sa.exists().where(condition))).scalar_one())


def _revision(db: sa.Connection) -> str:
    return str(db.execute(sa.select(_VERSION)).scalar_one())


def _copy_rows(source: sa.Connection, target: sa.Connection) -> None:
    for table in sorted(TABLES.sorted_tables, key=lambda table: table is not RECORDINGS):  # others name those
        rows = source.execute(sa.select(table).execution_options(yield_per=500))
        for some in rows.partitions():
            target.execute(sa.insert(table), [dict(row._mapping) for row in some])


def _file_url(path: Path) -> sa.URL:
    return sa.URL.create("sqlite", database=str(path))


def lock(db: sa.Connection, *names: str, shared: bool = False) -> bool:
    """Exclude, to the end of this transaction, all others that take a lock of one of these names, or only
    those that do not share it. See the module's head for what the names are and their order.

    Returns whether it took any, so that others may have written since this transaction looked: in SQLite
    there are no others.
    """
    if db.dialect.name == "sqlite":
        return False
    # as numbers that no other program in this database is likely to use
    numbers = sorted(
        int.from_bytes(hashlib.sha256(f"clasp {name}".encode()).digest()[:8], "big", signed=True)
        for name in set(names)
    )
    take = "pg_advisory_xact_lock_shared" if shared else "pg_advisory_xact_lock"
    each = sa.text(f"SELECT {take}(number) FROM unnest(CAST(:numbers AS bigint[])) AS number")  # noqa: S608
    db.execute(each, {"numbers": numbers})
    return True


def _is_for_lack_of_room(error: sa.exc.OperationalError) -> bool:
    return getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL


_NO_ROOM = "The disk that holds the catalogue is full."
_POOL = {"pool_size": 5, "max_overflow": 15, "pool_timeout": 10, "pool_pre_ping": True}
"""20 connections for each process at most, and seconds until one of them is free; each is tried before use,
so that a server that was restarted is not noticed."""
_SESSION = (
    "SET lock_timeout = '60s'",
    # of a process that hangs, or whose machine is gone without a word: others wait for its locks
    "SET idle_in_transaction_session_timeout = '5min'",
    "SET tcp_keepalives_idle = 30",
    "SET tcp_keepalives_interval = 10",
    "SET tcp_keepalives_count = 3",
)
_CONNECT = {
    "connect_timeout": "5",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
    "application_name": "clasp",
}
"""For libpq, where the URL says nothing else; seconds, but for the milliseconds of tcp_user_timeout."""
_PASSING = ("08", "40", "53", "57", "55P03", "25P03", "58")
"""Beginnings of SQLSTATE codes of trouble that is the server's and passes: connections, deadlocks, resources,
its end or its start, locks that do not come free. DiskFull's, 53100, is known before."""


def _on_postgresql_error(context: sa.engine.ExceptionContext) -> None:
    """Trouble of the server's as DatabaseUnavailable. All else is a bug: of what the server says of that only
    the kind is kept, since the rest repeats what rows hold, and errors go into the log."""
    error: Any = context.original_exception
    if context.is_pre_ping or not hasattr(error, "sqlstate"):
        return
    code = error.sqlstate
    if code == "53100":
        raise DiskFull(_NO_ROOM)
    is_lost = context.is_disconnect or context.connection is None
    if code is not None or not is_lost:
        where = error.diag.constraint_name or error.diag.table_name
        error.args = (f"SQLSTATE {code} {type(error).__name__}" + (f" at {where}" if where else ""),)
    if is_lost or (code or "").startswith(_PASSING):
        raise DatabaseUnavailable(
            "The database of the catalogue does not answer, or not in time; try again in a moment."
        )
    raise RuntimeError(f"{error.args[0]}, in: {context.statement}")


def create_engine(url: str | sa.URL, *, migrating: bool = False) -> sa.Engine:
    """`migrating` leaves SQLite's foreign keys unheeded, which can only be said outside of a transaction: to
    change a table there is to make another in its place, and to drop one deletes all that points at it."""
    # errors go into the log, and a statement's values are questions, metadata and transcripts
    url = sa.make_url(url)
    if url.get_backend_name() == "postgresql":
        return _create_postgresql_engine(url, migrating)
    engine = sa.create_engine(url, hide_parameters=True)

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


def _create_postgresql_engine(url: sa.URL, migrating: bool) -> sa.Engine:
    url = url.set(drivername="postgresql+psycopg")
    said = {name: value for name, value in _CONNECT.items() if name not in url.query}
    try:
        engine = sa.create_engine(url, hide_parameters=True, connect_args=said, **_POOL)
    except ModuleNotFoundError as error:
        raise ExtraMissing(
            f"The catalogue is to be in PostgreSQL, for which {error.name} is missing:"
            " pip install 'clasp-search[postgresql]'"
        ) from error

    @sa.event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _: object) -> None:  # noqa: ANN401
        if not migrating:  # which may have to wait
            connection.autocommit = True
            connection.execute("; ".join(_SESSION))
            connection.autocommit = False

    sa.event.listen(engine, "handle_error", _on_postgresql_error)
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
    except sa.exc.TimeoutError as error:  # of the pool
        raise DatabaseUnavailable(
            "Too much is asked of the catalogue at once; try again in a moment."
        ) from error
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
    engine = create_engine(url, migrating=True)
    try:
        with (
            _intact(engine, opening=True),
            engine.connect().execution_options(clasp_write=True) as db,
            db.begin(),
            _migrating,
        ):
            lock(db, "schema")
            if not create and not sa.inspect(db).has_table(RECORDINGS.name):
                raise _damaged(engine, "it is empty")
            config.attributes["connection"] = db
            if not _is_borne(db, alembic.script.ScriptDirectory.from_config(config)):
                alembic.command.upgrade(config, "head")
            for table in TABLES.sorted_tables:  # a column whose name is damaged is met here, and not later
                db.execute(sa.select(table).limit(0))
            fault("catalog.migrated")
    except DatabaseUnavailable as error:
        where = f"{engine.url.host or engine.url.query.get('host', '')}/{engine.url.database}"
        reason = " ".join(str(error.__cause__).split())
        raise DatabaseUnavailable(f"The catalogue's database {where} cannot be opened: {reason}") from error
    except alembic.util.CommandError as error:
        raise DataMismatch(
            f"The catalogue was written by a newer version of this program ({error}). Use that version, or"
            " another CLASP_DATA_DIR."
        ) from error
    finally:
        engine.dispose()


_BEARS = re.compile(r"\d{4}_bears_(\d{4})")
"""How a migration is called that programs of an older schema, down to the second number, can live with: it
only adds what they need not know of. A plain number, such as 0006, says that none can."""


def _is_borne(db: sa.Connection, known: alembic.script.ScriptDirectory) -> bool:
    """Whether a newer program upgraded the schema, and in such a way that this one can go on using it: during
    a rolling upgrade, services and workers of the old version must still be able to start."""
    written, head = MigrationContext.configure(db).get_current_revision(), known.get_current_head()
    if written is None or head is None or (borne := _BEARS.fullmatch(written)) is None:
        return False
    if written in {script.revision for script in known.walk_revisions()} or head[:4] < borne[1]:
        return False
    _log.warning(
        "a newer version of this program upgraded the catalogue; this one goes on", extra={"schema": written}
    )
    return True
