"""Several services and workers on one catalogue, in PostgreSQL: whoever is asked, the answer is the same."""

import contextlib
import itertools
import json
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from clasp_core.access import Keys
from clasp_core.catalog import Catalog
from tests.audio_files import encode, speech
from tests.forking import Forked, short_leases
from tests.load_proof import clip
from tests.network_test import run
from tests.postgres import postgres_url
from tests.service import ROOT, RunningService, environment, eventually
from tests.stack import Stack
from tests.stand_in import OTHER

KEY = "a key with all scopes"
_numbers = itertools.count(1)


def recording() -> bytes:
    """Half a second of noise unlike any other."""
    return clip(6, next(_numbers))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two services and a worker. Tests that need more than these find them as they were."""
    folder = tmp_path_factory.mktemp("replicas")
    url = postgres_url()
    with (
        short_leases(),
        Stack(folder, new_process=Forked, database_url=url, api_keys=KEY, log_level="info") as running,
    ):
        for api in running.apis:
            api.client.headers["X-API-Key"] = KEY
        yield running.start()
        assert running.stop() == [0, 0, 0]
        assert "unexpected error" not in running.log()


@pytest.fixture
def pair(stack: Stack) -> tuple[RunningService, RunningService]:
    first, second = stack.apis
    return first, second


def together(*calls: Any) -> list[Any]:
    """What the calls give, each made by a thread of its own, at the same moment."""
    barrier = threading.Barrier(len(calls))

    def made(call: Any) -> Any:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [done.result() for done in [pool.submit(made, call) for call in calls]]


def test_both_tell_the_same_of_everything(pair: tuple[RunningService, RunningService]) -> None:
    """A load balancer sends the next request anywhere: records, their ETags, pages and figures must agree."""
    first, second = pair
    names = [first.ready(recording(), metadata=json.dumps({"n": n}))["id"] for n in range(4)]
    for path in (f"/audio/{names[0]}", "/audio?limit=1000", f"/audio/{names[1]}/content"):
        answers = [api.client.get(path) for api in pair]
        assert answers[0].content == answers[1].content
        assert answers[0].headers.get("etag") == answers[1].headers.get("etag")
    assert first.found("anything", limit=100) == second.found("anything", limit=100)

    page = first.client.get("/audio", params={"limit": 3}).json()
    rest = second.client.get("/audio", params={"limit": 1000, "cursor": page["next_cursor"]}).json()
    assert [item["id"] for item in page["items"] + rest["items"]][:4] == names[::-1]

    etag = first.client.get(f"/audio/{names[0]}").headers["etag"]
    change = {"json": {"metadata": {"n": 10}}, "headers": {"If-Match": etag}}
    statuses = together(*(partial(api.client.patch, f"/audio/{names[0]}", **change) for api in pair))
    assert sorted(answer.status_code for answer in statuses) == [200, 412]

    for metric in ("clasp_recordings", "clasp_failed_recordings", "clasp_index_vectors", "clasp_ready"):
        assert first.metric(metric) == second.metric(metric) > -1
    for api in pair:
        assert api.client.get("/readyz").json()["checks"]["workers"] == "ok"


def test_the_same_upload_at_both_at_once_is_one_recording(
    pair: tuple[RunningService, RunningService],
) -> None:
    """A client that saw no answer asks the next replica, while the first may be at it still: what one process
    knows to be in flight, the other does not."""
    for _ in range(10):
        content, headers = recording(), {"Idempotency-Key": f"once-{next(_numbers)}"}
        before = len(pair[0].listed())
        answers = together(*(partial(api.upload, content, headers=headers) for api in pair * 2))
        done = [answer for answer in answers if answer.status_code != 409]
        assert {answer.status_code for answer in done} == {202}, [answer.text for answer in answers]
        assert len({answer.json()["id"] for answer in done}) == 1
        assert {answer.headers["location"] for answer in done} == {done[0].headers["location"]}
        assert len(pair[0].listed()) == before + 1
    # and without a key the bytes themselves say so
    content = recording()
    answers = together(*(partial(api.upload, content) for api in pair))
    assert sorted(answer.status_code for answer in answers) == [200, 202]


def test_waiting_at_a_replica_for_a_worker_elsewhere(pair: tuple[RunningService, RunningService]) -> None:
    """`Prefer: wait` must not depend on a worker of the service's own."""
    for api, other in (pair, pair[::-1]):
        content = recording()
        answer = api.upload(content, headers={"Prefer": "wait=20"})
        assert answer.status_code == 201
        assert other.found_by_sound(content, limit=1)[0]["id"] == answer.json()["id"]


def test_a_key_is_known_everywhere_at_once_and_revoked_everywhere_at_once(
    stack: Stack, pair: tuple[RunningService, RunningService]
) -> None:
    """A key that was stolen must be worthless when the command returns, not when a cache expires."""
    catalog = Catalog(str(stack.settings["database_url"]))
    try:
        keys = Keys(catalog)
        _, key = keys.create("temporary", ["read"])
        for api in pair:
            assert api.client.get("/audio", headers={"X-API-Key": key}).status_code == 200
        keys.revoke("temporary")
        for api in pair:
            assert api.client.get("/audio", headers={"X-API-Key": key}).status_code == 401
    finally:
        catalog.close()


def follow(pair: tuple[RunningService, RunningService], recordings: int) -> None:
    """Upload with one, and see with the other that what is `ready` is found, and what is deleted never again,
    while others upload and search without a pause."""
    over = threading.Event()
    trouble: list[str] = []

    def disturb(api: RunningService) -> None:
        with httpx.Client(base_url=api.client.base_url, headers=api.client.headers, timeout=60) as client:
            while not over.is_set():
                uploaded = client.post("/audio", files={"file": recording()}).raise_for_status()
                client.get("/search", params={"q": "anything", "limit": 1000}).raise_for_status()
                client.delete(uploaded.headers["location"]).raise_for_status()

    def watch(here: RunningService, there: RunningService) -> None:
        with contextlib.ExitStack() as clients:
            first, second = (
                clients.enter_context(
                    httpx.Client(base_url=api.client.base_url, headers=api.client.headers, timeout=60)
                )
                for api in (here, there)
            )
            asked = {"q": "anything", "limit": 1000}
            for _ in range(recordings // 2):
                record = first.post("/audio", files={"file": recording()}).raise_for_status().json()
                while record["status"] != "ready":
                    record = first.get(f"/audio/{record['id']}").raise_for_status().json()
                hits = second.get("/search", params=asked).raise_for_status().json()["hits"]
                if record["id"] not in [hit["id"] for hit in hits]:
                    trouble.append(f"{record['id']} was ready, and not found")
                first.delete(f"/audio/{record['id']}").raise_for_status()
                hits = second.get("/search", params=asked).raise_for_status().json()["hits"]
                if record["id"] in [hit["id"] for hit in hits]:
                    trouble.append(f"{record['id']} was deleted, and found")

    with ThreadPoolExecutor() as pool:
        disturbing = [pool.submit(disturb, api) for api in pair]
        watching = [pool.submit(watch, *pair), pool.submit(watch, *pair[::-1])]
        try:
            for done in watching:
                done.result()
        finally:
            over.set()
        for done in disturbing:
            done.result()
    assert not trouble


def test_what_one_replica_acknowledged_the_other_searches(
    pair: tuple[RunningService, RunningService],
) -> None:
    """The bound is none: a search that begins after the answer to a deletion, or after `ready` was seen,
    whereever it is asked, knows of it."""
    follow(pair, recordings=10)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_one_replica_acknowledged_the_other_searches_thousands_of_times(
    pair: tuple[RunningService, RunningService],
) -> None:
    """What is rare needs many occasions."""
    follow(pair, recordings=4000)


def test_a_worker_that_is_told_to_end_gives_back_its_recordings(
    stack: Stack, pair: tuple[RunningService, RunningService]
) -> None:
    """A rollout stops workers one by one: what they were at must not wait for its lease to run out."""
    (worker,) = stack.workers
    assert worker.stop() == 0
    worker.start(STAND_IN_PAUSE_S="0.5")
    try:
        long = pair[0].upload(encode(speech(60.0), 16_000)).json()["id"]
        eventually(lambda: pair[1].client.get(f"/audio/{long}").json()["status"] == "processing", within_s=60)
        assert worker.stop() == 0
        assert pair[1].client.get(f"/audio/{long}").json()["status"] == "pending"
    finally:
        worker.start()
    assert pair[0].settled(long)["status"] == "ready"


def test_all_outlive_a_database_that_is_away(
    stack: Stack, pair: tuple[RunningService, RunningService]
) -> None:
    """A database is restarted, or fails over: clients are told to come again, nobody ends, work goes on."""
    pids = sorted(stack.processes())
    url = sa.make_url(str(stack.settings["database_url"]))
    engine = sa.create_engine(
        url.set(drivername="postgresql+psycopg", database="postgres"), isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as db:
        db.exec_driver_sql(f"ALTER DATABASE {url.database} ALLOW_CONNECTIONS false")
        try:
            everybody = sa.text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"
            )
            db.execute(everybody, {"name": url.database})
            for api in pair:
                eventually(partial(is_unready, api), within_s=60)
                for answer in (api.client.get("/audio"), api.upload(recording())):
                    assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
                    assert "retry-after" in answer.headers
                assert api.client.get("/healthz").status_code == 200
        finally:
            db.exec_driver_sql(f"ALTER DATABASE {url.database} ALLOW_CONNECTIONS true")
    engine.dispose()
    for api, other in (pair, pair[::-1]):
        api.wait_until_ready()
        content = recording()
        name = api.ready(content)["id"]
        assert other.found_by_sound(content, limit=1)[0]["id"] == name
    assert set(pids) <= set(stack.processes())


def is_unready(api: RunningService) -> bool:
    return api.client.get("/readyz").status_code == 503


@pytest.mark.slow
def test_all_follow_to_another_model(stack: Stack, pair: tuple[RunningService, RunningService]) -> None:
    """A re-index is run once, by anybody; services and workers that nobody told must find it out."""
    content = recording()
    pair[0].ready(content, id="before")
    for model in (OTHER, "stand-in"):
        run_reindex(stack, model)
        for api in pair:
            eventually(partial(shows, api, model), within_s=60)
            assert api.found_by_sound(content, limit=1)[0]["id"] == "before"
        after = recording()
        name = pair[0].ready(after)["id"]
        assert pair[1].found_by_sound(after, limit=1)[0]["id"] == name


def shows(api: RunningService, model: str) -> bool:
    """Whether it answers by that model."""
    answer = api.client.get("/search", params={"q": "anything"}).raise_for_status().json()
    return bool(answer["model"]["name"] == model)


def run_reindex(stack: Stack, model: str) -> None:
    with (stack.data_dir / "reindex.log").open("wb") as log:
        verb = Forked(
            [sys.executable, "-m", "tests.stand_in", "reindex", "--model", model],
            env=environment(**stack.settings) | {"PYTHONPATH": str(ROOT)},
            cwd=stack.data_dir,
            stderr=log,
            stdout=log,
        )
        assert verb.wait(60) == 0, (stack.data_dir / "reindex.log").read_text()


def test_nothing_is_lost_or_doubled_while_all_of_them_are_killed(stack: Stack, tmp_path: Path) -> None:
    """A small run of `python -m tests.network_test`."""
    figures = run(
        tmp_path, uploads=40, clients=4, seed=3, database_url=postgres_url(), kill_every_s=0.7, kills=3
    )
    assert figures["complaints"] == []
    assert figures["kills"] == {"api": 1, "worker": 2}
