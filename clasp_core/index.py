"""The vector index: a FAISS inner-product index in memory, and its snapshot on disk.

A replica, never the truth: it is brought up to date from the catalogue's change sequence, and rebuilt
from it whenever its snapshot is missing, damaged or of another model. A segment's number in FAISS is
made of its recording's key and its place in the recording, so no map between the two can go stale.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import faiss
import numpy as np
from numpy.typing import NDArray
from readerwriterlock.rwlock import RWLockWrite

from clasp_core.catalog import Changes
from clasp_core.encoders.weights import sha256_of
from clasp_core.types import Embeddings

_ORDINAL_BITS = 20
"""At most 2**20 segments in a recording: over twelve days of speech."""

# One query gains nothing from more threads, and suffers under load.
faiss.omp_set_num_threads(1)
# FAISS uses matrix products only for batches where queries x dim reaches this; its default (128,000)
# leaves all of ours one by one. See docs/decisions.md.
faiss.cvar.distance_compute_blas_threshold = 3072


@dataclass(frozen=True, slots=True)
class Match:
    """A recording found: its key, its best cosine, its matching segments (ordinal, cosine), best first."""

    recording: int
    score: float
    segments: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the manifest beside a saved index says of it."""

    format: int
    file: str
    sha256: str
    count: int
    dim: int
    model: str
    seq: int
    token: str


class VectorIndex:
    """Exact cosine search over unit vectors. Thread-safe: many searches, or one change.

    FAISS itself is not: a search during an addition crashes the process, hence the lock.
    """

    def __init__(self, dim: int, model: str) -> None:
        self.dim = dim
        self.model = model
        self.point = (0, "")
        """The last change of the catalogue, by number and token, that this replica has."""
        self._faiss = faiss.IndexIDMap2(faiss.IndexFlatIP(dim))
        self._recordings: set[int] = set()
        self._lock = RWLockWrite()

    def __len__(self) -> int:
        return int(self._faiss.ntotal)

    @property
    def seq(self) -> int:
        """The number of the last change this replica has."""
        return self.point[0]

    def apply(self, changes: Changes) -> None:
        """Make the changed recordings what the catalogue says they are now.

        Raises ValueError for vectors of another dimension or that are not finite and of unit length.
        """
        _check(changes.vectors, self.dim)
        numbers = (changes.owners << _ORDINAL_BITS) | changes.ordinals
        with self._lock.gen_wlock():
            known = changes.recordings & self._recordings
            if known:
                stale = np.isin(self._numbers() >> _ORDINAL_BITS, np.fromiter(known, np.int64))
                self._faiss.remove_ids(self._numbers()[stale])
            if len(numbers):
                self._faiss.add_with_ids(changes.vectors, numbers)
            self._recordings -= changes.recordings
            self._recordings.update(np.unique(changes.owners).tolist())
            self.point = (changes.seq, changes.token)

    def search(
        self,
        queries: Embeddings,
        limits: Sequence[int],
        *,
        among: NDArray[np.int64] | None = None,
        segments: int = 5,
    ) -> list[list[Match]]:
        """For each query its `limit` best recordings: all that score at least as high as the last of them.

        Ties at the end are kept whole (the caller orders and cuts them), so a result may be longer
        than its limit. `among` holds the recording keys to search, ascending; None means all. Scores
        are computed again from the stored vectors, so they do not depend on the batch.
        """
        _check(queries, self.dim)
        with self._lock.gen_rlock():
            selector = None if among is None else _Selector(self._numbers(), among)
            size = len(self) if selector is None else selector.count
            depth = [min(size, 4 * limit + 16) for limit in limits]
            return [
                self._match(query, found, limit, selector, segments)
                for query, found, limit in zip(
                    queries, self._nearest(queries, depth, selector), limits, strict=True
                )
            ]

    def _match(
        self,
        query: NDArray[np.float32],
        nearest: "_Nearest",
        limit: int,
        selector: "_Selector | None",
        segments: int,
    ) -> list[Match]:
        """Look deeper until `limit` recordings are found, and all that scores as much as the last is seen."""
        size = len(self) if selector is None else selector.count
        while True:
            best: dict[int, float] = {}
            for number, score in nearest:
                best.setdefault(number >> _ORDINAL_BITS, score)
            ranked = sorted(best.values(), reverse=True)
            cutoff = ranked[limit - 1] if len(ranked) >= limit else -np.inf
            if len(nearest) >= size or (nearest and nearest[-1][1] < cutoff - _SCORE_NOISE):
                break
            (nearest,) = self._nearest(query[None], [min(size, 4 * len(nearest))], selector)
        grouped: dict[int, list[tuple[int, float]]] = {}
        for number, _ in nearest:
            recording, ordinal = number >> _ORDINAL_BITS, number & ((1 << _ORDINAL_BITS) - 1)
            if best[recording] >= cutoff - _SCORE_NOISE and len(grouped.setdefault(recording, [])) < segments:
                exact = float(query.astype(np.float64) @ self._faiss.reconstruct(number).astype(np.float64))
                grouped[recording].append((ordinal, exact))
        matches = []
        for recording, found in grouped.items():
            found.sort(key=lambda segment: (-segment[1], segment[0]))
            matches.append(Match(recording, found[0][1], tuple(found)))
        return matches

    def _nearest(
        self, queries: Embeddings, depths: Sequence[int], selector: "_Selector | None"
    ) -> Iterator["_Nearest"]:
        """Each query's own number of nearest segments, best first, in one pass over the vectors."""
        most = max(depths, default=0)
        if most == 0:
            yield from ([] for _ in depths)
            return
        if selector is None:
            scores, numbers = self._faiss.search(queries, most)
        else:
            inner = self._faiss.index
            scores, places = inner.search(queries, most, params=selector.parameters)
            numbers = np.where(places >= 0, selector.numbers[places], -1)
        for row_numbers, row_scores, depth in zip(numbers, scores, depths, strict=True):
            pairs = zip(row_numbers[:depth].tolist(), row_scores[:depth].tolist(), strict=True)
            yield [(number, score) for number, score in pairs if number >= 0]

    def _numbers(self) -> NDArray[np.int64]:
        """The segment numbers in FAISS's own order, without copying; valid until the next change."""
        if not len(self):
            return np.empty(0, np.int64)
        view: NDArray[np.int64] = faiss.rev_swig_ptr(self._faiss.id_map.data(), len(self))
        return view

    # --- the snapshot

    def save(self, folder: Path) -> None:
        """Write a snapshot that either is complete or is not there: file, then manifest, then clean up.

        Does nothing while another process is saving to the same folder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "saving").open("w") as guard:
            try:
                fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            temporary = folder / "saving.faiss"
            with self._lock.gen_rlock():
                name = _file_name(*self.point)
                faiss.write_index(self._faiss, str(temporary))
                snapshot = Snapshot(
                    1, name, sha256_of(temporary), len(self), self.dim, self.model, *self.point
                )
            _place(temporary, folder / name)
            manifest = folder / "saving.json"
            manifest.write_text(json.dumps(asdict(snapshot)))
            _place(manifest, folder / "manifest.json")
            for path in folder.glob("vectors-*"):
                if path.name != name:
                    path.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: Path, dim: int, model: str) -> "VectorIndex":
        """The saved index; an empty one (to be filled from the catalogue) where none can be trusted."""
        index = cls(dim, model)
        with suppress(OSError, ValueError, TypeError, RuntimeError):
            snapshot = Snapshot(**json.loads((folder / "manifest.json").read_text()))
            if (snapshot.format, snapshot.dim, snapshot.model) != (1, dim, model):
                return index
            if snapshot.file != _file_name(snapshot.seq, snapshot.token):
                return index
            path = folder / snapshot.file
            if sha256_of(path) != snapshot.sha256:
                return index
            loaded = faiss.read_index(str(path))
            if loaded.ntotal != snapshot.count or loaded.d != dim:
                return index
            index._faiss = loaded
            index._recordings = set(np.unique(index._numbers() >> _ORDINAL_BITS).tolist())
            index.point = (snapshot.seq, snapshot.token)
        return index


_Nearest: TypeAlias = list[tuple[int, float]]

_SCORE_NOISE = 1e-6
"""FAISS's own sums differ by less than this from exact ones."""


class _Selector:
    """The part of the index that belongs to some recordings."""

    def __init__(self, numbers: NDArray[np.int64], among: NDArray[np.int64]) -> None:
        inside = np.isin(numbers >> _ORDINAL_BITS, among)
        self.numbers = numbers
        self.count = int(inside.sum())
        self._bits = np.packbits(inside, bitorder="little")
        bitmap = faiss.IDSelectorBitmap(len(self._bits), faiss.swig_ptr(self._bits))
        self.parameters = faiss.SearchParameters(sel=bitmap)


def _check(vectors: Embeddings, dim: int) -> None:
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise ValueError(f"vectors of shape {vectors.shape}; the index holds {dim} numbers each")
    if len(vectors) and not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3):
        raise ValueError("a vector is not finite and of unit length")


def _file_name(seq: int, token: str) -> str:
    """A snapshot's name repeats its point, so that a damaged manifest contradicts itself."""
    return f"vectors-{seq:d}-{token}.faiss"


def _place(temporary: Path, final: Path) -> None:
    """Rename durably."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
