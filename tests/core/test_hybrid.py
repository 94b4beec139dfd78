"""`hybrid`: words where they can be trusted, sound where not; and how much of each is learned honestly."""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from clasp_core import models, transcription
from clasp_core.encoders import whisper
from clasp_core.encoders.weights import Source
from clasp_core.errors import InvalidField, InvalidManifest, ModelUnavailable
from clasp_core.evaluation import evaluate_manifest
from clasp_core.hybrid import EVIDENCE, HybridSpeechEncoder, Mixture, evidence, is_usable, mix, read
from clasp_core.manifest import ManifestItem
from clasp_core.models import HybridModel, TranscribingEncoder, open_model
from clasp_core.training import read_config, train
from clasp_core.training.hybrid import (
    Examples,
    compare,
    cross_validate,
    fit_mixture,
    gather,
    hits_at_1,
    shares_of,
    speaker_folds,
)
from clasp_core.transcription import Transcript
from clasp_core.types import Waveform
from tests.audio_files import encode, speech, tone
from tests.conftest import SAMPLES, lines
from tests.core.doubles import DIM, LetterTextEncoder, SpectralSpeechEncoder, random_vectors, unit
from tests.golden.make import sample


class Reader:
    """A transcriber that hears, in a clip of n tenths of a second, the nth of its texts; read slowly, it is
    the nth of its other ones."""

    name = "reader"
    weights_bytes = 0

    def __init__(self, *texts: Transcript, slow: Sequence[Transcript] | None = None) -> None:
        self.identity: list[object] = ["reader"]
        self.clips = 0
        self.lengths: list[int] = []
        self._texts = texts, texts if slow is None else slow

    def transcribe(
        self, waveforms: Sequence[Waveform], langs: Sequence[str | None] | None = None
    ) -> list[Transcript]:
        self.clips += len(waveforms)
        self.lengths += map(len, waveforms)
        heard = []
        for waveform, lang in zip(waveforms, langs or [None] * len(waveforms), strict=True):
            tenths = len(np.trim_zeros(waveform, "f")) / 1600
            text = self._texts[abs(tenths - round(tenths)) > 0.05][round(tenths) - 1]
            heard.append(replace(text, lang=lang or text.lang))
        return heard


def clip(tenths: int) -> Waveform:
    return tone(tenths / 10, frequency=200.0 + 150 * tenths)[:, 0]


TEXTS = (
    Transcript("Good  morning,\u200b everyone.", "en", -0.1),
    Transcript("", "en", -0.2),
    Transcript(" and so it goes" * 12, "en", -0.05),
    Transcript("كتابي ٢", "fa", -0.8),
)
EQUAL = Mixture()
"""Half of each."""


def encoder(mixture: Mixture = EQUAL) -> HybridSpeechEncoder:
    return HybridSpeechEncoder(SpectralSpeechEncoder(), LetterTextEncoder(), Reader(*TEXTS), mixture)


# --- the mixture


def test_shares_are_the_stated_function() -> None:
    """By hand, so that nobody has to trust the training to know what the numbers in a folder mean."""
    mixture = Mixture(0.5, {"confidence": 2.0, "agreement": -1.0, "pace": 0.25}, {"fa": -3.0})
    found = np.array([[-0.5, 0.2, 1.0], [-0.5, 0.2, 1.0], [0.0, 0.0, 0.0]])
    odds = [0.5 - 1.0 - 0.2 + 0.25, 0.5 - 3.0 - 1.0 - 0.2 + 0.25, 0.5]
    expected = [1 / (1 + np.exp(-x)) for x in odds]
    assert mixture.shares(found, ["de-AT", "fa-IR", None]) == pytest.approx(expected)


def test_evidence_is_what_it_says() -> None:
    """What is learned is learned from these three numbers; the same must be seen when it is applied."""
    rows = random_vectors(0, 2)
    found = evidence([Transcript("x" * 27, "en", -0.3)], [2.0], rows[:1], rows[1:])
    assert found[0] == pytest.approx([-0.3, float(rows[0] @ rows[1]), 0.0], abs=1e-6)
    slow, fast = (
        evidence([Transcript("x" * n, "en", 0.0)], [2.0], rows[:1], rows[1:])[0, 2] for n in (13, 55)
    )
    assert slow == pytest.approx(fast) == pytest.approx(np.log(2))


def test_a_mixture_lies_between_and_has_unit_length() -> None:
    """At the ends it is one of the two to the last bit; and opposite vectors give no NaN, which an index
    would refuse together with the whole recording."""
    a, b = random_vectors(0, 50), random_vectors(1, 50)
    assert mix(a, b, np.zeros(50)) == pytest.approx(a, abs=1e-7)
    assert mix(a, b, np.ones(50)) == pytest.approx(b, abs=1e-7)
    middle = mix(a, b, np.full(50, 0.5))
    assert np.linalg.norm(middle, axis=1) == pytest.approx(np.ones(50), abs=1e-6)
    assert np.sum(middle * a, 1) == pytest.approx(np.sum(middle * b, 1), abs=1e-6)
    assert mix(a, -a, np.full(50, 0.5)) == pytest.approx(a)


def test_a_mixture_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Serving must give the very shares that training measured."""
    mixture = Mixture(
        0.1 + 0.2, dict(zip(EVIDENCE, (1 / 3, -2e-17, 5.0), strict=True)), {"fa": -0.7, "en": 1.0}
    )
    mixture.save(tmp_path / "mixture.json")
    assert Mixture.load(tmp_path / "mixture.json") == mixture


@pytest.mark.parametrize(
    "change",
    [
        {"format": "clasp-mixture/2"},
        {"bias": None},
        {"bias": float("nan")},
        {"weights": {"confidence": 1.0}},
        {"langs": {"fa": "much"}},
    ],
)
def test_a_damaged_mixture_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    """Never something in its place: a service with other shares than its figures were measured with."""
    path = tmp_path / "mixture.json"
    EQUAL.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelUnavailable, match=r"mixture\.json"):
        Mixture.load(path)
    path.write_text("{")
    with pytest.raises(ModelUnavailable, match=r"mixture\.json"):
        Mixture.load(path)


# --- the encoder


@pytest.mark.parametrize(
    ("text", "usable"),
    [
        ("Good morning.", True),
        ("نه", True),
        ("no, no, no, no", True),
        ("谢谢", True),
        ("", False),
        (" ... ♪ ", False),
        ("and so it goes " * 12, False),
        ("ممنون از شما " * 15, False),
    ],
)
def test_a_text_without_words_or_without_end_is_of_no_use(text: str, usable: bool) -> None:
    """Recognisers write both of music and noise, and are sure of it; a short repetition people do say."""
    assert is_usable(Transcript(text, "en", -0.1)) is usable
    assert not is_usable(Transcript(text, "en", float("-inf")))


def test_what_is_heard_is_mixed_in_and_what_is_useless_is_not() -> None:
    """The stored vector is the stated one; where there are no words it is the speech vector to the last bit,
    never one of an empty text; and the words shown are those that were embedded."""
    clips = [clip(n) for n in (1, 2, 3, 4)]
    heard = encoder().hear(clips, [None, None, None, "fa-IR"])
    assert heard.transcripts == ["Good morning, everyone.", None, None, "کتابی 2"]
    spoken = SpectralSpeechEncoder().encode(clips)
    written = LetterTextEncoder().encode(["Good morning, everyone.", "کتابی 2"])
    assert heard.vectors[1:3].tobytes() == spoken[1:3].tobytes()
    assert heard.vectors[[0, 3]] == pytest.approx(unit(spoken[[0, 3]] + written), abs=1e-6)
    told = Mixture(-3.0, EQUAL.weights, {"fa": 6.0})
    shares = 1 / (1 + np.exp(3.0)), 1 / (1 + np.exp(-3.0))
    expected = mix(spoken[[0, 3]], written, np.array(shares))
    assert encoder(told).hear(clips, [None, None, None, "fa"]).vectors[[0, 3]] == pytest.approx(expected)


def test_two_readings_make_one_vector() -> None:
    """Their mean; the text shown is the one that the transcriber is surer of. A reading that is of no use
    leaves the other, and the second is told the language that the first was heard in."""
    quick = (Transcript("one", "en", -0.9), Transcript("two", "de", -0.2), Transcript("", "en", -0.1))
    slow = (Transcript("uno", None, -0.3), Transcript("zwei", None, -0.4), Transcript("three", None, -0.5))
    reader = Reader(*quick, slow=slow)
    clips = [clip(1), clip(2), clip(3)]
    words = [found for found in read(reader, LetterTextEncoder(), clips, [None] * 3) if found is not None]
    assert [found.transcript for found in words] == [
        Transcript("uno", "en", pytest.approx(-0.6)),
        Transcript("two", "de", pytest.approx(-0.3)),
        Transcript("three", "en", -0.5),
    ]
    alone = LetterTextEncoder().encode(["one", "uno", "two", "zwei", "three"])
    assert words[0].vector == pytest.approx(unit(alone[0] + alone[1]), abs=1e-6)
    assert words[1].vector == pytest.approx(unit(alone[2] + alone[3]), abs=1e-6)
    assert words[2].vector == pytest.approx(alone[4])


def test_the_longest_segment_is_read_as_well() -> None:
    """Whisper takes 30 s and not a sample more; both readings are longer than the segment."""
    reader = Reader(*[TEXTS[0]] * 400)
    for seconds in (30.0, 29.8, 27.0, 26.9):
        (found,) = read(reader, LetterTextEncoder(), [tone(seconds)[:, 0]], ["en"])
        assert found is not None
    assert max(reader.lengths) == 480_000


def test_a_clip_is_heard_the_same_whoever_is_beside_it() -> None:
    """Segments of many recordings are embedded together."""
    clips = [clip(n) for n in (4, 1, 3, 2)]
    together = encoder().hear(clips, [None] * 4)
    for place, one in enumerate(clips):
        alone = encoder().hear([one], [None])
        assert alone.vectors[0] == pytest.approx(together.vectors[place], abs=1e-6)
        assert alone.transcripts[0] == together.transcripts[place]
    assert encoder().encode(clips) == pytest.approx(together.vectors, abs=1e-6)
    assert encoder().hear([], [])[0].shape == (0, DIM)


# --- learning


def invented(noise: dict[str, tuple[float, float]], each: int = 60, dim: int = 24) -> Examples:
    """Recordings of which the speech and the written vector are off by so much noise, by language; of two
    texts of a language one is much worse than the other, and its transcriber knows."""
    random = np.random.default_rng(0)
    questions = random_vectors(1, each * len(noise), dim)
    rows: list[tuple[NDArray[np.float32], NDArray[np.float32], float, str]] = []
    for place, question in enumerate(questions):
        lang = list(noise)[place // each]
        spoken, written = noise[lang]
        bad = place % 2
        off = random.normal(size=(2, dim)) / np.sqrt(dim)
        rows.append(
            (
                unit(question + spoken * off[0]),
                unit(question + (written + 4 * bad) * off[1]),
                -0.2 - bad + 0.1 * random.normal(),
                lang,
            )
        )
    return Examples(
        [Transcript("some words of a text", lang, confidence) for _, _, confidence, lang in rows],
        np.full(len(rows), 1.5),
        np.stack([row[0] for row in rows]),
        np.stack([row[1] for row in rows]),
        questions,
        np.arange(len(rows)),
        np.array([row[3] for row in rows]),
        np.array([f"{row[3]}-{place % 6}" for place, row in enumerate(rows)]),
    )


def test_what_is_learned_beats_each_way_alone_on_other_speakers() -> None:
    """In one language the words are good, in the other the sound; the transcriber's confidence tells good
    transcripts from bad ones. Whoever learns that finds more than by either, and more than by one share."""
    examples = invented({"aa": (2.0, 0.3), "bb": (1.0, 2.5)})
    _, report = compare(examples, (0.001, 0.1), 3)
    alone = max(report["share 0.0"]["macro"], report["share 1.0"]["macro"])
    assert report["mixture"]["macro"] > alone + 0.05
    assert report["mixture"]["macro"] >= max(
        figures["macro"] for way, figures in report.items() if way != "mixture"
    )
    mixture = fit_mixture(examples, 0.001)
    assert mixture.weights["confidence"] > 0
    assert mixture.langs["aa"] > mixture.langs["bb"]
    assert fit_mixture(examples, 0.001) == mixture, "the same data must give the same weights"


def test_a_strong_pull_leaves_one_share_for_all() -> None:
    """That is what a language without data falls back to; and a useless transcript counts nothing in any."""
    examples = invented({"aa": (2.0, 0.3), "bb": (1.0, 2.5)})
    mixture = fit_mixture(examples, 1e4)
    shares = shares_of(mixture, examples)
    assert np.ptp(shares) < 0.01
    assert 0.05 < shares.mean() < 0.95
    mute = replace(examples, transcripts=[Transcript("", "aa", -0.1)] * len(examples))
    assert mute.mixtures(shares).tobytes() == mute.speech.tobytes()


def test_repeated_texts_answer_each_other() -> None:
    """As in `clasp evaluate`: who says the same is no mistake, and no negative to learn from."""
    examples = invented({"aa": (0.0, 0.0)}, each=30)
    twice = np.concatenate([np.arange(30), np.arange(30)])
    doubled = replace(
        examples,
        **{name: getattr(examples, name)[twice] for name in ("speech", "written", "questions", "numbers")},
        **{name: getattr(examples, name)[twice] for name in ("durations", "langs", "speakers")},
        transcripts=[examples.transcripts[place] for place in twice],
    )
    assert hits_at_1(doubled, np.zeros(60)) == {"aa": 1.0}
    assert all(np.isfinite([fit_mixture(doubled, 0.1).bias]))


def test_no_speaker_is_on_both_sides() -> None:
    """A voice that was learned from would make any figure too good."""
    speakers = np.array(["a"] * 50 + ["b"] * 30 + ["c"] * 25 + [f"d{n}" for n in range(40)])
    seen = []
    for learn, test in speaker_folds(speakers, 3):
        assert not set(speakers[learn]) & set(speakers[test])
        assert len(learn) + len(test) == len(speakers)
        assert 35 <= len(test) <= 60
        seen += test.tolist()
    assert sorted(seen) == list(range(len(speakers)))
    assert len(list(speaker_folds(np.array(["a", "a", "b"]), 5))) == 2
    examples = invented({"aa": (1.0, 1.0)})
    assert cross_validate(examples, 0.1, 3).keys() == {"aa"}


def test_recordings_are_heard_once(tmp_path: Path) -> None:
    """Hearing thousands takes an hour: a run that was killed goes on where it was, whatever half a line it
    left behind; what cannot be used is left out."""
    contents = {"one": encode(tone(0.1), 16_000), "four": encode(tone(0.4), 16_000), "bad": b"nothing"}
    contents["many"] = encode(speech(40.0), 16_000)
    items = []
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        items.append(ManifestItem(name, tmp_path / name, "Good morning, everyone", lang="en", speaker="me"))
    reader, cache = Reader(*TEXTS), tmp_path / "cache" / "heard.jsonl"
    parts = SpectralSpeechEncoder(), LetterTextEncoder(), reader
    first = gather(items, *parts, cache=cache)
    assert (len(first), reader.clips) == (2, 4)
    assert [text.text for text in first.transcripts] == ["Good morning, everyone.", "كتابي 2"]
    assert first.langs.tolist() == ["en", "en"]
    assert first.numbers.tolist() == [0, 0]
    whole = cache.read_bytes()
    cache.write_bytes(whole[: whole.index(b"\n") + 30])
    again = gather(items, *parts, cache=cache)
    assert reader.clips == 6
    assert again.speech == pytest.approx(first.speech)
    with pytest.raises(InvalidManifest, match="left to learn"):
        gather(items[2:3], *parts)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[data]\nmanifest = 'm'\n", r"data\.cache"),
        ("[data]\nmanifest = 'm'\ncache = 'c'\nspeeds = [1.0]\n", "speeds"),
        ("[data]\nmanifest = 'm'\ncache = 'c'\n[training]\nridges = []\n", r"training\.ridges"),
    ],
)
def test_a_setting_that_is_missing_or_unknown_is_named(tmp_path: Path, text: str, named: str) -> None:
    """A misspelt one that is ignored costs the hour of the run."""
    (tmp_path / "c.toml").write_text(f"output = 'o'\n[model]\narchitecture = 'hybrid'\n{text}")
    with pytest.raises(InvalidField, match=named):
        read_config(tmp_path / "c.toml")


# --- the model


@pytest.fixture(scope="module")
def hybrid() -> HybridModel:
    model = open_model("hybrid")
    assert isinstance(model, HybridModel)
    try:
        _ = model.fingerprint
    except ModelUnavailable as missing:
        pytest.skip(str(missing))
    return model


@pytest.mark.weights
def test_the_model_hears_words(hybrid: HybridModel) -> None:
    """The words of the bundled bees come with their vector, which is nearer to the question than sound
    alone; with the language told or not, in a batch or alone."""
    speech_encoder, mini = hybrid.speech_encoder(), open_model("mini")
    assert isinstance(speech_encoder, TranscribingEncoder)
    whole = sample()
    clips = [whole, whole[: len(whole) // 3]]
    told = speech_encoder.hear(clips, ["en-GB", "en"])
    assert told.transcripts[0] is not None
    assert "bees stay inside the hive" in told.transcripts[0]
    (alone,) = speech_encoder.encode(clips[:1])
    assert alone == pytest.approx(told.vectors[0], abs=1e-3)
    (question,) = hybrid.text_encoder().encode(["In winter the bees stay inside the hive."])
    (by_sound,) = mini.speech_encoder().encode(clips[:1])
    assert float(question @ told.vectors[0]) > float(question @ by_sound) + 0.05
    assert np.linalg.norm(told.vectors, axis=1) == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.weights
def test_the_fingerprint_is_of_all_that_decides_a_vector(hybrid: HybridModel, tmp_path: Path) -> None:
    """Vectors of other shares, or of none, must never meet these."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("model.json", "mixture.json"):
        (folder / name).write_bytes((hybrid.mixture.parent / name).read_bytes())
    same = open_model(str(folder))
    assert same.fingerprint == hybrid.fingerprint != open_model("mini").fingerprint
    Mixture(bias=1.5).save(folder / "mixture.json")
    assert open_model(str(folder)).fingerprint != hybrid.fingerprint
    (folder / "mixture.json").unlink()
    with pytest.raises(ModelUnavailable, match=r"mixture\.json"):
        _ = open_model(str(folder)).fingerprint
    assert {part.role for part in hybrid.parts()} >= {"speech", "text", "transcriber", "runtime", "mixture"}
    assert all(part.path is not None for part in hybrid.parts())


def test_what_is_missing_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """`CLASP_MODEL=hybrid` on a plain install: one line that helps, when it starts and not in a worker."""
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(
            ModelUnavailable, match=r"CTranslate2.*pip install 'clasp-search\[transcription\]'"
        ):
            _ = open_model("hybrid").fingerprint
    nowhere = tuple(
        replace(file, sources=(Source("no-such-package", "1", "model.bin", "0" * 64),))
        for file in (whisper.WHISPER_BASE_HALVES[0], transcription.WHISPER_FILES[0])
    )
    monkeypatch.setattr(whisper, "WHISPER_BASE_HALVES", (nowhere[0], *whisper.WHISPER_BASE_HALVES[1:]))
    monkeypatch.setattr(transcription, "WHISPER_FILES", (nowhere[1], *transcription.WHISPER_FILES[1:]))
    with pytest.raises(ModelUnavailable, match=r"decoder.*pip install 'clasp-search\[transcription\]'"):
        _ = open_model("hybrid").fingerprint
    missing = [part.role for part in open_model("hybrid").parts() if part.path is None]
    assert missing == ["transcriber"]


def test_only_a_model_like_mini_can_be_mixed_with(tmp_path: Path) -> None:
    """A folder that mixes transcripts into a mixture, or into the paper's model, has no space for them."""
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"format": "clasp-model/1", "architecture": "hybrid", "base": "hybrid"}))
    with pytest.raises(ModelUnavailable, match="hybrid"):
        open_model(str(tmp_path))


@pytest.mark.weights
@pytest.mark.usefixtures("hybrid")
def test_a_trained_folder_serves(tmp_path: Path) -> None:
    """From a manifest to a model that `clasp evaluate` takes, by the file that `clasp train` reads."""
    chosen = [line for line in lines(SAMPLES / "manifest.jsonl") if line["duration_s"] < 5.4]
    for line in chosen:
        line |= {"audio": str(SAMPLES / line["audio"]), "split": "train"}
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, chosen)))
    (tmp_path / "c.toml").write_text(
        "output = 'model'\n[data]\nmanifest = 'm.jsonl'\ncache = 'cache'\nids = 'ids.txt'\n"
        "[model]\narchitecture = 'hybrid'\n[training]\nfolds = 2\n"
    )
    (tmp_path / "ids.txt").write_text("".join(line["id"] + "\n" for line in chosen[1:]))
    folder = train(read_config(tmp_path / "c.toml"))
    record = json.loads((folder / "training.json").read_text())
    assert record["items"] == len(chosen) - 1
    assert {row["way"] for row in record["history"]} >= {"share 0.0", "share 1.0", "mixture"}
    description = json.loads((folder / "model.json").read_text())
    assert description["learnt_with"] == open_model("mini").fingerprint
    assert str(tmp_path) not in (folder / "training.json").read_text()
    (tmp_path / "two.jsonl").write_text("\n".join(map(json.dumps, chosen[:2])))
    report = evaluate_manifest(open_model(str(folder)), tmp_path / "two.jsonl")
    assert report["overall"]["text_to_speech"]["hits@1"] == 1.0
    assert report["fingerprint"] == models.open_model(str(folder)).fingerprint
