"""Systems side by side: the same recordings in the same run, each system in a process of its own.

A system turns recordings and questions into vectors of one space: a model of `clasp_core.models` does so
directly; a transcriber does it as the paper's baselines do (arXiv 2412.13071, section 4, stage 3), by
embedding what it wrote down with a model's text encoder. Every recording goes through one system after
the other before the next recording comes, so that whatever else the machine does meets them all alike.
"""

import multiprocessing
import os
import re
import resource
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar

import numpy as np
import soxr
from numpy.typing import NDArray

from clasp_core import evaluation, sandbox
from clasp_core.datasets.augmentation import Recipe
from clasp_core.errors import InvalidAudio, InvalidField, InvalidManifest, ProcessingFailed, SilentAudio
from clasp_core.ingest import hear
from clasp_core.language import match_key, normalize_text
from clasp_core.manifest import ManifestItem, read_manifest
from clasp_core.models import Model, TextEncoder, open_model, resolve_device, use_threads
from clasp_core.segmenting import split as split_into_segments
from clasp_core.segmenting import with_pictured
from clasp_core.transcription import Transcriber, open_transcriber
from clasp_core.types import SAMPLING_RATE, Embeddings, Seconds, Segment, Waveform

P = ParamSpec("P")
T = TypeVar("T")
Kind: TypeAlias = Literal["model", "transcription"]

CLEAN = "clean"
BABBLE = 4
"""Voices in a babble: enough that none of them can be followed."""
_TOO_FEW_VOICES = f"Babble needs {BABBLE} recordings of other speakers in the manifest."


@dataclass(frozen=True, slots=True)
class SystemSpec:
    """What to compare. `name` is a model's or a transcriber's, or a folder."""

    name: str
    kind: Kind
    text_model: str
    """The model whose text encoder embeds the questions, and a transcriber's text; a model's own name."""
    models_dir: Path | None = None
    device: str = "cpu"
    threads: int = 0
    """As `use_threads` takes it."""


def systems(
    models: Sequence[str],
    transcribers: Sequence[str] = (),
    *,
    models_dir: Path | None = None,
    device: str = "cpu",
    threads: int = 0,
) -> list[SystemSpec]:
    """Models, then transcribers with the text encoder of the first model.

    Raises InvalidField for a system named twice, or none.
    """
    if not models:
        raise InvalidField("A comparison needs a model, if only for its text encoder.")
    specs = [SystemSpec(name, "model", name, models_dir, device, threads) for name in models]
    specs += [
        SystemSpec(name, "transcription", models[0], models_dir, device, threads) for name in transcribers
    ]
    names = [spec.name for spec in specs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InvalidField(f"The system {twice[0]!r} is named twice.")
    return specs


def conditions_from(names: Iterable[str]) -> dict[str, Recipe]:
    """What is done to the recordings under each name: `clean`, or a recipe of `clasp_core.datasets`.

    `noise:10` is short for `noise:pink:10`. Raises InvalidField as `Recipe.parse` does, and for a name
    given twice or none at all.
    """
    recipes: dict[str, Recipe] = {}
    for name in names:
        if name in recipes:
            raise InvalidField(f"The condition {name!r} is named twice.")
        recipe = "none" if name == CLEAN else re.sub(r"\bnoise:(?=[-.\d])", "noise:pink:", name)
        recipes[name] = Recipe.parse(recipe)
    if not recipes:
        raise InvalidField("A comparison needs at least one condition.")
    return recipes


def compare(
    specs: Sequence[SystemSpec],
    manifest: Path,
    *,
    audio_root: Path | None = None,
    split: str | None = None,
    by: Sequence[str] = (),
    conditions: Sequence[str] = (CLEAN,),
    macro_min: int = evaluation.MACRO_MIN,
    hints: bool = True,
    progress: evaluation.Progress = lambda items, total: items,
) -> dict[str, Any]:
    """The report that `clasp compare` prints: of every system its figures, its costs, its differences.

    Figures are those of `evaluation.evaluate_manifest`, under each of the conditions, with
    `character_error` for transcribers: edits per letter, case, punctuation and spaces aside. `difference`
    compares with the first system, over all items, by the paired bootstrap. Costs are of the first
    condition: seconds a recording took, by wall clock and by the processor, without decoding, which is
    the same for all; and of the whole run the process's largest memory. With `hints`, what transcribes
    is told each recording's `lang`; without, it has to guess.

    A recording that cannot be heard under one of the conditions is `skipped` for all systems. Raises as
    `conditions_from` does, InvalidManifest where nothing is left, ModelUnavailable where a system cannot
    be opened, and ProcessingFailed where its process dies.
    """
    recipes = conditions_from(conditions)
    items = [item for item in read_manifest(manifest, audio_root) if split is None or item.split == split]
    if not items:
        raise InvalidManifest(f"{manifest}: no item could be evaluated.")
    if len(items) <= BABBLE and any(recipe.needs_babble for recipe in recipes.values()):
        raise InvalidField(_TOO_FEW_VOICES)
    for spec in specs:
        open_model(spec.text_model, models_dir=spec.models_dir, device=spec.device)
    with ExitStack() as stack:
        running = [stack.enter_context(_Running(spec)) for spec in specs]
        rates = {system.picture_rate for system in running if system.picture_rate is not None}
        kept: list[ManifestItem] = []
        durations: list[Seconds] = []
        skipped: list[dict[str, str]] = []
        for item in progress(items, len(items)):
            try:
                decoded = {rate: _samples(item.audio, rate) for rate in {SAMPLING_RATE, *rates}}
                heard = {name: _heard(item, decoded, recipe, items) for name, recipe in recipes.items()}
            except (InvalidAudio, OSError) as error:
                skipped.append({"id": item.id, "reason": str(error)})
                continue
            lang = item.lang if hints else None
            if not kept:  # what a system does once, at its first recording, is not any recording's cost
                for system in running:
                    system.embed(next(iter(heard.values())), lang)
            kept.append(item)
            first = next(iter(heard.values()))
            durations.append(first.seconds)
            for name, recording in heard.items():
                for system in running:
                    system.add(name, recording, lang)
        if not kept:
            raise InvalidManifest(f"{manifest}: no item could be evaluated.")
        texts = [evaluation.query_text(item) for item in kept]
        asked = [system.ask(texts) for system in running]
        costs = [system.costs(next(iter(recipes)), durations) for system in running]
    report: dict[str, Any] = {
        "manifest": str(manifest),
        "items": len(kept),
        "audio_s": round(sum(durations), 3),
        "conditions": list(recipes),
        "systems": {spec.name: cost for spec, cost in zip(specs, costs, strict=True)},
        "skipped": skipped,
    }
    rules = partial(evaluation.pooled, evaluation.by_clean_rules, macro_min=macro_min)
    keys = np.array([evaluation.transcript_key(item) for item in kept])
    for name in recipes:
        measured: list[evaluation.Directions] = []
        for system, vectors in zip(running, asked, strict=True):
            answers = system.answers[name]
            scores = evaluation.best_segment_scores(vectors, [answer.vectors for answer in answers])
            results = rules(scores, kept, durations, by)
            if system.spec.kind == "transcription":
                results["character_error"] = _character_errors(answers, kept, durations, by)
            measured.append(evaluation.by_clean_rules(scores, keys))
            if len(measured) > 1:
                results["difference"] = {
                    direction: queries.difference_from(measured[0][direction])
                    for direction, queries in measured[-1].items()
                }
            report["systems"][system.spec.name].setdefault("results", {})[name] = results
    return report


# --- recordings


@dataclass(frozen=True, slots=True)
class _Heard:
    """A recording under one condition, cut as for indexing; `pictured` by its rate."""

    segments: list[Segment]
    pictured: dict[int, list[Segment]]

    @property
    def seconds(self) -> Seconds:
        return self.segments[-1].end_s - self.segments[0].start_s

    def at(self, picture_rate: int | None) -> list[Segment]:
        return self.segments if picture_rate is None else self.pictured[picture_rate]


def _heard(
    item: ManifestItem, decoded: dict[int, Waveform], recipe: Recipe, items: Sequence[ManifestItem]
) -> _Heard:
    """Changed by the recipe, then cut. The same for every run: chance comes from the names alone.

    `decoded` holds the recording's samples by rate. A changed recording has its picture from the samples
    at 16 kHz, since the recipe changes only those. Raises InvalidAudio where nothing can be heard.
    """
    if recipe.steps:
        random = np.random.default_rng(zlib.crc32(f"{recipe}/{item.id}".encode()))
        babble = _babble(item, items, random) if recipe.needs_babble else None
        samples, _ = recipe.apply(decoded[SAMPLING_RATE], random, babble=babble)
        decoded = {rate: _resampled(samples, rate) for rate in decoded}
    segments = list(split_into_segments([decoded[SAMPLING_RATE]]))
    if not segments:
        raise SilentAudio("Nothing can be heard in this recording.")
    return _Heard(
        segments,
        {
            rate: list(with_pictured(segments, [samples], rate))
            for rate, samples in decoded.items()
            if rate != SAMPLING_RATE
        },
    )


def _resampled(samples: Waveform, rate: int) -> Waveform:
    if rate == SAMPLING_RATE:
        return samples
    resampled: Waveform = soxr.resample(samples, SAMPLING_RATE, rate, quality="HQ")
    return resampled


def _samples(path: Path, rate: int) -> Waveform:
    blocks = sandbox.decode(path, max_duration_s=evaluation.MAX_CLIP_S, sampling_rate=rate)
    return np.concatenate(list(blocks))


def _babble(item: ManifestItem, items: Sequence[ManifestItem], random: np.random.Generator) -> list[Waveform]:
    """Other people's utterances, from the same manifest. Raises InvalidField where it has too few."""

    def voices() -> Iterator[Waveform]:
        for place in random.permutation(len(items)).tolist():
            other = items[place]
            if other.id == item.id or (item.speaker is not None and other.speaker == item.speaker):
                continue
            try:
                yield _samples(other.audio, SAMPLING_RATE)
            except (InvalidAudio, OSError):  # it is named where its own turn comes
                continue

    found = [voice for voice, _ in zip(voices(), range(BABBLE), strict=False)]
    if len(found) < BABBLE:
        raise InvalidField(_TOO_FEW_VOICES)
    return found


# --- a system, in its process


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a system made of a recording: a vector for each segment, its text if it wrote one, and seconds
    by stage and clock."""

    vectors: Embeddings
    seconds: dict[str, Seconds]
    processor_s: Seconds
    text: str | None = None


class _System:
    """One system with its networks; lives in the child."""

    def __init__(self, spec: SystemSpec) -> None:
        use_threads(spec.threads)
        started = time.perf_counter()
        model = open_model(spec.text_model, models_dir=spec.models_dir, device=spec.device)
        self.transcriber: Transcriber | None = None
        if spec.kind == "model":
            self.speech = model.speech_encoder()
            self.picture_rate = self.speech.picture_rate
            self.weights_bytes = _bytes(model)
            self.fingerprint = model.fingerprint
        else:
            device = resolve_device(spec.device).type
            self.transcriber = open_transcriber(spec.name, models_dir=spec.models_dir, device=device)
            self.picture_rate = None
            self.weights_bytes = self.transcriber.weights_bytes + _bytes(model, "text")
            identity = repr([self.transcriber.identity, model.fingerprint])
            self.fingerprint = sha256(identity.encode()).hexdigest()[:16]
        self.text: TextEncoder = model.text_encoder()
        self.load_s = time.perf_counter() - started

    def embed(self, segments: Sequence[Segment], lang: str | None) -> _Answer:
        processor, started = time.process_time(), time.perf_counter()
        if self.transcriber is None:
            heard = hear(self.speech, segments, [lang] * len(segments))
            seconds = {"encode": time.perf_counter() - started}
            return _Answer(heard.vectors, seconds, time.process_time() - processor)
        waveforms = [segment.waveform for segment in segments]
        transcripts = self.transcriber.transcribe(waveforms, [lang] * len(waveforms))
        written = time.perf_counter()
        texts = [normalize_text(transcript.text, transcript.lang) for transcript in transcripts]
        # What was heard as nothing is embedded as the empty text it is, as a search in transcripts would.
        vectors = self.text.encode(texts)
        seconds = {"transcribe": written - started, "text": time.perf_counter() - written}
        return _Answer(vectors, seconds, time.process_time() - processor, " ".join(texts))


def _bytes(model: Model, *roles: str) -> int:
    return sum(part.size_bytes or 0 for part in model.parts() if not roles or part.role in roles)


_system: _System | None = None
"""The child's own."""


def _end_with_parent() -> None:
    """A pool's worker outlives a parent that is killed, waiting for ever with its networks in memory.

    Interrupts, which the terminal sends to both, are the parent's to answer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _open(spec: SystemSpec) -> dict[str, Any]:
    global _system
    _system = _System(spec)
    return {
        "kind": spec.kind,
        "text_model": spec.text_model,
        "fingerprint": _system.fingerprint,
        "weights_bytes": _system.weights_bytes,
        "picture_rate": _system.picture_rate,
        "load_s": _system.load_s,
    }


def _embed(segments: Sequence[Segment], lang: str | None) -> _Answer:
    assert _system is not None
    return _system.embed(segments, lang)


def _ask(texts: Sequence[str]) -> tuple[Embeddings, Seconds]:
    assert _system is not None
    started = time.perf_counter()
    return evaluation.embed_texts(_system.text, texts), time.perf_counter() - started


def _peak_memory_bytes() -> int:
    """The largest resident memory of this process.

    Linux hands `ru_maxrss` down to children, so a small child of a large parent would be charged for it.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


@dataclass(slots=True)
class _Running:
    """A system's process, from the parent's side, and what it has answered."""

    spec: SystemSpec
    facts: dict[str, Any] = field(init=False)
    answers: dict[str, list[_Answer]] = field(default_factory=dict)
    query_s: Seconds = 0.0
    _process: ProcessPoolExecutor = field(init=False)

    def __enter__(self) -> "_Running":
        # A fork would inherit torch's threads and the parent's memory.
        self._process = ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent
        )
        try:
            self.facts = self._run(_open, self.spec)
        except BaseException:
            self._process.shutdown()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.shutdown(cancel_futures=True)

    @property
    def picture_rate(self) -> int | None:
        rate: int | None = self.facts["picture_rate"]
        return rate

    def embed(self, recording: _Heard, lang: str | None) -> _Answer:
        return self._run(_embed, recording.at(self.picture_rate), lang)

    def add(self, condition: str, recording: _Heard, lang: str | None) -> None:
        self.answers.setdefault(condition, []).append(self.embed(recording, lang))

    def ask(self, texts: Sequence[str]) -> Embeddings:
        self._run(_ask, texts[:1])
        vectors, seconds = self._run(_ask, texts)
        self.query_s = seconds / len(texts)
        return vectors

    def costs(self, condition: str, durations: Sequence[Seconds]) -> dict[str, Any]:
        """What this system took for the recordings of a condition, and holds in memory."""
        answers = self.answers[condition]
        totals = [sum(answer.seconds.values()) for answer in answers]
        stages = {
            stage: _spread([answer.seconds[stage] for answer in answers]) for stage in answers[0].seconds
        }
        return {
            **{name: self.facts[name] for name in ("kind", "text_model", "fingerprint", "weights_bytes")},
            "peak_memory_bytes": self._run(_peak_memory_bytes),
            "seconds": {
                "load": round(self.facts["load_s"], 3),
                "recording": _spread(totals),
                "processor": _spread([answer.processor_s for answer in answers]),
                **stages,
                "query": round(self.query_s, 6),
            },
            "audio_s_per_s": round(sum(durations) / sum(totals), 2),
            "audio_s_per_processor_s": round(
                sum(durations) / sum(answer.processor_s for answer in answers), 2
            ),
        }

    def _run(self, function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        try:
            return self._process.submit(function, *arguments, **options).result()
        except BrokenProcessPool as error:
            reason = f"The process of {self.spec.name} died: is there memory enough?"
            raise ProcessingFailed(reason) from error


def _spread(seconds: Sequence[Seconds]) -> dict[str, Seconds]:
    low, middle, high = np.percentile(seconds, (10, 50, 90)).tolist()
    return {
        "median": round(middle, 6),
        "p10": round(low, 6),
        "p90": round(high, 6),
        "mean": round(float(np.mean(seconds)), 6),
    }


# --- transcripts


def _character_errors(
    answers: Sequence[_Answer],
    items: Sequence[ManifestItem],
    durations: Sequence[Seconds],
    by: Sequence[str],
) -> dict[str, Any]:
    """Edits per letter of the true transcripts, over all items and inside each group."""
    counts = np.array([_errors(item, answer) for item, answer in zip(items, answers, strict=True)])

    def rate(places: Any) -> float:  # noqa: ANN401 - any index of numpy's
        edits, letters = counts[places].sum(0).tolist()
        return float(edits / letters)

    return {
        "overall": rate(slice(None)),
        "groups": {
            name: {
                value: rate(places) for value, places in evaluation.groups_of(items, durations, name).items()
            }
            for name in by
        },
    }


def _errors(item: ManifestItem, answer: _Answer) -> tuple[int, int]:
    truth = evaluation.transcript_key(item)
    written = normalize_text(answer.text or "", item.lang)
    return edits(truth, match_key(written) if written else ""), len(truth)


def edits(truth: str, written: str) -> int:
    """Letters to insert, remove or replace to make one text of the other (Levenshtein)."""
    letters: NDArray[np.int64] = np.fromiter(map(ord, written), np.int64, len(written))
    places = np.arange(len(letters) + 1)
    row = places.copy()
    for letter in truth:
        replaced = row[:-1] + (letters != ord(letter))
        row = np.concatenate((row[:1] + 1, np.minimum(replaced, row[1:] + 1)))
        row = np.minimum.accumulate(row - places) + places  # insertions, along the row
    return int(row[-1])


# --- the picture


def plot(report: dict[str, Any], path: Path) -> None:
    """Curves of hits@1 over the conditions, one for each system, both directions, with their intervals.

    Of the mean over groups of the first field that has one, else of the whole pool. The suffix says the
    format. `maps.require_drawing` says beforehand whether it can be drawn.
    """
    from matplotlib.figure import Figure

    conditions = report["conditions"]
    any_result = next(iter(report["systems"].values()))["results"][conditions[0]]
    grouped = next((field for field, macro in any_result["macro"].items() if macro["groups"]), None)
    pool = "whole pool" if grouped is None else f"mean over groups of {grouped}"
    figure = Figure(figsize=(5 + 0.8 * len(conditions), 4), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(conditions))
    for axes, direction in zip(both, ("text_to_speech", "speech_to_text"), strict=True):
        for number, (name, system) in enumerate(report["systems"].items()):
            results = [system["results"][condition] for condition in conditions]
            chosen = [_shown(result, grouped)[direction] for result in results]
            values = np.array([figures["hits@1"] for figures in chosen])
            low, high = np.array([figures["ci95"]["hits@1"] for figures in chosen]).T
            shift = 0.06 * (number - (len(report["systems"]) - 1) / 2)
            errors = np.maximum(0, (values - low, high - values))
            axes.errorbar(places + shift, values, yerr=errors, marker="o", capsize=3, label=name)
        axes.set_title(direction.replace("_", " "))
        axes.set_xticks(places, conditions, rotation=45, ha="right")
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
    both[0].set_ylabel(f"hits@1, {pool}")
    both[0].legend()
    figure.savefig(path, dpi=150)


def _shown(result: dict[str, Any], field: str | None) -> dict[str, Any]:
    shown: dict[str, Any] = result["overall"] if field is None else result["macro"][field]
    return shown
