"""The audio store in S3, where it differs from a folder: requests, pages, a network, and no common lock."""

import hashlib
import io
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clasp_core import s3
from clasp_core.errors import BackupFailed, DataDamaged, IdConflict, QuotaExceeded, StoreUnavailable
from clasp_core.library import Library
from clasp_core.limits import Admission, Quota
from clasp_core.s3 import S3Store
from tests.core.doubles import DIM, upload
from tests.core.test_store import content_of, put
from tests.object_store import BUCKET, SECRET, Way, object_store

MODEL = "57a4d1457a4d1457"


@pytest.fixture
def way() -> Iterator[Way]:
    """To the server; tests cut it."""
    way = Way(object_store().port)
    way.open()
    yield way
    way.close()


@pytest.fixture
def store(tmp_path: Path, way: Way) -> S3Store:
    return S3Store(BUCKET, f"test{tmp_path}", tmp_path / "incoming", endpoint=f"http://127.0.0.1:{way.port}")


@pytest.fixture
def library(tmp_path: Path, store: S3Store) -> Iterator[Library]:
    library = Library(tmp_path / "data", model=MODEL, dim=DIM, store=store)
    yield library
    library.close()


def test_large_recordings_go_in_parts_and_are_read_from_anywhere(
    store: S3Store, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour of sound is asked for in stretches, by players that jump about; a connection that breaks in the
    middle is no reason to begin again."""
    content = random.Random(1).randbytes((17 << 20) + 5)
    sha256 = put(store, content)
    assert store.find(sha256).size_bytes == len(content)
    asked: list[str] = []
    real = store._client.get_object

    def get(**named: Any) -> Any:
        asked.append(named["Range"])
        return real(**named)

    monkeypatch.setattr(store._client, "get_object", get)
    with store.open(sha256) as file:
        for start, size in ((5_000_000, 10), (len(content) - 3, 100), (0, 400_000)):
            file.seek(start)
            assert file.read(size) == content[start : start + size]
        assert len(asked) == 4
        way.close()
        way.open()
        assert file.read() == content[400_000:]
        assert file.read(1) == b""
        assert file.seek(0, io.SEEK_END) == len(content)
        assert len(asked) < 12
    with store.verified(sha256) as path, path.open("rb") as one, path.open("rb") as other:
        assert hashlib.sha256(one.read()).hexdigest() == sha256
        assert other.read(10) == content[:10]
    assert list((store._spool).iterdir()) == []


def test_many_objects_are_listed_in_pages_and_strangers_left_alone(
    store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start goes through all objects and removes those of no recording: it must see every one of ours once,
    and must not touch what somebody else keeps beside them."""
    monkeypatch.setattr(s3, "_PAGE", 5)
    contents = [f"{number}".encode() for number in range(400)]
    late = [content for content in contents if hashlib.sha256(content).hexdigest()[0] == "f"]
    hashes = {put(store, content) for content in late[:12]}  # so that there is little to list after them
    for name in ("README", "ab/short", "00/" + "G" * 62, "zz/" + "a" * 62):
        store._client.put_object(Bucket=BUCKET, Key=store._prefix + name, Body=b"mine")
    found = list(store.stored())
    assert len(found) == len(set(found)) == 12
    assert set(found) == hashes
    store.remove(*hashes)
    store.remove(*hashes)
    assert list(store.stored()) == []
    left = store._client.list_objects_v2(Bucket=BUCKET, Prefix=store._prefix)["Contents"]
    assert len(left) == 4


def test_what_is_swept_while_it_is_sent_is_sent_again(library: Library, store: S3Store) -> None:
    """Another's deletion of the same bytes may end between the transfer and the row, which are no one step:
    the row must not be made of bytes that are gone."""
    real, times = store.prepare, 0

    def prepare_and_sweep(arriving: Any) -> None:
        nonlocal times
        times += 1
        real(arriving)
        if times < 3:
            library.catalog.sweep([arriving.sha256], store.remove)

    store.prepare = prepare_and_sweep  # type: ignore[method-assign]
    recording = upload(library, b"some bytes")
    assert times == 3
    assert content_of(store, recording.sha256) == b"some bytes"


def test_what_is_refused_leaves_nothing(library: Library, store: S3Store) -> None:
    """The bytes are in the store before the catalogue says no; not afterwards, unless they are another's."""
    kept = upload(library, b"kept", "one")
    with pytest.raises(IdConflict):
        upload(library, b"other", "one")
    full = Admission("key", Quota(recordings=0))
    with pytest.raises(QuotaExceeded):
        upload(library, b"kept", "two", collection="another", admission=full)
    assert list(store.stored()) == [kept.sha256]
    again = upload(library, b"again", "three", once="name")
    library.delete("three")
    assert upload(library, b"again", "three", once="name").status == "failed"
    assert again.sha256 not in list(store.stored())


def test_without_the_store_deletions_hold_and_uploads_are_refused(
    library: Library, store: S3Store, way: Way, caplog: pytest.LogCaptureFixture
) -> None:
    """A network that is gone for a while may cost waiting, never a recording or a promise to forget one."""
    kept, gone = upload(library, b"kept", "kept"), upload(library, b"gone", "gone")
    way.close()
    for ask in (
        lambda: upload(library, b"new"),
        lambda: store.find(kept.sha256),
        lambda: any(store.stored()),
    ):
        with pytest.raises(StoreUnavailable) as refused:
            ask()
        assert "127.0.0.1" not in refused.value.detail
    assert "EndpointConnectionError" in (store.trouble() or "")
    library.delete("gone")
    library.tidy()
    library.sweep_again()
    way.open()
    assert set(store.stored()) == {kept.sha256, gone.sha256}
    library.sweep_again()
    assert list(store.stored()) == [kept.sha256]
    assert store.trouble() is None
    assert SECRET not in caplog.text
    assert library.catalog.counts() == {"pending": 1}


def test_a_bucket_that_is_not_there_is_no_missing_recording(tmp_path: Path) -> None:
    """A setting that is wrong for an hour must not turn recordings into `failed` ones."""
    store = S3Store("no-such-bucket", "", tmp_path, endpoint=object_store().endpoint)
    with pytest.raises(StoreUnavailable):
        store.find("ab" * 32)
    with pytest.raises(StoreUnavailable):
        put(store, b"x")
    assert "404" in (store.trouble() or "")
    store.discard_abandoned()


def test_damage_is_noticed_before_it_is_decoded(store: S3Store) -> None:
    """What is in the store is believed by its sha256 only."""
    sha256 = put(store, b"some bytes")
    store._client.put_object(Bucket=BUCKET, Key=store._key(sha256), Body=b"some bites")
    with pytest.raises(DataDamaged), store.verified(sha256):
        pass


def test_nothing_of_a_request_is_logged(store: S3Store, caplog: pytest.LogCaptureFixture) -> None:
    """At debug, the client library writes down signatures, and tokens of sessions."""
    caplog.set_level(logging.DEBUG)
    put(store, b"x")
    assert "Signature" not in caplog.text
    assert SECRET not in caplog.text
    assert not any(record.name.startswith(("boto", "urllib3", "s3transfer")) for record in caplog.records)


def test_a_library_goes_into_a_backup_and_into_another_store(
    library: Library, store: S3Store, tmp_path: Path
) -> None:
    """A backup is whole without the store it is made of, and is not put over what another library has."""
    from clasp_core.backup import backup, restore

    recording = upload(library, b"some bytes", "one")
    made = backup(tmp_path / "data", tmp_path / "backup", store=store)
    assert (made.copied, made.copied_bytes) == (1, 10)
    elsewhere = S3Store(BUCKET, f"new{tmp_path}", tmp_path / "new incoming", endpoint=object_store().endpoint)
    with pytest.raises(BackupFailed, match="empty"):
        restore(tmp_path / "backup", tmp_path / "new", store=store)
    restore(tmp_path / "backup", tmp_path / "new", store=elsewhere)
    assert content_of(elsewhere, recording.sha256) == b"some bytes"
    restored = Library(tmp_path / "new", model=MODEL, dim=DIM, store=elsewhere)
    restored.tidy()
    assert restored.catalog.get("one").sha256 == recording.sha256
    assert list(elsewhere.stored()) == [recording.sha256]
    restored.close()


def test_no_new_catalogue_is_put_beside_recordings_that_another_knows(
    library: Library, store: S3Store, tmp_path: Path
) -> None:
    """A replica that is started without its CLASP_DATABASE_URL would sweep everybody's recordings away."""
    recording = upload(library, b"some bytes")
    with pytest.raises(DataDamaged, match="CLASP_DATABASE_URL"):
        Library(tmp_path / "new", model=MODEL, dim=DIM, store=store)
    assert list(store.stored()) == [recording.sha256]
