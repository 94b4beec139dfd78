"""The service and a plain dictionary live the same life, chosen by Hypothesis: they must never disagree."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.core.doubles import wav_bytes
from tests.service import RunningService, clasp, eventually

SOUNDS = [wav_bytes(200.0 * (1 + number), 0.4) for number in range(8)]
COLLECTIONS = ("a", "b")
SEEN_BY = {"a": {"a"}, "b": {"b"}, "all": {"a", "b"}}
"""Who asks: two tenants, and a key for everything."""

callers = st.sampled_from(sorted(SEEN_BY))
collections = st.sampled_from(COLLECTIONS)
some_collection = st.sampled_from([None, *COLLECTIONS])
names = st.sampled_from(["x", "y", "z"])
sounds = st.integers(0, len(SOUNDS) - 1)


@dataclass
class Kept:
    """A recording as the dictionary has it; `serial` tells it from another that had its name."""

    serial: int
    collection: str
    id: str
    sound: int


@dataclass
class Listing:
    """A list that somebody has begun to read, a page now and a page later."""

    by: str
    cursor: str | None
    seen: list[tuple[str, str, str]] = field(default_factory=list)
    at_first: set[int] = field(default_factory=set)


class Keyed:
    """The service under test, with its keys."""

    def __init__(self, folder: Path) -> None:
        self.service = RunningService(folder, program="tests.stand_in")
        limits = {"a": ["--collection", "a"], "b": ["--collection", "b"], "all": []}
        self.keys = {}
        for name, limit in limits.items():
            made = clasp("keys", "create", name, "--scope", "read,write", *limit, "--json", cwd=folder)
            self.keys[name] = json.loads(made.stdout)["key"]

    def ask(self, by: str, method: str, path: str, **more: Any) -> httpx.Response:
        headers = {"X-API-Key": self.keys[by]} | more.pop("headers", {})
        return self.service.client.request(method, path, headers=headers, **more)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    keyed = Keyed(tmp_path_factory.mktemp("dictionary"))
    with keyed.service as service:
        service.start()
        yield keyed
        assert service.stop() == 0
        assert "unexpected error" not in service.log()


class Life(RuleBasedStateMachine):
    """Each rule does to the service what it does to `self.kept`, and compares."""

    def __init__(self, keyed: Keyed) -> None:
        super().__init__()
        self.keyed = keyed
        self.kept: dict[tuple[str, str], Kept] = {}
        self.created_at: dict[int, str] = {}
        self.listings: list[Listing] = []
        self.serial = 0

    # --- what the dictionary says

    def visible(self, by: str, collection: str | None = None) -> list[Kept]:
        seen = SEEN_BY[by] & ({collection} if collection else set(COLLECTIONS))
        return [kept for kept in self.kept.values() if kept.collection in seen]

    def expected(self, by: str, name: str, collection: str | None) -> Kept | tuple[int, str]:
        """The recording that is meant, or the status and the code of the refusal."""
        if collection is not None and collection not in SEEN_BY[by]:
            return 403, "forbidden"
        meant = [kept for kept in self.visible(by, collection) if kept.id == name]
        if not meant:
            return 404, "recording_not_found"
        return meant[0] if len(meant) == 1 else (409, "ambiguous_id")

    def refused(self, answer: httpx.Response, expected: tuple[int, str]) -> None:
        assert (answer.status_code, answer.json()["code"]) == expected

    def settle(self) -> None:
        """Wait until nothing waits, so that a search has one right answer."""

        def idle() -> bool:
            found = [
                self.keyed.ask("all", "GET", "/audio", params={"status": status}).json()["items"]
                for status in ("pending", "processing")
            ]
            return not any(found)

        eventually(idle, within_s=90)

    # --- what can happen

    @initialize()
    def begin_empty(self) -> None:
        for item in self.keyed.ask("all", "GET", "/audio", params={"limit": 1000}).json()["items"]:
            where = {"collection": item["collection"]}
            self.keyed.ask("all", "DELETE", f"/audio/{item['id']}", params=where).raise_for_status()

    @rule(by=callers, collection=collections, name=st.none() | names, sound=sounds, wait=st.booleans())
    def upload(self, by: str, collection: str, name: str | None, sound: int, wait: bool) -> None:
        form = {"collection": collection, "metadata": json.dumps({"sound": sound})}
        form |= {} if name is None else {"id": name}
        headers = {"Prefer": "wait=60"} if wait else {}
        answer = self.keyed.ask(
            by, "POST", "/audio", files={"file": SOUNDS[sound]}, data=form, headers=headers
        )
        if collection not in SEEN_BY[by]:
            return self.refused(answer, (403, "forbidden"))
        same = [k for k in self.kept.values() if (k.collection, k.sound) == (collection, sound)]
        if same:
            assert (answer.status_code, answer.json()["id"]) == (200, same[0].id)
            assert answer.json()["duplicate"] is True
            return None
        if name in [kept.id for kept in self.visible(by)]:
            return self.refused(answer, (409, "id_conflict"))
        assert answer.status_code == (201 if wait else 202), answer.text
        body = answer.json()
        assert name in (None, body["id"])
        self.serial += 1
        kept = self.kept[collection, body["id"]] = Kept(self.serial, collection, body["id"], sound)
        self.created_at[kept.serial] = body["created_at"]
        return None

    @rule(by=callers, name=names, collection=some_collection)
    def delete(self, by: str, name: str, collection: str | None) -> None:
        params = {"collection": collection} if collection else {}
        answer = self.keyed.ask(by, "DELETE", f"/audio/{name}", params=params)
        meant = self.expected(by, name, collection)
        if not isinstance(meant, Kept):
            return self.refused(answer, meant)
        assert answer.status_code == 204
        del self.kept[meant.collection, meant.id]
        return None

    @rule(by=callers, name=names, collection=some_collection, content=st.booleans())
    def get(self, by: str, name: str, collection: str | None, content: bool) -> None:
        """The record, or the very bytes that were sent."""
        params = {"collection": collection} if collection else {}
        path = f"/audio/{name}/content" if content else f"/audio/{name}"
        answer = self.keyed.ask(by, "GET", path, params=params)
        meant = self.expected(by, name, collection)
        if not isinstance(meant, Kept):
            return self.refused(answer, meant)
        assert answer.status_code == 200
        if content:
            assert answer.content == SOUNDS[meant.sound]
        else:
            body = answer.json()
            assert (body["collection"], body["id"]) == (meant.collection, meant.id)
            assert body["metadata"] == {"sound": meant.sound}
            assert body["created_at"] == self.created_at[meant.serial]
            assert body["status"] != "failed"
        return None

    @rule(by=callers, sound=sounds, collection=some_collection)
    def search_by_sound(self, by: str, sound: int, collection: str | None) -> None:
        """All that the asker may see, and first of all what has this very sound."""
        self.settle()
        params: dict[str, Any] = {"limit": 1000} | ({"collection": collection} if collection else {})
        answer = self.keyed.ask(by, "POST", "/search/audio", files={"file": SOUNDS[sound]}, params=params)
        if collection is not None and collection not in SEEN_BY[by]:
            return self.refused(answer, (403, "forbidden"))
        hits = answer.raise_for_status().json()["hits"]
        there = {(kept.collection, kept.id): kept.sound for kept in self.visible(by, collection)}
        assert sorted((hit["collection"], hit["id"]) for hit in hits) == sorted(there)
        own = {name for name, other in there.items() if other == sound}
        assert {(hit["collection"], hit["id"]) for hit in hits[: len(own)]} == own
        assert all(hit["score"] > 0.9999 for hit in hits[: len(own)])
        return None

    @rule(by=callers, sound=sounds)
    def search_with_a_filter(self, by: str, sound: int) -> None:
        self.settle()
        body = {"q": "bees", "limit": 1000, "filter": {"metadata": {"sound": sound}}}
        hits = self.keyed.ask(by, "POST", "/search", json=body).raise_for_status().json()["hits"]
        found = sorted((hit["collection"], hit["id"]) for hit in hits)
        assert found == sorted((k.collection, k.id) for k in self.visible(by) if k.sound == sound)

    @rule(by=callers)
    def begin_a_list(self, by: str) -> None:
        listing = Listing(by, None, at_first={kept.serial for kept in self.visible(by)})
        self.listings.append(listing)
        self.read_a_page(len(self.listings) - 1)

    @rule(which=st.integers(0, 3))
    def read_a_page(self, which: int) -> None:
        """Pages neither skip nor repeat a recording, whatever has happened since the last one."""
        if not self.listings:
            return
        listing = self.listings[which % len(self.listings)]
        params: dict[str, Any] = {"limit": 2} | ({"cursor": listing.cursor} if listing.cursor else {})
        page = self.keyed.ask(listing.by, "GET", "/audio", params=params).raise_for_status().json()
        there = {(k.collection, k.id, self.created_at[k.serial]) for k in self.visible(listing.by)}
        shown = [(item["collection"], item["id"], item["created_at"]) for item in page["items"]]
        assert set(shown) <= there, "what was deleted is listed"
        listing.seen += shown
        listing.cursor = page["next_cursor"]
        if listing.cursor is None:
            self.listings.remove(listing)
            assert len(set(listing.seen)) == len(listing.seen), "a recording was listed twice"
            stayed = {
                (k.collection, k.id, self.created_at[k.serial])
                for k in self.visible(listing.by)
                if k.serial in listing.at_first
            }
            assert stayed <= set(listing.seen), "a recording was skipped"

    @rule(how=st.sampled_from([*["nothing"] * 12, "stop", "kill", "kill the worker", "kill the worker"]))
    def trouble(self, how: str) -> None:
        """Seldom, the service is restarted, or loses its worker."""
        service = self.keyed.service
        if how == "kill the worker":
            service.kill_workers()
        elif how != "nothing":
            if how == "stop":
                assert service.stop() == 0
            else:
                service.kill()
            service.start()

    def teardown(self) -> None:
        """All lists end, and everything is found in the end."""
        while self.listings:
            self.read_a_page(0)
        for by in SEEN_BY:
            self.search_by_sound(by, 0, None)


def live(keyed: Keyed, *, lives: int, steps: int, chance: bool) -> None:
    run_state_machine_as_test(
        lambda: Life(keyed),
        settings=settings(
            max_examples=lives,
            stateful_step_count=steps,
            deadline=None,
            derandomize=not chance,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_few_lives(keyed: Keyed) -> None:
    """Uploads, duplicates, tenants, deletions, lists read over changes, restarts: what is answered is
    what the dictionary says."""
    live(keyed, lives=10, steps=30, chance=False)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_lives(keyed: Keyed) -> None:
    """The same for half an hour, another way each time."""
    live(keyed, lives=250, steps=60, chance=True)
