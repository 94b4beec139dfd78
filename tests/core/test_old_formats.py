"""Data directories that earlier versions wrote: each opens, and answers exactly as it did."""

import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from clasp_core.library import Library, Question
from clasp_core.store import FolderStore
from tests.core.doubles import DIM, MODEL, random_vectors, segments_of, upload
from tests.old_formats.make import FAILED, FOLDER, READY, WAITING, revisions

FORMATS = sorted(FOLDER.glob("*.sql"))


def test_every_format_is_kept() -> None:
    """A migration that is not tried on what the version before wrote will meet it at a user's."""
    assert [path.stem for path in FORMATS] == revisions(), "run python -m tests.old_formats.make"


@pytest.mark.parametrize("written", FORMATS, ids=lambda path: path.stem)
def test_what_an_earlier_version_wrote_is_read(written: Path, tmp_path: Path) -> None:
    """Recordings, their vectors, what waits and what failed; and no key is given out a second time."""
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite3")) as db:
        # the dump of sqlite_sequence wants a table that only SQLite may make
        db.executescript(re.sub(r"(?m)^CREATE TABLE sqlite_sequence.*\n", "", written.read_text()))
    store = FolderStore(tmp_path / "audio")
    for name in [*READY, WAITING, FAILED]:
        with store.receive() as arriving:
            arriving.write(name.encode())
            arriving.seal()
            store.place(arriving)
    for _ in range(2):
        with closing(Library(tmp_path, model=MODEL, dim=DIM, name="spectral")) as library:
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
                with library.store.open(recording.sha256) as file:
                    assert file.read() == name.encode()
    with closing(Library(tmp_path, model=MODEL, dim=DIM, name="spectral")) as library:
        (leased,) = library.catalog.lease("worker", limit=8, lease_s=60, model=MODEL)
        assert leased.id == WAITING
        made = segments_of(random_vectors(7, 1))
        assert library.catalog.complete(leased.key, "worker", duration_s=1.0, model=MODEL, segments=made)
        assert upload(library, b"new").key > 9
        assert len(library.refresh()) == 7
