"""`clasp reindex` beside a running service, which answers throughout, by one model and then by the other."""

import asyncio
import contextlib
import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.answering import Answer, Answerer, Engine, EngineChanged
from app.telemetry import Metrics
from clasp_core.library import Library, Question
from clasp_core.models import Part
from clasp_core.types import Embeddings
from tests.app.test_processes import refuses_to_start
from tests.audio_files import encode, speech
from tests.core.doubles import LetterTextEncoder, SpectralSpeechEncoder, add, random_vectors
from tests.postgres import database_settings
from tests.service import ROOT, RunningService, clasp, engines, environment, eventually, sql
from tests.stand_in import OTHER

QUESTION = "the train is late because of a tree"


def recording(seed: int) -> bytes:
    """A second of babble unlike any other seed's."""
    return encode(speech(1.0, seed=seed), 16_000)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: mini's architecture with weights of its own, on both sides."""
    import torch

    from clasp_core import models
    from clasp_core.mini import read_fusion, write_fusion

    mini = Path(models.__file__).parent / "weights" / "mini"
    folder = tmp_path_factory.mktemp("models") / "other"
    folder.mkdir()
    (folder / "model.json").write_text((mini / "model.json").read_text())
    config, tensors = read_fusion(mini / "fusion.safetensors")
    generator = torch.Generator().manual_seed(1)
    for values in tensors.values():
        if values.is_floating_point() and values.numel() > 1:
            values += 0.05 * values.std() * torch.randn(values.shape, generator=generator)
    write_fusion(config, tensors, folder / "fusion.safetensors")
    return folder


@contextlib.contextmanager
def reindexing(
    folder: Path, model: Path | str, program: str = "app.cli"
) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", program, "reindex", "--model", str(model), "--json"]
    with subprocess.Popen(
        command,
        env=environment(threads=1, **engines(folder / "index_data")) | {"PYTHONPATH": str(ROOT)},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def finished(process: "subprocess.Popen[str]") -> dict[str, Any]:
    printed, complaints = process.communicate(timeout=120)
    assert process.returncode == 0, complaints
    outcome: dict[str, Any] = json.loads(printed)
    return outcome


def embedded_by(folder: Path) -> dict[str, int]:
    """Recordings that have vectors, by model."""
    return dict(
        sql(folder / "index_data", "SELECT model, count(DISTINCT recording) FROM segments GROUP BY model")
    )


@dataclass
class Witness:
    """One client that uploads, deletes and asks for all there is, and notes what it is answered."""

    contents: dict[str, bytes]
    answers: list[dict[str, Any]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    ready: set[str] = field(default_factory=set)

    def watch(self, base_url: httpx.URL) -> None:
        seeds = iter(range(1000, 2000))
        waiting: set[str] = set()
        with httpx.Client(base_url=base_url, timeout=60) as client:
            while not self.over.wait(0.15):
                turn = next(seeds)
                if turn % 4 == 0 and len(waiting) < 3:
                    self.contents[f"r{turn}"] = recording(turn)
                    form = {"data": {"id": f"r{turn}"}, "files": {"file": self.contents[f"r{turn}"]}}
                    self._ask(client, "POST", "/audio", **form)
                    waiting.add(f"r{turn}")
                if turn % 16 == 0:
                    gone = min(self.ready)
                    self.ready.discard(gone)
                    del self.contents[gone]
                    self._ask(client, "DELETE", f"/audio/{gone}")
                for name in list(waiting):
                    if self._ask(client, "GET", f"/audio/{name}").json()["status"] == "ready":
                        waiting.discard(name)
                        self.ready.add(name)
                if turn % 6 == 0:
                    sounding = max(self.ready)
                    found = self._ask(
                        client, "POST", "/search/audio", files={"file": self.contents[sounding]}
                    ).json()
                    best = found["hits"][0]
                    if best["id"] != sounding or best["score"] < 0.999:
                        self.wrong.append(f"{sounding} does not sound like itself: {best}")
                answer = self._ask(client, "GET", "/search", params={"q": QUESTION, "limit": 1000}).json()
                self.answers.append(answer)
                there = {hit["id"] for hit in answer["hits"]}
                if missing := self.ready - there:
                    self.wrong.append(f"missing: {missing}")
                if strange := there - self.ready - waiting - {"late"}:
                    self.wrong.append(f"deleted: {strange}")

    def _ask(self, client: httpx.Client, method: str, path: str, **rest: Any) -> httpx.Response:
        answer = client.request(method, path, **rest)
        if not answer.is_success:
            self.refused.append(f"{method} {path}: {answer.status_code} {answer.text}")
        return answer


@pytest.mark.timeout(240)
def test_a_service_changes_its_model_without_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator brings a better model to a service in use. Nobody who uploads, deletes or asks at that time
    may notice but by the model's name in the answers."""
    monkeypatch.setenv("STAND_IN_PAUSE_S", "0.1")
    program, other = "tests.stand_in", OTHER
    with RunningService(tmp_path, program=program) as service:
        service.start()
        witness = Witness({f"a{seed}": recording(seed) for seed in range(12)})
        for name, content in witness.contents.items():
            service.upload(content, id=name).raise_for_status()
        for name in witness.contents:
            assert service.settled(name)["status"] == "ready"
            witness.ready.add(name)
        old = service.client.get("/readyz").json()["model"]
        workers = service.worker_pids()
        client = threading.Thread(target=witness.watch, args=[service.client.base_url])
        client.start()
        try:
            with reindexing(tmp_path, other, program) as process:
                outcome = finished(process)
            new = outcome["model"]["fingerprint"]
            assert (outcome["result"], outcome["failed"]) == ("switched", [])
            assert outcome["embedded"] >= 12

            def follows() -> bool:
                return service.client.get("/readyz").raise_for_status().json()["model"] == new

            eventually(follows, within_s=30)
            seen = len(witness.answers)
            late = service.ready(recording(5000), id="late")
            eventually(lambda: len(witness.answers) > seen + 10, within_s=60)
        finally:
            witness.over.set()
            client.join()
        assert witness.refused == []
        assert witness.wrong == []
        check_one_model_at_a_time(witness.answers, [old, new])
        assert late["status"] == "ready"
        eventually(lambda: not set(workers) & set(service.worker_pids()), within_s=10)
        assert service.metric("clasp_model", fingerprint=new) == 1
        assert service.metric("clasp_model", fingerprint=old) == 0
        assert service.metric("clasp_worker_restarts_total") == 0
        eventually(
            lambda: service.metric("clasp_recordings", status="ready") == len(service.listed()), within_s=60
        )
        expected = service.found(QUESTION, limit=1000)
        assert service.stop() == 0
        assert "unexpected error" not in service.log()

        refuses_to_start(tmp_path, "another model", f"CLASP_MODEL={other}", "clasp reindex --model mini")
        service.settings["model"] = other
        service.start()
        assert service.found(QUESTION, limit=1000) == expected
        assert service.stop() == 0


def check_one_model_at_a_time(answers: list[dict[str, Any]], fingerprints: list[str]) -> None:
    """First one, then the other; and all scores in an answer are those that its model gives."""
    by = [answer["model"]["fingerprint"] for answer in answers]
    assert by == sorted(by, key=fingerprints.index)
    assert set(by) == set(fingerprints)
    scores: dict[tuple[str, str], float] = {}
    for model, answer in zip(by, answers, strict=True):
        for hit in answer["hits"]:
            assert hit["segments"], hit
            assert hit["score"] == pytest.approx(
                scores.setdefault((model, hit["id"]), hit["score"]), abs=1e-4
            )
    both = {name for model, name in scores if model == fingerprints[0]} & {
        name for model, name in scores if model == fingerprints[1]
    }
    assert len(both) > 3
    assert all(abs(scores[fingerprints[0], name] - scores[fingerprints[1], name]) > 1e-3 for name in both), (
        "the two models are too alike for this test to see a mixture"
    )


class Unhurried(LetterTextEncoder):
    """Leaves time for something to happen between encoding and searching."""

    def encode(self, texts: Sequence[str]) -> Embeddings:
        time.sleep(0.002)
        return super().encode(texts)


class SmallModel:
    """A model of letters and bands of frequency, with vectors of its own length."""

    def __init__(self, dim: int) -> None:
        self.name = self.fingerprint = f"small-{dim}"
        self.dim = dim

    def text_encoder(self) -> LetterTextEncoder:
        return Unhurried(self.dim)

    def speech_encoder(self) -> SpectralSpeechEncoder:
        return SpectralSpeechEncoder(self.dim)

    def parts(self) -> list[Part]:
        return []


def test_every_question_is_answered_by_one_engine(tmp_path: Path) -> None:
    """The exchange comes at any moment, thousands of times here: texts that wait are answered all the same,
    all of it by one model, and a vector that the other one made is sent back to be made again."""
    engines = []
    for dim in (8, 24):
        model = SmallModel(dim)
        library = Library(tmp_path / f"{dim}", model=model.fingerprint, dim=dim)
        for number in range(5):
            add(library, f"{number}", random_vectors(number, 2, dim))
        engines.append(Engine(model, library))
    expected = {
        engine.model.fingerprint: engine.library.search(engine.text_encoder.encode(["bees"]), [Question()])[0]
        for engine in engines
    }
    answerer = Answerer(engines[0], Metrics())
    answerer.start()
    over = threading.Event()

    def exchange() -> None:
        for engine in itertools.cycle(engines):
            answerer.engine = engine
            if over.wait(0.0005):
                return

    async def ask_on() -> tuple[list[Answer], list[object]]:
        texts: list[Answer] = []
        sounds: list[object] = []
        for _ in range(60):
            made_by = answerer.engine
            vector = made_by.text_encoder.encode(["bees"])[0]
            texts += await asyncio.gather(*(answerer.ask("bees", Question()) for _ in range(8)))
            by_sound = (answerer.ask(vector, Question(), made_by=made_by) for _ in range(8))
            sounds += await asyncio.gather(*by_sound, return_exceptions=True)
        return texts, sounds

    exchanging = threading.Thread(target=exchange)
    exchanging.start()
    try:
        texts, sounds = asyncio.run(ask_on())
    finally:
        over.set()
        exchanging.join()
        answerer.stop()
    answered = [answer for answer in sounds if not isinstance(answer, EngineChanged)]
    assert 0 < len(answered) < len(sounds)
    for answer in [*texts, *answered]:
        assert isinstance(answer, Answer)
        assert answer.hits == expected[answer.model.fingerprint]
    assert {answer.model.fingerprint for answer in texts} == expected.keys()


@pytest.mark.timeout(200)
def test_a_service_that_cannot_follow_says_so_and_goes_on(tmp_path: Path, other: Path) -> None:
    """The new model is not mounted here: answers by the old one are better than none, the reason is
    where operators look, and once the folder is there nothing else has to be done."""
    folder = tmp_path / "models" / "mine"
    folder.parent.mkdir()
    folder.symlink_to(other)
    folder = folder.resolve()
    with RunningService(tmp_path, workers=0) as service:
        (tmp_path / "one.wav").write_bytes(recording(1))
        assert clasp("index", "one.wav", cwd=tmp_path).returncode == 0
        service.start()
        before = service.found(QUESTION)
        assert service.process is not None
        service.process.send_signal(signal.SIGSTOP)
        moved = folder.with_name("away")
        try:
            with reindexing(tmp_path, folder) as process:
                assert finished(process)["result"] == "switched"
            folder.rename(moved)
        finally:
            service.process.send_signal(signal.SIGCONT)
        try:
            refusal = eventually(
                lambda: answer if not (answer := service.client.get("/readyz")).is_success else None,
                within_s=20,
            )
            assert refusal.status_code == 503
            assert str(folder) in refusal.json()["detail"]
            assert service.found(QUESTION) == before
            uploaded = service.upload(recording(2)).json()["id"]
        finally:
            moved.rename(folder)
        service.wait_until_ready()
        after = service.found(QUESTION)
        assert [hit["id"] for hit in after] == [hit["id"] for hit in before]
        assert after[0]["score"] != pytest.approx(before[0]["score"], abs=1e-4)
        assert service.client.get(f"/audio/{uploaded}").json()["status"] == "pending"
        assert service.stop() == 0


def test_a_model_that_is_not_there_changes_nothing(tmp_path: Path) -> None:
    """A typing error costs one line, and no data directory."""
    done = clasp("reindex", "--model", "huge", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("clasp: There is no model 'huge'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(200)
def test_an_interrupted_run_is_gone_on_with_beside_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C is status 1 and one line, and what was done stays done. A worker on a machine of its own, which
    nobody would start anew, has the new model after the switch."""
    from clasp_core.catalog import NewRecording
    from clasp_core.library import open_catalog
    from clasp_core.store import FolderStore

    monkeypatch.setenv("STAND_IN_PAUSE_S", "0.2")
    program = "tests.stand_in"
    folder = tmp_path / "many"
    folder.mkdir()
    for seed in range(12):
        (folder / f"{seed}.wav").write_bytes(recording(seed))
    assert clasp("index", folder, cwd=tmp_path, program=program).returncode == 0
    with reindexing(tmp_path, OTHER, program) as process:
        eventually(lambda: len(embedded_by(tmp_path)) == 2, within_s=60)
        process.send_signal(signal.SIGINT)
        printed, complaints = process.communicate(timeout=30)
    assert process.returncode == 1
    assert complaints == "clasp: stopped before the switch; run it again to go on from here\n"
    assert json.loads(printed)["result"] == "stopped"
    done = json.loads(printed)["embedded"]
    assert 0 < done < 12

    command = [sys.executable, "-m", program, "worker"]
    data_dir = tmp_path / "index_data"
    with (
        (tmp_path / "worker.log").open("wb") as log,
        subprocess.Popen(
            command,
            env=environment(threads=1, **engines(data_dir)) | {"PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            stderr=log,
        ) as worker,
    ):
        try:
            eventually(lambda: "worker ready" in (tmp_path / "worker.log").read_text(), within_s=60)
            shown = clasp("reindex", "--model", OTHER, cwd=tmp_path, program=program)
            assert shown.returncode == 0, shown.stderr
            assert shown.stdout.startswith(f"{12 - done} embedded, 0 failed\nswitched: ")
            catalog = open_catalog(data_dir, **database_settings(data_dir))
            store = FolderStore(tmp_path / "index_data" / "audio")
            with store.receive() as upload:
                upload.write(recording(100))
                upload.seal()
                new = NewRecording("late", "default", upload.sha256, upload.size_bytes, None, None, {})
                catalog.register(new, lambda: store.place(upload))
            eventually(lambda: catalog.get("late").status == "ready", within_s=60)
            active = catalog.active()
            assert active is not None
            assert active.name == OTHER
            assert catalog.get("late").model == active.fingerprint
            catalog.close()
            worker.terminate()
            assert worker.wait(30) == 0
        finally:
            worker.kill()
    again = clasp("reindex", "--model", OTHER, cwd=tmp_path, program=program)
    assert again.returncode == 0
    assert again.stdout.startswith("nothing to do: ")
