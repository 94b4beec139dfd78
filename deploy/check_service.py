"""Whether a service does what it should, from upload to deletion, whatever it is made of.

    python deploy/check_service.py --url https://clasp.example.org --key KEY --cacert ca.pem

Uploads three of the sample recordings into a collection of its own, asks about them in several languages, by
sound and with filters, changes one, deletes them, and sees that they are gone. Prints a line for each step;
the exit status is 0 only if all is as it should be. The key needs the scopes `read` and `write`; one for
some collections only needs `--collection` with one of them, which must be empty. Needs Python 3.11, httpx,
and the checkout that it lies in.
"""

import argparse
import hashlib
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx

sys.path.insert(0, str(Path(__file__).parent.parent))

from app.samples import SAMPLES, ask, index, lines
from clasp_core.errors import ClaspError

RECORDINGS = ("en-lost-dog", "fr-museum", "it-wedding")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--url", required=True, help="such as http://127.0.0.1:8000")
    parser.add_argument("--key", help="an API key, if the service needs one")
    parser.add_argument("--cacert", help="a file with the certificate of who signed the service's")
    parser.add_argument("--collection", help="by default one with a new name")
    options = parser.parse_args()
    collection = options.collection or f"check-{uuid4().hex}"
    headers = {"Authorization": f"Bearer {options.key}"} if options.key else {}
    context = ssl.create_default_context(cafile=options.cacert)
    with httpx.Client(base_url=options.url, headers=headers, verify=context, timeout=90) as client:
        try:
            check(client, collection)
        except (httpx.HTTPError, AssertionError, ClaspError) as error:
            print(f"BAD {type(error).__name__}: {error}")
            return 1
    print("\nEverything is as it should be.")
    return 0


def check(client: httpx.Client, collection: str) -> None:
    """All of it. Raises AssertionError, httpx.HTTPError or ClaspError; leaves the collection empty."""
    recordings = [line for line in lines("manifest.jsonl") if line["id"] in RECORDINGS]
    questions = [line for line in lines("questions.jsonl") if line["expect"] in RECORDINGS]
    here = {"collection": collection}
    with _step("it is alive and ready"):
        client.get("/healthz").raise_for_status()
        client.get("/readyz").raise_for_status()
        assert not _listed(client, here), f"the collection {collection} is not empty"
    try:
        with _step(f"{len(recordings)} recordings are uploaded and embedded"):
            index(client, recordings, collection)
            assert {item["id"] for item in _listed(client, here)} == set(RECORDINGS)
        for question in questions:
            assert ask(client, question, collection), "another recording was found first"
        for recording in recordings:
            _check_recording(client, recording, here)
        with _step("filters and changes"):
            _check_filters(client, here)
        with _step("the same upload is done once"):
            _check_once(client, recordings[0], here)
        with _step("what is deleted is gone"):
            _check_deletion(client, here)
    finally:
        client.post("/audio/delete", json={**here, "all": True}).raise_for_status()
    assert not _listed(client, here), "something is left"


@contextmanager
def _step(name: str) -> Iterator[None]:
    yield
    print(f"ok  {name}")


def _listed(client: httpx.Client, here: dict[str, str]) -> list[dict[str, Any]]:
    """All that is in the collection, by pages of two."""
    items: list[dict[str, Any]] = []
    cursor: dict[str, str] = {}
    while True:
        answer = client.get("/audio", params={**here, "limit": 2, **cursor}).raise_for_status()
        page = answer.json()
        items += page["items"]
        if page["next_cursor"] is None:
            return items
        cursor = {"cursor": page["next_cursor"]}


def _check_recording(client: httpx.Client, recording: dict[str, Any], here: dict[str, str]) -> None:
    name, content = recording["id"], (SAMPLES / recording["audio"]).read_bytes()
    with _step(f"{name}: its record, its bytes, and its own sound finds it first"):
        record = client.get(f"/audio/{name}", params=here).raise_for_status().json()
        assert record["sha256"] == hashlib.sha256(content).hexdigest(), "the record has another sha256"
        assert record["metadata"] == {"said": recording["text"]}, "the record has other metadata"
        stored = client.get(f"/audio/{name}/content", params=here).raise_for_status().content
        assert stored == content, "other bytes came back"
        answer = client.post("/search/audio", params=here, files={"file": content}).raise_for_status()
        best = answer.json()["hits"][0]
        assert best["id"] == name, f"{best['id']} was found first"
        assert best["score"] > 0.99, f"its score is {best['score']}"


def _check_filters(client: httpx.Client, here: dict[str, str]) -> None:
    answer = client.post("/search", json={"q": "museum", **here, "filter": {"lang": "fr"}}).raise_for_status()
    assert [hit["id"] for hit in answer.json()["hits"]] == ["fr-museum"], "the filter by language"
    etag = client.get("/audio/it-wedding", params=here).raise_for_status().headers["etag"]
    patch = {"metadata": {"checked": True}}
    unchanged = client.patch("/audio/it-wedding", params=here, json=patch, headers={"If-Match": '"other"'})
    assert unchanged.status_code == 412, "it was changed though it is not what If-Match says"
    client.patch("/audio/it-wedding", params=here, json=patch, headers={"If-Match": etag}).raise_for_status()
    wanted = {"q": "wedding", **here, "filter": {"metadata": {"checked": True}}}
    hits = client.post("/search", json=wanted).raise_for_status().json()["hits"]
    assert [hit["id"] for hit in hits] == ["it-wedding"], "the filter by metadata"


def _check_once(client: httpx.Client, recording: dict[str, Any], here: dict[str, str]) -> None:
    client.delete(f"/audio/{recording['id']}", params=here).raise_for_status()
    headers = {"Idempotency-Key": uuid4().hex, "Prefer": "wait=60"}
    content = (SAMPLES / recording["audio"]).read_bytes()
    answers = [
        client.post("/audio", files={"file": content}, data=here, headers=headers).raise_for_status()
        for _ in range(2)
    ]
    first, again = (answer.json() for answer in answers)
    assert first["id"] == again["id"], "it became two recordings"
    assert len(_listed(client, here)) == len(RECORDINGS), "it is there twice"


def _check_deletion(client: httpx.Client, here: dict[str, str]) -> None:
    client.delete("/audio/fr-museum", params=here).raise_for_status()
    gone = client.get("/audio/fr-museum", params=here)
    assert (gone.status_code, gone.json()["code"]) == (404, "recording_not_found"), "its record is there"
    answer = client.get("/search", params={"q": "museum", **here}).raise_for_status()
    assert "fr-museum" not in [hit["id"] for hit in answer.json()["hits"]], "it was found"


if __name__ == "__main__":
    sys.exit(main())
