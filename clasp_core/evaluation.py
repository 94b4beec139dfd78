"""Measuring a model on recordings with transcripts, through the very encoders and segmenting that serve.

This module embeds and pools; the figures themselves are `clasp_core.metrics`.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from clasp_core import metrics
from clasp_core.catalog import EmbeddedSegment
from clasp_core.errors import InvalidAudio, InvalidManifest
from clasp_core.ingest import embed_recording
from clasp_core.language import canonical_tag, match_key, normalize_text
from clasp_core.library import mean_vector
from clasp_core.manifest import ManifestItem, read_manifest
from clasp_core.models import Model, TextEncoder
from clasp_core.types import Embeddings, Seconds

Progress = Callable[[Iterable[ManifestItem], int], Iterable[ManifestItem]]

Directions: TypeAlias = dict[str, metrics.Measured]
"""Queries of both kinds, by "text_to_speech" and "speech_to_text"."""

MAX_CLIP_S: Seconds = 3600.0
MACRO_MIN = 24
"""Items that a group must have to take part in a mean over groups, unless it is said otherwise."""
LENGTHS_S: tuple[Seconds, ...] = (2.0, 4.0, 8.0, 15.0)
"""Where the groups of the derived field `length` end; each holds its lower end, the last all beyond."""
_TEXTS_AT_ONCE = 64


def evaluate_manifest(
    model: Model,
    manifest: Path,
    *,
    audio_root: Path | None = None,
    split: str | None = None,
    by: Sequence[str] = (),
    protocol: str = "clean",
    candidates: int | None = None,
    threshold: float = 0.5,
    macro_min: int = MACRO_MIN,
    hints: bool = True,
    progress: Progress = lambda items, total: items,
) -> dict[str, Any]:
    """The report that `clasp evaluate` prints: figures over all items, and inside each group of `by`.

    Text-to-speech: each item's query (its transcript, where it has no other) against all recordings;
    speech-to-text: each recording against all queries. A recording scores as its best segment. Items
    whose transcripts are the same after normalisation answer each other's queries. Recordings that
    cannot be embedded are listed under `skipped` and take part in nothing. With `hints` a model that
    transcribes is told each recording's `lang`, as by an upload that says it; without, it has to guess.

    Under the protocol "paper" each query ranks its own item among `candidates` (a smaller group: all of
    it; None: all everywhere), and pairs from `threshold` on count as predicted, for macro_f1: see
    `metrics.paper_measure`.

    `by` names fields of the manifest, or `length`, the duration of what was embedded, in buckets of
    `LENGTHS_S` (unless the manifest has a field of that name). `macro` holds, for each field, the mean of
    the figures over its groups of at least `macro_min` items, named there; without any, only how many
    are asked for.

    Raises InvalidManifest where nothing is left to evaluate.
    """
    embedded = embed_manifest(
        model, manifest, audio_root=audio_root, split=split, hints=hints, progress=progress
    )
    started = time.perf_counter()
    rules = by_clean_rules if protocol == "clean" else partial(_by_paper_rules, candidates, threshold)
    report: dict[str, Any] = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "protocol": protocol,
        **pooled(rules, embedded.scores(), embedded.items, embedded.durations(), by, macro_min=macro_min),
        "skipped": embedded.skipped,
    }
    seconds = embedded.seconds
    report["seconds"] = {
        "load": round(seconds["load"], 3),
        "speech": round(seconds["speech"], 3),
        "text": round(seconds["text"], 3),
        "figures": round(time.perf_counter() - started, 3),
        "audio": round(seconds["audio"], 3),
    }
    return report


@dataclass(frozen=True, slots=True)
class EmbeddedManifest:
    """The items of a manifest that could be embedded, with their vectors."""

    items: list[ManifestItem]
    recordings: list[list[EmbeddedSegment]]
    """Each item's segments, as they would be indexed."""
    texts: Embeddings
    """(items, dim): each item's query, or its transcript where it has no other."""
    skipped: list[dict[str, str]]
    """`id` and `reason` of the others."""
    seconds: dict[str, Seconds]
    """What `load`, `speech` and `text` took, and how much `audio` there was."""

    def scores(self, places: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """(texts, recordings): the cosine of each text with each recording's best segment; of all items, or
        of those at these places."""
        chosen = range(len(self.items)) if places is None else places
        return _scores(self.texts[chosen], [self.recordings[place] for place in chosen])

    def scores_by_sound(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        """(recordings, recordings) at these places: each as a question, its mean vector, to each."""
        chosen = [self.recordings[place] for place in places]
        return _scores(np.stack([mean_vector(segments) for segments in chosen]), chosen)

    def keys(self) -> NDArray[np.str_]:
        """(items,): equal where the transcripts say the same, so that each answers the other's query."""
        return np.array([transcript_key(item) for item in self.items])

    def durations(self) -> list[Seconds]:
        """(items,): from the beginning of the first segment to the end of the last."""
        return [segments[-1].end_s - segments[0].start_s for segments in self.recordings]


def embed_manifest(
    model: Model,
    manifest: Path,
    *,
    audio_root: Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    hints: bool = True,
    progress: Progress = lambda items, total: items,
) -> EmbeddedManifest:
    """Recordings and queries of a manifest (of one split of it; of `limit` items drawn at random).

    With `hints`, each recording's `lang` is told to a model that asks for it.

    Raises InvalidManifest where none could be embedded.
    """
    items = [item for item in read_manifest(manifest, audio_root) if split is None or item.split == split]
    if limit is not None and limit < len(items):
        drawn = np.random.default_rng(seed).choice(len(items), limit, replace=False)
        items = [items[place] for place in np.sort(drawn)]
    started = time.perf_counter()
    kept: list[ManifestItem] = []
    recordings: list[list[EmbeddedSegment]] = []
    skipped: list[dict[str, str]] = []
    encoder = model.speech_encoder()
    loaded = time.perf_counter()
    for item in progress(items, len(items)):
        try:
            lang = canonical_tag(item.lang) if hints else None
            segments = embed_recording(encoder, item.audio, max_duration_s=MAX_CLIP_S, lang=lang)
        except (InvalidAudio, OSError) as error:
            skipped.append({"id": item.id, "reason": str(error)})
            continue
        kept.append(item)
        recordings.append(segments)
    if not kept:
        raise InvalidManifest(f"{manifest}: no item could be evaluated.")
    spoken = time.perf_counter()
    texts = embed_texts(model.text_encoder(), [query_text(item) for item in kept])
    seconds = {
        "load": loaded - started,
        "speech": spoken - loaded,
        "text": time.perf_counter() - spoken,
        "audio": sum(segments[-1].end_s - segments[0].start_s for segments in recordings),
    }
    return EmbeddedManifest(kept, recordings, texts, skipped, seconds)


def _scores(queries: Embeddings, recordings: Sequence[Sequence[EmbeddedSegment]]) -> NDArray[np.float32]:
    segments = [np.stack([segment.vector for segment in recording]) for recording in recordings]
    return best_segment_scores(queries, segments)


def pooled(
    rules: Callable[[NDArray[np.float32], NDArray[np.str_]], Directions],
    scores: NDArray[np.float32],
    items: Sequence[ManifestItem],
    durations: Sequence[Seconds],
    by: Sequence[str],
    *,
    macro_min: int = MACRO_MIN,
) -> dict[str, Any]:
    """`overall`, `groups` and `macro` of a report, from all items' scores (texts, recordings)."""
    keys = np.array([transcript_key(item) for item in items])
    groups = {
        field: {
            value: rules(scores[np.ix_(places, places)], keys[places])
            for value, places in groups_of(items, durations, field).items()
        }
        for field in by
    }
    return {
        "overall": _figures(rules(scores, keys)),
        "groups": {
            field: {value: _figures(measured) for value, measured in of_field.items()}
            for field, of_field in groups.items()
        },
        "macro": {field: _macro(of_field, macro_min) for field, of_field in groups.items()},
    }


def _figures(measured: Directions) -> dict[str, Any]:
    return {direction: queries.figures() for direction, queries in measured.items()}


def _macro(groups: dict[str, Directions], least: int) -> dict[str, Any]:
    # Rules that leave queries out do so in one direction only; a group is as large as its larger one.
    large = {
        value: measured
        for value, measured in groups.items()
        if max(len(queries.per_query) for queries in measured.values()) >= least
    }
    macro: dict[str, Any] = {"least": least, "groups": list(large)}
    if large:
        for direction in ("text_to_speech", "speech_to_text"):
            macro[direction] = metrics.macro_average([measured[direction] for measured in large.values()])
    return macro


def query_text(item: ManifestItem) -> str:
    """What an item is searched with, normalised as the service would."""
    if item.query is None:
        return normalize_text(item.text, canonical_tag(item.lang))
    return normalize_text(item.query, canonical_tag(item.query_lang))


def transcript_key(item: ManifestItem) -> str:
    """Items of the same key say the same."""
    return match_key(normalize_text(item.text, canonical_tag(item.lang)))


def embed_texts(encoder: TextEncoder, texts: Sequence[str]) -> Embeddings:
    """Normalised texts to unit rows, in batches of like length."""
    vectors = np.empty((len(texts), encoder.dim), np.float32)
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    for start in range(0, len(order), _TEXTS_AT_ONCE):
        places = order[start : start + _TEXTS_AT_ONCE]
        vectors[places] = encoder.encode([texts[place] for place in places])
    return vectors


def best_segment_scores(texts: Embeddings, segments: Sequence[Embeddings]) -> NDArray[np.float32]:
    """(texts, recordings): the cosine of each text with each recording's best segment."""
    starts = np.cumsum([0, *(len(vectors) for vectors in segments[:-1])])
    scores: NDArray[np.float32] = np.maximum.reduceat(texts @ np.concatenate(segments).T, starts, axis=1)
    return scores


def by_clean_rules(scores: NDArray[np.float32], keys: NDArray[np.str_]) -> Directions:
    """Items with the same key are all right answers."""
    relevant = keys[:, None] == keys[None, :]
    return {
        "text_to_speech": metrics.measure(scores, relevant),
        "speech_to_text": metrics.measure(scores.T, relevant.T),
    }


def _by_paper_rules(
    candidates: int | None, threshold: float, scores: NDArray[np.float32], keys: NDArray[np.str_]
) -> Directions:
    """Only whole pools of texts skip tied duplicates: the paper's stage 3, whose rows are speech."""
    drawn = None if candidates is None else min(candidates, len(scores))
    return {
        "text_to_speech": metrics.paper_measure(scores, candidates=drawn, threshold=threshold),
        "speech_to_text": metrics.paper_measure(
            scores.T, candidates=drawn, threshold=threshold, skip_tied_duplicates=drawn is None
        ),
    }


def groups_of(
    items: Sequence[ManifestItem], durations: Sequence[Seconds], field: str
) -> dict[str, NDArray[np.int64]]:
    """Places of the items with each value of a field, in order of value; items without it are in none."""
    if field == "length" and not any(field in item.extra for item in items):
        buckets = np.searchsorted(LENGTHS_S, durations, side="right")
        return {_length(bucket): np.flatnonzero(buckets == bucket) for bucket in np.unique(buckets).tolist()}
    places: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        value = (
            getattr(item, field, None)
            if field in ManifestItem.__dataclass_fields__
            else item.extra.get(field)
        )
        if value is not None:
            places.setdefault(str(value), []).append(place)
    return {value: np.array(places[value]) for value in sorted(places)}


def _length(bucket: int) -> str:
    """ "2-4", in seconds; the last is "15+"."""
    ends = [f"{end:g}" for end in (0.0, *LENGTHS_S)]
    return f"{ends[bucket]}-{ends[bucket + 1]}" if bucket < len(LENGTHS_S) else f"{ends[bucket]}+"
