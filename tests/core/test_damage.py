"""Damaged files: whatever is cut or flipped in a data directory, a start answers with what is whole or says
what to do. Never another's result, never an empty library for a full one, never an unexpected error."""

import os
import random
import shutil
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from clasp_core.errors import DataDamaged, DataMismatch
from clasp_core.ingest import Ingester
from clasp_core.library import Library, Question
from clasp_core.types import Embeddings
from tests.core.doubles import (
    DIM,
    MODEL,
    SpectralSpeechEncoder,
    add,
    processes,
    random_vectors,
    upload,
    wav_bytes,
)

NAMES = [f"recording-{number}" for number in range(12)]
IN_THE_LOG = 2
"""How many of them are in SQLite's log only, where a process was killed."""


def vectors_of(name: str) -> Embeddings:
    return random_vectors(NAMES.index(name), 3)


def open_library(data_dir: Path) -> Library:
    return Library(data_dir, model=MODEL, dim=DIM, name="spectral")


def fill(data_dir: Path, *, die: bool) -> None:
    """All but the last are in the main file and in a snapshot; those came later."""
    with closing(open_library(data_dir)) as library:
        for name in NAMES[:-IN_THE_LOG]:
            add(library, name, vectors_of(name), metadata={"name": name}, lang="fa")
        library.refresh()
    library = open_library(data_dir)
    for name in NAMES[-IN_THE_LOG:]:
        add(library, name, vectors_of(name), metadata={"name": name}, lang="fa")
    if die:
        os.kill(os.getpid(), signal.SIGKILL)
    library.catalog.close()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory as a service leaves it that was stopped: the catalogue is one file."""
    data_dir = tmp_path_factory.mktemp("stopped") / "index_data"
    fill(data_dir, die=False)
    assert not (data_dir / "catalog.sqlite3-wal").exists()
    return data_dir


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As one leaves it that was killed: with a log that is not in the main file yet."""
    data_dir = tmp_path_factory.mktemp("killed") / "index_data"
    process = processes(__name__).Process(target=fill, args=(data_dir,), kwargs={"die": True})
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert (data_dir / "catalog.sqlite3-wal").stat().st_size > 10_000
    return data_dir


def flipped(first: float, last: float) -> Callable[[bytes, random.Random], bytes]:
    """One bit between these parts of the file."""

    def flip(content: bytes, chance: random.Random) -> bytes:
        spoilt = bytearray(content)
        spoilt[chance.randrange(int(first * len(content)), 1 + int(last * (len(content) - 1)))] ^= (
            1 << chance.randrange(8)
        )
        return bytes(spoilt)

    return flip


CUTS: list[Callable[[bytes, random.Random], bytes]] = [
    lambda content, chance: b"",
    lambda content, chance: content[: len(content) // 2],
    lambda content, chance: content[:-1],
]
FLIPS = [flipped(0, 0.03), flipped(0.03, 0.9), flipped(0.9, 1)]


def starts_after(data_dir: Path, path: Path, copy: Path, seeds: int) -> list[tuple[str, set[str] | str]]:
    """What two starts in a row come to after each damage of a file: the ids that are listed, or the code of
    the error that says what to do."""
    outcomes: list[tuple[str, set[str] | str]] = []
    damages = [(damage, 0) for damage in CUTS] + [(damage, seed) for damage in FLIPS for seed in range(seeds)]
    for damage, seed in damages:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(data_dir, copy)
        target = copy / path.relative_to(data_dir)
        target.write_bytes(damage(target.read_bytes(), random.Random(seed)))
        first, second = started(copy), started(copy)
        assert first == second
        outcomes.append((f"{path.name} {damages.index((damage, seed))}", first))
    return outcomes


def started(data_dir: Path) -> set[str] | str:
    try:
        library = open_library(data_dir)
    except (DataDamaged, DataMismatch) as error:
        assert "backup" in error.detail or isinstance(error, DataMismatch)  # noqa: PT017
        return error.code
    try:
        library.tidy()
        library.refresh()
        listed = {recording.id: recording for recording in library.page(limit=1000)[0]}
        for name, recording in listed.items():
            (hits,) = library.search(vectors_of(name)[:1], [Question()])
            own = recording.status != "ready" or hits[0].recording.id == name
            assert own or hits[0].score < 0.9, "another's result"
            assert library.store.path(recording.sha256).is_file(), "its bytes are gone"
        return set(listed)
    except DataDamaged as error:
        return error.code
    finally:
        library.catalog.close()


@pytest.mark.parametrize("seeds", [6, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_a_damaged_catalogue_is_refused_or_all_there(stopped: Path, tmp_path: Path, seeds: int) -> None:
    """Disks lose and flip. A cut file, an empty one above all, must not be taken for a library with less in
    it: its recordings' bytes would be swept away as nobody's."""
    outcomes = starts_after(stopped, stopped / "catalog.sqlite3", tmp_path / "copy", seeds)
    for what, outcome in outcomes:
        assert outcome in ("data_damaged", "data_mismatch", set(NAMES)), what
    # (the last byte may be a zero of an empty page, which nobody misses)
    assert [outcome for _, outcome in outcomes[:2]] == ["data_damaged"] * 2


@pytest.mark.parametrize("seeds", [2, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_damage_beside_the_catalogue_loses_no_more_than_itself(
    killed: Path, tmp_path: Path, seeds: int
) -> None:
    """The log ends at its first damaged frame: its transactions are there up to one, and not beyond. SQLite's
    and our index are made again; a recording that is damaged harms no other."""
    log = starts_after(killed, killed / "catalog.sqlite3-wal", tmp_path / "copy", seeds)
    for what, outcome in log:
        assert outcome in [set(NAMES[: len(NAMES) - lost]) for lost in range(IN_THE_LOG + 1)], what
    others = [killed / "catalog.sqlite3-shm", *(killed / "index").iterdir()]
    others.append(min(path for path in (killed / "audio").rglob("*") if path.is_file()))
    for path in others:
        if path.stat().st_size:
            for what, outcome in starts_after(killed, path, tmp_path / "copy", seeds):
                assert outcome == set(NAMES), what


def test_a_damaged_schema_is_refused(stopped: Path, tmp_path: Path) -> None:
    """One letter of a column's name, and a search would fail long after the start."""
    copy = tmp_path / "copy"
    shutil.copytree(stopped, copy)
    content = (copy / "catalog.sqlite3").read_bytes()
    assert content.count(b"start_s") == 1
    (copy / "catalog.sqlite3").write_bytes(content.replace(b"start_s", b"stabt_s"))
    assert started(copy) == started(copy) == "data_damaged"


def test_recordings_without_a_catalogue_are_no_new_library(stopped: Path, tmp_path: Path) -> None:
    """The wrong half of a copy, or a restore that was cut short: whoever starts a service there must not lose
    the other half, too."""
    copy = tmp_path / "copy"
    shutil.copytree(stopped, copy)
    (copy / "catalog.sqlite3").unlink()
    for _ in range(2):
        with pytest.raises(DataDamaged, match="clasp restore"):
            open_library(copy)
    assert not (copy / "catalog.sqlite3").exists()
    assert len([path for path in (copy / "audio").rglob("*") if path.is_file()]) == len(NAMES)


def test_damaged_vectors_are_made_again(tmp_path: Path) -> None:
    """A flipped bit in a stored vector would stop every replica at that change. The sound is there, so that
    recording is embedded anew, and the others are found meanwhile."""
    data_dir = tmp_path / "index_data"
    with closing(open_library(data_dir)) as library:
        for number in range(4):
            upload(library, wav_bytes(300.0 + 100 * number), f"tone-{number}")
        Ingester(library, SpectralSpeechEncoder(), max_duration_s=60).step()
        assert library.catalog.counts() == {"ready": 4}
    with closing(sqlite3.connect(data_dir / "catalog.sqlite3")) as db:
        db.execute("UPDATE segments SET vector = zeroblob(64) WHERE recording = 1")
        db.execute("UPDATE segments SET vector = x'00' WHERE recording = 2")
        db.commit()
    with closing(open_library(data_dir)) as library:
        assert len(library.refresh()) == 2
        assert library.catalog.counts() == {"pending": 2, "ready": 2}
        Ingester(library, SpectralSpeechEncoder(), max_duration_s=60).step()
        assert library.catalog.counts() == {"ready": 4}
        assert len(library.refresh()) == 4


def test_damaged_sound_is_not_embedded(tmp_path: Path) -> None:
    """It may still decode, to what nobody said."""
    with closing(open_library(tmp_path)) as library:
        recording = upload(library, wav_bytes(), "tone")
        stored = library.store.path(recording.sha256)
        content = bytearray(stored.read_bytes())
        content[-100] ^= 1
        stored.write_bytes(content)
        Ingester(library, SpectralSpeechEncoder(), max_duration_s=60).step()
        failed = library.catalog.get("tone")
        assert (failed.status, failed.error_code) == ("failed", "processing_failed")
        assert "damaged" in (failed.error_detail or "")
        upload(library, wav_bytes())
        Ingester(library, SpectralSpeechEncoder(), max_duration_s=60).step()
        assert library.catalog.get("tone").status == "ready"
