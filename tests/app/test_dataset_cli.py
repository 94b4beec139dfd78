"""`clasp dataset`: published data sets and read-aloud texts become manifests that every other verb takes."""

import json
import shutil

import pytest
import soundfile as sf

from clasp_core.manifest import read_manifest
from tests.audio_files import encode, speech
from tests.service import clasp


@pytest.fixture
def recordings(tmp_path):
    """A folder in Common Voice's layout with one good clip, one that is broken and one that is absent."""
    folder = tmp_path / "cv"
    (folder / "clips").mkdir(parents=True)
    (folder / "clips" / "good.mp3").write_bytes(encode(speech(0.5), 16_000))
    (folder / "clips" / "broken.mp3").write_bytes(b"no sound")
    rows = [f"ann\t{name}.mp3\tThis is {name}.\ten" for name in ("good", "broken", "absent")]
    (folder / "train.tsv").write_text("\n".join(["client_id\tpath\tsentence\tlocale", *rows]))
    return folder


def test_import_writes_a_manifest_and_tells_what_it_left_out(recordings, tmp_path):
    """Exit status 0 with two thirds of the data gone would be a trap, were it not said which and why."""
    out = tmp_path / "manifests" / "train.jsonl"
    done = clasp(
        "dataset", "import", "common-voice", recordings, "--out", out, "--check", "--json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["sentences"] == 1
    assert answer["left_out"] == {
        "no sound file": {"count": 1, "first": ["train.tsv, line 4"]},
        "undecodable_audio": {"count": 1, "first": ["broken"]},
    }
    (item,) = read_manifest(out)
    assert (item.id, item.text, item.extra["duration_s"]) == ("good", "This is good.", 0.5)
    assert item.audio.samefile(recordings / "clips" / "good.mp3")


def test_import_says_in_one_line_what_is_wrong(tmp_path):
    """As every verb does: status 1, one line on standard error, nothing written."""
    done = clasp("dataset", "import", "fleurs", tmp_path, "--out", tmp_path / "m.jsonl", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("clasp: ")
    assert done.stderr.count("\n") == 1
    assert "no FLEURS" in done.stderr
    wrong = clasp("dataset", "import", "folder", tmp_path, "--out", tmp_path / "m.jsonl", cwd=tmp_path)
    assert wrong.returncode == 2, "the next import of the folder would read it"
    assert not (tmp_path / "m.jsonl").exists()


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_speech_brown_reads_a_text_file(tmp_path):
    """One command from a text to recordings with manifest and card; run again, it has nothing to do."""
    (tmp_path / "text.txt").write_text("The rain fell on the city.\n\nNobody asked the jury why.\n")
    command = ("dataset", "speech-brown", "text.txt", "--out", "set", "--lang", "en", "--format", "wav")
    options = (
        "--voices",
        "espeak-ng:en+f3:speed=180",
        "--augment",
        "noise:pink:20",
        "--text-licence",
        "CC0-1.0",
    )
    done = clasp(*command, *options, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["sentences"], answer["made"], answer["failed"]) == (2, 2, {})
    items = read_manifest(tmp_path / "set" / "manifest.jsonl")
    assert {item.text for item in items} == {"The rain fell on the city.", "Nobody asked the jury why."}
    for item in items:
        assert item.extra["augmentation"] == "noise:pink:20"
        assert sf.info(item.audio).duration == pytest.approx(item.extra["duration_s"], abs=0.001)
    card = (tmp_path / "set" / "README.md").read_text()
    assert "text.txt; licence: CC0-1.0" in card
    assert "clasp dataset speech-brown text.txt" in card
    again = clasp(*command, *options, "--json", cwd=tmp_path)
    assert json.loads(again.stdout)["made"] == 0
