"""Transcribers: what was said, the same whatever the batch, and greedy CTC as the paper's notebooks do it."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from clasp_core.audio import decode
from clasp_core.encoders.weights import sha256_of
from clasp_core.errors import InvalidLanguage, ModelUnavailable, WeightsMismatch
from clasp_core.language import match_key, normalize_text
from clasp_core.transcription import (
    WHISPER_FILES,
    CtcTranscriber,
    WhisperTranscriber,
    whisper_folder,
    whisper_identity,
    without_loop,
)
from tests.conftest import SAMPLES, lines
from tests.golden.make import sample
from tests.paper_checkpoints import new_names, rewrite, save_hubert, save_wav2vec2

HEARD = ("en-bees", "es-flood", "pt-fishing", "zh-chess")
"""Samples in languages that whisper-base is good at."""
LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]
"""The published checkpoints' labels."""


def clip(name: str) -> NDArray[np.float32]:
    """A bundled recording, decoded as the service would."""
    line = next(line for line in lines(SAMPLES / "manifest.jsonl") if line["id"] == name)
    return np.concatenate(list(decode(SAMPLES / line["audio"], max_duration_s=30)))


def said(name: str) -> str:
    line = next(line for line in lines(SAMPLES / "manifest.jsonl") if line["id"] == name)
    return match_key(normalize_text(line["text"], line["lang"]))


def errors(truth: str, heard: str) -> int:
    """Edits between two texts (Levenshtein)."""
    row = list(range(len(heard) + 1))
    for place, letter in enumerate(truth, start=1):
        last, row[0] = row[0], place
        for other, its_letter in enumerate(heard, start=1):
            last, row[other] = (
                row[other],
                min(row[other] + 1, row[other - 1] + 1, last + (letter != its_letter)),
            )
    return row[-1]


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder in which whisper-base has been put together."""
    folder = tmp_path_factory.mktemp("models")
    whisper_folder(folder)
    return folder


@pytest.fixture(scope="module")
def whisper(models_dir: Path) -> WhisperTranscriber:
    return WhisperTranscriber(models_dir)


# --- Whisper


def test_whisper_hears_what_was_said(whisper: WhisperTranscriber) -> None:
    """At most six errors in a hundred letters, and the language recognised:
    a front end, a prompt or a tokenizer that is slightly wrong shows here first."""
    transcripts = whisper.transcribe([clip(name) for name in HEARD])
    for name, transcript in zip(HEARD, transcripts, strict=True):
        assert transcript.lang == name[:2]
        assert -0.5 < transcript.confidence <= 0
        truth, heard = said(name), match_key(normalize_text(transcript.text, transcript.lang))
        limit = 0.3 if name == "zh-chess" else 0.06  # it may write traditional characters
        assert errors(truth, heard) <= limit * len(truth), transcript.text


def test_a_transcript_does_not_feel_its_batch(whisper: WhisperTranscriber) -> None:
    """A recording must be found by the same words whoever else is uploaded at the time."""
    bees = clip("en-bees")
    clips = [bees[:44_000], bees[:40_500], clip("es-flood")[:42_000], bees[:1000]]
    assert whisper.transcribe(clips) == [whisper.transcribe([one])[0] for one in clips]


def test_padded_and_unpadded_agree_on_clear_speech(whisper: WhisperTranscriber, models_dir: Path) -> None:
    """The cheap form leaves out silence alone; where speech is clear it must not cost words."""
    padded = WhisperTranscriber(models_dir, padded=True)
    (short,), (full,) = (form.transcribe([clip("en-bees")]) for form in (whisper, padded))
    assert match_key(short.text) == match_key(full.text)
    assert short.confidence == pytest.approx(full.confidence, abs=0.1)
    assert whisper.name != padded.name
    assert whisper.identity == whisper_identity()
    assert padded.identity == whisper_identity(padded=True) != whisper.identity


def test_a_known_language_is_believed(whisper: WhisperTranscriber) -> None:
    """Whoever says what a recording is in must get its letters; regions, and Whisper's own names of
    languages, are no reason to guess instead."""
    bees = clip("en-bees")[:30_000]
    told = whisper.transcribe([bees] * 5, ["en-GB", "el", "nb-NO", "tl", "arz"])
    assert [transcript.lang for transcript in told] == ["en", "el", "no", "fil", "ar"]
    assert any("\u0370" <= letter <= "\u03ff" for letter in told[1].text)
    assert not any("\u0370" <= letter <= "\u03ff" for letter in told[0].text)
    assert whisper.transcribe([bees], ["eo"]) == whisper.transcribe([bees])  # not one of Whisper's


@pytest.mark.parametrize(
    ("waveform", "complaint"),
    [(np.zeros(30 * 16000 + 160, np.float32), "30 s"), (np.array([0.1, np.nan] * 4000, np.float32), "NaN")],
)
def test_what_cannot_be_read_is_refused(
    whisper: WhisperTranscriber, waveform: NDArray[np.float32], complaint: str
) -> None:
    """A text made up about such a clip would be searched like any other."""
    with pytest.raises(ValueError, match=complaint):
        whisper.transcribe([clip("en-bees"), waveform])


def test_a_clip_of_the_greatest_length_is_read(whisper: WhisperTranscriber) -> None:
    """There is no room for silence behind it, and its words still come."""
    bees = clip("en-bees")
    whole = np.pad(bees, (30 * 16000 - len(bees), 0))
    assert "bees" in whisper.transcribe([whole])[0].text


def test_a_malformed_language_is_said(whisper: WhisperTranscriber) -> None:
    """As everywhere: a typing error is no hint to guess."""
    with pytest.raises(InvalidLanguage):
        whisper.transcribe([clip("en-bees")], ["en_GB"])


# --- loops


def slow_without_loop(tokens: list[int]) -> list[int]:
    """Every period, every place it may begin at: the one with the shortest period, then the earliest."""
    for period in range(1, len(tokens)):
        for start in range(len(tokens)):
            end = tokens[start:]
            again = [end[place % period] for place in range(len(end))]
            if end == again and len(end) >= period * (2 if period >= 4 else 4):
                return tokens[: start + period]
    return tokens


@given(st.lists(st.integers(0, 2), max_size=24), st.integers(0, 9))
def test_loops_are_cut_as_they_are_defined(tokens: list[int], wanted: int) -> None:
    """On texts of few words, where loops are the rule, against the definition tried out one by one."""
    looping = (tokens + tokens[:wanted] * 4)[:40]
    assert without_loop(looping) == slow_without_loop(looping)


def test_repetition_that_may_have_been_said_stays() -> None:
    """ "No, no, no!" is speech; the same sentence over and over with a piece of it at the end is not."""
    assert without_loop([7, 8, 8, 8]) == [7, 8, 8, 8]
    assert without_loop([1, 2, 3, 1, 2, 3, 9]) == [1, 2, 3, 1, 2, 3, 9]
    assert without_loop([5, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2]) == [5, 1, 2, 3, 4]
    assert without_loop([]) == []


# --- the folder


def test_the_halves_make_the_published_file(models_dir: Path) -> None:
    """Joined in the wrong order, or cut short, the file would still be a file."""
    folder = models_dir / "whisper-base"
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        Path(file.local_name).name for file in WHISPER_FILES
    )
    assert sha256_of(folder / "model.bin") == WHISPER_FILES[0].sources[0].sha256


def test_without_a_models_folder_it_is_in_the_users_cache(
    models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second start must find what the first one made, and the packages' own folder may be read-only."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = tmp_path / "clasp-search" / "whisper-base"
    shutil.copytree(models_dir / "whisper-base", kept)
    before = {file: file.stat().st_mtime_ns for file in kept.iterdir()}
    assert whisper_folder(None) == kept
    assert {file: file.stat().st_mtime_ns for file in kept.iterdir()} == before


def test_a_damaged_file_is_an_error(models_dir: Path, tmp_path: Path) -> None:
    """As for all weights: what is there and wrong is named, and nothing is put in its place."""
    shutil.copytree(models_dir / "whisper-base", tmp_path / "whisper-base")
    (tmp_path / "whisper-base" / "vocabulary.txt").write_text("other words")
    with pytest.raises(WeightsMismatch, match=r"vocabulary\.txt"):
        whisper_folder(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "whisper-base.bin.part1").write_bytes(b"not the half")
    with pytest.raises(WeightsMismatch, match="part1"):
        whisper_folder(tmp_path / "other")
    assert list((tmp_path / "other" / "whisper-base").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named() -> None:
    """Containers run on read-only disks: the message says which setting to change."""
    with pytest.raises(ModelUnavailable, match="CLASP_MODELS_DIR"):
        whisper_folder(Path("/proc/models"))


def test_workers_may_start_together(tmp_path: Path) -> None:
    """Several put the file together at once: each finds it whole, none sees another's half."""
    with ThreadPoolExecutor(3) as workers:
        assert set(workers.map(whisper_folder, [tmp_path] * 3)) == {tmp_path / "whisper-base"}
    assert len(list((tmp_path / "whisper-base").iterdir())) == len(WHISPER_FILES)


# --- CTC


@pytest.fixture(scope="module", params=["hubert", "wav2vec2"])
def ctc(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with a CTC head and the published letters."""
    save = {"hubert": save_hubert, "wav2vec2": save_wav2vec2}[request.param]
    folder = save(tmp_path_factory.mktemp("ctc") / request.param, pad_token_id=0, vocab_size=len(LETTERS))
    (folder / "vocab.json").write_text(json.dumps({letter: place for place, letter in enumerate(LETTERS)}))
    return folder


def test_ctc_reads_as_the_notebooks_do(ctc: Path) -> None:
    """Against transformers' own network and tokenizer, clip by clip, on weights that torch alone loaded."""
    import transformers

    kind = {"hubert": transformers.HubertForCTC, "wav2vec2": transformers.Wav2Vec2ForCTC}[ctc.name]
    network = kind(kind.config_class.from_pretrained(ctc)).eval()
    network.load_state_dict(new_names(load_file(ctc / "model.safetensors")), strict=True)
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(ctc)
    tokenizer = transformers.Wav2Vec2CTCTokenizer(ctc / "vocab.json")
    speech = sample()
    clips = [speech[:48_000], 0.01 * speech[:47_000], speech[8000:24_000], speech[:400]]
    for transcript, waveform in zip(CtcTranscriber(ctc).transcribe(clips), clips, strict=True):
        values = extractor(
            waveform / np.abs(waveform).max(), sampling_rate=16_000, return_tensors="pt"
        ).input_values
        with torch.inference_mode():
            scores = network(values).logits.log_softmax(-1)[0]
        expected = tokenizer.decode(scores.argmax(-1))  # told to skip <s>, it would drop blanks too early
        assert transcript.text == " ".join(re.sub("<s>|</s>|<unk>", "", expected).lower().split())
        best = scores.max(-1)
        spoken = best.indices != 0
        assert transcript.confidence == pytest.approx(float(best.values[spoken].mean()), abs=1e-3)
        assert transcript.lang is None


def test_ctc_says_something(ctc: Path) -> None:
    """Guards the test above: two empty texts agree as well."""
    assert len(CtcTranscriber(ctc).transcribe([sample()])[0].text) > 10


def test_what_a_ctc_folder_lacks_is_said(tmp_path: Path) -> None:
    """Folders without a head, or with other letters, would transcribe into noise."""
    folder = save_hubert(tmp_path / "hubert", vocab_size=len(LETTERS))
    with pytest.raises(ModelUnavailable, match=r"vocab\.json"):
        CtcTranscriber(folder)
    (folder / "vocab.json").write_text(json.dumps({"<pad>": 0, "|": 1, "A": 2}))
    with pytest.raises(ModelUnavailable, match="3 labels"):
        CtcTranscriber(folder)
    (folder / "vocab.json").write_text(json.dumps({letter: 3 for letter in LETTERS}))
    with pytest.raises(ModelUnavailable, match="from 0 on"):
        CtcTranscriber(folder)
    rewrite(
        folder / "model.safetensors", lambda state: {k: v for k, v in state.items() if "lm_head" not in k}
    )
    with pytest.raises(ModelUnavailable, match="CTC head"):
        CtcTranscriber(folder)


def test_a_ctc_transcript_depends_on_its_weights(ctc: Path, tmp_path: Path) -> None:
    """Stored transcripts of two checkpoints must never be taken for each other's."""
    other = Path(shutil.copytree(ctc, tmp_path / "other"))
    assert CtcTranscriber(other).identity == CtcTranscriber(ctc).identity
    state = load_file(other / "model.safetensors")
    state["lm_head.bias"] += 1
    save_file(state, other / "changed.safetensors", metadata={"format": "pt"})
    (other / "changed.safetensors").replace(other / "model.safetensors")
    assert CtcTranscriber(other).identity != CtcTranscriber(ctc).identity
