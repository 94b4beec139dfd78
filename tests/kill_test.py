"""Kill a library's processes at every fault point and at random, and see that nothing acknowledged is lost.

    python -m tests.kill_test --kills 300 --seed 1 --log kills.jsonl

First every point of `clasp_core.faults.POINTS`, wherever it is passed: in the service, its worker, or a verb
of the command line; then random moments under load, until there were as many kills as asked for. What died is
started again, now and then to be killed while it starts, and all that clients were told must hold: see
`KillTest.check`. One line for each kill goes to the log, the summary to standard output, as JSON. The exit
status is 1 where anything was violated. With `--audio-store s3` the recordings are in a server of S3's
protocol, which survives, and the points are those that are passed then.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import httpx

from clasp_core.faults import POINTS
from tests import forking
from tests.audio_files import encode, speech
from tests.forking import Forked, short_leases
from tests.object_store import object_store
from tests.service import RunningService, engines, environment, eventually
from tests.stand_in import OTHER

PROGRAM = "tests.stand_in"
ENOUGH = 24
"""Recordings kept at a time, so that each check can look at all of them."""
KILLED = -signal.SIGKILL

IN_UPLOADS = ("store.receiving", "store.sealed", "store.renamed", "store.placed", "catalog.registered")
IN_WORKERS = ("ingest.leased", "ingest.decoded", "ingest.embedded", "ingest.committing", "ingest.committed")
IN_SAVES = ("index.written", "index.placed", "index.described", "index.saved", "durability.synced")
WHERE = {
    "upload": (*IN_UPLOADS, "library.registered"),
    "worker": (*IN_WORKERS, "catalog.completed"),
    "search": ("library.applied",),
    "delete": ("catalog.deleted", "library.forgotten", "store.removed", "library.deleted"),
    "start": ("catalog.migrated", "library.tidied", "library.loaded"),
    "retire": ("catalog.retiring",),
    "shutdown": (*IN_SAVES, "durability.placed"),
    "index": (*IN_UPLOADS, "library.registered", *IN_WORKERS, "catalog.completed"),
    "reindex": tuple(point for point in POINTS if point.startswith("reindex.")),
    "backup": (
        *(point for point in POINTS if point.startswith("backup.")),
        "store.renamed",
        "durability.synced",
        "durability.placed",
    ),
    "restore": (*(point for point in POINTS if point.startswith("restore.")), "store.receiving"),
}
"""In which process, and doing what, each point is passed."""
EVERYWHERE = [(where, point) for where, points in WHERE.items() for point in points]
OF_FOLDERS = {"store.renamed": "s3.sent", "store.placed": "s3.placed", "store.removed": "s3.removed"}
"""Points of a folder, and what a store in S3 passes instead."""
EVERYWHERE_IN_S3 = [
    ("upload", "s3.sending"),
    ("worker", "s3.fetching"),
    ("restore", "s3.sent"),
    *((where, point if where == "backup" else OF_FOLDERS.get(point, point)) for where, point in EVERYWHERE),
]
LARGE = 17 << 20
"""What is sent to such a store in parts."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A recording as a client sends it."""

    id: str
    content: bytes
    metadata: dict[str, Any]
    lang: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


def new_recording(number: int) -> Sent:
    """Half a second of babble unlike any other number's."""
    content = encode(speech(0.5, seed=number), 8_000)
    return Sent(
        f"r{number}", content, {"number": number, "نام": f"ضبط {number}"}, "fa" if number % 2 else "en-GB"
    )


@dataclass
class Ledger:
    """What clients were told, and what they asked for and were never told about."""

    kept: dict[str, Sent] = field(default_factory=dict)
    deleted: dict[str, Sent] = field(default_factory=dict)
    unanswered: dict[str, tuple[str, Sent]] = field(default_factory=dict)
    """What to ask for again, by id: "upload" or "delete" of a recording."""
    surprises: list[str] = field(default_factory=list)

    def upload(self, client: httpx.Client, sent: Sent) -> None:
        self.unanswered[sent.id] = ("upload", sent)
        form = {"id": sent.id, "metadata": json.dumps(sent.metadata), "lang": sent.lang}
        answer = client.post("/audio", files={"file": sent.content}, data=form)
        if answer.status_code not in (200, 202) or answer.json()["id"] != sent.id:
            self.surprises.append(f"upload of {sent.id}: {answer.status_code} {answer.text}")
            return
        self.kept[sent.id] = sent
        del self.unanswered[sent.id]

    def upload_again(self, client: httpx.Client, sent: Sent) -> None:
        """The same bytes under no name, of a recording that is kept: the first record is the answer."""
        answer = client.post("/audio", files={"file": sent.content})
        if (answer.status_code, answer.json().get("id")) != (200, sent.id):
            self.surprises.append(f"second upload of {sent.id}: {answer.status_code} {answer.text}")

    def delete(self, client: httpx.Client, sent: Sent) -> None:
        again = sent.id in self.unanswered
        self.unanswered[sent.id] = ("delete", sent)
        self.kept.pop(sent.id, None)
        answer = client.delete(f"/audio/{sent.id}")
        if answer.status_code != 204 and not (again and answer.status_code == 404):
            self.surprises.append(f"deletion of {sent.id}: {answer.status_code} {answer.text}")
        self.deleted[sent.id] = sent
        del self.unanswered[sent.id]

    def ask_again(self, client: httpx.Client) -> None:
        """For all that was never answered, until it is."""
        for what, sent in list(self.unanswered.values()):
            (self.upload if what == "upload" else self.delete)(client, sent)


class ForkedService(RunningService):
    """A service whose processes are all forked from one that is not part of it."""

    def __init__(self, data_dir: Path, **settings: Any) -> None:
        super().__init__(data_dir, **settings)
        self.new_process = Forked

    def worker_pids(self) -> list[int]:
        return self.processes()[1:]

    def processes(self) -> list[int]:
        """The API process, and workers that write the same log."""
        assert self.process is not None
        return [
            self.process.pid,
            *(pid for pid in writers(self.data_dir / "service.log") if pid != self.process.pid),
        ]


class KillTest:
    """One data directory, the service on it, and what is done to them."""

    def __init__(self, folder: Path, seed: int, log: TextIO) -> None:
        self.chance = random.Random(seed)
        self.ledger = Ledger()
        self.kills: collections.Counter[str] = collections.Counter()
        self.restarts = 0
        self.violations: list[str] = []
        self._folder = folder
        self._log = log
        self._numbers = iter(range(seed * 1_000_000, (seed + 1) * 1_000_000))
        self._began = time.monotonic()
        self.service = ForkedService(folder, program=PROGRAM)
        self._data = folder / "index_data"
        self._backup = folder / "backup"
        self._in_s3 = "audio_store" in self.service.settings

    def __enter__(self) -> "KillTest":
        self._start()
        for _ in range(5):
            self.ledger.upload(self.service.client, self._new())
        return self

    def __exit__(self, *error: Any) -> None:
        self.service.__exit__(*error)

    @property
    def count(self) -> int:
        return sum(self.kills.values())

    def summary(self) -> dict[str, Any]:
        everywhere = EVERYWHERE_IN_S3 if self._in_s3 else EVERYWHERE
        points = {f"{where} {point}" for where, point in everywhere}
        return {
            "kills": self.count,
            "points_passed": len(points & self.kills.keys()),
            "points": len(points),
            "by": dict(sorted(self.kills.items())),
            "restarts": self.restarts,
            "uploads": len(self.ledger.kept) + len(self.ledger.deleted),
            "deletions": len(self.ledger.deleted),
            "seconds": round(time.monotonic() - self._began),
            "violations": self.violations,
        }

    # --- one kill

    def at_point(self, where: str, point: str) -> None:
        """Die at a point, start again, and look."""
        getattr(self, f"_at_{where}")(point)
        self._killed(f"{where} {point}")
        self._look()

    def at_random(self) -> None:
        """Die at a random moment under load, start again, and look."""
        kind = self.chance.choice(["worker", "worker", "api", "api", "group", "backup", "reindex", "index"])
        files, in_time = self._new_files() if kind == "index" else [], True
        with self._load():
            if kind in ("backup", "reindex", "index"):
                in_time = self._verb_killed_within(kind, self.chance.uniform(0.0, 1.5))
            else:
                if kind == "worker":
                    for _ in range(2):
                        self._kill_worker()
                        self.kills["random worker"] += 1
                        self._say(kill=self.count, what="random worker")
                    self._kill_worker()
                else:
                    time.sleep(self.chance.uniform(0.1, 1.5))
                    _kill(self.service.processes() if kind == "group" else [self._process.pid])
                    self._process.wait()
        if in_time:
            self._killed(f"random {kind}")
        if files:
            self._stop_and_start()  # which sweeps bytes that the verb had placed, and made no recording of
            self._adopt(files)
        self._look()

    def _kill_worker(self) -> None:
        time.sleep(self.chance.uniform(0.1, 1.5))
        _kill(eventually(self.service.worker_pids, within_s=30))

    def _killed(self, what: str) -> None:
        self.kills[what] += 1
        self._say(kill=self.count, what=what)
        if self._process.poll() is not None:
            self._start()
        elif any(name in what for name in ("ingest", "catalog.completed", "s3.fetching")):
            self._stop_and_start()

    def _look(self) -> None:
        try:
            self.check(thorough=self.count % 20 == 0)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"after kill {self.count}, {where.line}: {type(error).__name__}: {error}"
            self.violations.append(reason[:2000])
            self._say(violation=reason)
            raise

    # --- where the points are

    def _at_upload(self, point: str) -> None:
        self._start_with(point)
        new = self._new()
        if point == "s3.sending":  # behind its end, a WAV file may hold anything
            new = replace(new, content=new.content + self.chance.randbytes(LARGE))
        with contextlib.suppress(httpx.TransportError):
            self.ledger.upload(self.service.client, new)
        self._expect_death()

    def _at_worker(self, point: str) -> None:
        self._start_with(point)
        for _ in range(3):
            self.ledger.upload(self.service.client, self._new())
        eventually(lambda: self.service.metric("clasp_worker_restarts_total") >= 1, within_s=60)

    def _at_search(self, point: str) -> None:
        self._start_with(point, wait=False)  # where changes are not in the snapshot yet, it dies at once
        with contextlib.suppress(httpx.TransportError, AssertionError):
            self.service.wait_until_ready()
            self.ledger.upload(self.service.client, self._new())

        def asked_in_vain() -> bool:
            with contextlib.suppress(httpx.TransportError):
                self.service.found("anything")
                return False
            return True

        eventually(asked_in_vain, within_s=60)
        self._expect_death()

    def _at_delete(self, point: str) -> None:
        self._start_with(point)
        with contextlib.suppress(httpx.TransportError):
            self.ledger.delete(self.service.client, self.chance.choice(list(self.ledger.kept.values())))
        self._expect_death()

    def _at_start(self, point: str) -> None:
        self._start_with(point, wait=False)
        self._expect_death()

    def _at_retire(self, point: str) -> None:
        self._reindex()
        self._stop()
        with contextlib.closing(sqlite3.connect(self._data / "catalog.sqlite3")) as db:
            db.execute("UPDATE models SET kept_until = 0 WHERE state = 'retired'")
            db.commit()
        self._at_start(point)

    def _at_shutdown(self, point: str) -> None:
        self._start_with(point)
        self.ledger.upload(self.service.client, self._new())
        self._settle()
        self.service.found("anything")
        self._process.terminate()
        self._expect_death()

    def _at_index(self, point: str) -> None:
        new = self._new_files()
        folder = self._folder / "files"
        _kill(self.service.processes())  # so that it is the verb that embeds
        self._process.wait()
        died = self._clasp("index", folder, fault=point)
        assert died.returncode == KILLED, died
        again = self._clasp("index", folder, "--json")
        assert again.returncode == 0, again
        outcome = json.loads(again.stdout)
        assert (outcome["indexed"] + outcome["known"], outcome["failed"]) == (3, []), outcome
        self._start()
        assert self._adopt(new) == 3

    def _new_files(self) -> list[Sent]:
        folder = self._folder / "files"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        new = [self._new() for _ in range(3)]
        for sent in new:
            (folder / f"{sent.id}.wav").write_bytes(sent.content)
        return new

    def _adopt(self, files: list[Sent]) -> int:
        """Note those of the files that became recordings, under ids that nobody was told; how many."""
        named = {item["sha256"]: item for item in self.service.listed(limit=1000)}
        here = [sent for sent in files if sent.sha256 in named]
        for sent in here:
            item = named[sent.sha256]
            assert item["metadata"]["path"].endswith(f"{sent.id}.wav")
            self.ledger.kept[item["id"]] = Sent(item["id"], sent.content, item["metadata"], "")
        return len(here)

    def _at_reindex(self, point: str) -> None:
        died = self._clasp("reindex", "--model", self._coming(), fault=point)
        assert died.returncode == KILLED, died
        self.check()
        self._reindex()

    def _at_backup(self, point: str) -> None:
        self.ledger.upload(self.service.client, self._new())
        if point == "backup.described":  # there is something to remove then
            self.ledger.delete(self.service.client, self.chance.choice(list(self.ledger.kept.values())))
        died = self._clasp("backup", self._backup, fault=point)
        assert died.returncode == KILLED, died
        if (self._backup / "manifest.json").exists():
            self._verify()
        self._back_up()

    def _at_restore(self, point: str) -> None:
        self._back_up()
        there = self._folder / "restored"
        shutil.rmtree(there, ignore_errors=True)
        if self._in_s3:
            object_store().clear(there)
        stores = engines(there)
        died = self._clasp("restore", self._backup, "--data-dir", there, fault=point, **stores)
        assert died.returncode == KILLED, died
        if not (there / "catalog.sqlite3").exists():
            placed = object_store().keys(there) if self._in_s3 else (there / "audio").exists()
            if placed:  # a service that is started now must not take it for a new library
                refused = self._clasp("serve", "--port", 0, data_dir=there, **stores)
                assert (refused.returncode, "restore again" in refused.stderr) == (1, True), refused
            again = self._clasp("restore", self._backup, "--data-dir", there, **stores)
            assert again.returncode == 0, again
        with contextlib.closing(sqlite3.connect(there / "catalog.sqlite3")) as db:
            restored = dict(db.execute("SELECT id, sha256 FROM recordings"))
        assert restored == {sent.id: sent.sha256 for sent in self.ledger.kept.values()}
        for sha256 in restored.values():
            name = f"{sha256[:2]}/{sha256[2:]}"
            content = (
                object_store().content(there, name) if self._in_s3 else (there / "audio" / name).read_bytes()
            )
            assert hashlib.sha256(content).hexdigest() == sha256

    # --- verbs

    def _clasp(self, *arguments: object, **settings: object) -> "subprocess.CompletedProcess[str]":
        """Run a verb to its end."""
        command = [sys.executable, "-m", PROGRAM, *map(str, arguments)]
        env = environment(**({"model": self._model(), "threads": 1} | engines(self._data) | settings))
        return forking.run(command, env=env, cwd=self._folder, timeout=120)

    def _back_up(self) -> None:
        done = self._clasp("backup", self._backup)
        assert done.returncode == 0, done
        self._verify()

    def _verify(self) -> None:
        verified = self._clasp("restore", self._backup, "--verify-only")
        assert verified.returncode == 0, verified

    def _reindex(self) -> None:
        """To the other model, unless that was switched to already; and the service follows."""
        done = self._clasp("reindex", "--model", self._coming(), "--json")
        assert done.returncode == 0, done
        new = json.loads(done.stdout)["model"]["fingerprint"]
        eventually(lambda: self.service.client.get("/readyz").json().get("model") == new, within_s=60)

    def _verb_killed_within(self, verb: str, seconds: float) -> bool:
        """Whether it was not done already."""
        arguments: dict[str, list[object]] = {
            "backup": [self._backup],
            "reindex": ["--model", self._coming()],
            "index": [self._folder / "files"],
        }
        command = [sys.executable, "-m", PROGRAM, verb, *map(str, arguments[verb])]
        env = environment(model=self._model(), threads=1, **engines(self._data))
        with Path(os.devnull).open("wb") as nothing:
            process = Forked(command, env=env, cwd=self._folder, stdout=nothing, stderr=nothing)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.kill()
        if verb == "backup" and (self._backup / "manifest.json").exists():
            self._verify()
        return process.wait() == KILLED

    # --- the service

    @property
    def _process(self) -> "subprocess.Popen[bytes]":
        assert self.service.process is not None
        return self.service.process

    def _start(self) -> None:
        """Start what is not armed; now and then it is killed again before it is up."""
        self.service.settings.pop("fault", None)
        self.service.settings["model"] = self._model()
        while self.chance.random() < 0.35 and self.restarts:
            self.service.start(wait=False)
            time.sleep(self.chance.uniform(0.0, 1.5))
            _kill(self.service.processes() if self.chance.random() < 0.5 else [self._process.pid])
            self._process.wait()
            self.restarts += 1
            self.kills["random start"] += 1
            self._say(kill=self.count, what="random start")
        self.service.start()
        self.restarts += 1

    def _start_with(self, point: str, *, wait: bool = True) -> None:
        self._stop()
        self.service.settings |= {"fault": point, "model": self._model()}
        self.service.start(wait=wait)
        self.restarts += 1

    def _stop(self) -> None:
        if self._process.poll() is None:
            if self.chance.random() < 0.5:
                assert self.service.stop() == 0
            else:
                self.service.kill()

    def _stop_and_start(self) -> None:
        self._stop()
        self._start()

    def _expect_death(self) -> None:
        assert self._process.wait(60) == KILLED, self._process.returncode

    def _model(self) -> str:
        """The name of the model that the library has, which the service is to be started with."""
        try:
            with contextlib.closing(
                sqlite3.connect(f"file:{self._data}/catalog.sqlite3?mode=ro", uri=True)
            ) as db:
                (name,) = db.execute("SELECT name FROM models WHERE state = 'active'").fetchone()
                return str(name)
        except (sqlite3.Error, TypeError):  # there is no library yet
            return "stand-in"

    def _coming(self) -> str:
        return "stand-in" if self._model() == OTHER else OTHER

    @contextlib.contextmanager
    def _load(self) -> Iterator[None]:
        """Three clients at work, each with recordings of its own."""
        over = threading.Event()
        mine = list(self.ledger.kept.values())
        clients = [
            threading.Thread(target=self._work, args=[over, mine[number::3], self.chance.getrandbits(32)])
            for number in range(3)
        ]
        for client in clients:
            client.start()
        try:
            yield
        finally:
            over.set()
            for client in clients:
                client.join()

    def _work(self, over: threading.Event, mine: list[Sent], seed: int) -> None:
        chance = random.Random(seed)
        with httpx.Client(base_url=self.service.client.base_url, timeout=60) as client:
            try:
                while not over.is_set():
                    if mine and (len(mine) > ENOUGH / 3 or chance.random() < 0.3):
                        self.ledger.delete(client, mine.pop(chance.randrange(len(mine))))
                    elif mine and chance.random() < 0.3:
                        self.ledger.upload_again(client, chance.choice(mine))
                    else:
                        sent = self._new()
                        self.ledger.upload(client, sent)
                        mine.append(sent)
                    client.get("/search", params={"q": "anything"})
            except httpx.TransportError:
                return  # the service is gone; what was not answered is asked for again

    # --- what must hold

    def _new(self) -> Sent:
        return new_recording(next(self._numbers))

    def _settle(self) -> None:
        """All that was asked for is answered, and embedded. A recording that was at work in five kills is
        given up with a reason that says to upload it again; so that is done here."""
        self.ledger.ask_again(self.service.client)

        def unsettled() -> list[dict[str, Any]]:
            items = self.service.listed(limit=1000)
            for item in items:
                if item["status"] == "failed":
                    assert item["error"]["code"] == "processing_failed", item
                    self.ledger.upload_again(self.service.client, self.ledger.kept[item["id"]])
            return [item for item in items if item["status"] != "ready"]

        eventually(lambda: not unsettled(), within_s=120)

    def check(self, *, thorough: bool = False) -> None:
        """Acknowledged means kept, with its bytes, its metadata and its place in the index; deleted means
        gone; nothing is there twice; all counts agree; nothing lies about."""
        self._settle()
        service, ledger = self.service, self.ledger
        assert not ledger.surprises, ledger.surprises
        listed = service.listed(limit=1000)
        items = {item["id"]: item for item in listed}
        assert items.keys() == ledger.kept.keys(), (
            f"lost: {ledger.kept.keys() - items.keys()}, not forgotten: {items.keys() - ledger.kept.keys()}"
        )
        assert len(items) == len(listed), "listed twice"
        for sent in ledger.kept.values():
            item = items[sent.id]
            told = (item["sha256"], item["size_bytes"], item["metadata"], item["lang"] or "", item["status"])
            assert told == (sent.sha256, len(sent.content), sent.metadata, sent.lang, "ready"), item
        assert {hit["id"] for hit in service.found("anything", limit=1000)} == items.keys()
        assert service.metric("clasp_recordings", status="ready") == len(items)
        assert service.metric("clasp_recordings") == len(items)
        assert service.metric("clasp_index_vectors") == sum(item["segments"] for item in listed)
        kept = list(ledger.kept.values())
        for sent in kept if thorough else self.chance.sample(kept, min(3, len(kept))):
            assert service.client.get(f"/audio/{sent.id}/content").raise_for_status().content == sent.content
            best = service.found_by_sound(sent.content)[0]
            assert (best["id"], best["score"] > 0.999) == (sent.id, True), best
        gone = list(ledger.deleted)
        for one in gone if thorough else gone[-3:]:
            for path in (f"/audio/{one}", f"/audio/{one}/content"):
                assert service.client.get(path).status_code == 404, one
        self._check_files({sent.sha256 for sent in kept})

    def _check_files(self, contents: set[str]) -> None:
        expected = {f"{sha256[:2]}/{sha256[2:]}" for sha256 in contents}
        found = {path for path in self.service.stored() if not path.startswith("incoming/")}
        assert expected == found, f"missing: {expected - found}, litter: {found - expected}"
        known = {"catalog.sqlite3", "catalog.sqlite3-wal", "catalog.sqlite3-shm", "audio", "index"}
        assert {path.name for path in self._data.iterdir()} <= known
        assert len(list((self._data / "index").glob("vectors-*"))) <= 2

    def _say(self, **line: object) -> None:
        self._log.write(json.dumps({"s": round(time.monotonic() - self._began, 1)} | line) + "\n")
        self._log.flush()


def writers(path: Path) -> list[int]:
    """Processes of ours that have a file open."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/2"):
        with contextlib.suppress(OSError):
            if link.readlink() == path:
                found.append(int(link.parts[2]))
    return found


def _kill(pids: list[int]) -> None:
    """All at once."""
    subprocess.run(["kill", "-KILL", *map(str, pids)], stderr=subprocess.DEVNULL)


def run(folder: Path, *, kills: int, seed: int, log: TextIO, points: list[tuple[str, str]]) -> dict[str, Any]:
    """These points in random order, then random moments until there were so many kills; the summary. Ends
    at the first violation: what follows one means nothing."""
    with short_leases(), KillTest(folder, seed, log) as test:
        try:
            for where, point in test.chance.sample(points, len(points)):
                test.at_point(where, point)
            while test.count < kills:
                test.at_random()
            test.check(thorough=True)
        except BaseException as error:
            if not test.violations:
                test.violations.append(f"{type(error).__name__}: {error}"[:2000])
        return test.summary()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=Path, default=Path("kills.jsonl"))
    parser.add_argument("--folder", type=Path, help="keep the data directory here; by default it is removed")
    parser.add_argument("--at", help="only this point, such as library.registered, wherever it is passed")
    parser.add_argument("--audio-store", choices=["folder", "s3"], default="folder")
    arguments = parser.parse_args()
    os.environ["CLASP_TEST_AUDIO_STORE"] = arguments.audio_store
    everywhere = EVERYWHERE if arguments.audio_store == "folder" else EVERYWHERE_IN_S3
    points = [pair for pair in everywhere if arguments.at in (None, pair[1])]
    kept: Callable[[], contextlib.AbstractContextManager[str]] = tempfile.TemporaryDirectory
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True)
        kept = lambda: contextlib.nullcontext(str(arguments.folder))  # noqa: E731
    with kept() as folder, arguments.log.open("a") as log:
        kills = 0 if arguments.at else arguments.kills
        summary = run(Path(folder), kills=kills, seed=arguments.seed, log=log, points=points)
        log.write(json.dumps({"seed": arguments.seed} | summary) + "\n")
    sys.stdout.write(json.dumps(summary, indent=1) + "\n")
    raise SystemExit(bool(summary["violations"]))


if __name__ == "__main__":
    main()
