"""Bounds: what one key may ask and keep, how much may wait, how long anything may take, and a full disk."""

import json
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest

from app.answering import MAX_RECORDINGS_WAITING
from clasp_core.access import Keys
from clasp_core.library import open_catalog
from clasp_core.limits import Quota
from tests.app.test_access import Keyed, recording
from tests.app.test_errors import check_problem
from tests.audio_files import encode, speech
from tests.postgres import database_settings
from tests.service import RunningService, eventually

STAND_IN = "tests.stand_in"
SIZE = len(recording(0))


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    """A service whose keys these tests make and limit."""
    with RunningService(tmp_path_factory.mktemp("keyed"), program=STAND_IN) as running:
        keyed = Keyed(running.start())
        limits = {
            "few": (("read", "write"), Quota(recordings=3)),
            "small": (("write",), Quota(size_bytes=3 * SIZE - 1)),
            "brief": (("read", "write"), Quota(hours=0.0004)),
        }
        data_dir = running.data_dir / "index_data"
        with closing(open_catalog(data_dir, **database_settings(data_dir))) as catalog:
            keys = Keys(catalog)
            keyed.texts["operator"] = keys.create("operator", ["admin"])[1]
            for name, (scopes, quota) in limits.items():
                keyed.texts[name] = keys.create(name, scopes, [name], quota=quota)[1]
        yield keyed


def only_head(service: RunningService, length: int, headers: str = "") -> httpx.Response:
    """The answer to an upload of which nothing but its head is sent."""
    head = f"POST /audio HTTP/1.1\r\nHost: x\r\n{headers}Content-Type: audio/wav\r\n"
    head += f"Content-Length: {length}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.port), 5) as connection:
        connection.sendall(head.encode())
        return answer_on(connection)


def answer_on(connection: socket.socket) -> httpx.Response:
    """What the service writes, up to the end of the answer."""
    got = b""
    while b"\r\n\r\n" not in got:
        got += (data := connection.recv(1 << 16))
        assert data, got
    head, _, body = got.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    while len(body) < int(headers["content-length"]):
        body += connection.recv(1 << 16)
    return httpx.Response(int(status.split()[1]), headers=headers, content=body)


def at_once(count: int, call: "object") -> list[httpx.Response]:
    with ThreadPoolExecutor(count) as clients:
        return list(clients.map(call, range(count)))  # type: ignore[call-overload]


# --- rates


def test_a_key_is_kept_to_its_rate(keyed: Keyed) -> None:
    """One tenant's loop that went wild may not take the service from the others; and it is told when to come
    again, before its body is read."""
    key = keyed.create("hasty", "--scope", "read,write", "--rate", "3/minute")
    for _ in range(3):
        assert keyed.ask("hasty", "GET", "/audio").status_code == 200
    answers = [keyed.ask("hasty", "GET", "/audio")]
    answers += [only_head(keyed.service, 1_000_000, f"X-API-Key: {key}\r\n")]
    for answer in answers:
        check_problem(answer, 429, "rate_limited")
        assert 15 <= int(answer.headers["retry-after"]) <= 20
        assert answer.headers["ratelimit-policy"] == '"key";q=3;w=60'
    assert keyed.ask("operator", "GET", "/audio").status_code == 200
    keyed.keys("limit", "hasty", "--rate", "1000/second")
    for _ in range(10):
        assert keyed.ask("hasty", "GET", "/audio").status_code == 200, "what a running service does at once"


# --- quotas


def test_a_quota_of_recordings_is_exact(keyed: Keyed) -> None:
    """However many clients race for the last place: the number is what was sold. What is refused leaves
    nothing, the same again costs nothing, and what is deleted makes room."""
    kept = keyed.service.stored()
    answers = at_once(12, lambda number: keyed.upload("few", recording(100 + number)))
    accepted = [answer.json() for answer in answers if answer.status_code == 202]
    assert len(accepted) == 3
    for answer in answers:
        if answer.status_code != 202:
            assert "3 recordings" in check_problem(answer, 403, "quota_exceeded")["detail"]
    assert len(keyed.service.stored() - kept) == 3
    again = [keyed.upload("few", recording(100 + number)).status_code for number in range(12)]
    assert sorted(again) == [200] * 3 + [403] * 9
    assert keyed.upload("operator", recording(150), collection="few").status_code == 202, "another's quota"
    keyed.ask("few", "DELETE", f"/audio/{accepted[0]['id']}").raise_for_status()
    assert keyed.upload("few", recording(120)).status_code == 202
    check_problem(keyed.upload("few", recording(121)), 403, "quota_exceeded")
    keyed.keys("limit", "few", "--max-recordings", "none")
    assert keyed.upload("few", recording(121)).status_code == 202


def test_a_quota_of_bytes_is_not_gone_beyond(keyed: Keyed) -> None:
    """A disk is shared by all; and who has no room is told so before a gigabyte was sent in vain."""
    kept = keyed.service.stored()
    answers = at_once(6, lambda number: keyed.upload("small", recording(200 + number)))
    assert sorted(answer.status_code for answer in answers) == [202] * 2 + [403] * 4
    key = f"X-API-Key: {keyed.texts['small']}\r\n"
    check_problem(only_head(keyed.service, 100 * SIZE, key), 403, "quota_exceeded")
    for pieces in (1, 9):  # of no declared length
        content = (bytes([number]) * (1 << 20) for number in range(pieces))
        headers = {"Content-Type": "audio/wav"}
        answer = keyed.ask("small", "POST", "/audio", content=content, headers=headers)
        check_problem(answer, 403, "quota_exceeded")
    again = [keyed.upload("small", recording(200 + number)).status_code for number in range(6)]
    assert sorted(again) == [200] * 2 + [403] * 4
    assert len(keyed.service.stored() - kept) == 2
    (listed,) = [one for one in keyed.keys("list")["keys"] if one["name"] == "small"]
    assert listed["limits"] == {
        "rate": None,
        "max_recordings": None,
        "max_bytes": 3 * SIZE - 1,
        "max_hours": None,
    }
    assert (listed["held"]["recordings"], listed["held"]["bytes"]) == (2, 2 * SIZE)


def test_hours_are_counted_once_they_are_known(keyed: Keyed) -> None:
    """What costs time is sound, not bytes. Its length is known when it has been decoded, so the last one may
    go beyond; the next is refused until something is deleted."""
    first = keyed.ready("brief", recording(300))
    keyed.ready("brief", recording(301))
    answer = keyed.upload("brief", recording(302))
    assert "hours" in check_problem(answer, 403, "quota_exceeded")["detail"]
    keyed.ask("brief", "DELETE", f"/audio/{first}").raise_for_status()
    keyed.ready("brief", recording(302))


# --- a queue that is full


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[RunningService]:
    """A service that embeds nothing, and where three recordings may wait."""
    with RunningService(tmp_path, program=STAND_IN, workers=0, max_pending=3) as running:
        yield running.start()


def test_a_full_queue_takes_no_more(stuck: RunningService) -> None:
    """To accept what cannot be done for days helps nobody; exactly so many wait, what is refused leaves
    nothing, and what is there already is still found out."""
    answers = at_once(10, lambda number: stuck.upload(recording(number), id=f"r{number}"))
    assert sorted(answer.status_code for answer in answers) == [202] * 3 + [503] * 7
    for answer in answers:
        if answer.status_code == 503:
            check_problem(answer, 503, "queue_full")
            assert int(answer.headers["retry-after"]) >= 10
    assert len(stuck.stored()) == len(stuck.listed()) == 3
    check_problem(only_head(stuck, 9 * SIZE), 503, "queue_full")
    accepted = [number for number, answer in enumerate(answers) if answer.status_code == 202]
    again = stuck.upload(recording(accepted[0]))
    assert (again.status_code, again.json()["duplicate"]) == (200, True)
    raw = {"content": recording(accepted[1]), "headers": {"Content-Type": "audio/wav"}}
    assert stuck.client.post("/audio", **raw).status_code == 200
    stuck.client.delete(f"/audio/r{accepted[0]}").raise_for_status()
    assert stuck.upload(recording(50)).status_code == 202


def test_who_has_gone_is_not_waited_for(stuck: RunningService) -> None:
    """`Prefer: wait` of a client that hung up would hold a place for a minute, for nobody."""
    body = recording(60)
    head = "POST /audio HTTP/1.1\r\nHost: x\r\nPrefer: wait=60\r\nX-Request-ID: left-1\r\n"
    head += f"Content-Type: audio/wav\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", stuck.port), 5) as connection:
        connection.sendall(head.encode() + body)
        eventually(lambda: stuck.listed(), within_s=5)
    eventually(lambda: logged(stuck, "left-1"), within_s=5)


def logged(service: RunningService, request_id: str) -> dict[str, object] | None:
    """The line of a request's end, once it is there."""
    for line in service.log().splitlines():
        entry: dict[str, object] = json.loads(line)
        if entry.get("request_id") == request_id and entry["message"] == "request":
            return entry
    return None


def test_a_disk_that_is_nearly_full_takes_no_more(stuck: RunningService) -> None:
    """What is left belongs to the catalogue: searching goes on, and deleting, which is the way out."""
    for number in range(2):
        stuck.upload(recording(number), id=f"r{number}").raise_for_status()
    assert stuck.stop() == 0
    stuck.settings["min_free_bytes"] = 1 << 60
    stuck.start()
    kept = stuck.stored()
    for answer in (stuck.upload(recording(9)), only_head(stuck, SIZE)):
        check_problem(answer, 507, "disk_full")
    assert stuck.stored() == kept
    assert stuck.found("anything") == stuck.found_by_sound(recording(9)) == []
    assert stuck.client.delete("/audio/r0").status_code == 204
    assert len(stuck.stored()) == 1


# --- deadlines, and clients that are slow or gone


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service whose model takes 0.3 s for each question and segment, and which waits 2 s for anything."""
    bounds = {"request_timeout_s": 2, "upload_idle_s": 1, "max_connections": 250, "workers": 0}
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("STAND_IN_PAUSE_S", "0.3")
        with RunningService(tmp_path_factory.mktemp("slow"), program=STAND_IN, **bounds) as running:
            yield running.start()
            assert "unexpected error" not in running.log()
            assert "Traceback" not in running.log()


def encoded(service: RunningService) -> float:
    return service.metric("clasp_search_batch_size_sum")


def test_a_question_that_waited_too_long_is_dropped(slow: RunningService) -> None:
    """Who asks has given up by then: to answer all the same would keep the next ones waiting, too."""
    before = encoded(slow)
    with ExitStack() as stack:
        asked = []
        for number, count in enumerate((1, 12, 20)):  # alone; 3.6 s together; after those
            for _ in range(count):
                asked.append(stack.enter_context(socket.create_connection(("127.0.0.1", slow.port), 5)))
                asked[-1].sendall(b"GET /search?q=a HTTP/1.1\r\nHost: x\r\n\r\n")
            time.sleep(0.1 if number == 0 else 0.5)
        first, *late = map(answer_on, asked)
    assert first.status_code == 200
    for answer in late:
        check_problem(answer, 503, "deadline_exceeded")
        assert answer.headers["retry-after"]
    eventually(lambda: slow.client.get("/search", params={"q": "a"}).is_success, within_s=20)
    assert encoded(slow) - before <= 15, "those were encoded that nobody waited for"


def test_a_question_whose_asker_has_gone_is_dropped(slow: RunningService) -> None:
    """Who types searches with every letter, and hangs up on the one before."""
    before = encoded(slow)
    with ExitStack() as stack:
        for _ in range(20):
            asked = stack.enter_context(socket.create_connection(("127.0.0.1", slow.port), 5))
            asked.sendall(b"GET /search?q=a HTTP/1.1\r\nHost: x\r\n\r\n")
    slow.found("a")
    assert encoded(slow) - before <= 5


def test_a_recording_whose_asker_has_gone_is_dropped(slow: RunningService) -> None:
    """A minute of sound costs seconds of everybody's model; whoever hangs up gives them back."""
    body = encode(speech(5.0), 16_000)
    head = "POST /search/audio HTTP/1.1\r\nHost: x\r\nX-Request-ID: left-2\r\nContent-Type: audio/wav\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with ExitStack() as stack:
        for _ in range(20):
            address = ("127.0.0.1", slow.port)
            connection = stack.enter_context(socket.create_connection(address, 5))
            connection.sendall(head.encode() + body)
        time.sleep(0.2)
    line = eventually(lambda: logged(slow, "left-2"), within_s=2)
    assert line["status"] == 499
    began = time.monotonic()
    assert slow.found_by_sound(recording(1)) == []
    assert time.monotonic() - began < 2, "twenty that nobody waits for were embedded before"
    assert slow.stored() == set()


def test_recordings_that_wait_keep_nobody_else_waiting(slow: RunningService) -> None:
    """They are embedded one by one. Others need threads, too; who would wait in vain is told so at once."""
    body = recording(2)
    head = f"POST /search/audio HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: audio/wav\r\n\r\n"
    with ExitStack() as stack:
        asked = []
        for _ in range(2 * MAX_RECORDINGS_WAITING):
            asked.append(stack.enter_context(socket.create_connection(("127.0.0.1", slow.port), 5)))
            asked[-1].sendall(head.encode() + body)
        began = time.monotonic()
        slow.client.get("/audio").raise_for_status()
        assert time.monotonic() - began < 1.5
        codes = [answer_on(connection).json().get("code") for connection in asked]
    assert set(codes) == {None, "deadline_exceeded", "not_ready"}


@pytest.mark.parametrize("path", ["/audio", "/search/audio", "/search"])
def test_an_upload_that_stops_is_ended(slow: RunningService, path: str) -> None:
    """Somebody with many sockets and no data must not be able to fill the service; what had come is gone."""
    for pieces in (1, 100):
        kind = "application/json" if path == "/search" else "audio/wav"
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: 100000\r\n\r\n"
        with socket.create_connection(("127.0.0.1", slow.port), 5) as connection:
            connection.sendall(head.encode())
            connection.settimeout(0.1)
            began = time.monotonic()
            for _ in range(pieces):
                connection.sendall(b"RIFF")
                try:
                    if connection.recv(1, socket.MSG_PEEK):
                        break
                except TimeoutError:
                    continue
            connection.settimeout(5)
            answer = answer_on(connection)
            check_problem(answer, 408, "request_timeout")
            assert answer.headers["connection"] == "close"
            assert 0.9 < time.monotonic() - began < 4
    assert slow.stored() == set()


def test_idle_connections_keep_nobody_waiting(slow: RunningService) -> None:
    """Two hundred clients that say nothing, or stop in the middle of their request, are what it costs to take
    a service that waits for each of them; they are let go. More than that are turned away at once."""
    address = ("127.0.0.1", slow.port)
    with ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(address, 5)) for _ in range(200)]
        for connection in idle[::2]:
            connection.sendall(b"GET /search?q=a HTTP/1.1\r\nHos")
        began = time.monotonic()
        slow.found("anything")
        assert time.monotonic() - began < 1
        for connection in idle[:1]:
            connection.settimeout(5)
            assert connection.recv(1) == b"", "ended without an answer to what was no request"
        assert time.monotonic() - began < 3
    with ExitStack() as stack:
        many = [stack.enter_context(socket.create_connection(address, 5)) for _ in range(260)]
        refused = answer_on(many[-1])
        assert (refused.status_code, refused.json()["code"]) == (503, "not_ready")
    eventually(lambda: slow.client.get("/healthz").is_success, within_s=5)


def test_who_does_not_take_the_answer_is_let_go(slow: RunningService) -> None:
    """A reader that stops in the middle of a recording would hold its file and its connection for ever."""
    content = os.urandom(30_000_000)
    place = slow.upload(content, id="large").headers["location"]

    def descriptors() -> int:
        assert slow.process is not None
        return sum(
            "/audio/" in str(path.readlink()) for path in Path(f"/proc/{slow.process.pid}/fd").iterdir()
        )

    try:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", slow.port))
            connection.sendall(f"GET {place}/content HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            eventually(lambda: descriptors() == 1, within_s=2)
            eventually(lambda: descriptors() == 0, within_s=5)
        assert slow.client.get(f"{place}/content").content == content
    finally:
        slow.client.delete(place).raise_for_status()
