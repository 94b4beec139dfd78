"""The service with its vectors in Milvus: the same promises, also while Milvus is away."""

from pathlib import Path

import httpx
import pytest

from tests.audio_files import encode, speech
from tests.milvus import free_port, start_lite
from tests.service import RunningService, eventually


def recording(seed: int) -> bytes:
    return encode(speech(1.0, seed=seed), 16_000)


def test_a_service_without_its_milvus_takes_uploads_and_heals(tmp_path: Path) -> None:
    """Machines restart in any order. A service whose Milvus is not there yet keeps what it is given, says why
    it cannot search, to people and to balancers, and searches as soon as Milvus is there. The password is
    told to nobody."""
    port = free_port()
    store = f"milvus:http://root:sesame-7@127.0.0.1:{port}"
    with RunningService(tmp_path, program="tests.stand_in", vector_store=store) as service:
        service.start(wait=False)

        def answers() -> httpx.Response | None:
            try:
                return service.client.get("/readyz")
            except httpx.TransportError:
                return None

        eventually(answers, within_s=60)
        uploaded = service.upload(recording(1), id="early")
        assert uploaded.status_code == 202
        assert service.settled("early")["status"] == "ready"
        refused = service.client.get("/search", params={"q": "anything"})
        assert (refused.status_code, refused.json()["code"]) == (503, "index_unavailable")
        ready = eventually(lambda: answers() if answers().json()["checks"]["index"] else None, within_s=30)
        assert ready.status_code == 503
        assert "Milvus" in ready.json()["detail"]
        assert service.client.delete("/audio/early").status_code == 204
        service.upload(recording(2), id="late")
        assert service.settled("late")["status"] == "ready"

        _, server = start_lite(tmp_path / "milvus", port)
        service.wait_until_ready()
        assert [hit["id"] for hit in service.found("anything")] == ["late"]
        told = service.log() + service.client.get("/metrics").text + ready.text + refused.text
        assert "sesame-7" not in told
        assert "anything" not in service.log()
        assert service.stop() == 0
        server.kill()


@pytest.mark.slow
def test_a_milvus_lite_file_is_enough_for_one_service(tmp_path: Path) -> None:
    """The way there is a file beside the data: what is ready is found, what is deleted is not, also after a
    restart, and whether asked for everything, a collection, or some recordings."""
    store = f"milvus:{tmp_path / 'vectors.db'}"
    with RunningService(tmp_path, program="tests.stand_in", vector_store=store) as service:
        service.start()
        for number in range(4):
            service.ready(recording(number), id=f"r{number}", collection="ab"[number % 2], lang="fa")
        for _ in range(2):
            assert service.found_by_sound(recording(3), limit=1)[0]["id"] == "r3"
            assert {hit["id"] for hit in service.found("x", collection="b")} == {"r1", "r3"}
            asked = {"q": "x", "filter": {"id": {"in": ["r1", "r2"]}}}
            hits = service.client.post("/search", json=asked).raise_for_status().json()["hits"]
            assert {hit["id"] for hit in hits} == {"r1", "r2"}
            service.client.delete("/audio/r3").raise_for_status()
            assert {hit["id"] for hit in service.found("x", collection="b")} == {"r1"}
            assert service.stop() == 0
            service.start()
            service.ready(recording(3), id="r3", collection="b")
        assert not (service.settings["data_dir"] / "index").exists()
        assert service.stop() == 0
