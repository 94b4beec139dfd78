"""`clasp compare`: what it says of systems is what they do, and what they cost."""

import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from app.cli import cli
from clasp_core.comparison import compare, systems
from clasp_core.errors import InvalidField, ProcessingFailed
from clasp_core.evaluation import evaluate_manifest
from clasp_core.manifest import ManifestItem
from clasp_core.models import open_model
from clasp_core.transcription import whisper_folder
from tests.conftest import SAMPLES, Sample
from tests.service import environment

NAMES = ("en-bees", "en-doctor", "fr-lift", "fr-museum", "es-bread")
CONDITIONS = ["clean", "noise:babble:0+telephone"]


def write(path: Path, samples: dict[str, Sample], *more: dict[str, object]) -> Path:
    # No speakers: anybody's voice may be in anybody's babble.
    lines = [samples[name].line | {"speaker": None} for name in NAMES] + list(more)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, samples: dict[str, Sample]) -> tuple[Any, str, Path]:
    """A comparison of `mini` with searching in transcripts: its report, what it printed, and its folder."""
    folder = tmp_path_factory.mktemp("compare")
    gone = {"id": "gone", "audio": "audio/gone.opus", "text": "Nobody knows."}
    manifest = write(folder / "m.jsonl", samples, gone)
    whisper_folder(folder / "models")
    arguments = ["--audio-root", SAMPLES, "--transcribers", "whisper-base", "--by", "lang"]
    arguments += ["--macro-min", 2, "--conditions", ",".join(CONDITIONS)]
    arguments += ["--out", folder / "c.json", "--plot", folder / "c.png"]
    # In this process: the command's own start is tested elsewhere, and its imports take seconds.
    environment = {"CLASP_MODELS_DIR": str(folder / "models"), "CLASP_THREADS": "1", "COLUMNS": "160"}
    done = CliRunner(env=environment).invoke(cli, ["compare", str(manifest), *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return json.loads((folder / "c.json").read_text()), done.stdout, folder


def test_a_models_figures_are_those_of_evaluate(
    compared: tuple[Any, str, Path], tmp_path: Path, samples: dict[str, Sample]
) -> None:
    """Two verbs that measure the same differently would have to be chosen between; and transcripts of
    clear speech find every recording by its text, which proves that they reach the text encoder whole."""
    report, _, folder = compared
    alone = evaluate_manifest(
        open_model("mini"), folder / "m.jsonl", audio_root=SAMPLES, by=["lang"], macro_min=2
    )
    mini, whisper = (report["systems"][name] for name in ("mini", "whisper-base"))
    clean = mini["results"]["clean"]
    for pool in ("overall", "groups", "macro"):
        assert json.dumps(clean[pool]) == json.dumps(alone[pool])
    assert mini["fingerprint"] == alone["fingerprint"] != whisper["fingerprint"]
    assert [item["id"] for item in report["skipped"]] == ["gone"]
    assert report["items"] == len(NAMES)
    heard = whisper["results"]["clean"]
    assert heard["overall"]["text_to_speech"]["hits@1"] == 1.0
    assert heard["overall"]["speech_to_text"]["hits@1"] == 1.0
    assert heard["character_error"]["overall"] < 0.15
    assert set(heard["character_error"]["groups"]["lang"]) == {"en", "es", "fr"}
    assert "character_error" not in clean


def test_noise_costs_and_differences_are_to_the_first_system(compared: tuple[Any, str, Path]) -> None:
    """Six voices at once over a telephone must hurt, or the condition never reached the encoders."""
    report, _, _ = compared
    mini, whisper = (report["systems"][name]["results"] for name in ("mini", "whisper-base"))
    noisy = CONDITIONS[1]
    assert whisper[noisy]["character_error"]["overall"] > 2 * whisper["clean"]["character_error"]["overall"]
    assert mini[noisy]["overall"]["text_to_speech"]["mrr"] < mini["clean"]["overall"]["text_to_speech"]["mrr"]
    for condition in CONDITIONS:
        assert "difference" not in mini[condition]
        for direction in ("text_to_speech", "speech_to_text"):
            difference = whisper[condition]["difference"][direction]["hits@1"]
            values = [system[condition]["overall"][direction]["hits@1"] for system in (whisper, mini)]
            assert difference["difference"] == pytest.approx(values[0] - values[1])
            assert difference["ci95"][0] <= difference["difference"] <= difference["ci95"][1]


def test_costs_are_measured_in_each_systems_own_process(compared: tuple[Any, str, Path]) -> None:
    """Memory and time decide what can be deployed where; a stage that is left out flatters its system."""
    report, _, _ = compared
    mini, whisper = (report["systems"][name] for name in ("mini", "whisper-base"))
    assert (mini["kind"], whisper["kind"]) == ("model", "transcription")
    assert mini["weights_bytes"] == sum(part.size_bytes or 0 for part in open_model("mini").parts())
    assert whisper["weights_bytes"] > 145_000_000 + 70_000_000  # whisper-base, and E5 for its text
    for system, stages in ((mini, {"encode"}), (whisper, {"transcribe", "text"})):
        seconds = system["seconds"]
        assert seconds.keys() == {"load", "recording", "processor", "query", *stages}
        assert (
            0 < seconds["recording"]["p10"] <= seconds["recording"]["median"] <= seconds["recording"]["p90"]
        )
        whole = sum(seconds[stage]["mean"] for stage in stages)
        assert seconds["recording"]["mean"] == pytest.approx(whole, abs=1e-5)
        assert seconds["query"] > 0
        assert system["audio_s_per_s"] == pytest.approx(
            report["audio_s"] / (seconds["recording"]["mean"] * report["items"]), rel=0.01
        )
        assert 200e6 < system["peak_memory_bytes"] < 3e9


def test_the_table_and_the_picture_are_for_people(compared: tuple[Any, str, Path]) -> None:
    """What the report says, in a form that fits into a message; the picture holds ink."""
    report, shown, folder = compared
    for word in ("mini", "whisper-base", "mean over 2 of lang", "character error", "peak MB", *CONDITIONS):
        assert word in shown
    hits = report["systems"]["mini"]["results"]["clean"]["overall"]["text_to_speech"]["hits@1"]
    assert f"{hits:.3f}" in shown
    assert (folder / "c.png").read_bytes().startswith(b"\x89PNG")


def test_a_system_that_dies_is_named(tmp_path: Path, samples: dict[str, Sample]) -> None:
    """The kernel kills who takes too much memory; a comparison without one of its systems is none."""

    def killing(items: Iterable[ManifestItem], total: int) -> Iterable[ManifestItem]:
        for item in items:
            yield item
            for child in multiprocessing.active_children():
                child.kill()
                child.join()

    manifest = write(tmp_path / "m.jsonl", samples)
    with pytest.raises(ProcessingFailed, match="mini died"):
        compare(systems(["mini"]), manifest, audio_root=SAMPLES, progress=killing)


OUTLIVED = """
import multiprocessing, sys, time
from pathlib import Path
from clasp_core.comparison import compare, systems

def wait(items, total):
    print(multiprocessing.active_children()[0].pid, flush=True)
    time.sleep(600)
    return items

if __name__ == "__main__":
    compare(systems(["mini"]), Path(sys.argv[1]), progress=wait)
"""


@pytest.mark.slow
def test_no_system_outlives_a_comparison_that_is_killed(tmp_path: Path, samples: dict[str, Sample]) -> None:
    """Each would keep a model's memory until somebody looks for it."""
    (tmp_path / "outlived.py").write_text(OUTLIVED)
    manifest = write(tmp_path / "m.jsonl", samples)
    command = [sys.executable, tmp_path / "outlived.py", manifest]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(threads=1)) as process:
        assert process.stdout is not None
        child = Path("/proc") / process.stdout.readline().strip()
        assert child.is_dir()
        process.kill()
    deadline = time.monotonic() + 60
    while child.is_dir():
        assert time.monotonic() < deadline, "the system is still there"
        time.sleep(0.05)


def test_a_picture_needs_a_name_that_says_its_kind() -> None:
    """Before an hour of embedding, not after it."""
    done = CliRunner().invoke(cli, ["compare", str(SAMPLES / "manifest.jsonl"), "--plot", "curves.doc"])
    assert isinstance(done.exception, InvalidField)
    assert ".png" in str(done.exception)
