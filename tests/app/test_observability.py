"""What an operator sees of a service, and does not: metrics, logs, traces, readiness, and how it ends.

One service with the stand-in model serves most tests. It sends its traces to a collector in this process,
logs all that it ever logs, and takes the disk for too small.
"""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from app import readiness
from app.readiness import Watch
from tests.audio_files import encode, speech
from tests.postgres import IN_A_FILE
from tests.service import ROOT, RunningService, eventually, sql

STAND_IN = "tests.stand_in"


def recording(seed: int, seconds: float = 1.0) -> bytes:
    return encode(speech(seconds, seed=seed), 16_000)


@dataclass
class Collector:
    """An OTLP receiver: what was posted to /v1/traces, as the package's own classes read it."""

    endpoint: str
    bodies: list[bytes] = field(default_factory=list)

    def spans(self) -> list[Any]:
        """Each with `process`, the resource's `clasp.process`."""
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        found = []
        for body in list(self.bodies):
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                facts = attributes(resource.resource)
                assert facts["service.name"] == "clasp-search"
                for scope in resource.scope_spans:
                    found += [(facts["clasp.process"], span) for span in scope.spans]
        return found


def attributes(of: Any) -> dict[str, Any]:
    return {
        item.key: getattr(item.value, item.value.WhichOneof("value"))
        for item in of.attributes
        if item.value.WhichOneof("value")
    }


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/v1/traces":
                collected.bodies.append(body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collected = Collector(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield collected
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[RunningService]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")  # ms
        folder = tmp_path_factory.mktemp("watched")
        settings = {"log_level": "debug", "max_upload_bytes": 1 << 60}
        with RunningService(folder, program=STAND_IN, **settings) as service:
            yield service.start()
            assert service.stop() == 0


def logged(service: RunningService, message: str, **members: object) -> list[dict[str, Any]]:
    """The lines with that message and these members. All of the log must be JSON."""
    entries = [json.loads(line) for line in service.log().splitlines()]
    return [
        entry
        for entry in entries
        if entry["message"] == message and all(entry.get(name) == value for name, value in members.items())
    ]


def request_line(service: RunningService, request_id: str) -> dict[str, Any]:
    """The one line of that request. It is written once the answer is sent, so it may come later."""
    (line,) = eventually(lambda: logged(service, "request", request_id=request_id), within_s=5)
    return line


# --- metrics


def shown(service: RunningService) -> dict[str, str]:
    """Metrics by name, with their kinds; without those that say when another began."""
    text = service.client.get("/metrics").raise_for_status().text
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    return {name: kind for name, kind in kinds.items() if not name.endswith("_created")}


def test_every_metric_is_documented(watched: RunningService) -> None:
    """An operator reads the table, and builds alarms on what it promises."""
    text = (ROOT / "docs" / "operations.md").read_text()
    documented = dict(re.findall(r"^\| `((?:clasp|process)_\w+)` \| (\w+) ", text, re.MULTILINE))
    assert documented == shown(watched)


def test_the_dashboard_and_the_alerts_know_what_is_there(watched: RunningService) -> None:
    """A panel of a metric that was renamed stays empty, and an alert silent, until the day it is needed."""
    there = set()
    for name, kind in shown(watched).items():
        there |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    board = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    rules = [
        rule
        for group in yaml.safe_load((ROOT / "deploy" / "alerts.yml").read_text())["groups"]
        for rule in group["rules"]
    ]
    drawn = [target["expr"] for panel in panels for target in panel["targets"]]
    used = set(re.findall(r"\b(?:clasp|process)_\w+", " ".join(drawn + [rule["expr"] for rule in rules])))
    assert used - there == set()
    histograms = {name for name, kind in shown(watched).items() if kind == "histogram"}
    seen = {name for name in shown(watched) if any(part.startswith(name) for part in used)}
    assert histograms <= seen


def test_metrics_say_where_the_time_goes(watched: RunningService) -> None:
    """Is it decoding, the model, the disk or the queue? And which errors, not only how many."""
    samples = {
        **{f"clasp_ingest_stage_seconds_total {stage}": {"stage": stage} for stage in STAGES},
        "clasp_ingest_batch_size_sum": {},
        "clasp_ingest_seconds_count": {},
        "clasp_index_refresh_seconds_count": {},
        "clasp_search_wait_seconds_count": {},
        "clasp_errors_total": {"code": "recording_not_found"},
        "clasp_failed_recordings": {"code": "silent_audio"},
    }

    def read() -> dict[str, float]:
        return {name: watched.metric(name.split()[0], **labels) for name, labels in samples.items()}

    before = read()
    watched.ready(recording(1, 40.0), id="long")
    silent = watched.upload(encode(speech(1.0) * 0, 16_000)).raise_for_status().json()["id"]
    assert watched.settled(silent)["error"]["code"] == "silent_audio"
    watched.found("anything")
    watched.client.get("/audio/nobody-has-this")
    eventually(lambda: all(now > before[name] for name, now in read().items()), within_s=10)
    after = read()
    assert after["clasp_errors_total"] - before["clasp_errors_total"] == 1
    assert after["clasp_failed_recordings"] == 1
    segments = after["clasp_ingest_batch_size_sum"] - before["clasp_ingest_batch_size_sum"]
    assert segments == watched.client.get("/audio/long").json()["segments"] > 1
    watched.client.delete(f"/audio/{silent}").raise_for_status()
    assert watched.metric("clasp_failed_recordings") == 0
    for name in ("process_resident_memory_bytes", "clasp_worker_resident_memory_bytes"):
        assert 10e6 < watched.metric(name) < 10e9
    assert 0 < watched.metric("clasp_disk_free_bytes") < watched.metric("clasp_disk_total_bytes")


STAGES = ("decode", "segment", "embed", "commit", "index")


# --- logs and traces


def test_a_recording_can_be_followed_by_its_id(watched: RunningService) -> None:
    """ "My upload of this morning is not found": from the client's request id to the worker that had it."""
    uploaded = watched.client.post(
        "/audio?id=followed",
        content=recording(2),
        headers={"Content-Type": "audio/wav", "X-Request-ID": "up-1"},
    )
    assert uploaded.status_code == 202
    watched.settled("followed")
    request = request_line(watched, "up-1")
    assert request["recording"] == "followed"
    (made,) = eventually(lambda: logged(watched, "recording ready", recording="followed"), within_s=5)
    assert made["owner"] in [entry["owner"] for entry in logged(watched, "worker ready")]
    watched.client.delete("/audio/followed", headers={"X-Request-ID": "away-1"}).raise_for_status()
    request = request_line(watched, "away-1")
    assert request["recording"] == "followed"
    watched.client.get("/audio/followed", headers={"X-Request-ID": "gone-1"})
    request = request_line(watched, "gone-1")
    assert request["code"] == "recording_not_found"


MARK = "zebrafinch"
"""Stands in all that clients send here, and may stand in no log and no trace."""


@IN_A_FILE  # it breaks the catalogue by what SQLite has
def test_nothing_of_what_clients_send_is_logged_or_traced(
    watched: RunningService, collector: Collector
) -> None:
    """Logs go to other people and other machines than the recordings. Also where something fails, when
    libraries like to put what they were given into the message."""
    headers = {"Authorization": f"Bearer {MARK}", "Cookie": MARK, "User-Agent": MARK, "Referer": f"/{MARK}"}
    metadata = json.dumps({MARK: MARK})
    question = {"q": MARK, "filter": {"metadata": {MARK: MARK}}}

    def everything(content: bytes) -> list[int]:
        file = {"file": (f"{MARK}.wav", content, f"audio/{MARK}")}
        calls = [
            ("POST", "/audio", {"files": file, "data": {"metadata": metadata}}),
            ("POST", "/audio", {"files": file, "data": {"metadata": f'{{"{MARK}"'}}),
            ("POST", "/audio", {"files": {"file": (MARK, MARK.encode())}, "data": {"lang": MARK}}),
            ("POST", "/audio", {"params": {"metadata": metadata}, "content": MARK}),
            ("GET", "/search", {"params": {"q": f"{MARK} and more"}}),
            ("GET", "/search", {"params": {"q": MARK, "lang": f"{MARK}-", "limit": MARK}}),
            ("POST", "/search", {"json": question}),
            ("POST", "/search", {"json": {"q": {MARK: MARK}}}),
            ("POST", "/search", {"content": f'{{"q": "{MARK}'}),
            ("POST", "/search/audio", {"files": file}),
            ("POST", "/search/audio", {"files": {"file": (MARK, MARK.encode())}}),
            ("GET", "/audio", {"params": {"collection": MARK, "cursor": MARK}}),
            ("GET", f"/{MARK}", {"params": {MARK: MARK}}),
        ]
        return [
            watched.client.request(method, path, headers=headers, **parts).status_code
            for method, path, parts in calls
        ]

    assert set(everything(recording(3))) >= {200, 202, 404, 415, 422}
    insert = (
        "CREATE TRIGGER broken BEFORE INSERT ON recordings BEGIN SELECT RAISE(ABORT, 'broken'); END",
        "DROP TRIGGER broken",
    )
    with changed(watched, *insert), changed(watched, *LOSE_CHANGES):
        assert everything(recording(5)).count(500) >= 3
    told = "".join(entry["exception"] for entry in logged(watched, "unexpected error"))
    assert "INSERT INTO recordings" in told
    assert "no such table" in told
    eventually(lambda: watched.metric("clasp_recordings", status="pending") == 0, within_s=30)
    watched.client.get("/search", params={"q": "the last one"}, headers={"X-Request-ID": "last-1"})
    if traces_are_sent():
        eventually(lambda: any(b"last-1" in body for body in collector.bodies), within_s=10)
        assert all(MARK.encode() not in body for body in collector.bodies)
    assert MARK not in watched.log()
    assert "the last one" not in watched.log()


LOSE_CHANGES = ("ALTER TABLE changes RENAME TO lost", "ALTER TABLE lost RENAME TO changes")
"""Uploads go on; searches, and a look at the index, fail."""


@contextmanager
def changed(service: RunningService, break_it: str, mend_it: str) -> Iterator[None]:
    """The catalogue as one statement leaves it, until another mends it."""
    sql(service.data_dir / "index_data", break_it)
    try:
        yield
    finally:
        sql(service.data_dir / "index_data", mend_it)


def traces_are_sent() -> bool:
    try:
        import opentelemetry.exporter.otlp.proto.http
        import opentelemetry.sdk  # noqa: F401
    except ImportError:
        return False
    return True


def test_questions_are_logged_where_that_is_asked_for(tmp_path: Path) -> None:
    """To improve a search, one must see what people look for; an operator decides that, not we."""
    with RunningService(tmp_path, program=STAND_IN, workers=0, log_questions=True) as service:
        service.start()
        service.client.get(
            "/search", params={"q": "Wo ist der Zug?", "lang": "de"}, headers={"X-Request-ID": "a"}
        )
        (line,) = eventually(lambda: logged(service, "question"), within_s=5)
        assert (line["q"], line["lang"], line["request_id"]) == ("Wo ist der Zug?", "de", "a")


def test_traces_reach_the_collector(watched: RunningService, collector: Collector) -> None:
    """One slow answer among thousands: its trace says which stage it was, and belongs to the caller's."""
    if not traces_are_sent():
        pytest.skip("needs pip install 'clasp-search[tracing]'")
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01", "X-Request-ID": "traced-1"}
    watched.client.get("/search", params={"q": "hello"}, headers=headers).raise_for_status()
    watched.client.get("/readyz")
    watched.client.post("/audio", files={"file": recording(6)}, data={"id": "traced"}).raise_for_status()
    watched.settled("traced")

    def spans() -> dict[str, Any]:
        """By process and name, those of this test."""
        found = collector.spans()
        requests = [span for _, span in found if attributes(span).get("clasp.recording") == "traced"]
        ours = {bytes.fromhex(trace), *(span.trace_id for span in requests)}
        return {f"{process} {span.name}": span for process, span in found if span.trace_id in ours}

    wanted = {"api GET /search", "api queue", "api encode", "api search"}
    wanted |= {"api POST /audio", "api receive", "api register"}
    wanted |= {"worker ingest", "worker decode", "worker embed", "worker commit"}
    eventually(lambda: wanted <= set(spans()), within_s=10)
    found = spans()
    request = found["api GET /search"]
    assert request.trace_id.hex() == trace
    assert request.parent_span_id.hex() == "b7ad6b7169203331"
    assert attributes(request) == {
        "http.request.method": "GET",
        "http.route": "/search",
        "http.response.status_code": 200,
        "clasp.request_id": "traced-1",
    }
    for stage in ("queue", "encode", "search"):
        span = found[f"api {stage}"]
        assert span.parent_span_id == request.span_id
        assert request.start_time_unix_nano - 1e6 <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= request.end_time_unix_nano + 1e6
    ingest = found["worker ingest"]
    assert all(
        found[f"worker {stage}"].parent_span_id == ingest.span_id for stage in ("decode", "embed", "commit")
    )
    assert not any("readyz" in span.name for _, span in collector.spans())
    line = request_line(watched, "traced-1")
    assert line["trace_id"] == trace


def test_without_a_collector_nothing_is_loaded(tmp_path: Path) -> None:
    """Who traces nothing pays nothing; and what FastAPI traces by itself, questions among it, stays off."""
    code = (
        "import sys; from app import main, tracing; tracing.start_tracing('api');"
        "assert 'opentelemetry.sdk' not in sys.modules; assert tracing._tracer is None"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    environment |= {"PYTHONPATH": str(ROOT), "FASTAPI_OTEL_AUTO_CONFIGURE": "true"}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True)


# --- readiness


def test_readiness_names_every_check(watched: RunningService) -> None:
    """A full disk loses uploads, but questions are answered: a load balancer must go on sending them."""
    ready = eventually(
        lambda: answer if (answer := watched.client.get("/readyz")).json()["degraded"] else None, within_s=5
    )
    assert ready.status_code == 200
    body = ready.json()
    assert body["status"] == "ready"
    assert body["degraded"] == ["disk"]
    assert "no room" in body["checks"].pop("disk")
    assert set(body["checks"]) == {"process", "model", "workers", "index", "data_dir"}
    assert set(body["checks"].values()) == {"ok"}
    assert body["age_s"] < 5
    assert watched.metric("clasp_ready") == 1
    assert watched.metric("clasp_check_ok", check="disk") == 0


def test_a_service_that_cannot_answer_is_not_ready(watched: RunningService) -> None:
    """Alive, warm, and of no use: the catalogue behind it is broken."""
    with changed(watched, *LOSE_CHANGES):
        refusal = eventually(
            lambda: answer if (answer := watched.client.get("/readyz")).status_code == 503 else None,
            within_s=5,
        )
        assert refusal.json()["code"] == "not_ready"
        assert refusal.json()["checks"]["index"].startswith("It failed")
        assert refusal.headers["retry-after"] == "2"
        assert watched.metric("clasp_ready") == 0
    watched.wait_until_ready()


def test_readiness_waits_for_no_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked every second by several, with a timeout; an index that is being rebuilt, or a disk that
    does not answer, must show as a reason and not as silence."""
    monkeypatch.setattr(readiness, "HANGS_AFTER_S", 0.3)
    free = threading.Event()
    watch = Watch(
        {"index": lambda: None, "disk": lambda: free.wait(10) and None}, stopping=frozenset({"index"})
    )
    watch.start()
    try:
        assert watch.readiness({"process": None}).why_not is None
        began = time.monotonic()
        reason = eventually(lambda: watch.readiness({}).why_not, within_s=5)
        assert "not come to an end" in reason
        assert time.monotonic() - began < 2
        free.set()
        eventually(lambda: watch.readiness({}).why_not is None, within_s=5)
    finally:
        free.set()
        watch.stop()


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """A disk that was remounted read-only, or taken away."""
    assert readiness.why_not_writable(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    reason = readiness.why_not_writable(tmp_path / "taken-away")
    assert "cannot be written" in reason
    assert "taken-away" not in reason


# --- the end


def test_a_service_drains_before_it_ends(tmp_path: Path) -> None:
    """A deployment must lose nothing: load balancers are told first and may send a little longer; who waits
    for a recording is told how far it is; then nobody new is let in, and an upload on its way arrives."""
    with RunningService(tmp_path, program=STAND_IN, workers=0, drain_s=3) as service:
        service.start()
        slow = SlowUpload(service, "slow", recording(1))
        with ThreadPoolExecutor(1) as client:
            waiting = client.submit(service.upload, recording(2), id="waiting", headers={"Prefer": "wait=60"})
            eventually(lambda: [item["id"] for item in service.listed()] == ["waiting"], within_s=10)
            assert service.process is not None
            began = time.monotonic()
            service.process.terminate()
            eventually(lambda: service.client.get("/readyz").status_code == 503, within_s=2)
            assert (
                service.client.get("/readyz").json()["checks"]["process"] == "The service is shutting down."
            )
            assert service.client.get("/search", params={"q": "still there?"}).status_code == 200
            assert waiting.result(5).status_code == 202
        eventually(lambda: refuses(service), within_s=10)
        assert time.monotonic() - began >= 2.9
        assert service.process.poll() is None
        assert slow.finish().startswith(b"HTTP/1.1 202 ")
        assert service.process.wait(20) == 0
        assert '"level": "error"' not in service.log()
        service.settings["workers"] = 1
        service.start()
        assert {service.settled(name)["status"] for name in ("slow", "waiting")} == {"ready"}
        assert service.stop() == 0


class SlowUpload:
    """An upload of which one half has been sent."""

    def __init__(self, service: RunningService, name: str, content: bytes) -> None:
        self._rest = content[len(content) // 2 :]
        self._connection = socket.create_connection(("127.0.0.1", service.port), 20)
        head = f"POST /audio?id={name} HTTP/1.1\r\nHost: x\r\nContent-Type: audio/wav\r\n"
        head += f"Content-Length: {len(content)}\r\n\r\n"
        self._connection.sendall(head.encode() + content[: len(content) // 2])
        incoming = service.data_dir / "index_data" / "audio" / "incoming"
        eventually(lambda: list(incoming.iterdir()), within_s=5)

    def finish(self) -> bytes:
        """The answer."""
        answer = b""
        with self._connection as connection:
            connection.sendall(self._rest)
            while data := connection.recv(1 << 16):
                answer += data
        return answer


def refuses(service: RunningService) -> bool:
    """Whether new connections are refused."""
    try:
        httpx.get(f"http://127.0.0.1:{service.port}/healthz", timeout=5)
    except httpx.TransportError:  # or let in by the system, and dropped
        return True
    return False


def test_a_collector_that_is_gone_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tracing is a convenience; without it the service answers, and ends in time, all the same."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        with RunningService(tmp_path, program=STAND_IN) as service:
            service.start()
            service.ready(recording(7))
            service.found("anything")
            began = time.monotonic()
            assert service.stop() == 0
            assert time.monotonic() - began < 15
