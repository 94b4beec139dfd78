"""Calibration: a confidence is a frequency, bars follow language and crowd, and models are not mixed up.

Most of it on a small world whose truth is known: texts are random directions, a recording is its text with
noise, and how much noise is the language's own.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clasp_core.calibration import Calibration, Curve, calibrate, calibration_of
from clasp_core.catalog import EmbeddedSegment
from clasp_core.errors import InvalidManifest, NotCalibrated
from clasp_core.evaluation import EmbeddedManifest
from clasp_core.manifest import ManifestItem
from clasp_core.models import open_model
from tests.core.doubles import unit

DIM = 48
NOISE = {"en": 1.0, "fa": 2.5, "ka": 2.5}
COUNTS = {"en": 300, "fa": 300, "ka": 16}


def world(seed: int, counts: dict[str, int] = COUNTS) -> EmbeddedManifest:
    """Items of each language, three to a speaker, in recordings of one or two segments."""
    random = np.random.default_rng(seed)
    languages = [language for language, count in counts.items() for _ in range(count)]
    texts = unit(random.normal(size=(len(languages), DIM)))
    items, recordings = [], []
    for place, (language, text) in enumerate(zip(languages, texts, strict=True)):
        speech = unit(text + NOISE[language] * random.normal(size=DIM) / np.sqrt(DIM))
        vectors = [speech] if place % 2 else [unit(random.normal(size=DIM)), speech]
        recordings.append([EmbeddedSegment(float(i), i + 1.0, vector) for i, vector in enumerate(vectors)])
        speaker = f"{language} {place // 3}"
        items.append(ManifestItem(str(place), Path("x"), f"text {place}", lang=language, speaker=speaker))
    return EmbeddedManifest(items, recordings, texts, [], {})


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(world(0), fingerprint="0" * 16, data="a small world")


def asked(
    calibration: Calibration, other: EmbeddedManifest, lang: str, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Best hits of questions in a language, half of them without an answer, each in a random pool of a world:
    the score, whether it was right, and the segments searched."""
    random = np.random.default_rng(1)
    scores, best, right, many = other.scores(), [], [], []
    for question in [place for place, item in enumerate(other.items) if item.lang == lang]:
        others = random.choice([p for p in range(len(other.items)) if p != question], size, replace=False)
        pool = [*others, question] if random.random() < 0.5 else list(others)
        found = max(pool, key=lambda place: scores[question, place])
        best.append(scores[question, found])
        right.append(found == question)
        many.append(sum(len(other.recordings[place]) for place in pool))
    return np.array(best), np.array(right), np.array(many)


@pytest.mark.parametrize("lang", ["en", "fa"])
@pytest.mark.parametrize("size", [20, 400])
def test_a_confidence_is_a_frequency(calibration: Calibration, lang: str, size: int) -> None:
    """Who reads 0.8 acts on it: four of five such hits must be right, in a language that is heard well or
    badly, among few recordings or many, on speakers that nothing was fitted to."""
    best, right, many = asked(calibration, world(7, {lang: 900}), lang, size)
    sure = np.array([calibration.confidence(float(s), lang, int(n)) for s, n in zip(best, many, strict=True)])
    assert sure.mean() == pytest.approx(right.mean(), abs=0.05)
    for low, high in ((0, 0.3), (0.3, 0.7), (0.7, 1.01)):
        inside = (low <= sure) & (sure < high)
        if inside.sum() >= 30:
            assert sure[inside].mean() == pytest.approx(right[inside].mean(), abs=0.1), (low, high)


def test_the_bar_is_higher_in_a_crowd_and_of_the_language(calibration: Calibration) -> None:
    """The best of 100,000 wrong segments scores what the right one of ten does; and a language in which
    right answers score lower must not lose them to another's bar."""
    bars = [calibration.min_score("fa", segments) for segments in (10, 1000, 100_000)]
    assert bars == sorted(bars)
    assert bars[2] - bars[0] > 0.1
    assert calibration.min_score("fa", 100) != pytest.approx(calibration.min_score("en", 100), abs=0.01)
    for lang, segments in (("en", 10), ("fa", 5000)):
        bar = calibration.min_score(lang, segments)
        assert calibration.confidence(bar, lang, segments) == pytest.approx(calibration.accept, abs=1e-3)
        assert calibration.confidence(bar + 0.05, lang, segments) > calibration.accept
    sounds = [calibration.min_score(None, segments, by_sound=True) for segments in (10, 1000)]
    assert sounds == sorted(sounds)


def test_a_question_without_an_answer_shows_little(calibration: Calibration) -> None:
    """What `min_score=auto` is for, in the figures it is chosen by; and the bar by sound keeps its word."""
    other = world(9)
    best, right, many = asked(calibration, other, "en", 100)
    bars = np.array([calibration.min_score("en", int(n)) for n in many])
    shown = best >= bars
    assert right[shown].mean() > 0.9
    assert shown[right].mean() > 0.9
    figures = calibration.report["overall"]
    assert figures["auroc"] > 0.8
    assert calibration.report["log_loss"]["by_language"] < calibration.report["log_loss"]["one_curve"]
    by_sound = other.scores_by_sound(np.arange(100))
    np.fill_diagonal(by_sound, -1)
    bar = calibration.min_score(None, sum(map(len, other.recordings[:100])), by_sound=True)
    assert 0.005 < (by_sound.max(axis=1) >= bar).mean() < 0.2


def test_a_language_of_which_little_was_heard_leans_on_the_others(calibration: Calibration) -> None:
    """Eight questions say something, but not everything: its curve lies between that of all and its own.
    One never heard has that of all; a region's tag has its language's."""
    assert calibration.curve("fa-IR") == calibration.curve("fa") == calibration.languages["fa"]
    assert calibration.curve("sw") == calibration.curve(None) == calibration.default
    distance = {
        lang: abs(calibration.min_score(lang, 100) - calibration.min_score(None, 100))
        for lang in ("fa", "ka")
    }
    assert distance["ka"] > 0
    plenty = calibrate(world(0, {"en": 300, "fa": 16, "ka": 300}), fingerprint="0" * 16, data="")
    own = abs(plenty.min_score("ka", 100) - plenty.min_score(None, 100))
    assert distance["ka"] < own + 0.02


def test_no_speaker_is_in_both_halves(calibration: Calibration) -> None:
    """A voice that was fitted to flatters its own report; and the same manifest gives the same curves."""
    fitted, reported = (calibration.report[name] for name in ("fitted_on", "reported_on"))
    small = world(0)
    assert fitted["questions"] + reported["questions"] == len(small.items)
    assert fitted["speakers"] + reported["speakers"] == len({item.speaker for item in small.items})
    assert abs(fitted["questions"] - reported["questions"]) <= 10
    for row in calibration.report["reliability"]:
        assert row["ci95"][0] <= row["right"] <= row["ci95"][1]
    again = calibrate(world(0), fingerprint="0" * 16, data="a small world")
    assert again == calibration


def test_a_precision_can_be_asked_for(calibration: Calibration) -> None:
    """Some would rather be told nothing than something wrong; and what cannot be had is refused."""
    strict = calibrate(world(0), fingerprint="0" * 16, data="", precision=0.97)
    assert strict.accept > calibration.accept
    assert strict.report["overall"]["precision"] > 0.94
    scrambled = world(0)
    scrambled = replace(scrambled, texts=np.roll(scrambled.texts, 1, axis=0))
    with pytest.raises((InvalidManifest, NotCalibrated)):
        calibrate(scrambled, fingerprint="0" * 16, data="", precision=0.97)
    with pytest.raises(InvalidManifest, match="ten"):
        calibrate(world(0, {"en": 12}), fingerprint="0" * 16, data="")


# --- the file


class Uncalibrated:
    """As much of a model as a calibration looks at."""

    name = "mine"
    fingerprint = "0" * 16

    def __init__(self, file: Path | None) -> None:
        self.calibration_file = file


def test_a_calibration_is_read_as_it_was_written(calibration: Calibration, tmp_path: Path) -> None:
    """And a running service sees a new one, without a start."""
    model = Uncalibrated(tmp_path / "folder" / "calibration.json")
    calibration.write(model.calibration_file)
    assert calibration_of(model) == calibration
    assert json.loads(model.calibration_file.read_text())["format"] == "clasp-calibration/1"
    changed = replace(calibration, default=Curve(-1.0, 10.0, 0.5))
    changed.write(model.calibration_file)
    assert calibration_of(model).default == Curve(-1.0, 10.0, 0.5)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "Nobody has measured"),
        ("{", "no calibration"),
        ("[]", "no calibration"),
        ('{"format": "clasp-calibration/2"}', "clasp-calibration/1"),
        ('{"format": "clasp-calibration/1"}', "no calibration"),
    ],
)
def test_what_is_no_calibration_is_refused(tmp_path: Path, content: str | None, reason: str) -> None:
    """A bar that came from nowhere hides hits without a word; the sentence says how to get a real one."""
    file = tmp_path / "calibration.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(NotCalibrated, match=reason) as refused:
        calibration_of(Uncalibrated(file))
    assert "clasp calibrate" in refused.value.detail
    with pytest.raises(NotCalibrated):
        calibration_of(Uncalibrated(None))


def test_another_version_s_calibration_is_refused(calibration: Calibration, tmp_path: Path) -> None:
    """Retrained weights in the same folder score otherwise; the old file must not speak for them."""
    model = Uncalibrated(tmp_path / "calibration.json")
    replace(calibration, fingerprint="f" * 16).write(model.calibration_file)
    with pytest.raises(NotCalibrated, match=r"f{16}.*0{16}"):
        calibration_of(model)


def test_the_embedded_model_is_calibrated() -> None:
    """`min_score=auto` works out of the box, by curves of these very weights; its own report is fair to good
    at telling questions with an answer from those without."""
    shipped = calibration_of(open_model("mini"))
    assert len(shipped.languages) >= 30
    assert shipped.report["fitted_on"]["questions"] >= 1000
    assert shipped.report["overall"]["auroc"] > 0.7
    assert shipped.min_score("it", 21) < shipped.min_score("it", 100_000)
