"""Uploads through the front door: what is accepted, what is refused, and that nothing of that is kept."""

import hashlib
import json
import socket
from typing import Any

import httpx
import pytest

from tests import audio_files
from tests.audio_files import encode, speech, tone, wav
from tests.conftest import MAX_UPLOAD_BYTES
from tests.service import RunningService, eventually

HOSTILE = audio_files.hostile()
IN_A_MOMENT = {"Prefer": "wait=60"}


FORM = "multipart/form-data; boundary=x"
END = b"--x--\r\n"


def part(name: str, content: bytes, more: str = "") -> bytes:
    """One part of a multipart body, written by hand so that it can be wrong."""
    return f'--x\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content + b"\r\n"


def refused(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The body of an answer that must be this problem."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert (problem["status"], problem["code"]) == (status, code), problem
    assert problem["request_id"] == answer.headers["x-request-id"]
    return problem


# --- what is accepted


def test_a_form_upload_is_acknowledged_and_then_searchable(
    service: RunningService, collection: str, bees: bytes
) -> None:
    """The promise of the front page: post a file, get its record and address at once, find it in a moment."""
    metadata = {"title": "زنبورها", "tags": ["a", 1, None], "deep": {"x": 1.5}}
    form = {"id": collection, "lang": "EN-gb", "collection": collection, "metadata": json.dumps(metadata)}
    answer = service.upload(bees, **form)
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/audio/{collection}"
    record = answer.json()
    assert record["id"] == collection
    assert record["status"] in ("pending", "processing")
    assert record["lang"] == "en-GB"
    assert record["metadata"] == metadata
    assert record["sha256"] == hashlib.sha256(bees).hexdigest()
    assert record["created_at"].endswith(("Z", "+00:00"))
    assert record["error"] is None

    record = service.settled(collection)
    assert record["status"] == "ready"
    assert record["duration_s"] == pytest.approx(5.41, abs=0.05)
    assert record["segments"] >= 1
    assert service.client.get(answer.headers["location"]).json() == record


def test_a_raw_body_is_a_recording_too(service: RunningService, collection: str, bees: bytes) -> None:
    """`curl --data-binary @file` and browsers' `fetch(blob)` should not have to build a form."""
    parameters = {"id": collection, "lang": "en", "collection": collection, "metadata": '{"n": 1}'}
    answer = service.client.post(
        "/audio", content=bees, params=parameters, headers={"Content-Type": "audio/ogg"} | IN_A_MOMENT
    )
    assert answer.status_code == 201, answer.text
    record = answer.json()
    assert (record["id"], record["lang"], record["metadata"]) == (collection, "en", {"n": 1})
    assert record["size_bytes"] == len(bees)
    assert record["sha256"] == hashlib.sha256(bees).hexdigest()


def test_an_id_is_made_where_none_is_given(service: RunningService, collection: str, bees: bytes) -> None:
    """Callers without names of their own get unique ones, and the defaults they were promised."""
    first = service.upload(bees, collection=collection).json()
    second = service.upload(bees, collection=f"{collection}-2").json()
    assert first["id"] != second["id"]
    assert first["lang"] is None
    assert first["metadata"] == {}


def test_the_part_may_be_called_audio(service: RunningService, collection: str, bees: bytes) -> None:
    """Some clients of neighbouring services name the part so."""
    form = {"collection": collection}
    assert service.client.post("/audio", files={"audio": bees}, data=form).status_code == 202


def test_who_prefers_to_wait_gets_a_searchable_recording(
    service: RunningService, collection: str, bees: bytes
) -> None:
    """201 must mean that a search sees it now: scripts upload and then ask, without polling."""
    answer = service.upload(bees, collection=collection, headers={"Prefer": "respond-async, wait=60"})
    assert answer.status_code == 201
    assert answer.headers["preference-applied"] == "wait=60"
    assert answer.json()["status"] == "ready"
    hits = service.found("bees in the hive", collection=collection)
    assert [hit["id"] for hit in hits] == [answer.json()["id"]]


def test_who_prefers_to_wait_too_short_gets_202(
    service: RunningService, collection: str, bees: bytes
) -> None:
    """The time is a bound for the caller's sake: the recording is safe and goes on without them."""
    answer = service.upload(bees, collection=collection, headers={"Prefer": "wait=0"})
    assert answer.status_code == 202
    assert service.settled(answer.json()["id"])["status"] == "ready"


@pytest.mark.parametrize("preference", ["wait=soon", "wait=-1", "wait", "return=minimal", "", "wait=nan"])
def test_preferences_that_mean_nothing_are_ignored(
    service: RunningService, collection: str, bees: bytes, preference: str
) -> None:
    """RFC 7240: a preference is never a reason to refuse."""
    answer = service.upload(bees, collection=collection, headers={"Prefer": preference})
    assert answer.status_code == 202
    assert "preference-applied" not in answer.headers


@pytest.mark.parametrize("form", audio_files.FORMATS)
def test_every_format_becomes_ready(service: RunningService, collection: str, form: str) -> None:
    """People's recordings come in these; a format that works in the decoder alone helps nobody."""
    content = encode(speech(2.0, rate=48_000), 48_000, form)
    answer = service.upload(content, collection=collection, headers=IN_A_MOMENT)
    assert answer.status_code == 201, answer.text
    assert answer.json()["duration_s"] == pytest.approx(2.0, abs=0.2)


# --- the same again


def test_the_same_bytes_again_are_the_first_recording(
    service: RunningService, collection: str, bees: bytes
) -> None:
    """A client that retries after a lost answer must not end up with two of everything."""
    first = service.ready(bees, collection=collection, id=collection, lang="en")
    again = service.upload(bees, collection=collection, id=f"{collection}-b", lang="de", metadata='{"a": 1}')
    assert again.status_code == 200
    assert again.headers["location"] == f"/audio/{collection}"
    assert again.json() == first | {"duplicate": True}
    assert service.client.get(f"/audio/{collection}-b").status_code == 404
    assert len(service.listed(collection=collection)) == 1


def test_the_same_bytes_in_another_collection_are_a_recording_of_their_own(
    service: RunningService, collection: str, bees: bytes
) -> None:
    """Collections keep tenants apart: one's upload must not answer with, or hang on, another's record."""
    first = service.upload(bees, collection=collection).json()
    other = service.upload(bees, collection=f"{collection}-2")
    assert other.status_code == 202
    assert other.json()["id"] != first["id"]
    assert other.json()["duplicate"] is None


def test_a_used_id_with_other_bytes_is_a_conflict(
    service: RunningService, collection: str, bees: bytes
) -> None:
    """An id names one recording for good; to overwrite silently would lose the first."""
    service.upload(bees, collection=collection, id=collection).raise_for_status()
    kept = service.stored()
    answer = service.upload(encode(tone(1), 16_000), collection=collection, id=collection)
    refused(answer, 409, "id_conflict")
    refused(service.upload(bees, collection=f"{collection}-2", id=collection), 409, "id_conflict")
    assert service.client.get(f"/audio/{collection}").json()["size_bytes"] == len(bees)
    assert service.stored() == kept


# --- what is refused

BAD_NAMES = [
    "",
    ".",
    "..",
    ".hidden",
    "../../etc/passwd",
    "a/b",
    "a\\b",
    "a b",
    "a\x00b",
    "é",
    "x" * 129,
    "a%2Fb",
]
BAD_METADATA = ["[1]", "1", "null", '"a"', "{", '{"a": NaN}', '{"a": 1e999}', '{"a": "\\ud83d"}', "not json"]


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [("id", name, "invalid_field") for name in BAD_NAMES]
    + [("collection", name, "invalid_field") for name in BAD_NAMES]
    + [("lang", tag, "invalid_language") for tag in ("fa_IR", "farsi", "-", "en-", "e", "en US", "۱۲")]
    + [("metadata", text, "invalid_field") for text in BAD_METADATA]
    + [("metadata", '{"a":' * 40 + "1" + "}" * 40, "invalid_field")]
    + [("metadata", '{"a":' * 2000 + "1" + "}" * 2000, "invalid_field")]
    + [("metadata", json.dumps({"a": "x" * 33_000}), "invalid_field")],
    ids=lambda value: ascii(value)[:30],
)
def test_a_field_of_the_wrong_form_is_refused(
    service: RunningService, collection: str, field: str, value: str, code: str
) -> None:
    """What cannot be kept as given is said at once, and leaves nothing behind; deep or endless metadata
    would later break every answer that shows it."""
    content = wav(collection.encode() * 100)
    kept = service.stored()
    answer = service.upload(content, **{"collection": collection, field: value})
    refused(answer, 422, code)
    assert service.stored() == kept
    assert service.listed(collection=collection) == []


def test_a_raw_body_s_parameters_are_checked_the_same(service: RunningService, collection: str) -> None:
    """There is one rule for a name, not one for each way of saying it."""
    content = wav(collection.encode() * 100)
    for parameters in ({"id": "../x"}, {"collection": ""}, {"metadata": "[]"}):
        answer = service.client.post(
            "/audio", content=content, params=parameters, headers={"Content-Type": "audio/wav"}
        )
        refused(answer, 422, "invalid_field")


def test_too_large_is_refused_before_it_arrives(service: RunningService, collection: str) -> None:
    """A declared size is enough to say no; nobody should wait for a gigabyte to be turned down."""
    declared = 50_000_000
    head = (
        f"POST /audio?collection={collection} HTTP/1.1\r\nHost: x\r\nContent-Type: audio/wav\r\n"
        f"Content-Length: {declared}\r\nExpect: 100-continue\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", service.port), 10) as connection:
        connection.sendall(head.encode())
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("way", ["declared", "chunked", "form", "chunked form"])
def test_too_large_is_refused_however_it_comes(service: RunningService, collection: str, way: str) -> None:
    """The limit guards the disk, so it may not depend on what the client says of itself."""
    content = bytes(MAX_UPLOAD_BYTES + 1)
    headers = {"Content-Type": "audio/wav"}
    if "form" in way:
        content = part("file", content) + END
        headers = {"Content-Type": FORM}
    kept = service.stored()
    body = (content[start : start + 65_536] for start in range(0, len(content), 65_536))
    answer = service.client.post(
        "/audio",
        content=body if "chunked" in way else content,
        params={"collection": collection},
        headers=headers,
    )
    refused(answer, 413, "upload_too_large")
    assert service.stored() == kept


def test_the_largest_accepted_upload_is_accepted(service: RunningService, collection: str) -> None:
    """The limit means what it says, to the byte."""
    content = wav(speech(1.0).astype("<f4").tobytes(), bits=32, floating=True)
    content += bytes(MAX_UPLOAD_BYTES - len(content))
    answer = service.upload(content, collection=collection)
    assert answer.status_code == 202
    assert answer.json()["size_bytes"] == MAX_UPLOAD_BYTES


@pytest.mark.parametrize(
    ("content_type", "body", "status", "code"),
    [
        ("audio/wav", b"", 422, "empty_upload"),
        (FORM, part("file", b"") + END, 422, "empty_upload"),
        (FORM, part("id", b"a") + END, 422, "invalid_input"),
        (FORM, END, 422, "invalid_input"),
        (FORM, part("file", b"RIFF"), 400, "malformed_request"),
        (FORM, part("file", b"RIFF").replace(b"--x", b"--y") + END, 400, "malformed_request"),
        (FORM, b"", 400, "malformed_request"),
        ("multipart/form-data", part("file", b"RIFF") + END, 400, "malformed_request"),
        ("multipart/form-data; boundary=" + "x" * 100, b"hello", 400, "malformed_request"),
        (FORM, part("id", b"\xff\xfe") + END, 400, "malformed_request"),
        (FORM, part("id", b"a" * 70_000) + END, 400, "malformed_request"),
        (FORM, part("a", b"1") * 20 + END, 400, "malformed_request"),
        (FORM, b"--x\r\n" + b"h: a\r\n" * 10_000 + b"\r\na\r\n" + END, 400, "malformed_request"),
        (FORM, part("a" * 100_000, b"1") + END, 400, "malformed_request"),
        ("text/plain", b"RIFF", 415, "unsupported_media_type"),
        ("application/x-www-form-urlencoded", b"file=RIFF", 415, "unsupported_media_type"),
        ("", b"RIFF", 415, "unsupported_media_type"),
        ("\xff;;;=", b"RIFF", 415, "unsupported_media_type"),
    ],
)
def test_a_body_that_holds_no_recording_is_refused(
    service: RunningService, content_type: str, body: bytes, status: int, code: str
) -> None:
    """Broken clients must learn what is wrong with their request, and hostile ones must get no further."""
    kept = service.stored()
    headers = {b"Content-Type": content_type.encode("latin-1")}
    for path in ("/audio", "/search/audio"):
        refused(service.client.post(path, content=body, headers=headers), status, code)
    assert service.stored() == kept


def test_a_url_is_refused_unless_hosts_are_listed(service: RunningService) -> None:
    """A service that was never told to fetch anything is nobody's way into its network; and a question by
    sound is never fetched."""
    body = {"url": "https://example.org/bees.opus"}
    refused(service.client.post("/audio", json=body), 403, "url_not_allowed")
    refused(service.client.post("/audio", json={}), 403, "url_not_allowed")
    refused(service.client.post("/search/audio", json=body), 415, "unsupported_media_type")


def test_two_recordings_in_one_form_are_refused(service: RunningService, bees: bytes) -> None:
    """To keep only one of them without a word would lose the other."""
    kept = service.stored()
    files = [("file", ("a.ogg", bees)), ("file", ("b.ogg", bees))]
    refused(service.client.post("/audio", files=files), 400, "malformed_request")
    assert service.stored() == kept


@pytest.mark.parametrize("form", [False, True])
def test_a_cut_connection_leaves_nothing(service: RunningService, collection: str, form: bool) -> None:
    """Phones lose their network in the middle of an upload; half a recording is no recording."""
    kept = service.stored()
    kind = FORM if form else "audio/wav"
    head = (
        f"POST /audio?collection={collection} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
        "Content-Length: 3000000\r\n\r\n"
    )
    begun = part("file", b"").removesuffix(b"\r\n") if form else b""
    with socket.create_connection(("127.0.0.1", service.port), 10) as connection:
        connection.sendall(head.encode() + begun + bytes(2_000_000))
        eventually(lambda: service.stored() != kept, within_s=10)
    eventually(lambda: service.stored() == kept, within_s=10)
    assert service.listed(collection=collection) == []


# --- files made to do harm


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_recording_fails_with_its_reason(
    service: RunningService, collection: str, name: str
) -> None:
    """A person who uploads the wrong file must be told why it will never be found, not left waiting."""
    content, code = HOSTILE[name]
    answer = service.upload(content, collection=collection, id=collection, headers=IN_A_MOMENT)
    if not content:
        refused(answer, 422, "empty_upload")
        return
    assert answer.status_code == 202, answer.text
    record = answer.json()
    assert record["status"] == "failed"
    assert record["error"]["code"] == code
    assert len(record["error"]["detail"]) > 15
    assert service.found("anything", collection=collection) == []
    assert service.client.get("/readyz").status_code == 200


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_recording_is_no_question_either(service: RunningService, name: str) -> None:
    """A search by sound decodes in the API process's care; the same files must be refused there."""
    content, code = HOSTILE[name]
    answer = service.client.post("/search/audio", files={"file": content})
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.json()["code"] == (code if content else "empty_upload")
    assert service.client.get("/readyz").status_code == 200


def test_a_header_may_lie_about_its_length(service: RunningService, collection: str) -> None:
    """Recorders that lost power leave headers that claim 4 GB or nothing; what is there should be found."""
    samples = (speech(2.0) * 32_767).astype("<i2").tobytes()
    for number, size in enumerate((0xFFFF_FFFF, 0x7FFF_FFFF)):
        content = wav(samples, claimed_size=size)
        answer = service.upload(content, collection=f"{collection}-{number}", headers=IN_A_MOMENT)
        assert answer.json()["status"] == "ready", answer.text
        assert answer.json()["duration_s"] == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("form", ["wav-16", "flac", "mp3", "ogg-opus", "m4a", "webm"])
def test_half_a_file_comes_to_an_end(service: RunningService, collection: str, form: str) -> None:
    """A truncated file is either used as far as it goes or refused with a reason; never tried for ever."""
    content = encode(speech(3.0, rate=48_000), 48_000, form)
    answer = service.upload(content[: len(content) // 2], collection=collection, headers=IN_A_MOMENT)
    record = answer.json()
    assert record["status"] == "ready" or record["error"]["code"] == "undecodable_audio", record


@pytest.mark.parametrize("kind", ["hls", "concat", "dash", "sdp"])
def test_a_playlist_reads_no_file_of_ours(service: RunningService, collection: str, kind: str) -> None:
    """FFmpeg follows playlists; an upload must not make the service read its disk or its network."""
    target = str(service.data_dir / "service.log")
    content = audio_files.playlists(target)[kind]
    answer = service.upload(content, collection=collection, headers=IN_A_MOMENT)
    assert answer.json()["status"] == "failed", answer.text
    assert answer.json()["error"]["code"] == "undecodable_audio"


@pytest.mark.parametrize(
    "name",
    ["../../../../tmp/clasp-escape", "C:\\x\\y.wav", "a\x00b.wav", "/etc/passwd", "%2e%2e/x", "é" * 300],
)
def test_a_file_name_is_never_a_path(
    service: RunningService, collection: str, bees: bytes, name: str
) -> None:
    """Names come from strangers: files are stored under their hash, and nowhere else."""
    kept = service.stored()
    more = f'; filename="{name}"'.replace("\x00", "%00")
    body = part("file", bees + collection.encode(), more) + END
    headers = {"Content-Type": FORM}
    answer = service.client.post("/audio", content=body, params={"collection": collection}, headers=headers)
    assert answer.status_code == 202, answer.text
    sha256 = answer.json()["sha256"]
    assert service.stored() - kept == {f"{sha256[:2]}/{sha256[2:]}"}


# --- getting the bytes back


@pytest.fixture(scope="module")
def kept(service: RunningService, bees: bytes) -> str:
    """The path of a recording's bytes."""
    service.upload(bees, id="kept", collection="kept").raise_for_status()
    return "/audio/kept/content"


def test_the_bytes_come_back_as_they_were(service: RunningService, kept: str, bees: bytes) -> None:
    """The library is also where the recordings live; players, too, need type, length and validators."""
    answer = service.client.get(kept)
    assert answer.status_code == 200
    assert answer.content == bees
    assert answer.headers["content-type"] == "audio/ogg"
    assert answer.headers["etag"] == f'"{hashlib.sha256(bees).hexdigest()}"'
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("wanted", "part"),
    [
        ("0-9", slice(0, 10)),
        ("100-199", slice(100, 200)),
        ("20000-", slice(20_000, None)),
        ("-5", slice(-5, None)),
        ("0-999999999", slice(None)),
    ],
)
def test_a_range_is_that_part(
    service: RunningService, kept: str, bees: bytes, wanted: str, part: slice
) -> None:
    """A player that jumps to a hit's time asks for a range, not for the whole recording."""
    answer = service.client.get(kept, headers={"Range": f"bytes={wanted}"})
    assert answer.status_code == 206
    assert answer.content == bees[part]
    start, end, _ = part.indices(len(bees))
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{len(bees)}"


def test_several_ranges_come_in_parts(service: RunningService, kept: str, bees: bytes) -> None:
    """Resuming download tools ask for the holes they have left."""
    answer = service.client.get(kept, headers={"Range": "bytes=0-3,100-103"})
    assert answer.status_code == 206
    assert answer.headers["content-type"].startswith("multipart/byteranges")
    assert bees[:4] in answer.content
    assert bees[100:104] in answer.content


def test_a_range_beyond_the_end_is_refused(service: RunningService, kept: str, bees: bytes) -> None:
    """With the length in the answer, so that the client can ask again; and in our one form of errors."""
    answer = service.client.get(kept, headers={"Range": f"bytes={len(bees)}-"})
    refused(answer, 416, "range_not_satisfiable")
    assert answer.headers["content-range"] == f"bytes */{len(bees)}"


@pytest.mark.parametrize("wanted", ["lines=0-9", "bytes", "bytes=", "bytes=a-b", "bytes=9-3", "\xff"])
def test_a_range_that_cannot_be_read_is_none(
    service: RunningService, kept: str, bees: bytes, wanted: str
) -> None:
    """RFC 9110 section 14.2: an unknown unit must be ignored, and a malformed range may be."""
    answer = service.client.get(kept, headers={b"Range": wanted.encode("latin-1")})
    assert answer.status_code == 200
    assert answer.content == bees


def test_bytes_that_the_client_has_are_not_sent_again(
    service: RunningService, kept: str, bees: bytes
) -> None:
    """Bytes under an id never change, so a cache that asks should be told to keep its copy."""
    etag = service.client.get(kept).headers["etag"]
    for known in (etag, f'"other", W/{etag}', "*"):
        answer = service.client.get(kept, headers={"If-None-Match": known})
        assert answer.status_code == 304
        assert answer.content == b""
        assert answer.headers["etag"] == etag
    assert service.client.get(kept, headers={"If-None-Match": '"other"'}).content == bees
    resumed = {"Range": "bytes=0-3", "If-Range": '"other"'}
    assert service.client.get(kept, headers=resumed).content == bees


def test_head_answers_without_the_bytes(service: RunningService, kept: str, bees: bytes) -> None:
    """Download tools ask for the length and for ranges' support before they start."""
    answer = service.client.head(kept)
    assert answer.status_code == 200
    assert answer.content == b""
    assert answer.headers["content-length"] == str(len(bees))
    assert answer.headers["accept-ranges"] == "bytes"


def test_what_is_served_is_never_called_what_the_uploader_says(
    service: RunningService, collection: str
) -> None:
    """A web page disguised as a recording, served back as text/html, would run in our origin."""
    page = b"<!doctype html><script>alert(1)</script>"
    files = {"file": ("x.html", page, "text/html")}
    form = {"collection": collection, "id": collection}
    service.client.post("/audio", files=files, data=form).raise_for_status()
    answer = service.client.get(f"/audio/{collection}/content")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("form", "media_type"),
    [
        ("wav-16", "audio/wav"),
        ("flac", "audio/flac"),
        ("mp3", "audio/mpeg"),
        ("ogg-opus", "audio/ogg"),
        ("m4a", "audio/mp4"),
        ("aac", "audio/aac"),
        ("webm", "audio/webm"),
        ("aiff", "audio/aiff"),
    ],
)
def test_media_types_go_by_content(
    service: RunningService, collection: str, form: str, media_type: str
) -> None:
    """A browser plays what is labelled rightly, whatever the uploading script called it."""
    content = encode(tone(0.5, rate=48_000), 48_000, form)
    headers = {"Content-Type": "application/octet-stream"}
    answer = service.client.post(
        "/audio", content=content, params={"collection": collection}, headers=headers
    )
    assert answer.json()["media_type"] == media_type
