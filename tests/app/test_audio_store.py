"""A service whose recordings are in a store of S3's protocol, by a network that can be cut."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.app.test_errors import check_problem
from tests.kill_test import new_recording
from tests.object_store import SECRET, Way, object_store
from tests.service import RunningService, clasp, eventually, sql


@pytest.fixture(scope="module")
def way() -> Iterator[Way]:
    way = Way(object_store().port)
    way.open()
    yield way
    way.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, way: Way) -> Iterator[RunningService]:
    """Its log is as talkative as it can be."""
    folder = tmp_path_factory.mktemp("elsewhere")
    settings = object_store().settings(folder / "index_data")
    settings["s3_endpoint"] = f"http://127.0.0.1:{way.port}"
    with RunningService(folder, program="tests.stand_in", log_level="debug", **settings) as service:
        yield service.start()
        assert service.stop() == 0


def test_bytes_come_back_by_ranges_and_conditions(service: RunningService) -> None:
    """Players ask as they always did, and are told what a folder would tell them."""
    sent = new_recording(1)
    record = service.ready(sent.content, id="bytes")
    assert service.stored() == {f"{record['sha256'][:2]}/{record['sha256'][2:]}"}
    path, content, size = "/audio/bytes/content", sent.content, len(sent.content)
    whole = service.client.get(path)
    assert (whole.status_code, whole.content, whole.headers["accept-ranges"]) == (200, content, "bytes")
    assert whole.headers["etag"] == f'"{record["sha256"]}"'
    head = service.client.head(path)
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(size))
    for asked, first, last in (
        ("100-199", 100, 199),
        (f"{size - 5}-", size - 5, size - 1),
        ("-7", size - 7, size - 1),
    ):
        part = service.client.get(path, headers={"Range": f"bytes={asked}"})
        assert (part.status_code, part.content) == (206, content[first : last + 1])
        assert part.headers["content-range"] == f"bytes {first}-{last}/{size}"
    several = service.client.get(path, headers={"Range": "bytes=0-9,50-59"})
    assert several.status_code == 206
    assert content[:10] in several.content
    assert content[50:60] in several.content
    check_problem(service.client.get(path, headers={"Range": f"bytes={size}-"}), 416, "range_not_satisfiable")
    known = service.client.get(path, headers={"If-None-Match": whole.headers["etag"]})
    assert (known.status_code, known.content) == (304, b"")
    resumed = {"Range": "bytes=0-9", "If-Range": whole.headers["last-modified"]}
    assert service.client.get(path, headers=resumed).status_code == 206


def test_without_the_store_the_rest_goes_on_and_all_heals(service: RunningService, way: Way) -> None:
    """Another's outage: questions are answered, what cannot be done says so and may be sent again, and no
    recording pays for it with its attempts or its life."""
    kept = service.ready(new_recording(2).content, id="kept")
    service.ready(new_recording(3).content, id="gone")
    (worker,) = service.worker_pids()
    os.kill(worker, signal.SIGSTOP)
    assert service.upload(new_recording(4).content, id="waiting").status_code == 202
    way.close()
    os.kill(worker, signal.SIGCONT)
    refused = service.upload(new_recording(5).content, id="refused")
    check_problem(refused, 503, "store_unavailable")
    assert refused.headers["retry-after"]
    check_problem(service.client.get("/audio/kept/content"), 503, "store_unavailable")
    assert {hit["id"] for hit in service.found("anything")} >= {"kept", "gone"}
    assert service.found_by_sound(new_recording(2).content)[0]["id"] == "kept"
    eventually(lambda: service.client.get("/readyz").json()["degraded"] == ["audio_store"], within_s=10)
    assert (
        "cannot be reached"
        in service.client.get("/readyz").raise_for_status().json()["checks"]["audio_store"]
    )
    assert service.client.delete("/audio/gone").status_code == 204
    assert service.client.get("/audio/gone/content").status_code == 404
    eventually(lambda: "recordings wait for the audio store" in service.log(), within_s=30)
    assert service.client.get("/audio/refused").status_code == 404
    way.open()
    assert service.settled("waiting")["status"] == "ready"
    query = "SELECT attempts FROM recordings WHERE id = 'waiting'"
    ((attempts,),) = sql(service.data_dir / "index_data", query)
    assert attempts == 1
    assert service.worker_pids() == [worker]
    assert service.upload(new_recording(5).content, id="refused").status_code == 202
    eventually(lambda: not service.client.get("/readyz").json()["degraded"], within_s=10)
    assert service.client.get("/audio/kept/content").content == new_recording(2).content
    assert kept["sha256"][:2] + "/" + kept["sha256"][2:] in service.stored()


def test_nothing_secret_is_logged(service: RunningService) -> None:
    """Logs go where fewer people are careful."""
    log = service.log()
    for shown in (SECRET, "Signature", "X-Amz", "AWS4"):
        assert shown not in log
    assert "unexpected error" not in log


def test_the_command_line_uses_the_same_store(service: RunningService, tmp_path: Path) -> None:
    """What is indexed beside the service is where the service finds it."""
    sent = new_recording(6)
    (tmp_path / "file.wav").write_bytes(sent.content)
    settings = {name: service.settings[name] for name in ("audio_store", "s3_endpoint", "data_dir")}
    done = clasp("index", tmp_path / "file.wav", cwd=tmp_path, program="tests.stand_in", **settings)
    assert done.returncode == 0, done.stderr
    (record,) = [one for one in service.listed() if one["sha256"] == sent.sha256]
    assert service.client.get(f"/audio/{record['id']}/content").content == sent.content
