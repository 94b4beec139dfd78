"""What the page stands on: its files, sessions by cookie, collections, waveforms, search by a recording."""

import json
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import httpx
import numpy as np
import pytest

from app.pages import MEDIA_TYPES, PAGE
from clasp_core.access import Keys
from clasp_core.library import open_catalog
from clasp_core.limits import Rate
from tests.app.test_errors import check_problem
from tests.audio_files import encode, tone
from tests.postgres import database_settings
from tests.service import RunningService, sql


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


# --- sessions


KEYS: dict[str, tuple[Any, ...]] = {
    "reader": (["read"],),
    "tenant": (["read", "write"], ["tenant"]),
    "operator": (["admin"],),
}
OURS = {"Sec-Fetch-Site": "same-origin"}


def test_a_service_without_keys_says_that_none_is_needed(service: RunningService) -> None:
    """The page then asks for none; and a key that somebody types all the same is kept nowhere."""
    assert service.client.get("/session").json() == {
        "name": None,
        "scopes": ["read", "write", "admin"],
        "collections": None,
        "anonymous": True,
    }
    opened = service.client.post("/session", json={"key": "anything"}, headers=OURS)
    assert (opened.status_code, "set-cookie" in opened.headers) == (204, False)


@pytest.mark.parametrize("origin", ["cross-site", "same-site"])
def test_other_sites_change_nothing_in_an_open_service(service: RunningService, origin: str) -> None:
    """Any page that somebody looks at can send forms to 127.0.0.1, where most services have no key."""
    headers = {"Sec-Fetch-Site": origin}
    answer = service.client.post("/audio", files={"file": b"RIFF"}, headers=headers)
    check_problem(answer, 403, "forbidden")
    check_problem(service.client.request("DELETE", "/audio/html", headers=headers), 403, "forbidden")
    assert [record["id"] for record in service.listed()] == ["html"]


@pytest.fixture(scope="module")
def keys(service: RunningService) -> dict[str, str]:
    """A key of each kind, by name. From here on the service is closed without one."""
    data_dir = service.data_dir / "index_data"
    with closing(open_catalog(data_dir, database_settings(data_dir).get("database_url"))) as catalog:
        kept = Keys(catalog)
        return {name: kept.create(name, *arguments)[1] for name, arguments in KEYS.items()} | {
            "slow": kept.create("slow", ["read"], rate=Rate.parse("3/minute"))[1]
        }


@contextmanager
def signed_in(service: RunningService, key: str) -> Iterator[httpx.Client]:
    """A browser, so to speak, that has the key as a cookie."""
    with httpx.Client(base_url=service.client.base_url) as browser:
        browser.post("/session", json={"key": key}, headers=OURS).raise_for_status()
        yield browser


def test_a_key_becomes_a_cookie_that_no_script_reads(service: RunningService, keys: dict[str, str]) -> None:
    """What a script can read, an injected one can send away; a cookie goes where the browser sends it."""
    check_problem(service.client.get("/session"), 401, "unauthorized")
    with signed_in(service, keys["tenant"]) as browser:
        said = browser.get("/session", headers=OURS)
        assert said.json() == {
            "name": "tenant",
            "scopes": ["read", "write"],
            "collections": ["tenant"],
            "anonymous": False,
        }
        assert said.headers["cache-control"] == "no-store"
        assert browser.get("/audio", headers=OURS).headers["cache-control"] == "private"
        uploaded = browser.post("/audio", files={"file": b"RIFF"}, headers=OURS)
        assert uploaded.json()["collection"] == "tenant"
        closed = browser.delete("/session", headers=OURS)
        assert closed.status_code == 204
        check_problem(browser.get("/session", headers=OURS), 401, "unauthorized")
    plain, kept, tls = (
        service.client.post("/session", json={"key": keys["reader"]} | more, headers=OURS | origin)
        for more, origin in (({}, {}), ({"remember": True}, {}), ({}, {"Origin": "https://a.example"}))
    )
    service.client.cookies.clear()
    words = [answer.headers["set-cookie"].lower() for answer in (plain, kept, tls)]
    for said_of_it in words:
        assert {"httponly", "samesite=strict", "path=/"} <= set(said_of_it.split("; "))
    assert ["max-age=2592000" in said_of_it for said_of_it in words] == [False, True, False]
    assert ["secure" in said_of_it for said_of_it in words] == [False, False, True]
    assert not any(key in service.log() for key in keys.values())


@pytest.mark.parametrize("site", ["cross-site", "same-site", "none", None])
def test_a_cookie_counts_for_our_own_page_only(
    service: RunningService, keys: dict[str, str], site: str | None
) -> None:
    """Browsers add cookies to requests that other pages make: none of them may delete here."""
    headers = {} if site is None else {"Sec-Fetch-Site": site}
    with signed_in(service, keys["tenant"]) as browser:
        check_problem(browser.get("/audio", headers=headers), 401, "unauthorized")
        refused = (403, "forbidden") if site in ("cross-site", "same-site") else (401, "unauthorized")
        for method, path in (("POST", "/audio"), ("DELETE", "/audio/html"), ("PATCH", "/v1/audio/html")):
            check_problem(browser.request(method, path, headers=headers), *refused)
        if site in ("cross-site", "same-site"):
            stranger = {"key": keys["reader"]}
            check_problem(browser.post("/session", json=stranger, headers=headers), 403, "forbidden")
            check_problem(browser.delete("/session", headers=headers), 403, "forbidden")
        # who has the key needs no cookie, wherever they are
        own = headers | {"X-API-Key": keys["tenant"]}
        assert browser.get("/audio", headers=own).status_code == 200
        assert browser.request("DELETE", "/audio/none", headers=own).status_code == 404


def test_headers_win_over_the_cookie(service: RunningService, keys: dict[str, str]) -> None:
    """A tool that says who it is must not be taken for whoever uses the browser."""
    with signed_in(service, keys["tenant"]) as browser:
        for name, header in (
            ("reader", {"Authorization": f"Bearer {keys['reader']}"}),
            (None, {"X-API-Key": "x"}),
        ):
            answer = browser.get("/session", headers=OURS | header)
            assert answer.json().get("name") == name
            assert answer.status_code == (200 if name else 401)


def test_a_session_gives_no_better_chance_to_guess(service: RunningService, keys: dict[str, str]) -> None:
    """A wrong key is as wrong here as in a header; a right one is counted, and what is sent is bounded."""
    for wrong in (keys["reader"][:-1], "clasp_" + 12 * "0" + "_" + 64 * "0", "x"):
        answer = service.client.post("/session", json={"key": wrong}, headers=OURS)
        check_problem(answer, 401, "unauthorized")
        assert "set-cookie" not in answer.headers
        assert wrong not in answer.text
    answers = [service.client.post("/session", json={"key": keys["slow"]}, headers=OURS) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [204, 204, 204, 429]
    check_problem(answers[3], 429, "rate_limited")
    service.client.cookies.clear()
    long = service.client.post("/session", json={"key": 20_000 * "x"}, headers=OURS)
    check_problem(long, 413, "upload_too_large")
    form = service.client.post("/session", content=json.dumps({"key": keys["reader"]}), headers=OURS)
    check_problem(form, 422, "invalid_input")


# --- what there is


@pytest.fixture(scope="module")
def tones(service: RunningService, keys: dict[str, str]) -> httpx.Client:
    """A client with a key for everything; three recordings of tones for the tenant, and one for others.

    `both` has ten seconds of a low tone, then ten of a high one, half as loud: two segments.
    """
    client = service.client
    client.headers["X-API-Key"] = keys["operator"]
    low, high = tone(4.0, frequency=500), tone(4.0, frequency=3000)
    both = np.concatenate([tone(10.0, frequency=500), tone(10.0, frequency=3000) / 2])
    files = {"low": low, "high": high, "both": both, "elsewhere": tone(4.0, frequency=510)}
    for name, samples in files.items():
        collection = "others" if name == "elsewhere" else "tenant"
        service.ready(encode(samples, 16_000), id=name, collection=collection)
    assert client.get("/audio/both").json()["segments"] == 2
    return client


def test_collections_are_listed_as_far_as_they_are_seen(
    tones: httpx.Client, service: RunningService, keys: dict[str, str]
) -> None:
    """People choose from this list where to look and where to upload; a tenant's must not name others."""
    found = {item["name"]: item for item in tones.get("/collections").json()["items"]}
    tenants = found["tenant"]
    assert list(found) == sorted(found)
    assert found.keys() >= {"default", "others", "tenant"}
    assert {name: tenants[name] for name in ("recordings", "ready", "failed", "segments")} == {
        "recordings": 4,  # one is from a test of uploads, and no recording
        "ready": 3,
        "failed": 1,
        "segments": 4,
    }
    assert tenants["duration_s"] == pytest.approx(28, abs=0.1)
    seen = tones.get("/v1/collections", headers={"X-API-Key": keys["tenant"]}).json()["items"]
    assert seen == [tenants]


# --- search by a recording that is there


def likes(client: httpx.Client, **body: Any) -> list[str]:
    answer = client.post("/search", json=body)
    assert answer.status_code == 200, answer.text
    asked = client.get("/search", params={name: value for name, value in body.items() if name != "filter"})
    assert asked.json()["hits"] == answer.json()["hits"] or "filter" in body
    assert answer.json()["query"] == {"text": None, "lang": None, "normalized": None}
    assert not any("confidence" in hit for hit in answer.json()["hits"])
    return [hit["id"] for hit in answer.json()["hits"]]


def test_what_is_like_a_moment_is_found(tones: httpx.Client) -> None:
    """ "More like this" means the passage that somebody hears, not the whole recording; and never itself."""
    assert likes(tones, like="both", at_s=2.0, limit=1, collection="tenant") == ["low"]
    assert likes(tones, like="both", at_s=17.0, limit=1) == ["high"]
    assert likes(tones, like="both", at_s=1e9, limit=1) == ["high"], "the nearest, behind the end"
    assert set(likes(tones, like="both", limit=2, collection="tenant")) == {"low", "high"}
    assert likes(tones, like="low", limit=1, filter={"id": {"in": ["low", "both"]}}) == ["both"]
    assert likes(tones, like="low", collection="others") == ["elsewhere"]


def test_its_own_segments_take_no_place_of_others(tones: httpx.Client) -> None:
    """Who asks for two passages gets two, though the recording's own would be the best."""
    answer = tones.get("/search", params={"like": "both", "at_s": 2, "group_by": "segment", "limit": 2})
    assert [hit["id"] for hit in answer.json()["hits"]] == ["low", "elsewhere"]


def test_who_may_not_see_a_recording_cannot_search_by_it(tones: httpx.Client, keys: dict[str, str]) -> None:
    """Else its neighbours would tell what is in it."""
    tenant = {"headers": {"X-API-Key": keys["tenant"]}}
    theirs = tones.get("/search", params={"like": "elsewhere"}, **tenant)
    unknown = tones.get("/search", params={"like": "nowhere"}, **tenant)
    assert (
        check_problem(theirs, 404, "recording_not_found")["detail"].replace("elsewhere", "nowhere")
        == (check_problem(unknown, 404, "recording_not_found")["detail"])
    )
    where = {"like": "elsewhere", "like_collection": "others"}
    check_problem(tones.get("/search", params=where, **tenant), 403, "forbidden")
    assert tones.get("/search", params=where).status_code == 200
    check_problem(tones.get("/search", params={"like": "html"}), 409, "recording_not_ready")


# --- waveforms


def test_a_waveform_shows_where_what_is_loud(tones: httpx.Client) -> None:
    """People click where it is loud: a drawing that is off by seconds misleads them."""
    answer = tones.get("/audio/both/waveform")
    said = answer.raise_for_status().json()
    assert (said["start_s"], said["end_s"], len(said["peaks"])) == (0, pytest.approx(20, abs=0.1), 400)
    assert said["peaks"][5:195] == pytest.approx([0.5] * 190, abs=0.01)
    assert said["peaks"][205:395] == pytest.approx([0.25] * 190, abs=0.01)
    near = tones.get("/audio/both/waveform", params={"start_s": 9.01, "end_s": 11, "points": 1000}).json()
    assert (near["start_s"], near["end_s"], len(near["peaks"])) == (9.0, 11.0, 40)
    assert np.diff(near["peaks"]).argmin() in (18, 19, 20)
    (one,) = tones.get("/audio/both/waveform", params={"points": 1}).json()["peaks"]
    assert one == max(said["peaks"])
    behind = tones.get("/audio/both/waveform", params={"start_s": 100}).json()
    assert behind["peaks"] == []
    check_problem(tones.get("/audio/both/waveform", params={"start_s": 2, "end_s": 1}), 422, "invalid_field")
    again = tones.get("/audio/both/waveform", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.headers["cache-control"]) == (304, "private, no-cache")


def test_where_there_is_no_waveform_it_says_so(tones: httpx.Client, service: RunningService) -> None:
    """What an older version indexed has none, and is found and played all the same."""
    check_problem(tones.get("/audio/html/waveform"), 404, "no_waveform")
    assert sql(service.data_dir / "index_data", "SELECT count(*) FROM waveforms") == [(4,)]
    tones.delete("/audio/elsewhere").raise_for_status()
    assert sql(service.data_dir / "index_data", "SELECT count(*) FROM waveforms") == [(3,)]
    sql(service.data_dir / "index_data", "DELETE FROM waveforms")
    check_problem(tones.get("/audio/low/waveform"), 404, "no_waveform")
