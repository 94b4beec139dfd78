"""The vector index: recordings found by their segments' vectors, and its snapshot on disk.

`Index` is what a library needs of one: `VectorIndex`, in this process's memory, or `clasp_core.milvus`, in
an engine that processes share. What of a recording makes a match, and what its scores are, is here for both.

A replica, never the truth: it is brought up to date from the catalogue's change sequence, and rebuilt
from it whenever its snapshot is missing, damaged or of another model. A segment's number in the vector
store is made of its recording's key and its place in the recording, so no map between the two can go
stale. Where the vectors lie and are multiplied is `clasp_core.vectors`.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from readerwriterlock.rwlock import RWLockWrite

from clasp_core.catalog import Catalog, Changes
from clasp_core.durability import locked, place
from clasp_core.encoders.weights import sha256_of
from clasp_core.faults import fault
from clasp_core.types import Embeddings
from clasp_core.vectors import FaissStore, Mask, StoreMaker

_log = logging.getLogger(__name__)

ORDINAL_BITS = 20
"""At most 2**20 segments in a recording: over twelve days of speech."""

Grouping: TypeAlias = Literal["recording", "segment"]
"""What a limit counts."""
Among: TypeAlias = NDArray[np.int64] | Set[str]
"""Which recordings to search: their keys, ascending; or, in an index that is shared, those of collections."""

SNAPSHOT_FILE = "manifest.json"
"""What is written last of a snapshot."""


@dataclass(frozen=True, slots=True)
class Match:
    """A recording found: its key, its best cosine, its matching segments (ordinal, cosine), best first. Or
    one of its segments, where those were asked for."""

    recording: int
    score: float
    segments: tuple[tuple[int, float], ...]
    among: int
    """How many segments were searched."""


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


class _Saving(Exception):
    """Another process is saving a snapshot to the same folder."""


class Index(Protocol):
    """What a library searches. Thread-safe; `follow` is called by one thread at a time."""

    is_shared: bool
    """Whether it lies elsewhere, for several processes: such a one takes collections for `among`, has no
    snapshot in the data directory, and gives no match that the catalogue does not have at that moment."""

    @property
    def point(self) -> tuple[int, str]:
        """The last change of the catalogue, by number and token, that is known to be in it."""
        ...

    def __len__(self) -> int:
        """Vectors, as far as known without asking anybody."""
        ...

    def follow(self, catalog: Catalog, at_once: int) -> bool:
        """Bring it to the catalogue's last change, `at_once` changes at a time; whether there was anything
        to do. Raises IndexUnavailable where it is shared and does not answer."""
        ...

    def search(
        self,
        queries: Embeddings,
        limits: Sequence[int],
        *,
        among: Among | None = None,
        segments: int = 5,
        group_by: Grouping = "recording",
    ) -> list[list[Match]]:
        """As `VectorIndex.search`. Raises as `follow` does."""
        ...

    def save(self, folder: Path) -> None:
        """Keep it for the next start, where it is not kept anyway."""
        ...

    def forget_others(self, models: Set[str]) -> None:
        """Drop what it keeps of this library by models that are none of these. Raises as `follow` does."""
        ...


class VectorIndex:
    """Exact cosine search over unit vectors. Thread-safe: many searches, or one change.

    The stores are not: FAISS searched during an addition crashes the process, hence the lock.
    """

    is_shared = False

    def __init__(self, dim: int, model: str, new_store: StoreMaker = FaissStore) -> None:
        self.dim = dim
        self.model = model
        self._new_store = new_store
        self.point = (0, "")
        """The last change of the catalogue, by number and token, that this replica has."""
        self._store = new_store(dim)
        self._recordings: set[int] = set()
        self._lock = RWLockWrite()

    def __len__(self) -> int:
        return len(self._store.numbers)

    @property
    def seq(self) -> int:
        """The number of the last change this replica has."""
        return self.point[0]

    def follow(self, catalog: Catalog, at_once: int) -> bool:
        if self.point == catalog.last_change():
            return False
        if not catalog.holds(self.point):
            # the catalogue was put back to an earlier state, by a restored backup say: start over
            with self._lock.gen_wlock():
                self._store = self._new_store(self.dim)
                self._recordings = set()
                self.point = (0, "")
        while changes := catalog.changes(self.seq, limit=at_once, model=self.model, dim=self.dim):
            self.apply(changes)
            follow_up(catalog, changes, self.model)
        return True

    def apply(self, changes: Changes) -> None:
        """Make the changed recordings what the catalogue says they are now.

        Raises ValueError for vectors of another dimension or that are not finite and of unit length.
        """
        check_vectors(changes.vectors, self.dim)
        numbers = (changes.owners << ORDINAL_BITS) | changes.ordinals
        with self._lock.gen_wlock():
            known = changes.recordings & self._recordings
            if known:
                owners = self._store.numbers >> ORDINAL_BITS
                self._store.remove(np.isin(owners, np.fromiter(known, np.int64)))
                self._recordings -= known
            if len(numbers):
                self._store.add(numbers, changes.vectors)
            self._recordings.update(np.unique(changes.owners).tolist())
            self.point = (changes.seq, changes.token)

    def search(
        self,
        queries: Embeddings,
        limits: Sequence[int],
        *,
        among: Among | None = None,
        segments: int = 5,
        group_by: Grouping = "recording",
    ) -> list[list[Match]]:
        """For each query its `limit` best recordings: all that score at least as high as the last of them.
        By "segment", its `limit` best segments, each a match of its own.

        Ties at the end are kept whole (the caller orders and cuts them), so a result may be longer
        than its limit. `among` holds the recording keys to search, ascending; None means all. Scores
        are computed again from the stored vectors, so they depend neither on the batch nor on the store.
        """
        check_vectors(queries, self.dim)
        if isinstance(among, Set):
            raise TypeError("this index knows recordings, and no collections")
        with self._lock.gen_rlock():
            inside = None if among is None else np.isin(self._store.numbers >> ORDINAL_BITS, among)
            size = len(self) if inside is None else int(np.count_nonzero(inside))
            depths = [min(size, 4 * limit + 16) for limit in limits]
            nearest = self._nearest(queries, depths, inside)
            if group_by == "segment":
                return [
                    self._match_segments(query, found, limit, size, inside)
                    for query, limit, found in zip(queries, limits, nearest, strict=True)
                ]
            return [
                self._match(query, found, limit, size, inside, segments)
                for query, limit, found in zip(queries, limits, nearest, strict=True)
            ]

    def _match(
        self,
        query: NDArray[np.float32],
        found: "_Found",
        limit: int,
        size: int,
        inside: Mask | None,
        segments: int,
    ) -> list[Match]:
        """Look deeper until `limit` recordings are found, and all that scores as much as the last is seen.

        The store's scores are off by its noise at most, so two of them say which is larger only where
        they are further apart than twice that; what is closer is decided by exact scores.
        """
        doubt = 2 * self._store.noise
        while True:
            scores, places = found
            numbers = self._store.numbers[places]
            owners = numbers >> ORDINAL_BITS
            _, firsts, owner = np.unique(owners, return_index=True, return_inverse=True)
            bests = scores[firsts]
            cutoff = np.sort(bests)[-limit] if len(bests) >= limit else -np.inf
            seen = -np.inf if len(places) >= size else scores[-1] + self._store.noise
            if seen == -np.inf or scores[-1] < cutoff - doubt:
                break
            (found,) = self._nearest(query[None], [min(size, 4 * len(places))], inside)
        chosen = _worth_scoring(scores, owner, bests >= cutoff - doubt, segments, doubt)
        exact = exact_scores(query, self._store.rows(places[chosen]))
        # below what was seen, another segment may be better that was not
        scored = [pair for pair in zip(numbers[chosen].tolist(), exact, strict=True) if pair[1] > seen]
        return best_recordings(scored, limit, size, segments)

    def _match_segments(
        self, query: NDArray[np.float32], found: "_Found", limit: int, size: int, inside: Mask | None
    ) -> list[Match]:
        """As `_match`, where each segment stands for itself: look deeper until all are seen that may be
        among the `limit` best."""
        doubt = 2 * self._store.noise
        while True:
            scores, places = found
            cutoff = scores[limit - 1] if len(scores) >= limit else -np.inf
            if len(places) >= size or scores[-1] < cutoff - doubt:
                break
            (found,) = self._nearest(query[None], [min(size, 4 * len(places))], inside)
        places = places[scores >= cutoff - doubt]
        exact = exact_scores(query, self._store.rows(places))
        return best_segments(zip(self._store.numbers[places].tolist(), exact, strict=True), limit, size)

    def _nearest(self, queries: Embeddings, depths: Sequence[int], inside: Mask | None) -> Iterator["_Found"]:
        """Each query's own number of nearest segments, best first, in one pass over the vectors."""
        most = max(depths, default=0)
        if most == 0:
            yield from ((np.empty(0), np.empty(0, np.int64)) for _ in depths)
            return
        scores, places = self._store.nearest(queries, most, inside)
        for row_scores, row_places, depth in zip(scores, places, depths, strict=True):
            yield row_scores[:depth].astype(np.float64), row_places[:depth]

    def forget_others(self, models: Set[str]) -> None:
        """There are none: the snapshot is of one model."""

    # --- the snapshot

    def save(self, folder: Path) -> None:
        """Write a snapshot that either is complete or is not there: file, then manifest, then clean up.

        Does nothing while another process is saving to the same folder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "saving").touch()
        with suppress(_Saving), locked(folder / "saving", _Saving()):
            with suppress(OSError, ValueError, LookupError):  # what kills left here must not add up
                _remove_all_but(json.loads((folder / SNAPSHOT_FILE).read_text())["file"], folder)
            temporary = folder / "saving.faiss"
            try:
                with self._lock.gen_rlock():
                    name = _file_name(*self.point)
                    self._store.write(temporary)
                    snapshot = Snapshot(
                        1, name, sha256_of(temporary), len(self), self.dim, self.model, *self.point
                    )
                fault("index.written")
                place(temporary, folder / name)
            finally:  # on a full disk, half of it would take the last of the room
                temporary.unlink(missing_ok=True)
            fault("index.placed")
            manifest = folder / "saving.json"
            manifest.write_text(json.dumps(asdict(snapshot)))
            place(manifest, folder / SNAPSHOT_FILE)
            fault("index.described")
            _remove_all_but(name, folder)
            fault("index.saved")

    @classmethod
    def load(cls, folder: Path, dim: int, model: str, new_store: StoreMaker = FaissStore) -> "VectorIndex":
        """The saved index, whatever store saved it; an empty one (to be filled from the catalogue) where
        none can be trusted."""
        index = cls(dim, model, new_store)
        with suppress(OSError, ValueError, TypeError, RuntimeError):
            snapshot = Snapshot(**json.loads((folder / SNAPSHOT_FILE).read_text()))
            if (snapshot.format, snapshot.dim, snapshot.model) != (1, dim, model):
                return index
            if snapshot.file != _file_name(snapshot.seq, snapshot.token):
                return index
            path = folder / snapshot.file
            if sha256_of(path) != snapshot.sha256:
                return index
            store = new_store(dim)
            store.read(path)
            if len(store.numbers) != snapshot.count:
                return index
            index._store = store
            index._recordings = set(np.unique(store.numbers >> ORDINAL_BITS).tolist())
            index.point = (snapshot.seq, snapshot.token)
        return index


def place_of(number: int) -> tuple[int, int]:
    """The recording's key and the place in the recording of the segment with that number."""
    return number >> ORDINAL_BITS, number & ((1 << ORDINAL_BITS) - 1)


def exact_scores(query: NDArray[np.float32], vectors: Embeddings) -> list[float]:
    """Scores of vectors (n, dim); each row by itself, so that equal vectors get equal scores wherever they
    lie."""
    products = vectors.astype(np.float64) * query.astype(np.float64)
    scores: list[float] = products.sum(axis=1).tolist()
    return scores


def best_recordings(scored: Iterable[tuple[int, float]], limit: int, size: int, segments: int) -> list[Match]:
    """The `limit` best recordings by their segments' numbers and exact scores, and ties with the last."""
    exact: dict[int, list[tuple[int, float]]] = {}
    for number, score in scored:
        recording, ordinal = place_of(number)
        exact.setdefault(recording, []).append((ordinal, score))
    matches = []
    for recording, own in exact.items():
        own.sort(key=lambda segment: (-segment[1], segment[0]))
        matches.append(Match(recording, own[0][1], tuple(own[:segments]), size))
    return _with_ties(matches, limit)


def best_segments(scored: Iterable[tuple[int, float]], limit: int, size: int) -> list[Match]:
    """The `limit` best segments, and all that tie with the last."""
    matches = []
    for number, score in scored:
        recording, ordinal = place_of(number)
        matches.append(Match(recording, score, ((ordinal, score),), size))
    return _with_ties(matches, limit)


def _with_ties(matches: list[Match], limit: int) -> list[Match]:
    if len(matches) <= limit:
        return matches
    last = sorted((match.score for match in matches), reverse=True)[limit - 1]
    return [match for match in matches if match.score >= last]


def follow_up(catalog: Catalog, changes: Changes, model: str) -> None:
    """What is to be done once changes are applied: what was found damaged is embedded anew."""
    if changes.damaged:
        _log.error("stored vectors are damaged; %d wait to be embedded anew", len(changes.damaged))
        catalog.embed_anew(changes.damaged, model)
    fault("library.applied")


_Found: TypeAlias = tuple[NDArray[np.float64], NDArray[np.int64]]


def _worth_scoring(
    scores: NDArray[np.float64], owner: NDArray[np.int64], wanted: Mask, segments: int, doubt: float
) -> NDArray[np.int64]:
    """Which of these segments, best first, may be among the `segments` best of a wanted recording.

    `owner` says which recording each is of, as a position in `wanted`.
    """
    order = np.argsort(owner, kind="stable")
    order = order[wanted[owner[order]]]
    _, starts, counts = np.unique(owner[order], return_index=True, return_counts=True)
    last = scores[order][starts + np.minimum(counts, segments) - 1]
    return order[scores[order] >= np.repeat(last, counts) - doubt]


def check_vectors(vectors: Embeddings, dim: int) -> None:
    """ValueError for vectors of another dimension, or that are not finite and of unit length."""
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise ValueError(f"vectors of shape {vectors.shape}; the index holds {dim} numbers each")
    if len(vectors) and not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3):
        raise ValueError("a vector is not finite and of unit length")


def _remove_all_but(name: str, folder: Path) -> None:
    for path in folder.glob("vectors-*"):
        if path.name != name:
            path.unlink(missing_ok=True)


def _file_name(seq: int, token: str) -> str:
    """A snapshot's name repeats its point, so that a damaged manifest contradicts itself."""
    return f"vectors-{seq:d}-{token}.faiss"
