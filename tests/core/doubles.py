"""Small real encoders and short ways to fill a library, for tests of what surrounds the models.

The encoders keep the promises of `clasp_core.models` (unit rows, no row depends on another, the same
input gives the same vector), cost microseconds, and understand nothing.
"""

import itertools
import multiprocessing
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from multiprocessing.context import ForkServerContext

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from clasp_core.catalog import (
    Catalog,
    EmbeddedSegment,
    NewRecording,
    Recording,
    StoredModel,
    note_change,
)
from clasp_core.database import RECORDINGS, SEGMENTS
from clasp_core.library import Library
from clasp_core.models import Heard
from clasp_core.types import SAMPLING_RATE, Embeddings, Waveform
from tests.audio_files import encode, tone

DIM = 16
MODEL = "0123456789abcdef"
STORED_MODEL = StoredModel(MODEL, "spectral", DIM)


class SpectralSpeechEncoder:
    """A fixed random projection of how loud each of 32 bands of frequency is; another for each dim."""

    picture_rate: int | None = None

    def __init__(self, dim: int = DIM) -> None:
        self.dim = dim
        self._projection = np.random.default_rng(1).normal(size=(32, dim))

    def encode(self, waveforms: Sequence[Waveform], pictured: Sequence[Waveform] | None = None) -> Embeddings:
        return np.stack([self._vector(waveform) for waveform in waveforms])

    def _vector(self, waveform: Waveform) -> NDArray[np.float32]:
        bands = np.array_split(np.abs(np.fft.rfft(waveform, 4096)), 32)
        loudness = np.log1p([band.mean() for band in bands])
        return unit(loudness @ self._projection)


class SpellingSpeechEncoder(SpectralSpeechEncoder):
    """Also writes down what it hears: how high the loudest tone is, and in which language it was told."""

    def hear(self, waveforms: Sequence[Waveform], langs: Sequence[str | None]) -> Heard:
        texts = [
            f"{_loudest_hz(waveform)} Hz ({lang})" for waveform, lang in zip(waveforms, langs, strict=True)
        ]
        return Heard(self.encode(waveforms), texts)


def _loudest_hz(waveform: Waveform) -> int:
    """To the nearest 10."""
    return 10 * round(np.abs(np.fft.rfft(waveform, SAMPLING_RATE)).argmax() / 10)


class LetterTextEncoder:
    """A fixed random projection of which letters a text has, by their numbers modulo 64."""

    def __init__(self, dim: int = DIM) -> None:
        self.dim = dim
        self._projection = np.random.default_rng(2).normal(size=(64, dim))

    def encode(self, texts: Sequence[str]) -> Embeddings:
        counts = [np.bincount([ord(letter) % 64 for letter in text] or [0], minlength=64) for text in texts]
        if not counts:
            return np.empty((0, self.dim), np.float32)
        return unit(np.stack(counts) @ self._projection)


def unit(vectors: NDArray[np.floating]) -> Embeddings:
    """The same directions at length one."""
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def random_vectors(seed: int, count: int, dim: int = DIM) -> Embeddings:
    return unit(np.random.default_rng(seed).normal(size=(count, dim)))


def wav_bytes(frequency: float = 440.0, seconds: float = 0.5) -> bytes:
    """A tone in a file; files of different frequency have different bytes and different vectors."""
    return encode(tone(seconds, frequency=frequency), 16_000)


def segments_of(vectors: Embeddings) -> list[EmbeddedSegment]:
    """One second for each vector."""
    return [EmbeddedSegment(float(i), i + 1.0, vector) for i, vector in enumerate(vectors)]


# --- a catalogue without audio

_contents = (f"{number:064x}" for number in itertools.count(1))


def register(catalog: Catalog, recording_id: str, **fields: object) -> Recording:
    """A pending recording of bytes that no other has, unless `sha256` says so."""
    defaults = {
        "collection": "default",
        "sha256": next(_contents),
        "size_bytes": 1,
        "media_type": None,
        "lang": None,
        "metadata": {},
    }
    new = NewRecording(**(defaults | fields | {"id": recording_id}))  # type: ignore[arg-type]
    return catalog.register(new, lambda: None)[0]


def complete(catalog: Catalog, recording: Recording, vectors: Embeddings, model: str = MODEL) -> bool:
    """Embed one recording of a catalogue in which no other is waiting."""
    owner = f"owner of {recording.id}"
    leased = catalog.lease(owner, limit=1, lease_s=60)
    assert [item.key for item in leased] == [recording.key]
    return catalog.complete(
        recording.key, owner, duration_s=float(len(vectors)), model=model, segments=segments_of(vectors)
    )


def store_ready(catalog: Catalog, model: str, recordings: Mapping[int, Embeddings]) -> None:
    """Ready recordings of these keys, called by them, with these vectors; in one transaction, and without any
    bytes, so that a hundred thousand are a minute."""
    now = datetime.now(UTC).replace(tzinfo=None)
    rows = [
        {"key": key, "id": f"{key}", "collection": "default", "sha256": f"{key:064x}", "size_bytes": 1}
        | {"metadata": {}, "created_at": now, "status": "ready", "duration_s": float(len(vectors))}
        | {"segments": len(vectors), "model": model, "attempts": 0}
        for key, vectors in recordings.items()
    ]
    segments = [
        {"recording": key, "model": model, "ordinal": ordinal, "vector": vector.tobytes()}
        | {"start_s": float(ordinal), "end_s": ordinal + 1.0, "transcript": None}
        for key, vectors in recordings.items()
        for ordinal, vector in enumerate(vectors)
    ]
    with catalog.database.writing() as db:
        db.execute(sa.insert(RECORDINGS), rows)
        db.execute(sa.insert(SEGMENTS), segments)
        note_change(db, list(recordings))


# --- a library with bytes, embedded without audio


def upload(library: Library, content: bytes, recording_id: str | None = None, **fields: object) -> Recording:
    with library.store.receive() as arriving:
        arriving.write(content)
        arriving.seal()
        return library.register(arriving, recording_id=recording_id, **fields)[0]  # type: ignore[arg-type]


def add(library: Library, recording_id: str, vectors: Embeddings, **fields: object) -> Recording:
    """A ready recording whose bytes are its id and whose segments have these vectors."""
    recording = upload(library, recording_id.encode(), recording_id, **fields)
    assert complete(library.catalog, recording, vectors, library.model)
    return library.catalog.get(recording_id)


# --- processes


def processes(*modules: str) -> ForkServerContext:
    """Makes real processes, quickly: each is forked from one that has imported the library already, and
    these modules, too, where it is the first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clasp_core.library", *modules])
    return context
