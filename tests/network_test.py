"""Several APIs and workers on one catalogue, under load and under fire: nothing is lost, nothing doubled.

    python -m tests.network_test --uploads 5000 --clients 16 --seed 1
    python -m tests.network_test --uploads 500 --vector-store milvus

Starts PostgreSQL (and Milvus), two `clasp serve` and three `clasp worker`, each a process of its own, with
the stand-in model, whose encoders cost nothing. Clients upload (by an `Idempotency-Key`), delete one in ten,
and search; whoever gets no answer, or is told to come again, asks the other API the same. Every few seconds a
worker, and now and then an API, gets SIGKILL and is started again. While this goes on,

- what was answered `204` to a deletion must never again be found, by whatever API;
- what one API calls `ready` must be found by the other with its own sound.

In the end, when all is embedded, `Network.check` looks at everything.
Prints the figures, and as JSON with --out; the exit status is 1 where anything was violated.
"""

import argparse
import collections
import contextlib
import hashlib
import itertools
import json
import random
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa

from clasp_core.database import RECORDINGS, SEGMENTS
from clasp_core.ingest import embed_recording
from tests.core.doubles import SpectralSpeechEncoder
from tests.forking import Forked, short_leases
from tests.load_proof import clip, percentiles
from tests.service import eventually
from tests.stack import Stack

APIS, WORKERS = 2, 3
COME_AGAIN = frozenset({502, 503, 507, 429})
"""Answers after which a client asks again, and the other API."""
PATIENCE_S = 120.0
SETTLED_WITHIN_S = 900.0
DELETED_SHARE, SEARCHED_SHARE = 0.1, 0.3
SAMPLE = 50
"""Of the deleted recordings, as many are asked for by their sound in the end."""


class GaveUp(Exception):
    """No API answered for PATIENCE_S."""


class Client:
    """One client with a connection to each API; asks the next one when one does not answer."""

    def __init__(self, network: "Network", seed: int) -> None:
        self.chance = random.Random(seed)
        self.mine: list[int] = []
        """Numbers of recordings whose upload was acknowledged."""
        self._network = network
        self._connections = [
            httpx.Client(base_url=api.client.base_url, timeout=30) for api in network.stack.apis
        ]

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections:
            connection.close()

    def ask(
        self, kind: str, method: str, path: str, *, api: int | None = None, **more: Any
    ) -> httpx.Response:
        """The first answer that is one, from that API or from any."""
        deadline = time.monotonic() + PATIENCE_S
        network, turn = self._network, self.chance.randrange(APIS) if api is None else api
        for attempt in itertools.count():
            if time.monotonic() > deadline:
                raise GaveUp(f"{method} {path}")
            began = time.perf_counter()
            try:
                answer = self._connections[turn % APIS].request(method, path, **more)
            except httpx.TransportError as error:
                network.count(f"{kind} {type(error).__name__}")
            else:
                network.count(
                    f"{kind} {answer.status_code}", None if attempt else time.perf_counter() - began
                )
                in_flight = answer.status_code == 409 and answer.json()["code"] == "idempotency_in_flight"
                if answer.status_code not in COME_AGAIN and not in_flight:
                    return answer
            network.count("retries")
            time.sleep(self.chance.uniform(0.05, 0.3))
            turn += api is None
        raise AssertionError

    def upload(self, number: int) -> None:
        """Until it is acknowledged, and never twice."""
        headers = {"Idempotency-Key": f"upload-{number}"}
        content = self._network.content(number)
        form = {"metadata": json.dumps({"n": number})}
        answer = self.ask("upload", "POST", "/audio", files={"file": content}, data=form, headers=headers)
        if answer.status_code != 202:
            self._network.complain(f"upload of {number}: {answer.status_code} {answer.text[:300]}")
            return
        self._network.ids[number] = answer.json()["id"]
        self.mine.append(number)

    def delete_one(self) -> None:
        """And see that no API ever finds it again: those that are being killed later, too."""
        number = self.mine.pop(self.chance.randrange(len(self.mine)))
        name = self._network.ids[number]
        self._network.deleting.add(number)
        answer = self.ask("delete", "DELETE", f"/audio/{name}")
        if answer.status_code not in (204, 404):  # 404: done by a request whose answer was lost
            self._network.complain(f"deletion of {number}: {answer.status_code} {answer.text[:300]}")
        self._network.deleted.add(number)
        for api in range(APIS):
            if name in self.found_by_sound(number, api=api):
                self._network.complain(f"{number} was deleted, and API {api} found it")
            self._network.count("looked for after deletion")

    def find_one(self) -> None:
        """What one API says is ready, the other must find."""
        number = self.chance.choice(self.mine)
        name = self._network.ids[number]
        here = self.chance.randrange(APIS)
        record = self.ask("record", "GET", f"/audio/{name}", api=here)
        if record.status_code != 200:
            self._network.complain(f"{number} is not there: {record.status_code}")
        elif record.json()["status"] == "ready":
            found = self.found_by_sound(number, api=(here + 1) % APIS)
            if name not in found:
                self._network.complain(f"{number} is ready, and not found")
            self._network.count("looked for when ready")

    def found_by_sound(self, number: int, *, api: int) -> list[str]:
        """Ids of those that score as high as the best."""
        files = {"file": self._network.content(number)}
        answer = self.ask("search", "POST", "/search/audio", api=api, files=files)
        if answer.status_code != 200:
            self._network.complain(f"search: {answer.status_code} {answer.text[:300]}")
            return []
        hits = answer.json()["hits"]
        return [hit["id"] for hit in hits if hit["score"] > hits[0]["score"] - 1e-6]

    def work(self, numbers: "itertools.count[int]", last: int) -> None:
        while (number := next(numbers)) <= last:
            self.upload(number)
            if self.chance.random() < DELETED_SHARE:
                self.delete_one()
            if self.mine and self.chance.random() < SEARCHED_SHARE:
                self.find_one()


class Network:
    """The stack, what clients were told, and what was done to it."""

    def __init__(
        self, folder: Path, *, database_url: str, seed: int, new_process: Any, **settings: object
    ) -> None:
        self.stack = Stack(
            folder,
            apis=APIS,
            workers=WORKERS,
            new_process=new_process,
            database_url=database_url,
            log_level="warning",
            **settings,
        )
        self.seed = seed
        self.ids: dict[int, str] = {}
        """Of acknowledged recordings, by their numbers."""
        self.deleting: set[int] = set()
        self.deleted: set[int] = set()
        self.kills: collections.Counter[str] = collections.Counter()
        self.counts: collections.Counter[str] = collections.Counter()
        self.seconds: dict[str, list[float]] = {}
        self.complaints: list[str] = []
        self._database_url = database_url
        self._lock = threading.Lock()
        self._over = threading.Event()

    def content(self, number: int) -> bytes:
        return clip(self.seed, number)

    def count(self, what: str, seconds: float | None = None) -> None:
        with self._lock:
            self.counts[what] += 1
            if seconds is not None:
                self.seconds.setdefault(what.split()[0], []).append(seconds)

    def complain(self, what: str) -> None:
        with self._lock:
            self.complaints.append(what)

    # --- the load, and the deaths

    def run(self, *, uploads: int, clients: int, kill_every_s: float, kills: int | None) -> None:
        """Until all is uploaded, and there were so many kills."""
        numbers = itertools.count(1)
        everybody = [Client(self, self.seed * 1000 + place) for place in range(clients)]
        killer = threading.Thread(target=self._kill_about, args=[kill_every_s, kills])
        killer.start()
        try:
            with ThreadPoolExecutor(clients) as pool:
                for done in [pool.submit(client.work, numbers, uploads) for client in everybody]:
                    done.result()
        finally:
            if kills is None:
                self._over.set()
            killer.join()
            for client in everybody:
                client.__exit__()

    def _kill_about(self, every_s: float, most: int | None) -> None:
        """Kill something, start it again; always leave one API."""
        chance = random.Random(self.seed)
        while not self._over.wait(chance.uniform(0.5, 1.5) * every_s):
            if most is not None and self.kills.total() >= most:
                return
            if self.kills.total() % 3 == 2:
                api = chance.choice(self.stack.apis)
                api.kill()
                self.kills["api"] += 1
                self._over.wait(chance.uniform(0.1, 1.0))
                api.start()
            else:
                worker = chance.choice(self.stack.workers)
                worker.kill()
                self.kills["worker"] += 1
                self._over.wait(chance.uniform(0.1, 1.0))
                worker.start()

    # --- what must hold

    def settle(self) -> None:
        """Until all is embedded. What was at work in five kills is given up, with a reason that says to
        upload it again; so that is done."""
        numbers = {name: number for number, name in self.ids.items()}

        def unsettled() -> bool:
            counts = {
                status: self.stack.apis[0].metric("clasp_recordings", status=status)
                for status in ("pending", "processing", "failed")
            }
            if counts["failed"]:
                for item in self.stack.apis[0].listed(status="failed"):
                    assert item["error"]["code"] == "processing_failed", item
                    again = self.stack.apis[0].upload(self.content(numbers[item["id"]]))
                    assert (again.status_code, again.json()["id"]) == (200, item["id"])
                    self.count("given up and uploaded again")
            return any(counts.values())

        def settled() -> bool:
            time.sleep(0.2)
            return not unsettled()

        eventually(settled, within_s=SETTLED_WITHIN_S)

    def check(self, clients: int) -> None:
        """Acknowledged: there once, with its bytes and vectors as an undisturbed worker makes them, and the
        best hit for its own sound, with each API. Deleted: nowhere. Counts agree everywhere."""
        kept = {name: number for number, name in self.ids.items() if number not in self.deleting}
        contents = {name: self.content(number) for name, number in kept.items()}
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        listings = [api.listed(limit=1000) for api in self.stack.apis]
        if any(listing != listings[0] for listing in listings):
            self.complain("the APIs list different recordings")
        listed = {item["id"]: item for item in listings[0]}
        if len(listed) != len(listings[0]):
            self.complain("a recording is listed twice")
        if listed.keys() != kept.keys():
            lost, surplus = kept.keys() - listed.keys(), listed.keys() - kept.keys()
            self.complain(f"lost: {sorted(lost)}; surplus: {sorted(surplus)}")
        for name in kept.keys() & listed.keys():
            item = listed[name]
            told = (item["sha256"], item["metadata"], item["status"])
            if told != (hashes[name], {"n": kept[name]}, "ready"):
                self.complain(f"{kept[name]} is {told}")
        segments = sum(item["segments"] for item in listings[0])
        for number, api in enumerate(self.stack.apis):
            api.found("anything", limit=1)  # brings its index up to date
            if (vectors := api.metric("clasp_index_vectors")) != segments:
                self.complain(f"the index of API {number} has {vectors:g} vectors of {segments} segments")
        if (files := self.stack.contents()) != set(hashes.values()):
            missing, litter = set(hashes.values()) - files, files - set(hashes.values())
            self.complain(f"missing files: {len(missing)}; files of nothing: {len(litter)}")
        self._check_catalogue(contents, segments)
        self._check_searches(kept, clients)

    def _check_catalogue(self, contents: dict[str, bytes], segments: int) -> None:
        """In SQL, beside the program: nothing is there twice, and every vector is the right one."""
        engine = sa.create_engine(self._database_url)
        try:
            with engine.connect() as db:
                count = db.execute(sa.select(sa.func.count()).select_from(RECORDINGS)).scalar_one()
                different = db.execute(sa.select(sa.func.count(RECORDINGS.c.sha256.distinct()))).scalar_one()
                if not count == different == len(contents):
                    self.complain(f"{count} rows with {different} contents for {len(contents)} recordings")
                total = db.execute(sa.select(sa.func.count()).select_from(SEGMENTS)).scalar_one()
                if total != segments:
                    self.complain(f"{total} rows for {segments} segments")
                query = sa.select(RECORDINGS.c.id, SEGMENTS.c.vector)
                joined = query.join(SEGMENTS, SEGMENTS.c.recording == RECORDINGS.c.key)
                stored: dict[str, list[bytes]] = {}
                for name, vector in db.execute(joined.order_by(RECORDINGS.c.key, SEGMENTS.c.ordinal)):
                    stored.setdefault(name, []).append(bytes(vector))
        finally:
            engine.dispose()
        encoder = SpectralSpeechEncoder()
        with tempfile.NamedTemporaryFile() as file:
            for name, content in contents.items():
                Path(file.name).write_bytes(content)
                made = embed_recording(encoder, Path(file.name), max_duration_s=60)
                if [segment.vector.astype("<f4").tobytes() for segment in made] != stored.get(name):
                    self.complain(f"{name} has other vectors than an undisturbed run gives")

    def _check_searches(self, kept: dict[str, int], clients: int) -> None:
        gone = random.Random(self.seed).sample(sorted(self.deleted), min(SAMPLE, len(self.deleted)))
        wanted = [(number, name, api) for name, number in kept.items() for api in range(APIS)]
        wanted += [(number, None, api) for number in gone for api in range(APIS)]

        def look(client: Client, mine: list[tuple[int, str | None, int]]) -> None:
            for number, name, api in mine:
                found = client.found_by_sound(number, api=api)
                if name is None and self.ids[number] in found:
                    self.complain(f"{number} was deleted, and API {api} found it in the end")
                if name is not None and name not in found:
                    self.complain(f"{number} is not API {api}'s best hit for its own sound")
                self.count("looked for in the end")

        with ThreadPoolExecutor(clients) as pool, contextlib.ExitStack() as open_ones:
            everybody = [open_ones.enter_context(Client(self, place)) for place in range(clients)]
            for done in [
                pool.submit(look, client, wanted[place::clients]) for place, client in enumerate(everybody)
            ]:
                done.result()


def run(
    folder: Path,
    *,
    uploads: int,
    clients: int,
    seed: int,
    database_url: str,
    kill_every_s: float = 3.0,
    kills: int | None = None,
    **settings: object,
) -> dict[str, Any]:
    """The figures; `complaints` is empty where all is well. `kills` None: as long as there are uploads."""
    began = time.monotonic()
    with short_leases():
        network = Network(folder, database_url=database_url, seed=seed, new_process=Forked, **settings)
        figures: dict[str, Any] = {}
        try:
            with network.stack:
                network.stack.start()
                started = time.monotonic()
                network.run(uploads=uploads, clients=clients, kill_every_s=kill_every_s, kills=kills)
                figures["uploading_s"] = round(time.monotonic() - started, 1)
                network.settle()
                figures["embedded_after_s"] = round(time.monotonic() - started, 1)
                network.check(clients)
                if any(statuses := network.stack.stop()):
                    network.complain(f"parts ended with {statuses}")
                eventually(lambda: not network.stack.processes(), within_s=20)
                if "unexpected error" in network.stack.log():
                    network.complain("a log tells of an unexpected error")
        except Exception as error:
            network.complain(f"{type(error).__name__}: {error}"[:2000])
            sys.stderr.write(network.stack.log()[-20_000:])
    answered = len(network.ids)
    return {
        "uploads": uploads,
        "clients": clients,
        "seed": seed,
        "vector_store": str(settings.get("vector_store", "faiss")).partition(":")[0],
        "acknowledged": answered,
        "deleted": len(network.deleted),
        "kills": dict(sorted(network.kills.items())),
        "seconds": round(time.monotonic() - began, 1),
        **figures,
        "uploads_a_second": round(answered / figures.get("uploading_s", float("inf")), 1),
        "answers": dict(sorted(network.counts.items())),
        "milliseconds": {kind: percentiles(took) for kind, took in sorted(network.seconds.items())},
        "complaints": network.complaints[:50],
    }


def main() -> int:
    from tests.postgres import postgres_url

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--uploads", type=int, default=5000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kill-every", type=float, default=3.0, metavar="S", help="on average")
    parser.add_argument(
        "--vector-store", default="faiss", help="as CLASP_VECTOR_STORE; milvus: a server of our own"
    )
    parser.add_argument("--database-url", help="of an empty database; by default one of a server of our own")
    parser.add_argument("--out", type=Path, help="where the figures go, too")
    options = parser.parse_args()
    store = options.vector_store
    if store == "milvus":
        from tests.milvus import whole_server

        store = f"milvus:{whole_server()}"
    with tempfile.TemporaryDirectory() as folder:
        figures = run(
            Path(folder).resolve(),
            uploads=options.uploads,
            clients=options.clients,
            seed=options.seed,
            kill_every_s=options.kill_every,
            database_url=options.database_url or postgres_url(),
            vector_store=store,
        )
    text = json.dumps(figures, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)
    return 1 if figures["complaints"] else 0


if __name__ == "__main__":
    sys.exit(main())
