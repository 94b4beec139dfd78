"""A real PostgreSQL for tests: a server of this process's own, from the package `pgserver`, or one that
CLASP_TEST_POSTGRES names (`postgresql://user:password@host/postgres`, of one who may create databases).

    url = postgres_url()  # a database that is fresh and empty
"""

import atexit
import os
import shutil
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa

from clasp_core.catalog import Catalog

IN_A_FILE = pytest.mark.skipif(
    os.environ.get("CLASP_TEST_DATABASE", "sqlite") != "sqlite",
    reason="it is about the file that the catalogue is in by default",
)

_starting = threading.Lock()
_databases: list[str] = []
_of_folder: dict[Path, str] = {}


def postgres_url(like: str = "template1") -> str:
    """The URL of a fresh database, empty or `like` the one of that name, which is dropped when this process
    ends. Other processes can use it as well: it leads through a socket in the file system. Skips the test
    where there is no PostgreSQL."""
    with _starting:
        name = f"clasp_{uuid4().hex[:12]}"
        _run(f"CREATE DATABASE {name} TEMPLATE {like}")
        _databases.append(name)
    return sa.make_url(_server()).set(database=name).render_as_string(hide_password=False)


def drop(url: str) -> None:
    """Drop a database of `postgres_url`, whoever uses it."""
    name = sa.make_url(url).database
    assert name in _databases
    _databases.remove(name)
    _run(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@contextmanager
def catalogue_url(kind: str, folder: Path) -> Iterator[str]:
    """The URL of a database without any recordings, `sqlite` (in that folder) or `postgresql`."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'catalog.sqlite3'}"
    else:
        url = postgres_url(like=_with_tables())
        yield url
        drop(url)


@cache
def _with_tables() -> str:
    """The name of a database that need not be migrated any more, which costs more than most tests."""
    url = postgres_url()
    Catalog(url).close()
    return str(sa.make_url(url).database)


def database_settings(data_dir: Path) -> dict[str, str]:
    """What puts the catalogue of a data directory where CLASP_TEST_DATABASE says: with `postgresql`, into a
    database that is this directory's for as long as this process runs; else nothing."""
    if os.environ.get("CLASP_TEST_DATABASE", "sqlite") == "sqlite":
        return {}
    assert os.environ["CLASP_TEST_DATABASE"] == "postgresql"
    data_dir = data_dir.absolute()
    if data_dir not in _of_folder:
        _of_folder[data_dir] = postgres_url()
    return {"database_url": _of_folder[data_dir]}


class Server:
    """A PostgreSQL that a test may stop and start; as a context manager it leaves nothing behind."""

    def __init__(self) -> None:
        # its socket lies in there, and a socket's path can have 107 characters
        self._folder = Path(tempfile.mkdtemp(prefix="clasp-pg-", dir="/tmp"))
        self._pid = 0
        self._url = ""

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it would like to have XDG_RUNTIME_DIR
            pgserver: Any = pytest.importorskip("pgserver", reason="no PostgreSQL: pip install pgserver")
        for attempt in range(3):
            with suppress(Exception if attempt < 2 else ()):  # what the one before left
                pgserver.PostgresServer._instances.clear()
                server = pgserver.get_server(self._folder / "data", cleanup_mode=None)
                break
        self._pid, self._url = server.get_pid(), server.get_uri()

    def stop(self) -> None:
        """At once, as by a power cut: a polite end waits for others."""
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGQUIT)
        deadline = time.monotonic() + 10
        while (self._folder / "data" / "postmaster.pid").exists() and time.monotonic() < deadline:
            time.sleep(0.02)

    def url(self, password: str | None = None) -> str:
        """Of a database that is there from the beginning; this server takes any password."""
        return sa.make_url(self._url).set(password=password).render_as_string(hide_password=False)


@cache
def _server() -> str:
    """The URL of the server's own database."""
    if named := os.environ.get("CLASP_TEST_POSTGRES"):
        return named
    server = Server()
    server.start()
    atexit.register(server.__exit__)
    return server.url()


def _run(statement: str) -> None:
    engine = sa.create_engine(_server(), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as db:
        db.exec_driver_sql(statement)


@atexit.register
def _drop_all() -> None:
    """Where the server is not ours to end."""
    while os.environ.get("CLASP_TEST_POSTGRES") and _databases:
        drop(sa.make_url(_server()).set(database=_databases[-1]).render_as_string(hide_password=False))
