"""Damaged files: whatever is cut or flipped in a data directory, a start answers with what is whole or says what
to do. Never another recording's result, never an empty library in the place of a full one, never a traceback."""

import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest

from clasp_core.catalog import Recording
from clasp_core.errors import ClaspError, DataDamaged, DataMismatch
from clasp_core.ingest import Ingester
from clasp_core.library import Library, Question
from tests.core.doubles import (
    DIM,
    MODEL,
    SpectralSpeechEncoder,
    add,
    complete,
    processes,
    random_vectors,
    upload,
    wav_bytes,
)

NAMES = [f"recording-{number}" for number in range(12)]
KEEP_OPEN_S = 60


def vectors_of(name: str) -> np.ndarray:
    return random_vectors(NAMES.index(name), 3)


def fill(data_dir: Path) -> None:
    """All but the last two recordings are in the main file and in a snapshot; those are in the log only."""
    library = Library(data_dir, model=MODEL, dim=DIM, name="spectral")
    for name in NAMES[:-2]:
        add(library, name, vectors_of(name), metadata={"name": name}, lang="fa")
    library.refresh()
    library.close()
    library = Library(data_dir, model=MODEL, dim=DIM, name="spectral")
    for name in NAMES[-2:]:
        add(library, name, vectors_of(name), metadata={"name": name}, lang="fa")
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def left_by_a_crash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory as a killed process leaves it: with a log that is not in the main file yet."""
    data_dir = tmp_path_factory.mktemp("damage") / "index_data"
    process = processes(__name__).Process(target=fill, args=(data_dir,))
    process.start()
    process.join(60)
    assert process.exitcode == -9
    assert (data_dir / "catalog.sqlite3-wal").stat().st_size > 10_000
    return data_dir


def start_twice(data_dir: Path) -> list[dict[str, Recording] | str]:
    """What two starts in a row come to: the recordings that are listed, each checked, or why it refused."""
    outcomes: list[dict[str, Recording] | str] = []
    for _ in range(2):
        try:
            outcomes.append(started(data_dir))
        except (DataDamaged, DataMismatch) as error:
            assert "\n" not in error.detail
            outcomes.append(error.code)
    return outcomes


def started(data_dir: Path) -> dict[str, Recording]:
    """As the service starts; then each recording is asked for by its own vectors."""
    with closing(Library(data_dir, model=MODEL, dim=DIM, name="spectral")) as library:
        library.tidy()
        library.refresh()
        listed = {recording.id: recording for recording in library.page(limit=1000)[0]}
        for name in listed:
            ((best, *_),) = library.search(vectors_of(name)[:1], [Question()])
            if listed[name].status == "ready":
                assert best.score < 0.9 or best.recording.id == name, "another's result"
            with library.store.open(listed[name].sha256) as file:
                assert len(file.read()) <= len(name)
        return listed


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "empty": lambda content, chance: b"",
    "half": lambda content, chance: content[: len(content) // 2],
    "a byte short": lambda content, chance: content[:-1],
    "header": lambda content, chance: flipped(content, chance, 0, min(100, len(content))),
    "middle": lambda content, chance: flipped(content, chance, len(content) // 3, 2 * len(content) // 3),
    "end": lambda content, chance: flipped(content, chance, len(content) - 50, len(content)),
}


def flipped(content: bytes, chance: random.Random, first: int, last: int) -> bytes:
    spoilt = bytearray(content)
    spoilt[chance.randrange(max(0, first), last)] ^= 1 << chance.randrange(8)
    return bytes(spoilt)


def files(data_dir: Path) -> Iterator[Path]:
    """One of each kind."""
    yield from sorted(data_dir.glob("catalog.sqlite3*"))
    yield from sorted(path for path in (data_dir / "index").iterdir() if path.stat().st_size)
    yield min(path for path in (data_dir / "audio").rglob("*") if path.is_file())
