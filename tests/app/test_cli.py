"""The command line: verbs, exit statuses, one clear line where something fails, JSON that parses."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import soundfile as sf

from app.cli import VERBS as GROUPS
from clasp_core.calibration import calibration_of
from tests.audio_files import encode, speech, tone
from tests.conftest import SAMPLES, Sample
from tests.milvus import IN_MEMORY
from tests.postgres import IN_A_FILE
from tests.service import ROOT, RunningService, clasp, engines, environment, eventually

VERBS = [
    "serve",
    "worker",
    "index",
    "search",
    "embed",
    "evaluate",
    "calibrate",
    "map",
    "compare",
    "dataset",
    "train",
    "reindex",
    "keys",
    "keys create",
    "keys list",
    "keys revoke",
    "status",
    "doctor",
    "capacity",
    "stages",
    "backup",
    "restore",
    "models",
    "models list",
    "models fetch",
    "models convert",
]
STAND_IN = "tests.stand_in"
quick = partial(clasp, program=STAND_IN)
"""The same verbs with a model that takes no time, where what it understands does not matter."""
FIGURES = {"n", "pool", "hits@1", "hits@5", "hits@10", "mrr", "mean_rank", "macro_f1"}


def failed(done: Any, *words: str) -> None:
    """That a command failed as promised: status 1, and one line on standard error that says why."""
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("clasp: ")
    for word in words:
        assert word in done.stderr


def as_json(done: Any) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory, samples: dict[str, Sample]) -> Path:
    """A working directory whose index_data holds three samples and knows of one broken file."""
    folder = tmp_path_factory.mktemp("cli")
    recordings = folder / "recordings"
    (recordings / "more").mkdir(parents=True)
    for name, place in (
        ("en-bees", "more/bees.opus"),
        ("en-volcano", "volcano.opus"),
        ("es-bread", "pan y água.opus"),
    ):
        (recordings / place).write_bytes(samples[name].content)
    (recordings / "notes.txt").write_text("not a recording")
    (recordings / ".hidden.opus").write_bytes(samples["en-doctor"].content)
    done = quick("index", "recordings", "--collection", "mine", "--lang", "en", "--json", cwd=folder)
    outcome = as_json(done)
    assert (outcome["indexed"], outcome["known"]) == (3, 0)
    assert [failure["path"] for failure in outcome["failed"]] == ["recordings/notes.txt"]
    return folder


# --- the form of every verb


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(tmp_path: Path, verb: str) -> None:
    """`--help` is where people look first; it must not load a model or make a directory."""
    done = clasp(*verb.split(), "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "Usage:" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["search"],
        ["index"],
        ["index", "/nowhere/at/all"],
        ["search", "a", "--limit", "0"],
        ["search", "a", "--min-score", "much"],
        ["search", "a", "--colour"],
        ["search", "a", "--like", "b"],
        ["search", "a", "--at", "3"],
        ["search", "a", "--group-by", "speaker"],
        ["search", "a", "--filter", '{"lag": "fa"}'],
        ["search", "a", "--filter", "{"],
        ["index", __file__, "--watch"],
        ["embed"],
        ["embed", "--text", "a", "--audio", __file__],
        ["evaluate", "/nowhere.jsonl"],
        ["evaluate", __file__, "--protocol", "mine"],
        ["serve", "--port", "70000"],
        ["models", "frobnicate"],
        ["keys", "create", "me"],
        ["keys", "create", "me", "--scope", "read,all"],
        ["train"],
        ["backup"],
        ["restore"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(tmp_path: Path, arguments: list[str]) -> None:
    """Scripts tell a misspelt command (2) from one that could not do its work (1)."""
    done = clasp(*arguments, cwd=tmp_path)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["search", ""], ["empty"]),
        (["search", "a", "--lang", "fa_IR"], ["fa_IR"]),
        (["embed", "--text", " \t"], ["empty"]),
        (["embed", "--audio", __file__], ["sound"]),
        (["index", __file__, "--lang", "fa_IR"], ["fa_IR"]),
        (["index", __file__, "--collection", "a b"], ["collection"]),
        pytest.param(["backup", "copy"], ["no library", "index_data"], marks=IN_A_FILE),
        (["restore", "nowhere"], ["nowhere", "manifest.json"]),
        (["restore", __file__, "--verify-only"], ["test_cli.py", "manifest.json"]),
        pytest.param(["status"], ["no library", "index_data"], marks=IN_A_FILE),
        (["evaluate", __file__], ["line 1"]),
        (["keys", "revoke", "nobody"], ["nobody"]),
        (["keys", "create", "a b", "--scope", "read"], ["name"]),
        (["keys", "create", "me", "--scope", "read,admin", "--collection", "mine"], ["admin"]),
        (["evaluate", str(SAMPLES / "manifest.jsonl"), "--split", "none"], ["no item"]),
        (["evaluate", str(SAMPLES / "manifest.jsonl"), "--model", "huge"], ["huge", "mini"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_what_cannot_be_done_is_1_and_one_line(
    tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    """A person reads one sentence and knows what to change; a traceback says that nobody thought of them."""
    failed(clasp(*arguments, cwd=tmp_path), *words)


def completed(words: str, cwd: Path, *python: str) -> Any:
    """What the shell is told, where the last of the words is to be completed."""
    asked = {"_CLASP_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    data_dir = cwd / "index_data"
    return subprocess.run(
        [sys.executable, *python, "-m", "app.cli"],
        env=environment(**engines(data_dir) | {"data_dir": data_dir}) | asked | {"PYTHONPATH": str(ROOT)},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_help_and_completion_are_quick(indexed: Path) -> None:
    """Whoever presses Tab waits for it: neither models nor the database may be loaded for names of verbs."""
    done = completed("clasp s", indexed, "-X", "importtime")
    assert done.stdout.split() == ["search", "status", "serve", "stages"]
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in loaded
    assert not loaded & {"torch", "numpy", "sqlalchemy", "faiss"}
    done = completed("clasp search bees --collection m", indexed, "-X", "importtime")
    assert done.stdout.split() == ["mine"]
    assert not {"torch", "transformers"} & {
        line.rpartition("|")[2].strip() for line in done.stderr.splitlines()
    }
    assert completed("clasp reindex --model hy", indexed).stdout.split() == ["hybrid"]
    shown = clasp("--help", cwd=indexed)
    for heading, verbs in GROUPS.items():
        assert f"\n{heading}:\n" in shown.stdout
        assert all(f"\n  {verb} " in shown.stdout for verb in verbs)
    assert re.fullmatch(r"clasp-search \d+\.\d+\.\d+\S*\n", clasp("--version", cwd=indexed).stdout)


@pytest.mark.parametrize("settings", [{"model": "huge"}, {"data_dir": "/proc/none"}, {"device": "tpu"}])
def test_a_wrong_setting_is_1_and_one_line(tmp_path: Path, settings: dict[str, str]) -> None:
    """Settings are read by every verb, and mistyped as often as arguments are."""
    failed(clasp("search", "bees", cwd=tmp_path, **settings))


@pytest.mark.parametrize("store", ["faiss", "torch"])
def test_a_gpu_that_is_not_there_is_1_and_one_line(tmp_path: Path, store: str) -> None:
    """Who demands a GPU is told what stands in its way before anything is asked, not served by the CPU."""
    done = clasp("search", "bees", cwd=tmp_path, vector_store=store, device="cuda")
    if done.returncode == 0:
        pytest.skip(f"this machine has a GPU for {store}")
    failed(done, "CLASP_DEVICE=cuda", f"CLASP_VECTOR_STORE={store}")


# --- index and search


def test_indexing_again_does_nothing_again(indexed: Path) -> None:
    """People run it from cron; it must be safe, quick and say what it found."""
    outcome = as_json(quick("index", "recordings", "--collection", "mine", "--json", cwd=indexed))
    assert (outcome["indexed"], outcome["known"], len(outcome["failed"])) == (0, 3, 1)
    shown = quick("index", "recordings/more", "--collection", "mine", cwd=indexed)
    assert shown.returncode == 0
    assert shown.stdout == "0 indexed, 1 known already, 0 failed\n"


def test_a_folder_is_found_by_any_of_its_names(indexed: Path, samples: dict[str, Sample]) -> None:
    """`../recordings` and a folder under a hidden one hold recordings like any other."""
    inside = indexed / ".cache" / "kept"
    inside.mkdir(parents=True)
    (inside / "lift.opus").write_bytes(samples["fr-lift"].content)
    for path in ("../cache/../.cache/kept", str(inside)):
        (indexed / "cache").mkdir(exist_ok=True)
        outcome = as_json(
            quick("index", path, "--json", cwd=indexed / "cache", data_dir=indexed / "index_data")
        )
        assert outcome["indexed"] + outcome["known"] == 1, path


def test_only_failures_are_a_failure(indexed: Path) -> None:
    """With the reason for each file, and status 1, so that a script notices."""
    done = quick("index", "recordings/notes.txt", cwd=indexed)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "clasp: no recording could be indexed"
    assert "recordings/notes.txt: " in done.stderr


def test_a_file_name_may_be_any_bytes(tmp_path: Path, samples: dict[str, Sample]) -> None:
    """Old disks hold names that are no text; they must be indexed, and must not spoil any answer later."""
    folder = tmp_path / "old"
    folder.mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.opus")).write_bytes(samples["en-bees"].content)
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe8.txt")).write_text("no")
    outcome = as_json(quick("index", "old", "--json", cwd=tmp_path))
    assert outcome["indexed"] == 1
    (hit,) = as_json(quick("search", "bees", "--json", cwd=tmp_path))["hits"]
    assert hit["metadata"]["path"].endswith("caf\ufffd.opus")


def test_a_search_answers_with_ranked_hits(indexed: Path, samples: dict[str, Sample]) -> None:
    """The same members as the HTTP answer has, so that scripts can move from one to the other."""
    options = ["--collection", "mine", "--lang", "en", "--limit", 2, "--json"]
    answer = as_json(quick("search", samples["en-volcano"].text, *options, cwd=indexed))
    assert answer["model"]["name"] == "stand-in"
    assert [hit["rank"] for hit in answer["hits"]] == [1, 2]
    first, second = answer["hits"]
    assert first["score"] >= second["score"]
    assert first["lang"] == "en"
    assert first["segments"][0].keys() == {"start_s", "end_s", "score"}


@pytest.mark.parametrize("half", [False, True])
def test_every_vector_store_answers_the_same(indexed: Path, half: bool) -> None:
    """Which one is used is the machine's affair; scripts and people see no difference."""
    options = ["bees", "--collection", "mine", "--json"]
    expected = as_json(quick("search", *options, cwd=indexed))
    assert expected["hits"]
    settings = {"vector_store": "faiss" if half else "torch", "vector_store_half": half}
    assert as_json(quick("search", *options, cwd=indexed, **settings)) == expected


def test_a_search_is_shown_as_a_table(indexed: Path) -> None:
    """With the file's own name and the minute, which is what a person at a terminal wants."""
    done = quick("search", "bread", "--collection", "mine", cwd=indexed)
    assert done.returncode == 0
    assert "recordings/pan y água.opus" in done.stdout
    assert "0:0" in done.stdout
    assert (
        quick("search", "bread", "--collection", "empty", cwd=indexed).stdout
        == "nothing is indexed here yet\n"
    )


def test_the_command_line_and_a_running_service_share_a_library(tmp_path: Path, bees: bytes) -> None:
    """`clasp index` beside `clasp serve` is how large folders come in; each sees the other's recordings."""
    (tmp_path / "bees.opus").write_bytes(bees)
    with RunningService(tmp_path, program=STAND_IN, workers=0) as service:
        service.start()
        uploaded = service.upload(encode(speech(1.0), 16_000), id="uploaded").json()
        assert as_json(quick("index", "bees.opus", "--json", cwd=tmp_path))["indexed"] == 1
        assert service.settled(uploaded["id"])["status"] == "ready"  # the verb did the waiting one, too
        by_http = service.found("bees in the hive")
        by_verb = as_json(quick("search", "bees in the hive", "--json", cwd=tmp_path))["hits"]
        assert [hit["id"] for hit in by_http] == [hit["id"] for hit in by_verb]
        assert by_http[0]["score"] == pytest.approx(by_verb[0]["score"], abs=1e-4)
        assert service.stop() == 0


def test_a_search_can_be_narrowed_and_begin_with_a_recording(
    indexed: Path, samples: dict[str, Sample]
) -> None:
    """What the HTTP interface can, without a service: filters, segments as hits, and more like this one."""
    everything = as_json(quick("search", "bees", "--json", cwd=indexed))["hits"]
    bees = next(hit["id"] for hit in everything if hit["metadata"]["path"].endswith("bees.opus"))
    only = json.dumps({"metadata": {"path": {"in": ["recordings/more/bees.opus"]}}})
    hits = as_json(quick("search", "bread", "--filter", only, "--json", cwd=indexed))["hits"]
    assert [hit["id"] for hit in hits] == [bees]
    segments = as_json(quick("search", "bees", "--group-by", "segment", "--json", cwd=indexed))["hits"]
    assert all(len(hit["segments"]) == 1 for hit in segments)
    alike = as_json(quick("search", "--like", bees, "--at", 1, "--json", cwd=indexed))["hits"]
    assert len(alike) == len(everything) - 1
    assert bees not in [hit["id"] for hit in alike]
    assert quick("search", "x", "--filter", '{"lang": "ja"}', cwd=indexed).stdout == "nothing found\n"
    failed(quick("search", "--like", "nobody", cwd=indexed), "nobody")


def test_a_hit_is_played(indexed: Path, tmp_path: Path) -> None:
    """By any program that plays WAV: cut out of the recording, with a second around it."""
    player = tmp_path / "aplay"
    player.write_text('#!/bin/sh\ncp "$2" "$PLAYED"\n')
    player.chmod(0o755)
    arguments = [sys.executable, "-m", STAND_IN, "search", "bees", "--collection", "mine", "--json", "--play"]
    settings = environment(data_dir=indexed / "index_data", threads=1, **engines(indexed / "index_data"))
    only = settings | {"PYTHONPATH": str(ROOT), "PATH": str(tmp_path), "PLAYED": str(tmp_path / "played.wav")}
    if (cp := shutil.which("cp")) is not None:
        (tmp_path / "cp").symlink_to(cp)
    done = subprocess.run([*arguments, "2"], env=only, cwd=indexed, capture_output=True, text=True)
    best = as_json(done)["hits"][1]["segments"][0]
    played = sf.info(tmp_path / "played.wav")
    assert played.frames / played.samplerate == pytest.approx(
        best["end_s"] + 1 - max(0, best["start_s"] - 1), abs=1.01
    )
    player.unlink()
    failed(
        subprocess.run(arguments, env=only, cwd=indexed, capture_output=True, text=True), "ffplay", "aplay"
    )


def test_a_table_keeps_every_word(tmp_path: Path, samples: dict[str, Sample]) -> None:
    """On a narrow terminal, too, and where the name is written from right to left."""
    name = "گفتگو با زنبوردار دربارهٔ زمستان و کندوها"
    (tmp_path / f"{name}.opus").write_bytes(samples["en-bees"].content)
    assert quick("index", ".", cwd=tmp_path).returncode == 0
    shown = subprocess.run(
        [sys.executable, "-m", STAND_IN, "search", "bees"],
        env=environment(threads=1, **engines(tmp_path / "index_data"))
        | {"PYTHONPATH": str(ROOT), "COLUMNS": "60"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    ).stdout
    assert all(word in shown for word in name.split())
    assert max(map(len, shown.splitlines())) <= 60


# --- what goes on for a while


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    """Hours of indexing are interrupted by closing a laptop. Nothing may be lost by it, none may fail for it,
    and the sentence at the end says how to go on."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02}.wav").write_bytes(encode(speech(2.0, seed=number), 16_000))
    process = subprocess.Popen(
        [sys.executable, "-m", STAND_IN, "index", str(folder)],
        env=environment(threads=1, **engines(tmp_path / "index_data"))
        | {"PYTHONPATH": str(ROOT), "STAND_IN_PAUSE_S": "0.3"},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process, contextlib.ExitStack() as cleanup:
        cleanup.callback(process.kill)

        def begun() -> bool:
            said = quick("status", "--json", cwd=tmp_path)
            return said.returncode == 0 and bool(json.loads(said.stdout)["recordings"]["processing"])

        eventually(begun, within_s=60)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to decoders, too
        assert process.stderr is not None
        last = process.stderr.read().splitlines()[-1]
        assert process.wait(60) == 1
    assert re.fullmatch(r"clasp: stopped; \d+ files are left\. .*run the same command again to go on", last)
    seen = as_json(quick("status", "--json", cwd=tmp_path))["recordings"]
    assert (seen["failed"], seen["processing"]) == (0, 0)
    again = as_json(quick("index", str(folder), "--json", cwd=tmp_path))
    assert (again["indexed"] + again["known"], again["failed"]) == (12, [])


def test_a_watched_folder_is_followed(tmp_path: Path, bees: bytes) -> None:
    """Recorders write into folders. What was there, what comes and what is still growing must each be indexed
    once, whole; and emptying the folder must not empty the library."""
    folder = tmp_path / "incoming"
    (folder / "monday").mkdir(parents=True)
    (folder / "before.opus").write_bytes(bees)
    whole = encode(speech(4.0), 16_000)
    process = subprocess.Popen(
        [sys.executable, "-m", STAND_IN, "index", "incoming", "--watch", "--json"],
        env=environment(threads=1, **engines(tmp_path / "index_data")) | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process, contextlib.ExitStack() as cleanup:
        cleanup.callback(process.kill)
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        assert first == {"path": "incoming/before.opus", "status": "indexed"}
        (folder / "before.opus").unlink()
        with (folder / "monday" / "growing.wav").open("wb") as file:
            for start in range(0, len(whole), len(whole) // 4 + 1):
                file.write(whole[start : start + len(whole) // 4 + 1])
                file.flush()
                time.sleep(1.2)
        second = json.loads(process.stdout.readline())
        assert second == {"path": "incoming/monday/growing.wav", "status": "indexed"}
        process.send_signal(signal.SIGINT)
        assert json.loads(process.stdout.readline()) == {"indexed": 2, "known": 0, "failed": []}
        assert process.wait(60) == 0
    seen = as_json(quick("status", "--json", cwd=tmp_path))
    assert seen["recordings"] == {"ready": 2, "pending": 0, "processing": 0, "failed": 0}
    assert seen["duration_s"] > 4


# --- status and doctor


def test_status_counts_and_changes_nothing(indexed: Path) -> None:
    """It is what people run beside a service that is in trouble."""
    before = {path: path.stat().st_mtime_ns for path in (indexed / "index_data").rglob("*") if path.is_file()}
    seen = as_json(quick("status", "--json", cwd=indexed, port=1))
    after = {path: path.stat().st_mtime_ns for path in before if path.exists()}
    databases = {path for path in before if path.name.startswith("catalog.sqlite3-")}
    assert {path for path in before if before[path] != after.get(path)} <= databases
    mine = next(held for held in seen["collections"] if held["name"] == "mine")
    assert (mine["recordings"], mine["ready"], mine["failed"]) == (4, 3, 1)
    assert seen["failures"]["undecodable_audio"] >= 1
    assert seen["model"]["name"] == "stand-in"
    assert seen["service"]["state"] == "nothing"
    shown = quick("status", cwd=indexed, port=1).stdout
    assert "undecodable_audio" in shown
    assert "nothing answers" in shown


@IN_MEMORY
def test_the_doctor_names_the_trouble_and_the_way_out(tmp_path: Path) -> None:
    """Most reports of trouble are a setting misspelt or a package missing; the rest begin with its output,
    which people paste in public: no secret may be in it."""
    (tmp_path / ".env").write_text("CLASP_MODLE=mini\nCLASP_API_KEYS=sesame-open\n")
    settings = {"vector_store_token": "root:sesame", "flat_up_to": 9, "half_up_to": 5, "secret_x": "sesame"}
    done = clasp("doctor", "--json", cwd=tmp_path, **settings)
    report = json.loads(done.stdout)
    said = {(found["level"], found["found"].split()[0]): found["remedy"] for found in report["findings"]}
    assert said[("warning", "CLASP_MODLE")] == "did you mean CLASP_MODEL?"
    assert ("warning", "CLASP_SECRET_X") in said
    assert ("warning", "CLASP_FLAT_UP_TO") in said
    assert ("warning", "CLASP_VECTOR_STORE_TOKEN") in said
    assert "sesame" not in done.stdout + done.stderr
    assert (done.returncode, report["problems"]) == (0, 0), done.stdout
    (tmp_path / "file").write_text("")
    done = clasp("doctor", cwd=tmp_path, model="huge", data_dir=tmp_path / "file", device="cpu")
    assert done.returncode == 1
    problems = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("problem")]
    assert {"models", "data"} <= set(problems)


# --- evaluate


def test_evaluate_reports_in_the_contract_s_shape(tmp_path: Path, samples: dict[str, Sample]) -> None:
    """Outside checks read this file; its names are a promise."""
    names = ("en-bees", "en-doctor", "fr-lift", "fr-museum", "zh-chess")
    manifest = tmp_path / "five.jsonl"
    manifest.write_text("".join(json.dumps(samples[name].line) + "\n" for name in names))
    arguments = [manifest, "--audio-root", SAMPLES, "--by", "lang,source", "--out", "figures.json"]
    shown = clasp("evaluate", *arguments, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "text_to_speech" in shown.stdout
    report = json.loads((tmp_path / "figures.json").read_text())
    assert report.keys() >= {"model", "fingerprint", "protocol", "overall", "groups", "seconds"}
    assert report["model"] == "mini"
    assert report["protocol"] == "clean"
    assert report["groups"].keys() == {"lang", "source"}
    assert report["groups"]["lang"].keys() == {"en", "fr", "zh-CN"}
    for pool in (report["overall"], *report["groups"]["lang"].values()):
        assert pool.keys() == {"text_to_speech", "speech_to_text"}
        for figures in pool.values():
            assert figures.keys() >= FIGURES
    overall = report["overall"]["text_to_speech"]
    assert (overall["n"], overall["pool"]) == (5, 5)
    assert 0 <= overall["hits@1"] <= overall["hits@5"] <= overall["hits@10"] <= 1


def test_evaluate_says_what_it_had_to_leave_out(tmp_path: Path, samples: dict[str, Sample]) -> None:
    """Figures over fewer recordings than one thinks are worse than none; and the paper's rules are named."""
    lines = [samples[name].line for name in ("en-bees", "en-doctor")] + [
        {"id": "gone", "audio": "audio/gone.opus", "text": "Nobody knows."}
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["evaluate", "m.jsonl", "--audio-root", SAMPLES, "--json", "--candidates", 10]
    report = as_json(clasp(*arguments, "--protocol", "paper", "--threshold", 0.4, cwd=tmp_path))
    assert report["protocol"] == "paper"
    figures = report["overall"]["text_to_speech"]
    assert (figures["n"], figures["pool"], figures["threshold"]) == (2, 2, 0.4)
    assert clasp(*arguments, cwd=tmp_path).returncode == 2  # candidates are the paper's rule
    assert [item["id"] for item in report["skipped"]] == ["gone"]


# --- what scores mean


def test_only_likely_hits_are_shown(tmp_path: Path, samples: dict[str, Sample]) -> None:
    """As over HTTP; and a model nobody measured says so, and how to measure it, rather than guess."""
    from clasp_core import models

    asked = ["search", samples["en-bees"].text, "--lang", "en", "--min-score", "auto"]
    for name in ("en-bees", "en-volcano", "es-bread"):
        (tmp_path / f"{name}.opus").write_bytes(samples[name].content)
    assert as_json(clasp("index", ".", "--json", cwd=tmp_path))["indexed"] == 3
    shipped = calibration_of(models.open_model("mini"))
    hits = as_json(clasp(*asked, "--json", cwd=tmp_path))["hits"]
    assert 1 <= len(hits) < 3
    assert all(shipped.accept <= hit["confidence"] <= 1 for hit in hits)
    copied = tmp_path / "unmeasured"
    weights = Path(models.__file__).parent / "weights" / "mini"
    shutil.copytree(weights, copied, ignore=lambda *_: {"calibration.json"})
    failed(clasp(*asked, cwd=tmp_path, model=copied), "Nobody has measured", "clasp calibrate")
    (tmp_path / "one.jsonl").write_text(json.dumps(samples["en-bees"].line))
    failed(clasp("calibrate", "one.jsonl", "--audio-root", SAMPLES, cwd=tmp_path, model=copied), "ten items")


# --- models and data


def test_models_are_listed(tmp_path: Path) -> None:
    """What is on this machine, under which licence; the first question of whoever packages this."""
    mini = as_json(clasp("models", "list", "--json", cwd=tmp_path))["models"][0]
    assert mini["name"] == "mini"
    assert mini["available"] is True
    assert {part["role"] for part in mini["parts"]} >= {"fusion"}
    assert all(part["licence"] and part["bytes"] > 0 for part in mini["parts"])
    shown = clasp("models", "list", cwd=tmp_path).stdout.splitlines()
    assert next(line.split()[1] for line in shown if line.startswith(" mini ")) == "yes"


def test_a_model_may_be_a_folder(service: RunningService, tmp_path: Path) -> None:
    """What `clasp train` writes is served by naming its folder; the same weights are the same model."""
    from clasp_core import models

    shutil.copytree(Path(models.__file__).parent / "weights" / "mini", tmp_path / "my-model")
    mine = as_json(clasp("embed", "--text", "bees", "--json", cwd=tmp_path, model=tmp_path / "my-model"))
    assert mine["model"] == service.client.get("/readyz").json()["model"]
    (tmp_path / "my-model" / "model.json").write_text('{"format": "clasp-model/99"}')
    failed(clasp("embed", "--text", "bees", cwd=tmp_path, model=tmp_path / "my-model"), "version")


def test_a_recording_that_is_too_long_is_refused(tmp_path: Path) -> None:
    """The limit is the operator's, and the verbs keep it like the service."""
    (tmp_path / "long.wav").write_bytes(encode(tone(3.0), 16_000))
    done = quick("index", "long.wav", cwd=tmp_path, max_duration_s=2)
    assert done.returncode == 1
    assert "2 s" in done.stderr
