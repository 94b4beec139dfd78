"""What the client does when things go wrong on the way, shown by a server that makes them go wrong."""

import hashlib
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clasp_client import (
    ClaspError,
    ConnectionFailed,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
    RateLimited,
    Retries,
    TimedOut,
    Unavailable,
    UnexpectedAnswer,
)
from clasp_client.retries import retry_after_s
from tests.client.calling import CALL_IDS, CALLS, Call
from tests.client.moody_server import Answer, Moody

AT_ONCE = {"retries": Retries(base_s=0.01)}
CONTENT = bytes(range(256)) * 4000
RECORD = {
    "id": "bees",
    "status": "ready",
    "collection": "default",
    "created_at": "2026-03-21T12:00:00Z",
    "sha256": hashlib.sha256(CONTENT).hexdigest(),
    "size_bytes": len(CONTENT),
    "lang": "en",
    "metadata": {"show": "news"},
    "error": None,
    "mood": "a member of a version to come",
    "links": {"self": "/audio/bees", "content": "/audio/bees/content", "picture": "/audio/bees/picture"},
}
ETAG = f'"{RECORD["sha256"]}"'
DROPPED = Answer(sent=-1)


def told(body: object = RECORD, status: int = 200, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, json.dumps(body).encode(), {"Content-Type": "application/json"} | named)


def problem(status: int, code: str, **headers: str) -> Answer:
    body = {"status": status, "code": code, "detail": "In words.", "request_id": "r1", "errors": None}
    return told(body, status, **headers)


@pytest.fixture
def moody() -> Iterator[Moody]:
    with Moody() as server:
        yield server


@pytest.fixture(params=CALLS, ids=CALL_IDS)
def call(request: pytest.FixtureRequest) -> Call:
    made: Call = request.param
    return made


def test_an_upload_goes_on_through_a_restart_of_the_service(moody: Moody, call: Call, tmp_path: Path) -> None:
    """A service that is being replaced says 503 and when to come back, or nothing at all. The same upload
    must come again, whole and under the same key, and not before it was asked to."""
    path = tmp_path / "bees.opus"
    path.write_bytes(CONTENT)
    moody.answers = [problem(503, "not_ready", Retry_After="1"), DROPPED, told(status=202)]
    passed: list[tuple[int, int | None]] = []
    record = call(
        moody.url, "upload", path, lang="en", options=AT_ONCE, progress=lambda *seen: passed.append(seen)
    )
    assert (record.id, record.metadata) == ("bees", {"show": "news"})
    first, second, third = moody.requests
    assert second.at - first.at >= 1
    assert [request.body for request in moody.requests] == [CONTENT] * 3
    keys = {request.headers["idempotency-key"] for request in moody.requests}
    assert len(keys) == 1
    assert third.headers["content-length"] == str(len(CONTENT))
    assert passed[-1] == (len(CONTENT), len(CONTENT))
    assert len(passed) > 3 * 2, "it should be told of pieces, not of the whole"
    assert third.path == "/audio?lang=en"


def test_a_file_that_cannot_be_sought_is_sent_once(moody: Moody, call: Call) -> None:
    """Half a recording from a pipe must never be taken for a whole one."""

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    moody.answers = [DROPPED, told()]
    with pytest.raises(ConnectionFailed):
        call(moody.url, "upload", Pipe(CONTENT), options=AT_ONCE)
    (only,) = moody.requests
    assert (only.body, only.headers["transfer-encoding"]) == (CONTENT, "chunked")

    middle = io.BytesIO(b"before it" + CONTENT)
    middle.seek(9)
    moody.answers = [DROPPED, told()]
    call(moody.url, "upload", middle, options=AT_ONCE)
    assert [request.body for request in moody.requests[1:]] == [CONTENT] * 2


def test_only_what_is_safe_is_sent_again(moody: Moody, call: Call) -> None:
    """A change whose answer was lost may have been done, and others may have changed the record since; with
    If-Match, or where the service said that it did nothing, there is no such doubt."""
    moody.answers = [Answer(200, b"{}" + bytes(50), sent=2), told()]
    assert call(moody.url, "get", "bees", options=AT_ONCE).id == "bees"

    for method, given in [("update", {"lang": "fa"}), ("delete_matching", None)]:
        moody.requests.clear()
        arguments = ["bees", given] if given else []
        more: dict[str, Any] = {} if given else {"status": "failed"}
        moody.answers = [DROPPED, told()]
        with pytest.raises(ConnectionFailed):
            call(moody.url, method, *arguments, options=AT_ONCE, **more)
        moody.answers = [problem(503, "database_unavailable", Retry_After="0"), told()]
        with pytest.raises(Unavailable):
            call(moody.url, method, *arguments, options=AT_ONCE, **more)
        assert len(moody.requests) == 2

    moody.answers = [problem(429, "rate_limited", Retry_After="0"), told(ETag='"2"')]
    assert call(moody.url, "update", "bees", {"lang": "fa"}, options=AT_ONCE).etag == '"2"'
    moody.answers = [DROPPED, told(ETag='"3"')]
    call(moody.url, "update", "bees", {"lang": "fa"}, if_match='"2"', options=AT_ONCE)
    assert moody.requests[-1].headers["if-match"] == '"2"'
    assert moody.requests[-1].headers["content-type"] == "application/merge-patch+json"


def test_an_answer_that_was_lost_is_no_failure(moody: Moody, call: Call) -> None:
    """Done by the first request, refused to the second: who asked wants to hear that it is done."""
    gone = problem(404, "recording_not_found")
    moody.answers = [DROPPED, gone]
    call(moody.url, "delete", "bees", options=AT_ONCE)
    moody.answers = [gone]
    with pytest.raises(NotFound, match="404 recording_not_found: In words"):
        call(moody.url, "delete", "bees", options=AT_ONCE)

    changed = problem(412, "precondition_failed")
    done = {"metadata": {"show": "news", "draft": None}}
    moody.answers = [DROPPED, changed, told()]
    assert call(moody.url, "update", "bees", done, if_match='"1"', options=AT_ONCE).id == "bees"
    for answers, change in [([DROPPED, changed, told()], {"lang": "fa"}), ([changed], done)]:
        moody.answers = answers
        with pytest.raises(PreconditionFailed):
            call(moody.url, "update", "bees", change, if_match='"1"', options=AT_ONCE)


def test_patience_ends(moody: Moody, call: Call) -> None:
    """A program must hear at last that nobody answers, and at once where it is told to come back tomorrow."""
    limited = problem(429, "rate_limited", Retry_After="86400")
    moody.answers = [limited]
    with pytest.raises(RateLimited) as refused:
        call(moody.url, "search", "bees", options=AT_ONCE)
    error = refused.value
    assert (error.status, error.code, error.request_id) == (429, "rate_limited", "r1")
    assert error.retry_after == 86400
    moody.requests.clear()
    with pytest.raises(ConnectionFailed):
        call(moody.url, "search", "bees", options={"retries": Retries(attempts=3, base_s=0.01)})
    assert len(moody.requests) == 3
    moody.answers = [problem(422, "empty_query"), told()]
    with pytest.raises(InvalidRequest):
        call(moody.url, "search", "", options=AT_ONCE)
    moody.requests.clear()
    moody.answers = [problem(503, "not_ready"), told()]
    with pytest.raises(Unavailable):
        call(moody.url, "ready", options=AT_ONCE)
    assert len(moody.requests) == 1, "who asks whether it is ready wants to know it now"


def test_a_download_goes_on_where_it_broke(moody: Moody, call: Call, tmp_path: Path) -> None:
    """Of an hour's recording over a bad line each byte should come once; and what lies there in the end must
    be that recording, even if the line, or an earlier run, lied."""
    path = tmp_path / "bees.opus"
    half, cut = len(CONTENT) // 2, 700_000
    rest = {"Content-Range": f"bytes {half}-{len(CONTENT) - 1}/{len(CONTENT)}", "ETag": ETAG}
    whole = Answer(200, CONTENT, {"ETag": ETAG})
    moody.answers = [told(), Answer(200, CONTENT, sent=half), Answer(206, CONTENT[half:], rest)]
    passed: list[int] = []
    call(moody.url, "content", "bees", path, progress=lambda at, _: passed.append(at), options=AT_ONCE)
    assert path.read_bytes() == CONTENT
    assert moody.requests[-1].headers["range"] == f"bytes={half}-"
    assert moody.requests[-1].headers["if-range"] == ETAG
    assert passed == sorted(passed)
    assert passed[-1] == len(CONTENT)

    path.unlink()
    moody.answers = [told(), Answer(200, CONTENT, sent=cut)]
    with pytest.raises(ConnectionFailed):
        call(moody.url, "content", "bees", path, options={"retries": Retries(attempts=1)})
    assert not path.exists()
    moody.answers = [told(), whole]  # to whom ranges mean nothing
    call(moody.url, "content", "bees", path, options=AT_ONCE)
    assert moody.requests[-1].headers["range"] == f"bytes={cut}-"
    assert path.read_bytes() == CONTENT

    moody.answers = [told(), Answer(200, CONTENT[::-1])]
    with pytest.raises(UnexpectedAnswer, match="sha256"):
        call(moody.url, "content", "bees", tmp_path / "other.opus", options=AT_ONCE)
    assert list(tmp_path.iterdir()) == [path]

    moody.answers = [told(), whole]
    file = io.BytesIO()
    call(moody.url, "content", "bees", file, options=AT_ONCE)
    assert file.getvalue() == CONTENT


def test_what_is_not_the_service_is_told_from_it(moody: Moody, call: Call) -> None:
    """Proxies, captive portals and wrong ports answer, too: neither a crash nor a key for whom they name."""
    moody.answers = [Answer(200, b"<html>Welcome</html>", {"Content-Type": "text/html"})]
    with pytest.raises(UnexpectedAnswer, match="text/html"):
        call(moody.url, "search", "bees")
    moody.answers = [told({"results": 5}), told({"hits": "many"}), told([1])]
    for method, asked in [("search_many", ["bees"]), ("search", "bees"), ("get", "bees")]:
        with pytest.raises(UnexpectedAnswer):
            call(moody.url, method, asked)
    moody.requests.clear()
    moody.answers = [Answer(302, headers={"Location": f"{moody.url}/login"})]
    with pytest.raises(UnexpectedAnswer, match="302"):
        call(moody.url, "get", "bees")
    assert len(moody.requests) == 1
    moody.answers = [Answer(502, b"<h1>Bad gateway</h1>")]
    with pytest.raises(Unavailable) as refused:
        call(moody.url, "get", "bees", options={"retries": Retries(attempts=1)})
    assert (refused.value.status, refused.value.code) == (502, None)


def test_nobody_there_and_nobody_answering(call: Call) -> None:
    """Two errors, since one is a wrong address and the other a busy service."""
    with pytest.raises(ConnectionFailed) as refused:
        call("http://127.0.0.1:9", "health")
    assert not isinstance(refused.value, TimedOut)
    with Moody() as silent:
        silent._server.shutdown()  # connections are taken by the system, and never answered
        with pytest.raises(TimedOut):
            call(silent.url, "health", options={"timeout": 0.2})


def test_the_key_is_sent_and_never_shown(
    moody: Moody, call: Call, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Keys in logs are how keys get lost; DEBUG is on, as it is when somebody looks for a mistake."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("CLASP_API_KEY", "not-for-your-eyes")
    moody.answers = [told(), problem(401, "unauthorized")]
    call(moody.url, "get", "bees")
    with pytest.raises(ClaspError) as refused:
        call(moody.url, "get", "bees")
    sent = moody.requests[0].headers
    assert sent["authorization"] == "Bearer not-for-your-eyes"
    assert sent["user-agent"].startswith("clasp-search-client/0.")
    from clasp_client import AsyncClient, Client

    shown = [repr(kind(moody.url)) for kind in (Client, AsyncClient)]
    shown += [repr(refused.value), str(refused.value), caplog.text]
    assert moody.url in shown[0]
    assert all("not-for-your-eyes" not in text for text in shown)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "120"}, 120),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 30),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(headers: dict[str, str], seconds: float | None) -> None:
    """RFC 9110 has both forms; a date is by the server's clock, which need not be ours."""
    assert retry_after_s(headers) == seconds
