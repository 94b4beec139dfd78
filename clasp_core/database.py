"""The SQL database under the catalogue: its tables, its transactions, and what a damaged or a full one says.

SQLite or PostgreSQL; the schema's history is `clasp_core.migrations`. What rows mean is the business of who
reads and writes them: `catalog`, `reindex`, `access`.
"""

import json
import logging
import re
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
import alembic.script
import alembic.util
import sqlalchemy as sa
from alembic.runtime.migration import MigrationContext

from clasp_core.errors import DataDamaged, DataMismatch, DiskFull
from clasp_core.faults import fault
from clasp_core.filters import SQL_FUNCTION, holds

_log = logging.getLogger(__name__)

_key = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TABLES = sa.MetaData()
RECORDINGS = sa.Table(
    "recordings",
    TABLES,
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
SEGMENTS = sa.Table(
    "segments",
    TABLES,
    sa.Column("recording", _key, primary_key=True),
    sa.Column("model", sa.Text, primary_key=True),
    sa.Column("ordinal", sa.Integer, primary_key=True),
    sa.Column("start_s", sa.Float),
    sa.Column("end_s", sa.Float),
    sa.Column("vector", sa.LargeBinary),
    sa.Column("transcript", sa.Text),
)
CHANGES = sa.Table(
    "changes",
    TABLES,
    sa.Column("seq", _key, primary_key=True),
    sa.Column("recording", _key),
    sa.Column("token", sa.Text),
    sa.Column("model", sa.Text),
)
MODELS = sa.Table(
    "models",
    TABLES,
    sa.Column("fingerprint", sa.Text, primary_key=True),
    sa.Column("name", sa.Text),
    sa.Column("dim", sa.Integer),
    sa.Column("state", sa.Text),
    sa.Column("hold_until", sa.Float),
    sa.Column("kept_until", sa.Float),
)
REINDEXING = sa.Table(
    "reindexing",
    TABLES,
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
ONCE = sa.Table(
    "once",
    TABLES,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("request", sa.Text),
    sa.Column("recording", _key),
    sa.Column("id", sa.Text),
    sa.Column("created", sa.Boolean),
    sa.Column("created_at", sa.DateTime),
    sa.Column("kept_until", sa.Float),
)


class Database:
    """Thread-safe, and safe to open from several processes at once."""

    def __init__(self, url: str | sa.URL, *, upgrade: bool = True, create: bool = True) -> None:
        """Open, creating or upgrading the schema; without `upgrade` it is left as it is. Raises as
        `Catalog` does."""
        self._engine = create_engine(url)
        if upgrade:
            _migrate(url, create)

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""
        return self._engine.dialect.name

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """One consistent snapshot."""
        with _intact(self._engine), self._engine.connect() as db, db.begin():
            yield db

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """Sole writer, durable when the block ends. Raises DiskFull, and nothing is written then."""
        engine = self._engine
        try:
            with _intact(engine), engine.connect().execution_options(clasp_write=True) as db, db.begin():
                yield db
        except sa.exc.OperationalError as error:
            if _is_for_lack_of_room(error):
                raise DiskFull("The disk that holds the catalogue is full.") from error
            raise

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
        """Write what is committed at this moment to a new file, while others go on reading and writing.

        SQLite only. Nothing of what was deleted is in it, as there may be in the pages of a file that
        are free. It is not on disk yet when this returns.
        """
        with _intact(self._engine), closing(self._engine.raw_connection()) as db:
            db.cursor().execute("VACUUM INTO ?", (str(path),))


def exists(db: sa.Connection, condition: sa.ColumnElement[bool]) -> bool:
    """Whether there is such a row, in the table that the condition is about."""
    return bool(db.execute(sa.select(sa.exists().where(condition))).scalar_one())


def _is_for_lack_of_room(error: sa.exc.OperationalError) -> bool:
    """SQLITE_FULL, or PostgreSQL's class of it."""
    cause = error.orig
    code = getattr(cause, "sqlite_errorcode", None)
    return code == sqlite3.SQLITE_FULL or getattr(cause, "sqlstate", None) == "53100"


_WRITERS = 0x636C617370
"""PostgreSQL's name of the lock that every writing transaction holds: "clasp"."""


def create_engine(url: str | sa.URL, *, migrating: bool = False) -> sa.Engine:
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
    engine = create_engine(url, migrating=True)
    try:
        with (
            _intact(engine, opening=True),
            engine.connect().execution_options(clasp_write=True) as db,
            db.begin(),
            _migrating,
        ):
            if not create and not sa.inspect(db).has_table(RECORDINGS.name):
                raise _damaged(engine, "it is empty")
            config.attributes["connection"] = db
            if not _is_borne(db, alembic.script.ScriptDirectory.from_config(config)):
                alembic.command.upgrade(config, "head")
            for table in TABLES.sorted_tables:  # a column whose name is damaged is met here, and not later
                db.execute(sa.select(table).limit(0))
            fault("catalog.migrated")
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
