"""What the page stands on: its files, sessions by cookie, collections, waveforms, search by a recording."""

import re
from collections.abc import Iterator

import httpx
import pytest

from app.pages import MEDIA_TYPES, PAGE
from tests.app.test_errors import check_problem
from tests.service import RunningService


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """One service for all; it has keys from the first test of sessions on."""
    with RunningService(tmp_path_factory.mktemp("page"), program="tests.stand_in") as running:
        yield running.start()


def policy(answer: httpx.Response) -> dict[str, str]:
    """A Content-Security-Policy by its directives."""
    parts = [part.split(None, 1) for part in answer.headers["content-security-policy"].split(";")]
    return {part[0]: part[1] if len(part) > 1 else "" for part in parts}


# --- the page


def test_the_page_runs_what_is_ours_only(service: RunningService) -> None:
    """A transcript or a file name that is HTML must stay text, and no other site may frame the page."""
    answer = service.client.get("/")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    said = policy(answer)
    assert (said["default-src"], said["script-src"], said["style-src"]) == ("'none'", "'self'", "'self'")
    assert said["frame-ancestors"] == said["base-uri"] == said["form-action"] == "'none'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    for name, value in {
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "permissions-policy": "microphone=(self)",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-cache",
    }.items():
        assert answer.headers[name] == value
    again = service.client.get("/", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_every_file_of_the_page_is_served_and_nothing_else(service: RunningService) -> None:
    """A file that the package has and the service does not serve breaks the page; one of the disk leaks."""
    files = [path for path in PAGE.rglob("*") if path.is_file()]
    for path in files:
        answer = service.client.get(f"/page/{path.relative_to(PAGE).as_posix()}")
        assert answer.content == path.read_bytes()
        assert answer.headers["content-type"].partition(";")[0] == MEDIA_TYPES[path.suffix]
    for name in ("none.js", "", "..%2fmain.py", "%2e%2e/main.py", "/etc/passwd", "samples/../../main.py"):
        check_problem(service.client.get(f"/page/{name}"), 404, "not_found")


def test_no_page_asks_another_host(service: RunningService) -> None:
    """Offline, or behind a firewall, everything works; and nobody else learns who reads it."""
    for path in ("/", "/docs"):
        answer = service.client.get(path)
        assert policy(answer)["default-src"] == "'none'"
        assert not re.search(r"""(src|href)=["']?(https?:)?//""", answer.text)
    assert "/audio/{id}/content" in answer.text


def test_what_is_uploaded_is_no_page_of_ours(service: RunningService) -> None:
    """Whoever opens the bytes of a recording in a browser must not run what its uploader wrote."""
    content = b"<!doctype html><script>alert(1)</script>"
    service.upload(content, id="html")
    answer = service.client.get("/audio/html/content")
    assert answer.content == content
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert policy(answer) == {"sandbox": "", "default-src": "'none'"}
    assert policy(service.client.get("/audio/html/content", headers={"Range": "bytes=0-4"}))["sandbox"] == ""
