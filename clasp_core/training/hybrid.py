"""Learning `hybrid`'s mixture: how much a transcript counts, from recordings of which the text is known.

A handful of numbers (see `hybrid.Mixture`) by a contrastive loss: each text against the mixtures of its
language's other recordings, and the other way round. The speech vectors must be honest ones: a model
finds the recordings that it was trained on far better than any it will ever be asked about, so the
base whose vectors are mixed here is one that has not heard these speakers.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from clasp_core import metrics
from clasp_core.encoders import SpeechEncoder, TextEncoder
from clasp_core.errors import InvalidAudio, InvalidManifest
from clasp_core.hybrid import EVIDENCE, Mixture, evidence, identity, is_usable, mix, read
from clasp_core.ingest import recording_segments
from clasp_core.language import match_key, normalize_text, primary_language
from clasp_core.manifest import ManifestItem, read_manifest
from clasp_core.models import open_model
from clasp_core.training.config import digest, require
from clasp_core.training.output import write_model
from clasp_core.training.trainer import Progress, silent
from clasp_core.transcription import Transcriber, Transcript, WhisperTranscriber
from clasp_core.types import SAMPLING_RATE, Embeddings, Seconds

_log = logging.getLogger(__name__)

TEMPERATURE = 0.05
MAX_CLIP_S: Seconds = 30.0
SMALLEST_POOL = 20
"""A language with fewer examples teaches nothing by itself."""


@dataclass(frozen=True, slots=True)
class HybridDataConfig:
    """[data]: what is learnt from. Environment variables in paths are expanded."""

    manifest: Path
    cache: Path
    """Where what was heard is kept."""
    split: str = "train"
    ids: Path | None = None
    """A file that names the items to use, one a line; by default all of the split."""
    hints: bool = True
    """Whether the transcriber is told the language, as by an upload that says it."""


@dataclass(frozen=True, slots=True)
class HybridModelConfig:
    """[model] with `architecture = "hybrid"`. None means the `mini` that this program comes with."""

    architecture: str = "hybrid"
    base: Path | None = None
    """Folder of the model whose speech vectors are mixed in training."""
    serves: Path | None = None
    """Folder of the model whose speech vectors are mixed in use."""


@dataclass(frozen=True, slots=True)
class HybridTrainingConfig:
    """[training]"""

    ridges: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0)
    """Strengths of the pull towards one share for all; cross-validation chooses."""
    folds: int = 5
    threads: int = 0
    """0 leaves torch's own choice."""

    def __post_init__(self) -> None:
        require(bool(self.ridges) and min(self.ridges) > 0, "training.ridges must be above 0")
        require(self.folds > 1, "training.folds must be above 1")


@dataclass(frozen=True, slots=True)
class HybridConfig:
    """What `clasp train` reads for `hybrid`."""

    data: HybridDataConfig
    output: Path
    model: HybridModelConfig = field(default_factory=HybridModelConfig)
    training: HybridTrainingConfig = field(default_factory=HybridTrainingConfig)


@dataclass(frozen=True, slots=True)
class Examples:
    """n segments with what was heard in them, and the texts that ought to find them.

    `speech`, `written` and `questions` are unit rows (n, dim) of one space. `numbers` (n,) are the same for
    texts that are the same.
    """

    transcripts: Sequence[Transcript]
    durations: NDArray[np.float64]
    speech: Embeddings
    written: Embeddings
    questions: Embeddings
    numbers: NDArray[np.int64]
    langs: NDArray[np.str_]
    speakers: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.transcripts)

    def pools(self) -> dict[str, NDArray[np.int64]]:
        """Places of each language's examples."""
        return {str(lang): np.flatnonzero(self.langs == lang) for lang in np.unique(self.langs)}

    def mixtures(self, shares: NDArray[np.float64]) -> Embeddings:
        """Vectors as they would be stored with these shares; a transcript that is of no use has none."""
        usable = np.array([is_usable(transcript) for transcript in self.transcripts])
        return mix(self.speech, self.written, np.where(usable, shares, 0.0))


def gather(
    items: Sequence[ManifestItem],
    speech: SpeechEncoder,
    text: TextEncoder,
    transcriber: Transcriber,
    *,
    hints: bool = True,
    cache: Path | None = None,
    progress: Progress = silent,
) -> Examples:
    """Hear and embed every item that is one segment; others, and those that cannot be decoded, are left out.

    What `cache` (a file) has already is not made again: it is JSON Lines, one added per item. Raises
    InvalidManifest where nothing is left.
    """
    made: dict[str, dict[str, Any]] = {}
    if cache is not None and cache.exists():
        whole = (line for line in cache.read_bytes().split(b"\n") if line.endswith(b"}"))
        made = {row["id"]: row for row in map(json.loads, whole)}
    for number, item in enumerate(items, 1):
        if item.id not in made:
            made[item.id] = {"id": item.id} | _heard(item, speech, text, transcriber, hints)
            if cache is not None:
                cache.parent.mkdir(parents=True, exist_ok=True)
                with cache.open("ab") as file:
                    file.write(json.dumps(made[item.id]).encode() + b"\n")
        progress("hearing", number, len(items), "")
    rows = [(item, made[item.id]) for item in items if "speech" in made[item.id]]
    if not rows:
        raise InvalidManifest("No recording is left to learn from.")
    keys = [match_key(normalize_text(item.text, item.lang)) for item, _ in rows]
    _, numbers = np.unique(np.array(keys), return_inverse=True)

    def matrix(name: str) -> Embeddings:
        return np.array([row[name] for _, row in rows], np.float32)

    return Examples(
        [Transcript(row["text"], row["lang"], row["confidence"]) for _, row in rows],
        np.array([row["seconds"] for _, row in rows]),
        matrix("speech"),
        matrix("written"),
        matrix("question"),
        numbers,
        np.array([primary_language(item.lang) or "" for item, _ in rows]),
        np.array([item.speaker or item.id for item, _ in rows]),
    )


def _heard(
    item: ManifestItem, speech: SpeechEncoder, text: TextEncoder, transcriber: Transcriber, hints: bool
) -> dict[str, Any]:
    try:
        segments = list(recording_segments(None, item.audio, max_duration_s=MAX_CLIP_S))
    except (InvalidAudio, OSError) as error:
        _log.warning("left out %s: %s", item.id, error)
        return {}
    if len(segments) != 1:
        return {}
    waveforms = [segments[0].waveform]
    (vector,) = speech.encode(waveforms)
    (words,) = read(transcriber, text, waveforms, [item.lang if hints else None])
    # without words the speech vector stands for them, too: whatever share they get is nothing
    transcript, written = words or (Transcript("", None, 0.0), vector)
    (question,) = text.encode([normalize_text(item.text, item.lang)])
    return {
        "text": transcript.text,
        "lang": transcript.lang,
        "confidence": transcript.confidence,
        "seconds": len(waveforms[0]) / SAMPLING_RATE,
        "speech": [round(float(x), 6) for x in vector],
        "written": [round(float(x), 6) for x in written],
        "question": [round(float(x), 6) for x in question],
    }


def fit_mixture(examples: Examples, ridge: float, among: NDArray[np.int64] | None = None) -> Mixture:
    """The mixture with the least loss on the examples (or those `among` them).

    Every language counts the same, however many recordings it has. `ridge` pulls the weights of the
    evidence (in standard deviations) and what languages add towards nothing.
    """
    chosen = np.arange(len(examples)) if among is None else among
    pools = [pool for pool in (np.intersect1d(p, chosen) for p in examples.pools().values()) if len(pool)]
    pools = [pool for pool in pools if len(pool) >= SMALLEST_POOL] or [chosen]
    used = np.concatenate(pools)
    found = evidence(examples.transcripts, examples.durations, examples.speech, examples.written)
    usable = np.array([is_usable(transcript) for transcript in examples.transcripts])
    mean, spread = found[used].mean(0), found[used].std(0) + 1e-6
    heard_in = [primary_language(transcript.lang) or "" for transcript in examples.transcripts]
    names = sorted({heard_in[place] for place in used} - {""})
    evident = torch.from_numpy((found - mean) / spread)
    known = torch.tensor([[lang == name for name in names] for lang in heard_in], dtype=torch.float64)
    speech, written, questions = (
        torch.from_numpy(rows.astype(float))
        for rows in (examples.speech, examples.written, examples.questions)
    )
    numbers = torch.from_numpy(examples.numbers)
    kept = torch.from_numpy(usable).double()
    numbers_of = [(torch.from_numpy(pool), numbers[pool]) for pool in pools]
    parameters = torch.zeros(1 + len(EVIDENCE) + len(names), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        bias, weights, by_language = torch.split(parameters, [1, len(EVIDENCE), len(names)])
        shares = torch.sigmoid(bias + evident @ weights + known @ by_language) * kept
        mixed = F.normalize((1 - shares[:, None]) * speech + shares[:, None] * written, dim=1)
        losses = [_contrastive(mixed[pool], questions[pool], same) for pool, same in numbers_of]
        pull = weights.square().sum() + by_language.square().sum()
        value = torch.stack(losses).mean() + ridge * pull
        value.backward()  # type: ignore[no-untyped-call]
        return float(value.detach())

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    solved = parameters.detach().numpy()
    weights = solved[1 : 1 + len(EVIDENCE)] / spread
    return Mixture(
        float(solved[0] - weights @ mean),
        dict(zip(EVIDENCE, map(float, weights), strict=True)),
        dict(zip(names, map(float, solved[1 + len(EVIDENCE) :]), strict=True)),
    )


def _contrastive(mixed: Tensor, questions: Tensor, numbers: Tensor) -> Tensor:
    """Symmetric; a repeated text is never a negative of itself."""
    scores = questions @ mixed.T / TEMPERATURE
    twins = (numbers[:, None] == numbers[None]) & ~torch.eye(len(numbers), dtype=torch.bool)
    scores = scores.masked_fill(twins, float("-inf"))
    own = torch.arange(len(numbers))
    loss: Tensor = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
    return loss


def shares_of(mixture: Mixture, examples: Examples) -> NDArray[np.float64]:
    """(n,): what the mixture would give each transcript."""
    found = evidence(examples.transcripts, examples.durations, examples.speech, examples.written)
    return mixture.shares(found, [transcript.lang for transcript in examples.transcripts])


def hits_at_1(
    examples: Examples, shares: NDArray[np.float64], among: NDArray[np.int64] | None = None
) -> dict[str, float]:
    """By language: the share of texts (those `among` the examples) whose own recording comes first in the
    language's pool."""
    mixed = examples.mixtures(shares)
    figures = {}
    for lang, pool in examples.pools().items():
        asked = pool if among is None else np.intersect1d(pool, among)
        if len(asked):
            relevant = examples.numbers[asked][:, None] == examples.numbers[pool][None]
            ranks = metrics.known_item_ranks(examples.questions[asked] @ mixed[pool].T, relevant)
            figures[lang] = float(np.mean(ranks <= 1))
    return figures


def speaker_folds(
    speakers: NDArray[np.str_], folds: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(places to learn from, places to test on): no speaker is in both, and folds are of like size."""
    names, counts = np.unique(speakers, return_counts=True)
    sizes = np.zeros(min(folds, len(names)), int)
    fold_of: dict[str, int] = {}
    for place in np.argsort(-counts, kind="stable"):
        fold_of[str(names[place])] = smallest = int(np.argmin(sizes))
        sizes[smallest] += counts[place]
    of = np.array([fold_of[str(speaker)] for speaker in speakers])
    for fold in range(len(sizes)):
        yield np.flatnonzero(of != fold), np.flatnonzero(of == fold)


def cross_validate(examples: Examples, ridge: float, folds: int) -> dict[str, float]:
    """`hits_at_1` of speakers that the mixture was not learnt from, by language."""
    right: dict[str, float] = {}
    for learn, test in speaker_folds(examples.speakers, folds):
        mixture = fit_mixture(examples, ridge, learn)
        for lang, share in hits_at_1(examples, shares_of(mixture, examples), test).items():
            right[lang] = right.get(lang, 0.0) + share * float(np.sum(examples.langs[test] == lang))
    return {lang: count / float(np.sum(examples.langs == lang)) for lang, count in right.items()}


def train(config: HybridConfig, *, models_dir: Path | None = None, progress: Progress = silent) -> Path:
    """Learn the mixture and write the model folder that `config.output` names; its path."""
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    base = open_model(str(config.model.base or "mini"), models_dir=models_dir)
    transcriber = WhisperTranscriber(models_dir)
    made_by = digest(base.fingerprint, transcriber.identity, identity(), config.data.hints)
    examples = gather(
        _chosen(config.data),
        base.speech_encoder(),
        base.text_encoder(),
        transcriber,
        hints=config.data.hints,
        cache=config.data.cache / f"heard-{made_by}.jsonl",
        progress=progress,
    )
    ridge, figures = compare(examples, config.training.ridges, config.training.folds)
    serves = "mini" if config.model.serves is None else os.path.relpath(config.model.serves, config.output)
    description = {"architecture": "hybrid", "base": serves, "learnt_with": base.fingerprint}
    return write_model(
        config.output,
        description,
        {"mixture.json": fit_mixture(examples, ridge).save},
        config=config,
        items=len(examples),
        history=[{"way": way, **by_lang} for way, by_lang in figures.items()],
    )


def compare(
    examples: Examples, ridges: Sequence[float], folds: int
) -> tuple[float, dict[str, dict[str, float]]]:
    """The ridge to take, and hits@1 by language and on average ("macro"): by sound, by words, by one share
    for all, and by the mixture on speakers that it was not learnt from.

    Of the ridges that do as well as the best, to a standard error, it is the strongest: most languages are
    not in the data, and what they have of the mixture is what all languages share.
    """
    ways = {f"share {share}": np.full(len(examples), share) for share in (0.0, 0.3, 0.5, 0.7, 0.9, 1.0)}
    figures = {way: hits_at_1(examples, shares) for way, shares in ways.items()}
    learnt = {ridge: cross_validate(examples, ridge, folds) for ridge in ridges}
    best = max(ridges, key=lambda ridge: _macro(learnt[ridge]))
    enough = _macro(learnt[best]) - _standard_error(learnt[best], examples)
    chosen = max(ridge for ridge in ridges if _macro(learnt[ridge]) >= enough)
    figures["mixture"] = learnt[chosen]
    figures = {way: {"macro": _macro(by_lang), **by_lang} for way, by_lang in figures.items()}
    for way, by_lang in figures.items():
        shown = ", ".join(f"{lang} {value:.3f}" for lang, value in by_lang.items())
        _log.info("%-10s hits@1: %s", way, shown)
    return chosen, figures


def _macro(by_lang: Mapping[str, float]) -> float:
    return float(np.mean(list(by_lang.values())))


def _standard_error(by_lang: Mapping[str, float], examples: Examples) -> float:
    """Of the mean over languages of such shares."""
    pools = examples.pools()
    variances = [share * (1 - share) / len(pools[lang]) for lang, share in by_lang.items()]
    return float(np.sqrt(np.sum(variances))) / len(variances)


def _chosen(config: HybridDataConfig) -> list[ManifestItem]:
    wanted = None if config.ids is None else set(config.ids.read_text(encoding="utf-8").split("\n"))
    return [
        item
        for item in read_manifest(config.manifest)
        if item.split == config.split and (wanted is None or item.id in wanted)
    ]
