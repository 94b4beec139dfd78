"""Errors: one form from every layer, codes that stand in the documentation, and keys where keys are set."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.errors import STATUS_OF
from clasp_core.errors import ClaspError
from tests.service import RunningService, sql

DOCUMENTED = Path(__file__).parents[2] / "docs" / "errors.md"


def check_problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The body of an answer that must be this problem, in every detail of its form."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    body: dict[str, Any] = answer.json()
    assert body.keys() - {"errors"} == {"type", "title", "status", "detail", "code", "request_id"}
    assert (body["status"], body["code"]) == (status, code)
    assert body["type"] == f"urn:clasp:problem:{code}"
    assert body["title"]
    assert body["detail"]
    assert body["request_id"] == answer.headers["x-request-id"] != ""
    return body


# --- one form


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1/nowhere", 404, "not_found"),
        ("GET", "/v2/audio", 404, "not_found"),
        ("GET", "/audio/x/y/z", 404, "not_found"),
        ("GET", "/audio/unknown", 404, "recording_not_found"),
        ("DELETE", "/audio/unknown", 404, "recording_not_found"),
        ("GET", "/audio/unknown/content", 404, "recording_not_found"),
        ("PUT", "/audio", 405, "method_not_allowed"),
        ("PUT", "/audio/x", 405, "method_not_allowed"),
        ("PATCH", "/audio/x", 415, "unsupported_media_type"),
        ("GET", "/audio?filter=x", 422, "invalid_input"),
        ("POST", "/audio/delete", 422, "invalid_input"),
        ("POST", "/healthz", 405, "method_not_allowed"),
        ("DELETE", "/search", 405, "method_not_allowed"),
        ("GET", "/search", 422, "invalid_input"),
        ("GET", "/search?q=", 422, "empty_query"),
        ("GET", "/search?q=a&lang=fa_IR", 422, "invalid_language"),
        ("GET", "/audio?cursor=x", 422, "invalid_field"),
        ("POST", "/search", 422, "invalid_input"),
        ("POST", "/audio", 415, "unsupported_media_type"),
        ("POST", "/search/audio", 415, "unsupported_media_type"),
        ("OPTIONS", "/audio", 405, "method_not_allowed"),
    ],
)
def test_every_error_has_the_one_form(
    service: RunningService, method: str, path: str, status: int, code: str
) -> None:
    """A client that can read one error can read them all, from whichever layer it comes."""
    check_problem(service.client.request(method, path), status, code)


def test_a_wrong_method_is_told_a_right_one(service: RunningService) -> None:
    """RFC 9110 asks for `Allow` with every 405, and for all methods in it."""
    assert service.client.delete("/search").headers["allow"] == "GET, POST"
    assert service.client.put("/search/audio").headers["allow"] == "POST"
    for path in ("/audio/x", "/v1/audio/x"):
        assert {"GET", "DELETE"} <= set(service.client.put(path).headers["allow"].split(", "))
    assert service.client.put("/audio/x/content").headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("body", ["", "{", '{"q": }', "q=a", "\x00", '{"q": "a"', "[" * 100_000, "\xff\xfe"])
def test_what_is_not_json_is_malformed(service: RunningService, body: str) -> None:
    """To be told which bytes are wrong beats to be told that a field is missing."""
    headers = {"Content-Type": "application/json"}
    answer = service.client.post("/search", content=body.encode("latin-1"), headers=headers)
    if body:
        check_problem(answer, 400, "malformed_request")
    else:
        check_problem(answer, 422, "invalid_input")


@pytest.mark.parametrize(
    "head",
    [
        b"x\r\n\r\n",
        b"GET /audio?filter=%b HTTP/1.1\r\nHost: x\r\n\r\n" % (b"a" * 65_536),
        b"GET / HTTP/1.1\r\nX: " + b"a" * (128 << 10),
    ],
    ids=["no HTTP", "long address", "long head"],
)
def test_what_is_no_request_has_the_form_too(service: RunningService, head: bytes) -> None:
    """A filter that is too long for an address is met by honest clients; uvicorn answers it in plain text."""
    told, _, body = service.raw(head).partition(b"\r\n\r\n")
    assert told.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"\r\ncontent-type: application/problem+json" in told
    assert json.loads(body)["code"] == "malformed_request"


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"queries": [{"q": "a"}, {"q": "a", "filter": {"duration_s": {}}}]}, "/queries/1/filter/duration_s"),
        ({"queries": [{"q": "a"}], "limit": 3}, "/limit"),
        ({"queries": 3}, "/queries"),
        ({"q": "a", "filter": {"metadata": {"n": {"in": [1, [2]]}}}}, "/filter/metadata/n/in/1"),
        ({"q": "a", "filter": {"metadata": {"value": [2]}}}, "/filter/metadata/value"),
        ({"q": "a", "filter": {"metadata": {"a/b": {"like": "x"}}}}, "/filter/metadata/a~1b/like"),
        ({"q": "a", "filter": {"id": {"in": []}}}, "/filter/id/in"),
        ({}, ""),  # `q` or `like`
        ([], ""),
    ],
    ids=str,
)
def test_a_pointer_leads_into_the_body(service: RunningService, body: Any, pointer: str) -> None:
    """Clients show the reason beside what it is about, once: not one for each form that it might have had."""
    answer = check_problem(service.client.post("/search", json=body), 422, "invalid_input")
    assert [error["pointer"] for error in answer["errors"]] == [f"/body{pointer}"]


def test_a_wrong_value_is_pointed_at(service: RunningService) -> None:
    """422 answers say where, as a JSON pointer, and why: forms put the reason beside the field."""
    body = check_problem(service.client.get("/search?q=a&limit=x&min_score=automatic"), 422, "invalid_input")
    assert {error["pointer"] for error in body["errors"]} == {"/query/limit", "/query/min_score"}
    assert all(error["reason"] for error in body["errors"])


def test_a_bug_too_has_the_one_form(tmp_path: Path) -> None:
    """Even what nobody foresaw answers in our form, with the id under which the log explains it; the
    answer itself gives nothing away."""
    with RunningService(tmp_path, program="tests.stand_in", workers=0) as service:
        service.start()
        sql(tmp_path / "index_data", "ALTER TABLE recordings RENAME TO lost")
        answer = service.client.get("/audio", headers={"X-Request-ID": "unforeseen-1"})
        body = check_problem(answer, 500, "internal_error")
        assert body["request_id"] == "unforeseen-1"
        assert "recordings" not in answer.text
        logged = [line for line in map(json.loads, service.log().splitlines()) if line["level"] == "error"]
        assert any(
            ("no such table" in line["exception"] or "UndefinedTable" in line["exception"])
            and line["request_id"] == "unforeseen-1"
            for line in logged
        )
        assert service.client.get("/healthz").status_code == 200


# --- request ids


def test_a_request_id_is_kept(service: RunningService) -> None:
    """Callers trace a request through several services by the id they gave it."""
    for path in ("/healthz", "/nowhere", "/search?q="):
        answer = service.client.get(path, headers={"X-Request-ID": "trace:1.2_3-4"})
        assert answer.headers["x-request-id"] == "trace:1.2_3-4"


@pytest.mark.parametrize("given", ["", "a b", "a" * 129, 'a"b', "a{}", "<script>", "é", "a\tb", "a,b"])
def test_an_unusable_request_id_is_replaced(service: RunningService, given: str) -> None:
    """It is written into logs and answers, so it may not carry anything that means something there."""
    headers = {b"X-Request-ID": given.encode("latin-1")}
    answer = service.client.get("/healthz", headers=headers)
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


def test_every_request_has_an_id_of_its_own(service: RunningService) -> None:
    """Else a report of trouble could not be matched with its lines in the log."""
    seen = {service.client.get("/healthz").headers["x-request-id"] for _ in range(20)}
    assert len(seen) == 20


# --- the table of codes


def test_every_error_of_the_core_has_a_status() -> None:
    """A core error without one would reach its user as a crash."""

    def tree(kind: type[ClaspError]) -> Iterator[type[ClaspError]]:
        for child in kind.__subclasses__():
            yield child
            yield from tree(child)

    assert {kind.code for kind in tree(ClaspError)} <= STATUS_OF.keys()


def test_every_code_is_documented() -> None:
    """Programs act on codes; the list of them is a promise, so it is complete, right and has no leftovers."""
    rows = re.findall(r"^\| `(\w+)`(?: \*)? \| (\d+) \| \S.* \|$", DOCUMENTED.read_text(), re.MULTILINE)
    assert {code: int(status) for code, status in rows} == STATUS_OF
    assert len(rows) == len(STATUS_OF)


# --- keys


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service that wants one of two keys."""
    with RunningService(
        tmp_path_factory.mktemp("guarded"),
        program="tests.stand_in",
        api_keys=" first-secret, second-secret ",
    ) as running:
        yield running.start()


@pytest.mark.parametrize(
    "path",
    ["/audio", "/v1/audio", "/search?q=a", "/audio/x", "/audio/x/content", "/metrics", "/v1/search?q=a"],
)
def test_without_a_key_nothing_is_answered(guarded: RunningService, path: str) -> None:
    """Recordings are people's voices; where a key is set, there is no way round it."""
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic first-secret"},
        {"X-API-Key": ""},
        {"X-API-Key": "first-secre"},
        {"X-API-Key": "first-secret,second-secret"},
        {"Authorization": "Bearer"},
        {"X-API-Key": "é".encode()},
        {"Host": "localhost/healthz?x="},
    ):
        answer = guarded.client.get(path, headers=headers)
        check_problem(answer, 401, "unauthorized")
        assert answer.headers["www-authenticate"] == "Bearer"


def test_a_body_without_a_key_is_not_read(guarded: RunningService) -> None:
    """Strangers may neither store anything nor keep the decoder busy."""
    for path in ("/audio", "/search/audio", "/search"):
        check_problem(guarded.client.post(path, files={"file": b"RIFF" * 1000}), 401, "unauthorized")
    check_problem(guarded.client.delete("/audio/x"), 401, "unauthorized")
    assert guarded.stored() == set()


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer first-secret"},
        {"authorization": "bearer second-secret"},
        {"X-API-Key": "second-secret"},
    ],
)
def test_any_of_the_keys_opens_in_either_header(guarded: RunningService, headers: dict[str, str]) -> None:
    """Two keys let an operator change one without an outage; two headers suit the clients there are."""
    assert guarded.client.get("/audio", headers=headers).status_code == 200
    assert guarded.client.get("/search?q=a", headers=headers).status_code == 200


def test_health_needs_no_key(guarded: RunningService) -> None:
    """Load balancers and container platforms ask without one."""
    assert guarded.client.get("/healthz").status_code == 200
    assert guarded.client.get("/readyz").status_code == 200


def test_the_log_holds_no_key_and_no_question(guarded: RunningService, collection: str) -> None:
    """Logs are copied, shipped and read by many; neither secrets nor what people ask belong there."""
    key = {"X-API-Key": "first-secret"}
    guarded.client.get("/search", params={"q": "a very private question"}, headers=key).raise_for_status()
    guarded.client.get("/audio", headers={"X-API-Key": "guessed-secret"})
    guarded.client.post("/search", json={"q": "a very private question"}, headers=key).raise_for_status()
    log = guarded.log()
    assert '"/search"' in log
    for secret in ("secret", "private", "question"):
        assert secret not in log


def test_every_line_of_the_log_is_json(service: RunningService) -> None:
    """Log collectors parse lines; a stray warning on standard error would be lost or break them."""
    for line in service.log().splitlines():
        assert json.loads(line).keys() >= {"level", "timestamp", "message"}
