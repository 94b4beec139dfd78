"""The audio stores, a folder and one in S3: what has its final name is whole, and stays exactly as long as a
recording has it."""

import contextlib
import hashlib
import os
import random
import signal
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from clasp_core.catalog import Catalog, NewRecording
from clasp_core.errors import RecordingNotFound
from clasp_core.s3 import S3Store
from clasp_core.store import AudioStore, Displaced, FolderStore
from tests.core.doubles import processes
from tests.object_store import BUCKET, ENVIRONMENT, object_store

CONTENT = b"some bytes of a recording" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def opened(kind: str, root: Path, endpoint: str | None = None) -> AudioStore:
    """A store of either kind. What arrives for the one in S3 is in the same folder."""
    if kind == "folder":
        return FolderStore(root)
    return S3Store(BUCKET, root.as_posix().strip("/"), root / "incoming", endpoint=endpoint)


@pytest.fixture(params=["folder", "s3"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def endpoint(kind: str) -> str | None:
    return object_store().endpoint if kind == "s3" else None


@pytest.fixture
def store(kind: str, tmp_path: Path, endpoint: str | None) -> AudioStore:
    return opened(kind, tmp_path / "audio", endpoint)


def put(store: AudioStore, content: bytes) -> str:
    with store.receive() as upload:
        upload.write(content)
        upload.seal()
        store.prepare(upload)
        store.place(upload)
        return upload.sha256


def content_of(store: AudioStore, sha256: str) -> bytes:
    with store.open(sha256) as file:
        return file.read()


def arriving(folder: Path) -> list[Path]:
    return list((folder / "audio" / "incoming").iterdir())


def test_placed_bytes_come_back(store: AudioStore) -> None:
    """The upload is returned to its owner bit for bit, in however many pieces it came."""
    with store.receive() as upload:
        for start in range(0, len(CONTENT), 777):
            upload.write(CONTENT[start : start + 777])
        upload.seal()
        assert (upload.sha256, upload.size_bytes) == (SHA256, len(CONTENT))
        store.prepare(upload)
        store.place(upload)
    with store.open(SHA256) as file:
        assert file.read() == CONTENT
    assert content_of(store, SHA256) == CONTENT
    assert list(store.stored()) == [SHA256]


def test_no_name_shows_bytes_that_are_not_all_there(store: AudioStore) -> None:
    """Whoever finds a file by its content's name may rely on it: until it is placed, it is not there."""
    with store.receive() as upload:
        upload.write(CONTENT)
        assert list(store.stored()) == []
        upload.seal()
        assert list(store.stored()) == []
        with pytest.raises(FileNotFoundError):
            store.open(SHA256)
        store.prepare(upload)
        store.place(upload)
        assert list(store.stored()) == [SHA256]


def test_the_same_bytes_are_kept_once(store: AudioStore, tmp_path: Path) -> None:
    """A hundred uploads of one file take the disk of one; and whoever reads the first is not disturbed."""
    put(store, CONTENT)
    with store.open(SHA256) as file:
        assert put(store, CONTENT) == SHA256
        assert file.read() == CONTENT
    assert content_of(store, SHA256) == CONTENT
    assert list(store.stored()) == [SHA256]
    assert arriving(tmp_path) == []


def test_what_is_not_placed_is_removed(store: AudioStore, tmp_path: Path) -> None:
    """A refused upload, or one whose client went away, leaves nothing behind."""
    with store.receive() as upload:
        upload.write(CONTENT)
        upload.seal()
    with contextlib.suppress(ConnectionError), store.receive() as upload:
        upload.write(CONTENT)
        raise ConnectionError
    assert arriving(tmp_path) == []
    assert list(store.stored()) == []


def test_removing_is_final_and_may_be_repeated(store: AudioStore) -> None:
    """A delete that is sent twice, or finds the file gone already, has done its work."""
    put(store, CONTENT)
    store.remove(SHA256)
    store.remove(SHA256)
    with pytest.raises(FileNotFoundError):
        store.open(SHA256)
    assert put(store, CONTENT) == SHA256


def test_only_old_arrivals_are_discarded(store: AudioStore, tmp_path: Path) -> None:
    """What a killed process was receiving is garbage; what is being received now, perhaps slowly, is not."""
    with store.receive() as abandoned, store.receive() as current:
        for upload in (abandoned, current):
            upload.write(CONTENT)
            upload.seal()
        os.utime(abandoned.path, (0, 0))
        store.discard_abandoned()
        assert arriving(tmp_path) == [current.path]
        store.prepare(current)
        store.place(current)
    assert list(store.stored()) == [SHA256]


def place_until_killed(kind: str, root: Path, endpoint: str | None, life: int, begun: Connection) -> None:
    os.environ |= ENVIRONMENT  # it is forked from a process that may be older than the server
    store = opened(kind, root, endpoint)
    for number in range(10**6):
        put(store, f"{life} {number} ".encode() * 10_000)
        begun.send(number)


def test_a_killed_writer_leaves_whole_files_and_litter_that_can_be_discarded(
    kind: str, tmp_path: Path, endpoint: str | None
) -> None:
    """The worst moment to die is in the middle of a file: its name must not be there yet."""
    context = processes()
    for life in range(5 if kind == "folder" else 2):
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=place_until_killed, args=(kind, tmp_path, endpoint, life, writer))
        process.start()
        writer.close()
        for _ in range(life + 1):
            reader.recv()
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        reader.close()
    store = opened(kind, tmp_path, endpoint)
    for sha256 in store.stored():
        assert hashlib.sha256(content_of(store, sha256)).hexdigest() == sha256
    store.discard_abandoned(older_than_s=-1)
    assert list((tmp_path / "incoming").iterdir()) == []


def test_a_sweep_takes_only_what_no_recording_has(store: AudioStore, tmp_path: Path) -> None:
    """Crashes leave bytes without a recording; cleaning up must never take those of one."""
    catalog = Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite3'}")
    kept, orphan = put(store, b"kept"), put(store, b"orphan")
    catalog.register(NewRecording("kept", "default", kept, 4, None, None, {}), lambda: None)
    catalog.sweep(list(store.stored()), store.remove)
    assert list(store.stored()) == [kept]
    catalog.delete("kept")
    assert list(store.stored()) == [kept]
    catalog.sweep([kept, orphan], store.remove)
    assert list(store.stored()) == []
    catalog.close()


def test_no_recording_is_ever_without_its_bytes(store: AudioStore, tmp_path: Path) -> None:
    """Uploads, deletes and sweeps of the same few contents, all at once: where there is a recording there are
    its bytes, and in the end there is exactly one file for each content that some recording has."""
    catalog = Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite3'}")
    contents = [b"first", b"second"]
    hashes = [hashlib.sha256(content).hexdigest() for content in contents]
    over = threading.Event()
    missing: list[str] = []
    is_local = isinstance(store, FolderStore)

    def hammer(seed: int) -> None:
        chance = random.Random(seed)
        collection = f"{seed}"
        for _ in range(25 if is_local else 10):
            content = chance.choice(contents)
            with store.receive() as upload:
                upload.write(content)
                upload.seal()
                new = NewRecording(
                    f"{seed} {content!r}", collection, upload.sha256, len(content), None, None, {}
                )
                while True:
                    store.prepare(upload)
                    with contextlib.suppress(Displaced):
                        recording, _ = catalog.register(new, lambda upload=upload: store.place(upload))  # type: ignore[misc]
                        break
            # ours alone, so it and its bytes stay until we delete it
            try:
                store.find(recording.sha256)
            except FileNotFoundError:
                missing.append(recording.id)
            if chance.random() < 0.7:
                catalog.delete(recording.id)
                catalog.sweep([recording.sha256], store.remove)
                with pytest.raises(RecordingNotFound):
                    catalog.get(recording.id)

    def sweep_on() -> None:
        while not over.wait(0 if is_local else 0.05):
            catalog.sweep([*hashes, *store.stored()], store.remove)

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(4 if is_local else 2)]
    sweeper = threading.Thread(target=sweep_on)
    for thread in (*threads, sweeper):
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    sweeper.join()
    assert missing == []
    rows = catalog.page(limit=100)
    assert sorted(store.stored()) == sorted({row.sha256 for row in rows})
    assert arriving(tmp_path) == []
    catalog.close()
