"""Measuring a model on recordings with transcripts, through the very encoders and segmenting that serve.

This module embeds and pools; the figures themselves are `clasp_core.metrics`.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clasp_core import metrics
from clasp_core.errors import InvalidAudio, InvalidManifest
from clasp_core.ingest import embed_recording
from clasp_core.language import canonical_tag, match_key, normalize_text
from clasp_core.manifest import ManifestItem, read_manifest
from clasp_core.models import Model, TextEncoder
from clasp_core.types import Embeddings, Seconds

Progress = Callable[[Iterable[ManifestItem], int], Iterable[ManifestItem]]

MAX_CLIP_S: Seconds = 3600.0
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
    progress: Progress = lambda items, total: items,
) -> dict[str, Any]:
    """The report that `clasp evaluate` prints: figures over all items, and inside each group of `by`.

    Text-to-speech: each item's query (its transcript, where it has no other) against all recordings;
    speech-to-text: each recording against all queries. A recording scores as its best segment. Items
    whose transcripts are the same after normalisation answer each other's queries. Recordings that
    cannot be embedded are listed under `skipped` and take part in nothing.

    Under the protocol "paper" each query ranks its own item among `candidates` (a smaller group: all of
    it; None: all everywhere), and pairs from `threshold` on count as predicted, for macro_f1: see
    `metrics.paper_figures`.

    Raises InvalidManifest where nothing is left to evaluate.
    """
    items = [item for item in read_manifest(manifest, audio_root) if split is None or item.split == split]
    started = time.perf_counter()
    segments: list[Embeddings] = []
    durations: list[Seconds] = []
    kept: list[ManifestItem] = []
    skipped: list[dict[str, str]] = []
    encoder = model.speech_encoder()
    loaded = time.perf_counter()
    for item in progress(items, len(items)):
        try:
            embedded = embed_recording(encoder, item.audio, max_duration_s=MAX_CLIP_S)
        except (InvalidAudio, OSError) as error:
            skipped.append({"id": item.id, "reason": str(error)})
            continue
        kept.append(item)
        segments.append(np.stack([segment.vector for segment in embedded]))
        durations.append(embedded[-1].end_s - embedded[0].start_s)
    if not kept:
        raise InvalidManifest(f"{manifest}: no item could be evaluated.")
    spoken = time.perf_counter()
    texts = _embed_texts(model.text_encoder(), kept)
    written = time.perf_counter()
    scores = _best_segment_scores(texts, segments)
    keys = np.array([match_key(normalize_text(item.text, canonical_tag(item.lang))) for item in kept])
    directions = _by_clean_rules if protocol == "clean" else partial(_by_paper_rules, candidates, threshold)
    report: dict[str, Any] = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "protocol": protocol,
        "overall": directions(scores, keys),
        "groups": {
            field: {
                value: directions(scores[np.ix_(places, places)], keys[places])
                for value, places in _groups(kept, field).items()
            }
            for field in by
        },
        "skipped": skipped,
    }
    report["seconds"] = {
        "load": round(loaded - started, 3),
        "speech": round(spoken - loaded, 3),
        "text": round(written - spoken, 3),
        "figures": round(time.perf_counter() - written, 3),
        "audio": round(sum(durations), 3),
    }
    return report


def _embed_texts(encoder: TextEncoder, items: Sequence[ManifestItem]) -> Embeddings:
    """Each item's query, normalised as the service would, in batches of like length."""
    texts = [
        normalize_text(item.text, canonical_tag(item.lang))
        if item.query is None
        else normalize_text(item.query, canonical_tag(item.query_lang))
        for item in items
    ]
    vectors = np.empty((len(texts), encoder.dim), np.float32)
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    for start in range(0, len(order), _TEXTS_AT_ONCE):
        places = order[start : start + _TEXTS_AT_ONCE]
        vectors[places] = encoder.encode([texts[place] for place in places])
    return vectors


def _best_segment_scores(texts: Embeddings, segments: Sequence[Embeddings]) -> NDArray[np.float32]:
    """(texts, recordings): the cosine of each text with each recording's best segment."""
    starts = np.cumsum([0, *(len(vectors) for vectors in segments[:-1])])
    scores: NDArray[np.float32] = np.maximum.reduceat(texts @ np.concatenate(segments).T, starts, axis=1)
    return scores


def _by_clean_rules(scores: NDArray[np.float32], keys: NDArray[np.str_]) -> dict[str, Any]:
    relevant = keys[:, None] == keys[None, :]
    return {
        "text_to_speech": metrics.figures(scores, relevant),
        "speech_to_text": metrics.figures(scores.T, relevant.T),
    }


def _by_paper_rules(
    candidates: int | None, threshold: float, scores: NDArray[np.float32], keys: NDArray[np.str_]
) -> dict[str, Any]:
    """Only whole pools of texts skip tied duplicates: the paper's stage 3, whose rows are speech."""
    drawn = None if candidates is None else min(candidates, len(scores))
    return {
        "text_to_speech": metrics.paper_figures(scores, candidates=drawn, threshold=threshold),
        "speech_to_text": metrics.paper_figures(
            scores.T, candidates=drawn, threshold=threshold, skip_tied_duplicates=drawn is None
        ),
    }


def _groups(items: Sequence[ManifestItem], field: str) -> dict[str, NDArray[np.int64]]:
    """Places of the items with each value of a field, in order of value; items without it are in none."""
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
