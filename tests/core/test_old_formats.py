"""Data directories that earlier versions wrote: each opens, and answers exactly as it did."""

import re
import sqlite3
from contextlib import closing
from pathlib import Path

import alembic.command
import pytest
import sqlalchemy as sa

from clasp_core.database import create_engine
from clasp_core.errors import NoWaveform
from clasp_core.library import Library, Question
from clasp_core.store import FolderStore
from tests.core.doubles import DIM, MODEL, random_vectors, segments_of, upload
from tests.old_formats.make import FAILED, FOLDER, READY, WAITING, config, revisions, waveform
from tests.postgres import postgres_url

FORMATS = sorted(FOLDER.glob("*.sql"))


def test_every_format_is_kept() -> None:
    """A migration that is not tried on what the version before wrote will meet it at a user's."""
    assert [path.stem for path in FORMATS] == revisions(), "run python -m tests.old_formats.make"


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
@pytest.mark.parametrize("written", FORMATS, ids=lambda path: path.stem)
def test_what_an_earlier_version_wrote_is_read(written: Path, kind: str, tmp_path: Path) -> None:
    """Recordings, their vectors, what waits and what failed; and no key is given out a second time."""
    url = None
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite3")) as db:
        # the dump of sqlite_sequence wants a table that only SQLite may make
        db.executescript(re.sub(r"(?m)^CREATE TABLE sqlite_sequence.*\n", "", written.read_text()))
        if kind == "postgresql":
            url = postgres_url()
            write_the_same(db, url, written.stem)
    if url is not None:
        (tmp_path / "catalog.sqlite3").unlink()
    store = FolderStore(tmp_path / "audio")
    for name in [*READY, WAITING, FAILED]:
        with store.receive() as arriving:
            arriving.write(name.encode())
            arriving.seal()
            store.place(arriving)
    for _ in range(2):
        with closing(Library(tmp_path, model=MODEL, dim=DIM, name="spectral", database_url=url)) as library:
            library.tidy()
            listed, _ = library.page()
            assert [one.id for one in listed] == [FAILED, WAITING, *READY[::-1]]
            assert [one.status for one in listed] == ["failed", "pending", "ready", "ready", "ready"]
            assert listed[0].error_code == "silent_audio"
            for key, name in enumerate(READY, 1):
                recording = library.catalog.get(name)
                assert (recording.key, recording.lang, recording.size_bytes) == (key, "fa", len(name))
                assert recording.metadata == {"name": name, "نام": key}
                assert recording.created_at.day == key
                ((best, *others),) = library.search(random_vectors(key, 2)[1:], [Question()])
                assert (best.recording.id, len(others)) == (name, 2)
                assert best.score == pytest.approx(1)
                assert (best.segments[0].start_s, best.segments[0].end_s) == (1.0, 2.0)
                if written.stem >= "0008":
                    assert library.catalog.waveform(name)[1].levels.tobytes() == waveform(key)
                else:
                    with pytest.raises(NoWaveform):
                        library.catalog.waveform(name)
                with library.store.open(recording.sha256) as file:
                    assert file.read() == name.encode()
    with closing(Library(tmp_path, model=MODEL, dim=DIM, name="spectral", database_url=url)) as library:
        (leased,) = library.catalog.lease("worker", limit=8, lease_s=60, model=MODEL)
        assert leased.id == WAITING
        made = segments_of(random_vectors(7, 1))
        assert library.catalog.complete(leased.key, "worker", duration_s=1.0, model=MODEL, segments=made)
        assert upload(library, b"new").key > 9
        assert len(library.refresh()) == 7


def write_the_same(source: sqlite3.Connection, url: str, revision: str) -> None:
    """Put the rows of a SQLite catalogue into a PostgreSQL one of the same revision."""
    engine = create_engine(url, migrating=True)
    with engine.begin() as db:
        migrating = config()
        migrating.attributes["connection"] = db
        alembic.command.upgrade(migrating, revision)
        tables = sorted(set(sa.inspect(db).get_table_names()) - {"alembic_version", "recordings"})
        for table in ["recordings", *tables]:  # what others point at comes first
            read = source.execute(f"SELECT * FROM {table}")
            names = [column[0] for column in read.description]
            marks = ", ".join(["%s"] * len(names))
            for row in read:
                # texts without a type: PostgreSQL makes of them what the column has
                db.exec_driver_sql(f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks})", row)
        for table, last in source.execute("SELECT name, seq FROM sqlite_sequence"):
            key = "seq" if table == "changes" else "key"
            db.exec_driver_sql("SELECT setval(pg_get_serial_sequence(%s, %s), %s)", (table, key, last))
    engine.dispose()
