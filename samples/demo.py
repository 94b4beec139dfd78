"""`make demo`: serve, index the sample recordings, ask about them in many languages, check the answers.

Uses a temporary data directory and a free port, and leaves neither process nor file behind. Exit status 0
only if every question found the recording it is about first (and, in the long one, the right minute).
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

SAMPLES = Path(__file__).parent
START_WITHIN_S = 120
INDEX_WITHIN_S = 300
KEPT_SETTINGS = ("CLASP_MODEL", "CLASP_MODELS_DIR", "CLASP_DEVICE", "CLASP_THREADS")


def main() -> int:
    recordings = lines("manifest.jsonl")
    questions = lines("questions.jsonl")
    with tempfile.TemporaryDirectory(prefix="clasp-demo-") as data_dir, _service(Path(data_dir)) as client:
        started = time.monotonic()
        index(client, recordings)
        seconds = sum(recording["duration_s"] for recording in recordings)
        print(
            f"{len(recordings)} recordings ({seconds:.0f} s) indexed in {time.monotonic() - started:.0f} s\n"
        )
        right = sum([ask(client, question) for question in questions])
    languages = len({question["lang"] for question in questions})
    print(f"\n{right} of {len(questions)} questions in {languages} languages found their recording first")
    return 0 if right == len(questions) else 1


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SAMPLES / name).read_text(encoding="utf-8").splitlines()]


@contextmanager
def _service(data_dir: Path) -> Iterator[httpx.Client]:
    """A service of our own, ready; stopped however the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("CLASP_") or name in KEPT_SETTINGS
    }
    log_path = data_dir / "service.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "serve", "--host", "127.0.0.1", "--port", str(port)],
            env=kept | {"CLASP_DATA_DIR": str(data_dir / "index_data")},
            stderr=log,
            cwd=data_dir,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            _wait_until_ready(client, process, log_path)
            yield client
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_WITHIN_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if client.get("/readyz").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"The service did not start:\n{log.read_text(errors='replace')}")


def index(client: httpx.Client, recordings: list[dict[str, Any]], collection: str = "default") -> None:
    """Upload sample recordings and wait until they can be found. SystemExit where that does not come."""
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
            raise SystemExit(f"Could not be indexed: {failed}")
        if all(item["status"] == "ready" for item in states.values()):
            return
        time.sleep(0.2)
    raise SystemExit("The recordings were not indexed in time.")


def ask(client: httpx.Client, question: dict[str, Any], collection: str = "default") -> bool:
    """Ask, print what was found, and say whether it is right."""
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


if __name__ == "__main__":
    sys.exit(main())
