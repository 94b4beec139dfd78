"""Many clients at once, with real speech: nothing is refused, nothing is lost, and questions are answered."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import numpy as np
import pytest

from tests.conftest import lines
from tests.service import RunningService, eventually

UPLOADERS, ASKERS = 8, 2


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[RunningService]:
    """A service of this test's own, with its ordinary settings."""
    with RunningService(tmp_path) as running:
        yield running.start()


def clips_of(speech_dev: Path, count: int) -> list[dict[str, Any]]:
    """That many clips of the evaluation split, spread over all its sources and languages."""
    clips = [line for line in lines(speech_dev / "manifest.jsonl") if line["split"] == "eval"]
    assert len(clips) >= count
    return [clips[place] for place in np.linspace(0, len(clips) - 1, count, dtype=int)]


def load(service: RunningService, speech_dev: Path, count: int) -> None:
    clips = clips_of(speech_dev, count)
    done = Event()

    def upload(clip: dict[str, Any]) -> str:
        content = (speech_dev / clip["audio"]).read_bytes()
        answer = service.upload(content, lang=clip["lang"], metadata='{"said": true}')
        assert answer.status_code in (200, 202), answer.text
        return answer.json()["id"]

    def ask(number: int) -> list[float]:
        """Ask one transcript after the other; the seconds each answer took."""
        seconds = []
        with httpx.Client(base_url=service.client.base_url, timeout=60) as client:
            while not done.is_set():
                clip = clips[(7 * len(seconds) + number) % len(clips)]
                began = time.perf_counter()
                answer = client.get("/search", params={"q": clip["text"][:2000], "lang": clip["lang"]})
                seconds.append(time.perf_counter() - began)
                assert answer.status_code == 200, answer.text
        return seconds

    with ThreadPoolExecutor(UPLOADERS + ASKERS) as clients:
        asking = [clients.submit(ask, number) for number in range(ASKERS)]
        try:
            ids = list(clients.map(upload, clips))
            for recording_id in ids:
                assert service.settled(recording_id, within_s=600)["status"] == "ready"
        finally:
            done.set()
        seconds = sorted(second for asker in asking for second in asker.result())
    assert len(seconds) > 20
    assert seconds[int(0.95 * len(seconds))] < 2, f"p95 of {len(seconds)} searches"

    assert {item["id"] for item in service.listed()} == set(ids)
    found = {hit["id"] for hit in service.found("anything", limit=1000)}
    assert found == set(ids)
    for clip, recording_id in list(zip(clips, ids, strict=True))[:: max(1, count // 10)]:
        hits = service.found_by_sound((speech_dev / clip["audio"]).read_bytes(), limit=3)
        best = {hit["id"]: hit["score"] for hit in hits if hit["score"] > 0.99}
        assert recording_id in best, clip["id"]
    assert service.metric("clasp_worker_restarts_total") == 0
    assert service.stop() == 0
    assert "unexpected error" not in service.log()
    assert '"status": 5' not in service.log().partition("worker ready")[2]


@pytest.mark.speech_dev
def test_sixteen_real_clips_from_eight_clients(busy: RunningService, speech_dev: Path) -> None:
    """A morning's uploads: every one is acknowledged and found, and who searches meanwhile does not wait."""
    load(busy, speech_dev, 16)


@pytest.mark.slow
@pytest.mark.speech_dev
@pytest.mark.timeout(1800)
def test_five_hundred_real_clips_from_eight_clients(busy: RunningService, speech_dev: Path) -> None:
    """The same for long enough that a leak, or a queue that starves, would show."""
    load(busy, speech_dev, 500)


# --- what an operator sees


def test_metrics_are_there_and_move(service: RunningService, collection: str, bees: bytes) -> None:
    """Dashboards and alarms are built on these names."""
    moving = {
        "upload": ("clasp_http_requests_total", {"method": "POST", "route": "/audio", "status": "202"}),
        "search": ("clasp_http_requests_total", {"method": "GET", "route": "/search", "status": "200"}),
        "seconds": ("clasp_http_request_seconds_count", {"route": "/search"}),
        "encode": ("clasp_search_stage_seconds_count", {"stage": "encode"}),
        "stage": ("clasp_search_stage_seconds_count", {"stage": "search"}),
        "batch": ("clasp_search_batch_size_sum", {}),
        "ingested": ("clasp_ingested_recordings_total", {}),
        "sound": ("clasp_ingested_audio_seconds_total", {}),
        "embed": ("clasp_ingest_stage_seconds_total", {"stage": "embed"}),
        "ready": ("clasp_recordings", {"status": "ready"}),
        "vectors": ("clasp_index_vectors", {}),
    }

    def read() -> dict[str, float]:
        return {key: service.metric(name, **labels) for key, (name, labels) in moving.items()}

    def is_idle() -> bool:
        return not any(
            service.metric("clasp_recordings", status=status) for status in ("pending", "processing")
        )

    eventually(is_idle, within_s=60)
    before = read()
    recording = service.ready(bees + collection.encode(), collection=collection)
    service.found("bees", collection=collection)
    eventually(lambda: all(now > before[key] for key, now in read().items()), within_s=10)
    after = read()
    assert after["vectors"] - before["vectors"] == recording["segments"]
    assert after["ready"] - before["ready"] == 1
    service.client.delete(f"/audio/{recording['id']}").raise_for_status()
    # of an index that is elsewhere, how much it holds is asked now and then
    eventually(lambda: service.metric("clasp_index_vectors") == before["vectors"], within_s=10)
    assert service.metric("clasp_recordings", status="pending") == 0
    assert service.metric("clasp_queue_age_seconds") == 0


def test_a_stranger_cannot_make_metrics_without_end(service: RunningService) -> None:
    """A series for each address that is tried would fill the memory of whoever collects them."""
    for number in range(5):
        service.client.get(f"/stranger/{number}")
        service.client.get(f"/audio/stranger-{number}")
    shown = service.client.get("/metrics").text
    assert "stranger" not in shown
    assert service.metric("clasp_http_requests_total", route="unmatched", status="404") >= 5
