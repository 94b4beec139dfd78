"""What a score means: how probably a best hit is right, by the question's language and how much was searched.

A cosine has no fixed meaning. True pairs score lower in languages a model knows less (CLASP's threshold of
0.5 passes 85 % of English true pairs and 29 % of German ones: TE 129-139), and the best of many wrong scores
grows with their number, about as ln N (extreme values). So a `Calibration` is measured: questions are asked
of pools that hold the right recording and of pools it was taken from, of every size, and a logistic curve
(Platt, 1999) is fitted to whether the best hit was right:

    logit P = intercept + slope * score - crowd * ln(segments searched)

(were all wrong scores far below right ones, the odds would fall with 1 / N: a crowd of 1). Half of the pools
are of recordings in any language, the other half of those in the question's own as far as they go: wrong
answers in the same language score higher. No speaker counts for more than `SPEAKER_QUESTIONS`.

A language's intercept and slope are drawn towards those of all languages by a ridge penalty, which counts the
less the more was measured of it; a language that was not measured has those of all. P supposes that every
second question has an answer in the library, as half of the trials do.

    calibration_of(model).confidence(score, "fa", segments)
    calibration_of(model).min_score("fa", segments)
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clasp_core.durability import write_whole
from clasp_core.errors import InvalidManifest, NotCalibrated
from clasp_core.evaluation import EmbeddedManifest, Progress, embed_manifest
from clasp_core.language import primary_language
from clasp_core.manifest import ManifestItem, read_manifest
from clasp_core.models import Model

FORMAT = "clasp-calibration/1"
POOLS = (3, 10, 30, 100, 300, 1000, 3000, 10_000)
"""Recordings in a pool; those larger than the manifest's half are left out, and the whole half is one."""
PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Strengths of the ridge that are tried, in questions' worth."""
FOLDS = 5
LEAST_QUESTIONS = 5
"""A language with fewer to fit on has no curve of its own."""
SPEAKER_QUESTIONS = 20
SOUND_FALSE_ALARMS = 0.05

_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Curve:
    """One language's curve. `slope` is positive, `crowd` not negative."""

    intercept: float
    slope: float
    crowd: float

    def confidence(self, score: float, segments: int) -> float:
        """P(right), in 0..1, of a best hit with this cosine among so many segments."""
        logit = self.intercept + self.slope * score - self.crowd * math.log(max(1, segments))
        return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))

    def score_at(self, confidence: float, segments: int) -> float:
        """The cosine (not cut at 1) whose confidence this is."""
        logit = math.log(confidence / (1 - confidence))
        return (logit - self.intercept + self.crowd * math.log(max(1, segments))) / self.slope


@dataclass(frozen=True, slots=True)
class Calibration:
    """A model's curves, bound to it by its fingerprint."""

    fingerprint: str
    accept: float
    """The confidence from which `min_score=auto` keeps a hit."""
    default: Curve
    languages: Mapping[str, Curve]
    """By primary language: `fa` is that of fa-IR, too."""
    sound: tuple[float, float]
    """Questions by sound: the cosine that one in twenty without an answer reaches is a + b * ln(segments)."""
    report: Mapping[str, Any]
    """How it was made and how it fared on speakers that it was not made of."""

    def curve(self, lang: str | None) -> Curve:
        """`lang` is a canonical tag of the question's language; without one, all languages' curve."""
        return self.languages.get(primary_language(lang) or "", self.default)

    def confidence(self, score: float, lang: str | None, segments: int) -> float:
        """P(right) of a best hit to a question in words, rounded to four places."""
        return round(self.curve(lang).confidence(score, segments), 4)

    def min_score(self, lang: str | None, segments: int, *, by_sound: bool = False) -> float:
        """The lowest cosine worth showing, which is `min_score=auto`; where it lies beyond 1, nothing is.

        Of a recording as the question (`by_sound`) only that chance does not explain its hit can be said:
        hardly any manifest has two recordings of one sentence, to measure more by.
        """
        if by_sound:
            return self.sound[0] + self.sound[1] * math.log(max(1, segments))
        return self.curve(lang).score_at(self.accept, segments)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")


def calibration_of(model: Model) -> Calibration:
    """The model's own, from its folder; read again when the file changes.

    Raises NotCalibrated where there is none, where it is of another version of the model, or unreadable.
    """
    path = model.calibration_file
    anew = "Run `clasp calibrate` on a manifest of recordings that it was not trained on."
    if path is None or not path.is_file():
        raise NotCalibrated(f"Nobody has measured what scores of the model {model.name!r} mean. {anew}")
    try:
        calibration = _read(path, path.stat().st_mtime_ns)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise NotCalibrated(
            f"{path} is no calibration that this version can read: {error}. {anew}"
        ) from error
    if calibration.fingerprint != model.fingerprint:
        raise NotCalibrated(
            f"{path} was measured with another version of the model {model.name!r}:"
            f" {calibration.fingerprint}, and this one is {model.fingerprint}. {anew}"
        )
    return calibration


@lru_cache(maxsize=8)
def _read(path: Path, changed_ns: int) -> Calibration:
    fields = json.loads(path.read_text(encoding="utf-8"))
    if fields.pop("format", None) != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    fields["default"] = Curve(**fields["default"])
    fields["languages"] = {lang: Curve(**curve) for lang, curve in fields["languages"].items()}
    fields["sound"] = tuple(fields["sound"])
    return Calibration(**fields)


# --- measuring


def calibrate_manifest(
    model: Model,
    manifest: Path,
    *,
    audio_root: Path | None = None,
    split: str | None = None,
    precision: float | None = None,
    seed: int = 0,
    progress: Progress = lambda items, total: items,
) -> Calibration:
    """Fit on one half of the speakers, and report on the other.

    Use recordings that the model was not trained on: of its own it is too sure. `mini` learns from split
    `train`, so it is calibrated and reported on the two halves of `eval`. Items without a speaker are each
    one of their own.

    `accept` is the confidence that is best in F1, where what counts is a right best hit that is shown; or,
    with a `precision` (between 0 and 1), the lowest from which that share of the hits shown is right.

    Raises InvalidManifest where a half has fewer than ten items, or nothing is ever right.
    """
    items = [item for item in read_manifest(manifest, audio_root) if split in (None, item.split)]
    _check_halves(*_halves(items))  # before minutes of embedding
    embedded = embed_manifest(model, manifest, audio_root=audio_root, split=split, progress=progress)
    return calibrate(
        embedded, fingerprint=model.fingerprint, data=f"{manifest.name}, split {split or 'all'}",
        precision=precision, seed=seed,
    )  # fmt: skip


def calibrate(
    embedded: EmbeddedManifest, *, fingerprint: str, data: str, precision: float | None = None, seed: int = 0
) -> Calibration:
    """`calibrate_manifest` from vectors that are there already."""
    first, second = _halves(embedded.items)
    _check_halves(first, second)
    fitted = _trials(embedded, first, seed)
    if not 0 < fitted.right.sum() < len(fitted.right):
        raise InvalidManifest("The model's best hits are all wrong here: there is nothing to calibrate.")
    penalty = _best_penalty(fitted)
    default, languages = _fit(fitted, penalty)
    confidences = _confidences(fitted, default, languages)
    accept = _best_accept(fitted, confidences, precision)
    reported = _trials(embedded, second, seed + 1)
    report = {
        "data": data,
        "fitted_on": {"questions": len(first), "speakers": _speakers(embedded.items, first)},
        "reported_on": {"questions": len(second), "speakers": _speakers(embedded.items, second)},
        "penalty": penalty,
        "target": "f1" if precision is None else f"precision {precision}",
        **_report(reported, default, languages, accept),
    }
    return Calibration(
        fingerprint, round(accept, 4), default, languages, _sound(embedded, first, seed), report
    )


@dataclass(frozen=True, slots=True)
class _Trials:
    """Rows, each a question asked of a pool; every question weighs the same with an answer and without, and
    1 each, but for those of speakers with more than `SPEAKER_QUESTIONS`."""

    score: _Floats
    """Of the best hit."""
    segments: _Floats
    """In the pool."""
    pool: NDArray[np.int64]
    """Recordings in the pool."""
    answerable: NDArray[np.bool_]
    right: NDArray[np.bool_]
    """Whether the best hit was."""
    question: NDArray[np.int64]
    language: NDArray[np.str_]
    fold: NDArray[np.int64]
    """Of the question's speaker."""
    weight: _Floats

    def where(self, chosen: NDArray[np.bool_]) -> "_Trials":
        return _Trials(*(getattr(self, name)[chosen] for name in self.__slots__))


def _trials(embedded: EmbeddedManifest, places: NDArray[np.int64], seed: int) -> _Trials:
    """Each question with pools of growing size, in two random orders of its own of the half's recordings."""
    random = np.random.default_rng(seed)
    scores = embedded.scores(places)
    keys = embedded.keys()[places]
    lengths = np.array([len(embedded.recordings[place]) for place in places])
    items = [embedded.items[place] for place in places]
    spoken = np.array([primary_language(item.lang) or "" for item in items])
    counts = Counter(map(_speaker, items))
    rows: list[tuple[float, int, int, bool, bool, int, str, int, float]] = []
    for question, item in enumerate(items):
        right = keys == keys[question]
        best_right = float(scores[question, right].max())
        language = primary_language(item.query_lang or item.lang) or ""
        about = (question, language, _fold(item))
        mixed = random.permutation(np.flatnonzero(~right))
        own_first = random.permutation(mixed)
        own_first = own_first[np.argsort(spoken[own_first] != language, kind="stable")]
        sizes = [size for size in POOLS if size < len(mixed)] + [len(mixed)]
        weight = min(1.0, SPEAKER_QUESTIONS / counts[_speaker(item)]) / (2 * len(sizes))
        for wrong in (mixed, own_first):
            best_wrong = np.maximum.accumulate(scores[question, wrong])
            many = np.cumsum(lengths[wrong])
            for size in sizes:
                without, among = float(best_wrong[size - 1]), int(many[size - 1])
                rows.append((without, among, size, False, False, *about, weight))
                found, there = best_right > without, among + int(lengths[question])
                rows.append((max(best_right, without), there, size, True, found, *about, weight))
    columns = list(zip(*rows, strict=True))
    kinds = (np.float64, np.float64, np.int64, np.bool_, np.bool_, np.int64, np.str_, np.int64, np.float64)
    return _Trials(*(np.array(column, kind) for column, kind in zip(columns, kinds, strict=True)))


def _halves(items: Sequence[ManifestItem]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of both halves: speakers from the most to the least talkative, in each language, to the half
    that has fewer of that language's questions yet."""
    spoken: dict[tuple[str, str], list[int]] = {}
    for i, item in enumerate(items):
        spoken.setdefault((primary_language(item.lang) or "", _speaker(item)), []).append(i)
    side_of: dict[str, int] = {}
    counts: dict[tuple[str, int], int] = {}
    for (language, speaker), places in sorted(
        spoken.items(), key=lambda entry: (-len(entry[1]), _hash(entry[0][1]))
    ):
        fewer = min((0, 1), key=lambda side: counts.get((language, side), 0))
        side = side_of.setdefault(speaker, fewer)
        counts[language, side] = counts.get((language, side), 0) + min(len(places), SPEAKER_QUESTIONS)
    sides = np.array([side_of[_speaker(item)] for item in items])
    return np.flatnonzero(sides == 0), np.flatnonzero(sides == 1)


def _check_halves(first: NDArray[np.int64], second: NDArray[np.int64]) -> None:
    if min(len(first), len(second)) < 10:
        raise InvalidManifest("A calibration needs ten items or more in each half, by different speakers.")


def _speaker(item: ManifestItem) -> str:
    return f"item {item.id}" if item.speaker is None else f"speaker {item.speaker}"


def _speakers(items: Sequence[ManifestItem], places: NDArray[np.int64]) -> int:
    return len({_speaker(items[i]) for i in places})


def _fold(item: ManifestItem) -> int:
    return _hash(_speaker(item)) % FOLDS


def _hash(text: str) -> int:
    return int.from_bytes(sha256(text.encode()).digest()[:8])


# --- fitting


def _fit(trials: _Trials, penalty: float) -> tuple[Curve, dict[str, Curve]]:
    """The curve of all languages, and each language's own, by Newton's method on the penalised likelihood.

    Scores and ln N are brought to mean 0 and deviation 1 meanwhile, so that one penalty suits intercepts
    and slopes. Where few questions make a curve rise with the crowd, the crowd is left out; a language whose
    own would fall with the score has none of its own. NotCalibrated where that of all languages would.
    """
    mean, deviation = trials.score.mean(), trials.score.std() or 1.0
    crowd = np.log(trials.segments)
    crowd_mean, crowd_deviation = crowd.mean(), crowd.std() or 1.0
    scores, crowds = (trials.score - mean) / deviation, (crowd - crowd_mean) / crowd_deviation
    names, language = np.unique(trials.language, return_inverse=True)
    n = len(names)
    design = np.zeros((len(scores), 3 + 2 * n))
    design[:, :3] = np.stack((np.ones_like(scores), scores, crowds), axis=1)
    rows = np.arange(len(scores))
    design[rows, 3 + language] = 1
    design[rows, 3 + n + language] = scores
    ridge = np.full(3 + 2 * n, penalty)
    ridge[:3] = 1e-3  # against infinite curves where right and wrong never overlap
    weights = np.zeros(3 + 2 * n)
    for _ in range(100):
        logits = np.clip(design @ weights, -30, 30)
        expected = 1 / (1 + np.exp(-logits))
        gradient = design.T @ (trials.weight * (trials.right - expected)) - ridge * weights
        curvature = trials.weight * np.maximum(expected * (1 - expected), 1e-9)
        step = np.linalg.solve((design * curvature[:, None]).T @ design + np.diag(ridge), gradient)
        weights += step * min(1.0, 3.0 / max(float(np.abs(step).max()), 1e-12))
        if np.abs(step).max() < 1e-8:
            break

    if weights[2] > 0:
        return _fit(replace(trials, segments=np.ones_like(trials.segments)), penalty)

    def curve(intercept: float, slope: float) -> Curve:
        per_crowd = abs(weights[2]) / crowd_deviation
        at_zero = intercept - slope * mean / deviation + per_crowd * crowd_mean
        return Curve(round(float(at_zero), 4), round(float(slope / deviation), 4), round(float(per_crowd), 4))

    if weights[1] <= 0:
        raise NotCalibrated("The scores say nothing here: right hits do not score above wrong ones.")
    own = {}
    for i, name in enumerate(names):
        asked, slope = len(np.unique(trials.question[language == i])), weights[1] + weights[3 + n + i]
        if name and asked >= LEAST_QUESTIONS and slope > 0:
            own[str(name)] = curve(weights[0] + weights[3 + i], slope)
    return curve(weights[0], weights[1]), own


def _best_penalty(trials: _Trials) -> float:
    """The penalty under which speakers that a fit has not seen are least surprising."""

    def loss(penalty: float) -> float:
        total = 0.0
        for fold in range(FOLDS):
            unseen = trials.fold == fold
            if unseen.any() and not unseen.all():
                try:
                    default, languages = _fit(trials.where(~unseen), penalty)
                except NotCalibrated:
                    return math.inf
                left_out = trials.where(unseen)
                total += (
                    _log_loss(left_out, _confidences(left_out, default, languages)) * left_out.weight.sum()
                )
        return total

    return min(PENALTIES, key=loss)


def _confidences(trials: _Trials, default: Curve, languages: Mapping[str, Curve]) -> _Floats:
    names, language = np.unique(trials.language, return_inverse=True)
    curves = [languages.get(str(name), default) for name in names]
    intercept, slope, crowd = np.array([(c.intercept, c.slope, c.crowd) for c in curves])[language].T
    logits = intercept + slope * trials.score - crowd * np.log(trials.segments)
    confidences: _Floats = 1 / (1 + np.exp(-np.clip(logits, -30, 30)))
    return confidences


def _log_loss(trials: _Trials, confidences: _Floats) -> float:
    surprise = -np.log(np.where(trials.right, confidences, 1 - confidences))
    return float(np.average(surprise, weights=trials.weight))


def _best_accept(trials: _Trials, confidences: _Floats, precision: float | None) -> float:
    levels = np.unique(np.round(confidences, 3))
    levels = levels[(levels > 0) & (levels < 1)]
    if precision is None:
        return float(max(levels, key=lambda level: _figures(trials, confidences >= level)["f1"]))
    for level in levels:
        if _figures(trials, confidences >= level)["precision"] >= precision:
            return float(level)
    raise InvalidManifest(f"No confidence reaches a precision of {precision} on these recordings.")


def _sound(embedded: EmbeddedManifest, places: NDArray[np.int64], seed: int) -> tuple[float, float]:
    """a, b of a + b * ln(segments): what the best of wrong recordings scores with a recording as the
    question, at its upper `SOUND_FALSE_ALARMS`."""
    random = np.random.default_rng(seed)
    scores = embedded.scores_by_sound(places)
    keys = embedded.keys()[places]
    lengths = np.array([len(embedded.recordings[place]) for place in places])
    sizes = [size for size in POOLS if size < len(places) // 2] + [len(places) // 2]
    best = np.empty((len(places), len(sizes)))
    many = np.empty_like(best)
    for question in range(len(places)):
        wrong = random.permutation(np.flatnonzero(keys != keys[question]))[: sizes[-1]]
        ends = np.minimum(sizes, len(wrong)) - 1
        best[question] = np.maximum.accumulate(scores[question, wrong])[ends]
        many[question] = np.cumsum(lengths[wrong])[ends]
    b, a = np.polyfit(np.log(many.mean(axis=0)), np.quantile(best, 1 - SOUND_FALSE_ALARMS, axis=0), 1)
    return round(float(a), 4), round(float(b), 4)


# --- reporting


def _figures(trials: _Trials, shown: NDArray[np.bool_]) -> dict[str, float]:
    """Of best hits that are shown or not. precision: shown ones that are right; recall: questions with an
    answer that are shown it; false_alarm: questions without one that are shown something; miss: questions
    with one that are shown nothing."""

    def share(of: NDArray[np.bool_], among: NDArray[np.bool_]) -> float:
        total = trials.weight[among].sum()
        return float(trials.weight[of & among].sum() / total) if total else 0.0

    precision = share(trials.right, shown)
    recall = share(shown & trials.right, trials.answerable)
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "false_alarm": share(shown, ~trials.answerable),
        "miss": share(~shown, trials.answerable),
    }


def _auroc(trials: _Trials, ranking: _Floats) -> float:
    """P(a question with an answer ranks above one without), ties by half."""
    order = np.argsort(ranking, kind="stable")
    ranked, weight, positive = ranking[order], trials.weight[order], trials.answerable[order]
    _, group = np.unique(ranked, return_inverse=True)
    negatives = np.bincount(group, weight * ~positive)
    below = np.cumsum(negatives) - negatives
    wins = (weight * positive) @ (below + negatives / 2)[group]
    return float(wins / (weight @ positive * (weight @ ~positive)))


def _report(trials: _Trials, default: Curve, languages: Mapping[str, Curve], accept: float) -> dict[str, Any]:
    confidences = _confidences(trials, default, languages)
    shown = confidences >= accept

    def figures(chosen: NDArray[np.bool_]) -> dict[str, Any]:
        some = trials.where(chosen)
        measured = {
            "questions": len(np.unique(some.question)),
            **_figures(some, shown[chosen]),
            "auroc": _auroc(some, confidences[chosen]),
            "best_hit_right": float(np.average(some.right[some.answerable])),
        }
        return {name: round(value, 4) for name, value in measured.items()}

    everything = np.ones(len(trials.score), np.bool_)
    plain, alone = _fit(trials, 1e9)[0], replace(trials, segments=np.ones_like(trials.segments))
    return {
        "overall": figures(everything),
        "pools": {
            str(size): {
                "segments": round(float(trials.segments[trials.pool == size].mean()), 1),
                "best_wrong": round(
                    float(trials.score[(trials.pool == size) & ~trials.answerable].mean()), 4
                ),
                **figures(trials.pool == size),
            }
            for size in POOLS
            if (trials.pool == size).sum()
        },
        "languages": {
            str(name): figures(trials.language == name) for name in np.unique(trials.language) if name
        },
        "log_loss": {
            "by_language": round(_log_loss(trials, confidences), 4),
            "one_curve": round(_log_loss(trials, _confidences(trials, plain, {})), 4),
            "score_alone": round(_log_loss(trials, _confidences(alone, _fit(alone, 1e9)[0], {})), 4),
        },
        "reliability": _reliability(trials, confidences),
    }


def _reliability(trials: _Trials, confidences: _Floats, resamples: int = 500) -> list[dict[str, Any]]:
    """For each tenth of confidence: its mean, and the share of best hits that were right, with a 95 %
    bootstrap interval over questions."""
    random = np.random.default_rng(0)
    tenth = np.minimum((confidences * 10).astype(np.int64), 9)
    n = int(trials.question.max()) + 1
    rows = []
    for bin_ in range(10):
        inside = tenth == bin_
        if not inside.any():
            continue
        weight = np.bincount(trials.question[inside], trials.weight[inside], n)
        right = np.bincount(trials.question[inside], (trials.weight * trials.right)[inside], n)
        asked = np.flatnonzero(weight)
        drawn = random.choice(asked, (resamples, len(asked)))
        low, high = np.percentile(right[drawn].sum(1) / weight[drawn].sum(1), (2.5, 97.5))
        rows.append(
            {
                "from": bin_ / 10,
                "to": (bin_ + 1) / 10,
                "questions": len(asked),
                "confidence": round(float(np.average(confidences[inside], weights=trials.weight[inside])), 4),
                "right": round(float(right.sum() / weight.sum()), 4),
                "ci95": [round(float(low), 4), round(float(high), 4)],
            }
        )
    return rows
