"""Records: listed, paged, filtered, deleted; and the same under /v1."""

import pytest

from tests.audio_files import encode, speech, wav
from tests.service import RunningService


def recording(seed: int) -> bytes:
    """A second of babble unlike any other seed's."""
    return encode(speech(1.0, seed=seed), 16_000)


def fill(service: RunningService, collection: str, count: int) -> list[str]:
    """Ids of new recordings in a collection, oldest first."""
    ids = [f"{collection}-{number}" for number in range(count)]
    for number, recording_id in enumerate(ids):
        service.upload(recording(number), collection=collection, id=recording_id).raise_for_status()
    return ids


# --- one


def test_a_record_says_everything_that_the_contract_names(
    service: RunningService, collection: str, bees: bytes
) -> None:
    """Outside scripts read these names; one that goes missing breaks them."""
    record = service.ready(bees, collection=collection, id=collection)
    assert record.keys() >= {
        "id",
        "status",
        "duration_s",
        "segments",
        "lang",
        "collection",
        "metadata",
        "sha256",
        "created_at",
        "error",
    }
    assert record["links"] == {"self": f"/audio/{collection}", "content": f"/audio/{collection}/content"}


@pytest.mark.parametrize("path", ["/audio/{}", "/audio/{}/content", "/v1/audio/{}"])
def test_an_unknown_id_is_not_found(service: RunningService, collection: str, path: str) -> None:
    """404 with a code of its own, so that a client can tell a missing record from a wrong address."""
    for recording_id in (collection, "x%00y", "%F0%9F%90%9D", "%FF", "..%5C..", "' OR 1=1 --", "x" * 5000):
        answer = service.client.get(path.format(recording_id))
        assert answer.status_code == 404, recording_id
        assert answer.json()["code"] == "recording_not_found"


@pytest.mark.parametrize(
    "path", ["/audio/..%2F..%2Fcatalog.sqlite3", "/audio/%2e%2e%2f%2e%2e%2fetc%2fpasswd/content"]
)
def test_an_id_is_never_a_path(service: RunningService, path: str) -> None:
    """The data directory holds more than recordings, and the machine more than the data directory."""
    answer = service.raw(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 404 ")


# --- many


def test_the_newest_comes_first_and_pages_hold_everything_once(
    service: RunningService, collection: str
) -> None:
    """Whoever walks a library by its cursors must see each recording exactly once."""
    ids = fill(service, collection, 7)
    for limit in (1, 3, 7, 100):
        listed = service.listed(collection=collection, limit=limit)
        assert [item["id"] for item in listed] == ids[::-1]


def test_the_last_page_has_no_cursor(service: RunningService, collection: str) -> None:
    """A cursor that leads to an empty page sends clients on a needless trip, or round in a circle."""
    fill(service, collection, 4)
    page = service.client.get("/audio", params={"collection": collection, "limit": 4}).json()
    assert page["next_cursor"] is None
    empty = service.client.get("/audio", params={"collection": f"{collection}-none"}).json()
    assert empty == {"items": [], "next_cursor": None}


def test_pages_stand_still_while_the_library_moves(service: RunningService, collection: str) -> None:
    """Others upload and delete while we page; that may not hide or repeat what stays."""
    ids = fill(service, collection, 6)
    parameters = {"collection": collection, "limit": 2}
    page = service.client.get("/audio", params=parameters).json()
    assert [item["id"] for item in page["items"]] == [ids[5], ids[4]]
    service.client.delete(f"/audio/{ids[4]}").raise_for_status()  # the one that the cursor points at
    service.client.delete(f"/audio/{ids[2]}").raise_for_status()
    service.upload(recording(99), collection=collection).raise_for_status()
    page = service.client.get("/audio", params=parameters | {"cursor": page["next_cursor"]}).json()
    assert [item["id"] for item in page["items"]] == [ids[3], ids[1]]


def test_a_listing_is_narrowed_by_status_and_collection(
    service: RunningService, collection: str, bees: bytes
) -> None:
    """An operator looks for what failed, and a tenant for what is theirs."""
    service.ready(bees, collection=collection, id=collection)
    failed = service.upload(wav(bytes(64_000)), collection=collection).json()["id"]
    service.settled(failed)
    by_status = {
        status: [item["id"] for item in service.listed(collection=collection, status=status)]
        for status in ("pending", "processing", "ready", "failed")
    }
    assert by_status == {"pending": [], "processing": [], "ready": [collection], "failed": [failed]}


@pytest.mark.parametrize(
    ("parameters", "code"),
    [
        ({"cursor": "zzz"}, "invalid_field"),
        ({"cursor": ""}, "invalid_field"),
        ({"cursor": "MTo"}, "invalid_field"),
        ({"cursor": "MTotNQ"}, "invalid_field"),
        ({"cursor": "۱" * 9}, "invalid_field"),
        ({"cursor": "MTo5OTk5OTk5OTk5OTk5OTk5OTk5OTk5"}, "invalid_field"),
        ({"limit": "0"}, "invalid_input"),
        ({"limit": "1001"}, "invalid_input"),
        ({"limit": "ten"}, "invalid_input"),
        ({"status": "lost"}, "invalid_input"),
    ],
)
def test_a_listing_s_parameters_are_checked(
    service: RunningService, parameters: dict[str, str], code: str
) -> None:
    """A cursor from elsewhere must not quietly begin at the start, nor a limit empty the server."""
    answer = service.client.get("/audio", params=parameters)
    assert answer.status_code == 422
    assert answer.json()["code"] == code


# --- deleting


def test_what_is_deleted_is_gone(service: RunningService, collection: str, bees: bytes) -> None:
    """Someone asked to be forgotten: no hit, no record, no bytes, from the moment of the answer."""
    content = bees + collection.encode()  # bytes of no other test
    record = service.ready(content, collection=collection, id=collection)
    assert service.found("bees", collection=collection)
    assert service.client.delete(f"/audio/{collection}").status_code == 204
    assert service.found("bees", collection=collection) == []
    assert service.found_by_sound(content, collection=collection) == []
    assert collection not in {hit["id"] for hit in service.found("bees in the hive", limit=1000)}
    assert service.client.get(f"/audio/{collection}").status_code == 404
    assert service.client.get(f"/audio/{collection}/content").status_code == 404
    assert service.client.delete(f"/audio/{collection}").status_code == 404
    assert service.listed(collection=collection) == []
    assert f"{record['sha256'][:2]}/{record['sha256'][2:]}" not in service.stored()


def test_bytes_stay_for_as_long_as_a_recording_has_them(
    service: RunningService, collection: str, bees: bytes
) -> None:
    """Two collections share one copy; forgetting in one may not silence the other."""
    content = bees + collection.encode()
    ids = (f"{collection}-a", f"{collection}-b")
    for recording_id in ids:
        record = service.ready(content, collection=recording_id, id=recording_id)
    path = f"{record['sha256'][:2]}/{record['sha256'][2:]}"
    service.client.delete(f"/audio/{ids[0]}").raise_for_status()
    assert path in service.stored()
    assert service.client.get(f"/audio/{ids[1]}/content").content == content
    assert [hit["id"] for hit in service.found("bees", collection=ids[1])] == [ids[1]]
    service.client.delete(f"/audio/{ids[1]}").raise_for_status()
    assert path not in service.stored()


def test_what_is_deleted_may_come_back_as_new(service: RunningService, collection: str, bees: bytes) -> None:
    """To upload again is a new beginning: the id is free, and the old record's fields are not inherited."""
    first = service.ready(bees, collection=collection, id=collection, lang="en", metadata='{"n": 1}')
    service.client.delete(f"/audio/{collection}").raise_for_status()
    again = service.ready(bees, collection=collection, id=collection)
    assert again["duplicate"] is None
    assert (again["lang"], again["metadata"]) == (None, {})
    assert again["created_at"] > first["created_at"]
    assert [hit["id"] for hit in service.found("bees", collection=collection)] == [collection]


def test_a_recording_may_be_deleted_before_it_is_embedded(
    service: RunningService, collection: str, samples: dict[str, object]
) -> None:
    """Second thoughts come at once; a worker that is still at it may not bring the recording back."""
    long = samples["en-village-news"].content + collection.encode()
    service.upload(long, collection=collection, id=collection).raise_for_status()
    assert service.client.delete(f"/audio/{collection}").status_code == 204
    after = service.upload(recording(7), collection=collection).json()["id"]
    service.settled(after)  # the queue is worked off in order, so the deleted one's turn is over
    assert [item["id"] for item in service.listed(collection=collection)] == [after]
    assert [hit["id"] for hit in service.found("news", collection=collection)] == [after]


# --- the other address


def test_v1_is_the_same_api(service: RunningService, collection: str, bees: bytes) -> None:
    """Careful clients pin a version from the start; they must not get another service."""
    client = service.client
    uploaded = client.post(
        "/v1/audio", files={"file": bees}, data={"collection": collection, "id": collection}
    )
    assert uploaded.status_code == 202
    record = service.settled(collection)
    assert client.get(f"/v1/audio/{collection}").json() == record
    assert client.get("/v1/audio", params={"collection": collection}).json()["items"] == [record]
    assert client.get(f"/v1/audio/{collection}/content").content == bees
    question = {"q": "bees", "collection": collection}
    plain, versioned = client.get("/search", params=question), client.get("/v1/search", params=question)
    assert plain.json()["hits"] == versioned.json()["hits"] != []
    assert client.post("/v1/search", json=question).json()["hits"] == plain.json()["hits"]
    by_sound = client.post("/v1/search/audio", files={"file": bees}, params={"collection": collection})
    assert by_sound.json()["hits"][0]["id"] == collection
    assert client.delete(f"/v1/audio/{collection}").status_code == 204


def test_nothing_but_recordings_lies_in_the_store(service: RunningService) -> None:
    """Every stored file belongs to a record: leftovers would fill the disk unseen."""
    recorded = {item["sha256"] for item in service.listed()}
    assert service.stored() == {f"{sha256[:2]}/{sha256[2:]}" for sha256 in recorded}
