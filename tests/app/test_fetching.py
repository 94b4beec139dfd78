"""Recordings by URL: fetched from where the operator allows, and from nowhere else, whatever leads there."""

import json
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

from app.errors import HttpError
from app.fetching import AT_ONCE, MAX_REDIRECTS, Fetcher, is_public
from tests.app.test_errors import check_problem
from tests.audio_files import encode, tone
from tests.fetching_program import is_allowed
from tests.service import RunningService, eventually
from tests.web_server import ADDRESS, Web

HONEST = encode(tone(1.0), 16_000)
MAX_UPLOAD_BYTES = 200_000


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    """A web server that the fetchers of these tests may reach."""
    with Web({"/honest.wav": HONEST, "/large.wav": bytes(MAX_UPLOAD_BYTES + 1), "/empty": b""}) as running:
        yield running


# --- the service


@pytest.fixture(scope="module")
def fetching(web: Web, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service that may fetch from any public host, and from the server of these tests by some names."""
    folder = tmp_path_factory.mktemp("fetching")
    web.authority.cert_pem.write_to_path(folder / "ca.pem")
    names = ("files.test", "*.below.test", "inside.test", "mixed.test", "nowhere.test")
    hosts = ",".join(["*", *(f"{name}:{web.port}" for name in names)])
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AUTHORITY", str(folder / "ca.pem"))
        running = RunningService(
            folder, program="tests.fetching_program", url_hosts=hosts, max_upload_bytes=MAX_UPLOAD_BYTES
        )
        with running:
            yield running.start()
            assert "unexpected error" not in running.log(), "something that a test asked met a bug"


def test_a_url_is_an_upload(fetching: RunningService, web: Web, collection: str) -> None:
    """Whoever has recordings on a web server need not carry them through their own machine; all that holds of
    an upload holds: durable, searchable, known again by its bytes, one recording for an id."""
    said = {
        "id": collection,
        "lang": "EN-gb",
        "collection": collection,
        "metadata": {"title": "زنبور", "n": None},
    }
    body = said | {"url": web.url("/honest.wav")}
    answer = fetching.client.post("/audio", json=body, headers={"Prefer": "wait=60"})
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"/audio/{collection}"
    record = answer.json()
    assert {name: record[name] for name in said} == said | {"lang": "en-GB"}
    assert record["media_type"] == "audio/wav"
    assert fetching.client.get(f"/audio/{collection}/content").content == HONEST
    assert [hit["id"] for hit in fetching.found_by_sound(HONEST, collection=collection)] == [collection]

    again = fetching.client.post(
        "/v1/audio", json=body | {"url": web.url("/redirect?to=/honest.wav"), "id": None}
    )
    assert again.status_code == 200
    assert again.json() == record | {"duplicate": True}
    web.files["/other.wav"] = encode(tone(1.0, frequency=880.0), 16_000)
    other = fetching.client.post("/audio", json=body | {"url": web.url("/other.wav", "a.below.test")})
    check_problem(other, 409, "id_conflict")


@pytest.mark.parametrize(
    "url",
    [
        "http://files.test:{port}/honest.wav",
        "ftp://files.test:{port}/honest.wav",
        "file:///etc/passwd",
        "files.test/honest.wav",
        "https://unlisted.test:{port}/honest.wav",
        "https://below.test:{port}/honest.wav",
        "https://notbelow.test:{port}/honest.wav",
        "https://files.test:{port}@inside.test/",
        "https://user:pass@files.test:{port}/honest.wav",
        "https://files.test\\@localhost/",
        "https://files.test.:{port}/honest.wav",
        "https://files.test:22/",
        "https://localhost/",
        "https://LOCALHOST/",
        "https://127.0.0.1/",
        "https://127.0.0.2:{port}/honest.wav",
        "https://2130706433/",
        "https://0x7f000001/",
        "https://0x7f.1/",
        "https://0177.1/",
        "https://127.1/",
        "https://0/",
        "https://8.8.8.8/",
        "https://[::1]/",
        "https://[::]/",
        "https://[::ffff:127.0.0.1]/",
        "https://[fe80::1]/",
        "https://[64:ff9b::7f00:1]/",
        "https://[2002:7f00:1::]/",
        "https://inside.test:{port}/",
        "https://mixed.test:{port}/",
        "https://nowhere.test:{port}/",
        "https://files.test:{port}/redirect?to=https://127.0.0.1/",
        "https://files.test:{port}/redirect?to=https://localhost/",
        "https://files.test:{port}/redirect?to=https://inside.test:{port}/",
        "https://files.test:{port}/redirect?to=https://mixed.test:{port}/",
        "https://files.test:{port}/redirect?to=https://unlisted.test:{port}/honest.wav",
        "https://files.test:{port}/redirect?to=http://files.test:{port}/honest.wav",
        "https://files.test:{port}/redirect?to=//user@files.test:{port}/honest.wav",
        "https://files.test:{port}/redirect?to=https://169.254.169.254/latest/meta-data/",
    ],
)
def test_nothing_leads_elsewhere(fetching: RunningService, web: Web, url: str) -> None:
    """Each of these has opened somebody's cloud account or database to strangers. None gets an answer that a
    refused one would not get, and none leads to a second connection."""
    kept, asked = fetching.stored(), len(web.requests)
    answer = fetching.client.post("/audio", json={"url": url.format(port=web.port)})
    problem = check_problem(answer, 403, "url_not_allowed")
    assert not any(word in problem["detail"] for word in ("test", "127", "169", "localhost"))
    assert len(web.requests) - asked == ("/redirect" in url)
    assert fetching.stored() == kept


def test_a_private_name_is_not_told_from_none(fetching: RunningService, web: Web) -> None:
    """Else anybody could ask which names our network knows."""
    answers = [
        fetching.client.post("/audio", json={"url": web.url("/", name)}).json()["detail"]
        for name in ("inside.test", "mixed.test", "nowhere.test")
    ]
    assert len(set(answers)) == 1


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/status/404", 502, "url_failed"),
        ("/status/500", 502, "url_failed"),
        ("/status/206", 502, "url_failed"),
        ("/redirect?to=https://[::1", 502, "url_failed"),
        ("/redirect?to=https://files.test:x/", 502, "url_failed"),
        ("/status/302", 502, "url_failed"),
        ("/packed", 502, "url_failed"),
        ("/short", 502, "url_failed"),
        ("/unbounded", 502, "url_failed"),
        ("/large.wav", 413, "upload_too_large"),
        ("/empty", 422, "empty_upload"),
    ],
)
def test_what_is_no_whole_recording_is_refused(
    fetching: RunningService, web: Web, path: str, status: int, code: str
) -> None:
    """Half a file or an error page may not become a recording; and of what was answered, the client learns
    the status alone."""
    kept = fetching.stored()
    answer = fetching.client.post("/audio", json={"url": web.url(path)})
    problem = check_problem(answer, status, code)
    assert "inside information" not in answer.text
    assert path.removeprefix("/status/") in problem["detail"] or not path.startswith("/status/")
    assert fetching.stored() == kept


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ("{", 400, "malformed_request"),
        ("", 400, "malformed_request"),
        ("[]", 422, "invalid_input"),
        ("{}", 422, "invalid_input"),
        ('{"url": 1}', 422, "invalid_input"),
        ('{"url": "https://files.test/", "file": "x"}', 422, "invalid_input"),
        ('{"url": "https://files.test/", "metadata": "{}"}', 422, "invalid_input"),
        ('{"url": "https://files.test:x/"}', 422, "invalid_field"),
        (
            '{"url": "https://files.test/", "metadata": ' + '{"a":' * 500 + "1" + "}" * 501,
            422,
            "invalid_field",
        ),
        (json.dumps({"url": "https://files.test/" + "a" * 9000}), 422, "invalid_input"),
        (json.dumps({"url": "https://files.test/", "lang": "a" * 5_000_000}), 413, "upload_too_large"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_body_of_the_wrong_form_is_refused(
    fetching: RunningService, body: str, status: int, code: str
) -> None:
    """Before anything is fetched, and with a pointer to what is wrong."""
    headers = {"Content-Type": "application/json"}
    problem = check_problem(fetching.client.post("/audio", content=body, headers=headers), status, code)
    if code == "invalid_input":
        assert all(error["pointer"].startswith("/body") for error in problem["errors"])


def test_downloads_are_few_and_end_with_who_asked(
    fetching: RunningService, web: Web, collection: str
) -> None:
    """Strangers' servers may be slow for as long as they like: that may neither fill the service nor keep it
    busy once nobody waits."""
    kept = fetching.stored()
    body = json.dumps({"url": web.url("/endless")}).encode()
    head = "POST /audio HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    clients = [socket.create_connection(("127.0.0.1", fetching.port), 10) for _ in range(AT_ONCE)]
    try:
        for client in clients:
            client.sendall(request)
        eventually(lambda: web.open == AT_ONCE, within_s=10)
        full = fetching.client.post("/audio", json={"url": web.url("/honest.wav")})
        check_problem(full, 503, "not_ready")
        assert int(full.headers["retry-after"]) > 0
    finally:
        for client in clients:
            client.close()
    eventually(lambda: web.open == 0, within_s=10)
    eventually(lambda: fetching.stored() == kept, within_s=10)
    again = fetching.client.post("/audio", json={"url": web.url("/honest.wav"), "collection": collection})
    assert again.status_code == 202


def test_the_log_says_what_was_refused_and_not_the_url(fetching: RunningService, web: Web) -> None:
    """The operator must see who is knocking where; signatures in a URL are keys to somebody's files."""
    fetching.client.post("/audio", json={"url": web.url("/x?signature=53cr3t", "inside.test")})
    assert "inside.test" in fetching.log()
    assert "53cr3t" not in fetching.log()


# --- the fetcher, with resolvers that lie


class Resolver:
    """Answers by turns, and remembers what it was asked."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.asked: list[str] = []
        self._answers = list(answers)

    async def __call__(self, name: str) -> Sequence[str]:
        self.asked.append(name)
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


def fetched(web: Web, path: str, *answers: Sequence[str], host: str = "files.test", **options: Any) -> bytes:
    """What a fetcher gets of the server, if that is all that `answers` lead to."""
    resolve = Resolver(*(answers or ([ADDRESS],)))
    options = {"resolve": resolve, "is_allowed": is_allowed, "tls": web.trusting, "timeout_s": 10.0} | options
    fetcher = Fetcher([f"*:{web.port}"], **options)

    async def fetch() -> bytes:
        async with fetcher.fetch(web.url(path, host)) as pieces:
            return b"".join([piece async for piece in pieces])

    return anyio.run(fetch)


def refusal(web: Web, path: str, *answers: Sequence[str], **options: Any) -> str:
    """The code with which the fetcher refuses."""
    with pytest.raises(HttpError) as refused:
        fetched(web, path, *answers, **options)
    return refused.value.code


def test_a_second_answer_of_the_name_server_does_not_matter(web: Web) -> None:
    """DNS rebinding: public when it is checked, 127.0.0.1 when it is used. It is asked once, and the
    connection goes to the answer that was checked, by the name that the certificate is for."""
    resolve = Resolver([ADDRESS], ["127.0.0.1"])
    assert fetched(web, "/honest.wav", resolve=resolve) == HONEST
    assert resolve.asked == ["files.test"]
    assert web.requests[-1].sni == "files.test"
    assert web.requests[-1].headers["host"] == f"files.test:{web.port}"


def test_a_redirect_is_checked_as_the_first_address_was(web: Web) -> None:
    """The same name again, now with a private address: every hop is a new question."""
    asked = len(web.requests)
    assert refusal(web, "/redirect?to=/honest.wav", [ADDRESS], ["10.0.0.1"]) == "url_not_allowed"
    assert len(web.requests) == asked + 1


def test_one_private_address_among_public_ones_is_enough(web: Web) -> None:
    """An attacker's name has both, and hopes that the second is tried when the first does not answer."""
    asked = len(web.requests)
    for answer in (
        [ADDRESS, "127.0.0.1"],
        ["::1", ADDRESS],
        [ADDRESS, "fe80::1%eth0"],
        [ADDRESS, "what"],
        [],
    ):
        assert refusal(web, "/honest.wav", answer) == "url_not_allowed"
    assert len(web.requests) == asked


def test_an_address_that_does_not_answer_is_followed_by_the_next(web: Web) -> None:
    """Many hosts have an IPv6 address that many networks cannot reach."""
    assert fetched(web, "/honest.wav", ["127.0.0.3", ADDRESS], is_allowed=lambda _: True) == HONEST
    assert refusal(web, "/honest.wav", ["127.0.0.3"], is_allowed=lambda _: True) == "url_failed"


def test_redirects_end(web: Web) -> None:
    """In a loop, too, and after a number that honest hosts need."""
    web.files["/0"] = HONEST
    loop = "/redirect?to=%2Fredirect%3Fto%3D/"
    asked = len(web.requests)
    nested = "/honest.wav"
    for _ in range(MAX_REDIRECTS):
        nested = "/redirect?to=" + nested.replace("%", "%25").replace("?", "%3F").replace("=", "%3D")
    assert fetched(web, nested) == HONEST
    assert len(web.requests) == asked + MAX_REDIRECTS + 1
    once_more = "/redirect?to=" + nested.replace("%", "%25").replace("?", "%3F").replace("=", "%3D")
    assert refusal(web, once_more) == "url_failed"
    assert refusal(web, loop) == "url_failed"


def test_nothing_of_ours_is_sent(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy, no cookie of the hop before, no credentials: the far side learns that somebody asks."""
    for name in ("HTTPS_PROXY", "ALL_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetched(web, "/redirect?to=" + web.url("/honest.wav", "other.test")) == HONEST
    assert web.requests[-1].sni == "other.test"
    assert web.requests[-1].headers.keys() == {"host", "accept", "accept-encoding", "user-agent"}
    assert web.requests[-1].headers["accept-encoding"] == "identity"


def test_the_certificate_must_be_the_host_s(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checked address is no proof of who answers there; and no setting makes it one."""
    web.authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    asked = len(web.requests)
    assert refusal(web, "/honest.wav", host="wrong.test") == "url_failed"
    assert refusal(web, "/honest.wav", tls=None) == "url_failed"
    assert len(web.requests) == asked


@pytest.mark.parametrize(("path", "limits"), [("/silent", {"idle_s": 0.3}), ("/endless", {"timeout_s": 0.5})])
def test_waiting_has_an_end(web: Web, path: str, limits: dict[str, float]) -> None:
    """For a host that says nothing, and for one that says a little for ever."""
    assert refusal(web, path, **limits) == "url_timeout"


def test_a_slow_name_server_counts(web: Web) -> None:
    """The attacker's name server is part of the far side."""

    async def resolve(name: str) -> list[str]:
        await anyio.sleep(10)
        return [ADDRESS]

    assert refusal(web, "/honest.wav", resolve=resolve, timeout_s=0.3) == "url_timeout"


NOT_THE_INTERNET = """
    0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 100.100.100.200
    127.0.0.1 127.255.255.254 168.63.129.16 169.254.169.254
    172.16.0.1 172.31.255.255 192.0.0.192 192.0.0.9 192.0.2.1 192.88.99.1 192.168.0.1 198.18.0.1 198.51.100.1
    203.0.113.1 224.0.0.1 224.0.1.1 239.1.1.1 240.0.0.1 255.255.255.255
    :: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:8.8.8.8 ::ffff:a00:1 64:ff9b::7f00:1 64:ff9b::10.0.0.1
    64:ff9b:1::1 100::1 2001::1 2001:1::1 2001:db8::1 2002:7f00:1:: 2002:808:808:: 3fff::1 5f00::1 fc00::1
    fd00:ec2::254 fe80::1 fe80::1%eth0 2606:4700::1111%eth0 fec0::1 ff02::1 ff0e::1 localhost 0x7f.1 1
"""


@pytest.mark.parametrize("address", NOT_THE_INTERNET.split())
def test_these_are_not_the_internet(address: str) -> None:
    """Ours, our network's, our cloud's, or nobody's, in every notation that has been used to hide it."""
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.215.14", "2606:4700::1111", "2a00:1450::1", "64:ff9b::808:808"]
)
def test_these_are(address: str) -> None:
    """The refusals above leave the internet."""
    assert is_public(address)
