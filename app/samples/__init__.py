"""The recordings that come with the program, and how a service is tried with them, over HTTP.

For `clasp demo`, and for deploy/check_service.py, which runs where nothing but httpx is installed: this
module imports nothing that needs more.
"""

import json
import time
from pathlib import Path
from typing import Any

import httpx

from clasp_core.errors import ProcessingFailed

SAMPLES = Path(__file__).parent
INDEX_WITHIN_S = 300


def lines(name: str) -> list[dict[str, Any]]:
    """Those of `manifest.jsonl` or of `questions.jsonl`; README.md beside them says what they hold."""
    return [json.loads(line) for line in (SAMPLES / name).read_text(encoding="utf-8").splitlines()]


def index(client: httpx.Client, recordings: list[dict[str, Any]], collection: str = "default") -> None:
    """Upload recordings of the manifest and wait until they can be found.

    Raises ProcessingFailed where that does not come within INDEX_WITHIN_S, and httpx.HTTPError.
    """
    for recording in recordings:
        content = (SAMPLES / recording["audio"]).read_bytes()
        form = {
            "id": recording["id"],
            "lang": recording["lang"],
            "collection": collection,
            "metadata": json.dumps({"said": recording["text"]}),
        }
        client.post("/audio", files={"file": content}, data=form).raise_for_status()
    deadline = time.monotonic() + INDEX_WITHIN_S
    while time.monotonic() < deadline:
        page = client.get("/audio", params={"limit": 1000, "collection": collection}).raise_for_status()
        states = {item["id"]: item for item in page.json()["items"]}
        if failed := [item for item in states.values() if item["status"] == "failed"]:
            raise ProcessingFailed(f"Could not be indexed: {failed}")
        if all(item["status"] == "ready" for item in states.values()):
            return
        time.sleep(0.2)
    raise ProcessingFailed("The recordings were not indexed in time.")


def ask(client: httpx.Client, question: dict[str, Any], collection: str = "default") -> bool:
    """Ask, print what was found, and say whether it is right. Raises httpx.HTTPError."""
    asked = {"q": question["q"], "lang": question["lang"], "limit": 3, "collection": collection}
    hits = client.get("/search", params=asked).raise_for_status().json()["hits"]
    right = bool(hits) and hits[0]["id"] == question["expect"]
    if right and "expect_start_s" in question:
        best = hits[0]["segments"][0]
        right = best["start_s"] < question["expect_end_s"] and best["end_s"] > question["expect_start_s"]
    print(f"{'ok ' if right else 'BAD'} [{question['lang']}] {question['q']}")
    for hit in hits:
        best = hit["segments"][0]
        span = f"{_clock(best['start_s'])}-{_clock(best['end_s'])}"
        print(f"      {hit['rank']}. {hit['score']:.3f}  {span:>13}  {hit['id']}")
    return right


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}:{rest:04.1f}"
