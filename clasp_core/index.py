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
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from readerwriterlock.rwlock import RWLockWrite

from clasp_core.catalog import Catalog, Changes
from clasp_core.durability import locked, place
from clasp_core.encoders.weights import sha256_of
from clasp_core.faults import fault
from clasp_core.ivf import ON_THE_CPU, GivenUp, IvfStore, Recall, Wanted, fewest_probes
from clasp_core.types import Embeddings
from clasp_core.vectors import FaissStore, Kind, MappedStore, Mask, StoreMaker

_log = logging.getLogger(__name__)

_READ_AT_ONCE = 5000
"""Vectors read from the catalogue in one go."""
ORDINAL_BITS = 20
"""At most 2**20 segments in a recording: over twelve days of speech."""

Grouping: TypeAlias = Literal["recording", "segment"]
"""What a limit counts."""
Among: TypeAlias = NDArray[np.int64] | Set[str]
"""Which recordings to search: their keys, ascending; or, in an index that is shared, those of collections."""

SNAPSHOT_FILE = "manifest.json"
"""What is written last of a snapshot."""
_FORMAT = 2
"""Format 1 had no kind: all were flat."""

QUESTIONS = 200
"""Recall is measured by so many questions, and confirmed by as many others."""
FINER = 1.5
"""Filters cut finer than the regions that they are measured by: so many times as much is looked at."""
_FAR = 0.8
"""How far a question is from what it asks for: it is a stored vector and a random one of this length, at unit
length again. Texts are about that far from speech (the modality gap of `mini`: cosines of 0.5 to 0.8)."""

Reader: TypeAlias = Callable[[Sequence[tuple[int, int]]], Mapping[tuple[int, int], NDArray[np.float32]]]
"""From segments (recording key, ordinal) to their vectors, bit for bit as they were added, of those that are
still there."""


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
    kind: Kind = "flat"
    recall: Recall | None = None

    @classmethod
    def read(cls, folder: Path) -> "Snapshot":
        """As the manifest says. Raises OSError, ValueError, TypeError or RuntimeError for what is none."""
        said = json.loads((folder / SNAPSHOT_FILE).read_text())
        if not isinstance(said, dict):
            raise ValueError("a manifest is an object")
        recall = said.pop("recall", None)
        return cls(**said, recall=None if recall is None else Recall(**recall))

    def is_of(self, dim: int, model: str) -> bool:
        """Whether it is of that model and can be read here."""
        known = self.format == _FORMAT or (self.format == 1 and self.kind == "flat")
        of = (self.dim, self.model) == (dim, model)
        return known and of and self.file == _file_name(self.seq, self.token, self.kind)


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

    @property
    def kind(self) -> Kind:
        """How it keeps vectors."""
        ...

    @property
    def recall(self) -> Recall | None:
        """What was measured last, where not everything is looked at."""
        ...

    def calibrate(self, floor: float, given_up: Wanted = lambda: False) -> None:
        """As `VectorIndex.calibrate`."""
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
    """Cosine search over unit vectors. Thread-safe: many searches, or one change.

    The stores are not: FAISS searched during an addition crashes the process, hence the lock. Every score is
    exact; so is which recordings are found, unless the store is an `IvfStore`, for which see `calibrate`.
    """

    is_shared = False

    def __init__(
        self,
        dim: int,
        model: str,
        new_store: StoreMaker = FaissStore,
        *,
        kind: Kind = "flat",
        read: Reader | None = None,
        flat: StoreMaker | None = None,
    ) -> None:
        """`kind` is what a snapshot says of the store, and `flat` makes the one to start over with. `read`
        gives the vectors where the store has rounded ones only; what it does not have any more is not found.
        Without it scores are of the rounded ones."""
        self.dim = dim
        self.model = model
        self.kind = kind
        self.point = (0, "")
        """The last change of the catalogue, by number and token, that this replica has."""
        self._store = new_store(dim)
        self._flat = flat or new_store
        self._read = read
        self.file: str | None = None
        """The name of the snapshot that it was loaded from."""
        self._recordings: set[int] = set()
        self._lock = RWLockWrite()

    def __len__(self) -> int:
        return len(self._store.numbers)

    @property
    def seq(self) -> int:
        """The number of the last change this replica has."""
        return self.point[0]

    def follow(self, catalog: Catalog, at_once: int, given_up: Wanted = lambda: False) -> bool:
        """As `Index.follow`. Raises GivenUp between two steps once that is so."""
        if self.point == catalog.last_change():
            return False
        if not catalog.holds(self.point):
            # the catalogue was put back to an earlier state, by a restored backup say: start over
            with self._lock.gen_wlock():
                self._store, self.kind, self.file = self._flat(self.dim), "flat", None
                self._recordings = set()
                self.point = (0, "")
        while changes := catalog.changes(self.seq, limit=at_once, model=self.model, dim=self.dim):
            if given_up():
                raise GivenUp
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
            judge = self._likely_segments if group_by == "segment" else partial(self._likely, segments)
            likely: list[_Likely] = [None] * len(limits)
            depths = [min(size, 4 * limit + 16) for limit in limits]
            waiting = list(range(len(limits)))
            while waiting:  # all that have to look deeper do so together
                nearest = self._nearest(queries[waiting], [depths[one] for one in waiting], inside)
                for one, found in zip(waiting, nearest, strict=True):
                    likely[one] = judge(found, limits[one], size)
                    depths[one] = min(size, 4 * depths[one])
                waiting = [one for one in waiting if likely[one] is None]
            settled = [one for one in likely if one is not None]
            scored = self._scored(queries, [places for places, _ in settled])
            if group_by == "segment":
                return [best_segments(own, limit, size) for own, limit in zip(scored, limits, strict=True)]
            return [
                # below what was seen, another segment may be better that was not
                best_recordings([pair for pair in own if pair[1] > seen], limit, size, segments)
                for own, (_, seen), limit in zip(scored, settled, limits, strict=True)
            ]

    def _likely(self, segments: int, found: "_Found", limit: int, size: int) -> "_Likely":
        """The places of what may be among the `segments` best of the `limit` best recordings, and the score
        above which all was seen; None where more must be found to know.

        The store's scores are off by its noise at most, so two of them say which is larger only where
        they are further apart than twice that; what is closer is decided by exact scores.
        """
        doubt = 2 * self._store.noise
        scores, places = found
        owners = (self._store.numbers[places] >> ORDINAL_BITS).tolist()
        bests = dict(zip(reversed(owners), scores[::-1].tolist(), strict=True))
        cutoff = sorted(bests.values())[-limit] if len(bests) >= limit else -math.inf
        seen = -math.inf if len(places) >= size else float(scores[-1]) + self._store.noise
        if seen != -math.inf and scores[-1] >= cutoff - doubt:
            return None
        wanted = {owner for owner, score in bests.items() if score >= cutoff - doubt}
        return places[_worth_scoring(scores.tolist(), owners, wanted, segments, doubt)], seen

    def _likely_segments(self, found: "_Found", limit: int, size: int) -> "_Likely":
        """As `_likely`, where each segment stands for itself."""
        doubt = 2 * self._store.noise
        scores, places = found
        cutoff = scores[limit - 1] if len(scores) >= limit else -np.inf
        if len(places) < size and scores[-1] >= cutoff - doubt:
            return None
        return places[scores >= cutoff - doubt], -math.inf

    def _scored(
        self, queries: Embeddings, places: Sequence[NDArray[np.int64]]
    ) -> Iterator[list[tuple[int, float]]]:
        """For each query the numbers and the exact scores of the segments at its places, of those that the
        catalogue still has where it is asked: for as many queries at a time as is no burden to either."""
        numbers = [self._store.numbers[own] for own in places]
        if self._store.exact or self._read is None:
            for query, own, here in zip(queries, numbers, places, strict=True):
                yield list(zip(own.tolist(), exact_scores(query, self._store.rows(here)), strict=True))
            return
        done = 0
        while done < len(numbers):
            total, until = len(numbers[done]), done + 1
            while until < len(numbers) and total + len(numbers[until]) <= _READ_AT_ONCE:
                total, until = total + len(numbers[until]), until + 1
            wanted = np.unique(np.concatenate(numbers[done:until]))
            rows, there = read_rows(self._read, wanted, self.dim)
            for query, own in zip(queries[done:until], numbers[done:until], strict=True):
                at = np.searchsorted(wanted, own)
                at = at[there[at]]
                yield list(zip(wanted[at].tolist(), exact_scores(query, rows[at]), strict=True))
            done = until

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

    # --- recall

    @property
    def recall(self) -> Recall | None:
        """What was measured last of a store that does not look at everything; None of others."""
        lists = self._lists()
        return None if lists is None else lists.recall

    def _lists(self) -> IvfStore | None:
        store = self._store.base if isinstance(self._store, MappedStore) else self._store
        return store if isinstance(store, IvfStore) else None

    @property
    def lists(self) -> int:
        """How many lists the vectors are in; 1 where all are looked at."""
        lists = self._lists()
        return 1 if lists is None else lists.lists

    @property
    def changed(self) -> int | None:
        """How many vectors differ from the snapshot that is mapped; None where none is."""
        return self._store.changed if isinstance(self._store, MappedStore) else None

    def drawn(self, count: int) -> NDArray[np.int64]:
        """The numbers of some segments, `count` at most, each as likely as any other."""
        with self._lock.gen_rlock():
            numbers = self._store.numbers
            return np.random.default_rng().choice(numbers, min(count, len(numbers)), replace=False)

    def calibrate(self, floor: float, given_up: Wanted = lambda: False) -> None:
        """Have so many lists looked at that `floor` of the ten best recordings are found: measured by vectors
        drawn from the index as questions (`_FAR`), one at a time, so that searches and changes go on between.

        Where that cannot be measured, all are looked at. Raises GivenUp soon after that is so.
        """
        lists = self._lists()
        if lists is None:
            return
        chance = np.random.default_rng()
        questions = questions_near(read_vectors(self._read, self.drawn(2 * QUESTIONS), self.dim), chance)
        needed, filtered = [], []
        for question in questions:
            if given_up():
                raise GivenUp
            with self._lock.gen_rlock():
                owners = lists.numbers >> ORDINAL_BITS
                needed.append(lists.probes_needed(question, owners))
                filtered.append(lists.probes_needed(question, owners, lists.some_regions(chance)))
        probes, share, at_least = fewest_probes(needed, floor, lists=lists.lists)
        more, _, _ = fewest_probes(filtered, floor, lists=lists.lists)
        more = math.ceil(FINER * more)
        recall = Recall(share, at_least, probes, len(lists.numbers), max(probes, more))
        with self._lock.gen_wlock():
            lists.recall = recall

    # --- the snapshot

    def save(self, folder: Path) -> None:
        """Write a snapshot that either is complete or is not there: file, then manifest, then clean up.

        Does nothing while another process is saving to the same folder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "saving").touch()
        with suppress(_Saving), locked(folder / "saving", _Saving()):
            # what kills left here must not add up
            with suppress(OSError, ValueError, TypeError, RuntimeError):
                _remove_all_but(Snapshot.read(folder).file, folder)
            temporary = folder / "saving.faiss"
            try:
                with self._lock.gen_rlock():
                    name = _file_name(*self.point, self.kind)
                    self._store.write(temporary)
                    snapshot = Snapshot(
                        format=_FORMAT,
                        file=name,
                        sha256=sha256_of(temporary),
                        count=len(self),
                        dim=self.dim,
                        model=self.model,
                        seq=self.point[0],
                        token=self.point[1],
                        kind=self.kind,
                        recall=self.recall,
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
    def load(
        cls,
        folder: Path,
        dim: int,
        model: str,
        new_store: StoreMaker = FaissStore,
        *,
        others: Mapping[Kind, StoreMaker] = ON_THE_CPU,
        read: Reader | None = None,
    ) -> "VectorIndex":
        """The saved index, whatever store saved it; an empty one (to be filled from the catalogue) where
        none can be trusted. `new_store` makes its store where that is flat, `others` where it is not."""
        with suppress(OSError, ValueError, TypeError, LookupError, RuntimeError):
            snapshot = Snapshot.read(folder)
            path = folder / snapshot.file
            if snapshot.is_of(dim, model) and sha256_of(path) == snapshot.sha256:
                makers = {**others, "flat": new_store}
                index = cls(dim, model, makers[snapshot.kind], kind=snapshot.kind, read=read, flat=new_store)
                index._store.read(path)
                if len(index) == snapshot.count:
                    if (lists := index._lists()) is not None:
                        lists.recall = snapshot.recall
                    index._recordings = set(np.unique(index._store.numbers >> ORDINAL_BITS).tolist())
                    index.point = (snapshot.seq, snapshot.token)
                    index.file = snapshot.file
                    return index
        return cls(dim, model, new_store, read=read)


def questions_near(vectors: Embeddings, chance: np.random.Generator) -> Embeddings:
    """Questions to measure recall by, one for each of these vectors and as far from it as texts are from
    speech, in any order."""
    vectors = chance.permutation(vectors)
    aside = chance.standard_normal(vectors.shape).astype(np.float32)
    questions = vectors + _FAR * aside / np.linalg.norm(aside, axis=1, keepdims=True)
    near: Embeddings = questions / np.linalg.norm(questions, axis=1, keepdims=True)
    return near


def read_vectors(read: Reader | None, numbers: NDArray[np.int64], dim: int) -> Embeddings:
    """The vectors of these segments that are there, in the order of their numbers; none without a reader."""
    numbers = np.sort(numbers)
    parts = [np.empty((0, dim), np.float32)]
    for start in range(0, len(numbers) if read is not None else 0, _READ_AT_ONCE):
        assert read is not None
        rows, there = read_rows(read, numbers[start : start + _READ_AT_ONCE], dim)
        parts.append(rows[there])
    return np.concatenate(parts)


def read_rows(read: Reader, numbers: NDArray[np.int64], dim: int) -> tuple[Embeddings, Mask]:
    """The vectors of these segments (n, dim), and which of them are there (n,); the others are zeros."""
    rows = np.zeros((len(numbers), dim), np.float32)
    there = np.zeros(len(numbers), np.bool_)
    named = [place_of(number) for number in numbers.tolist()]
    found = read(named)
    for row, name in enumerate(named):
        vector = found.get(name)
        if vector is not None and len(vector) == dim:
            rows[row], there[row] = vector, True
    return rows, there


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
_Likely: TypeAlias = tuple[NDArray[np.int64], float] | None


def _worth_scoring(
    scores: Sequence[float], owners: Sequence[int], wanted: Set[int], segments: int, doubt: float
) -> list[int]:
    """Which of these segments, best first, may be among the `segments` best of a wanted recording. `owners`
    says which recording each is of."""
    chosen = []
    last: dict[int, tuple[int, float]] = {}
    """Of each recording, how many of its best were seen, up to `segments`, and the score of the last."""
    for position, (score, owner) in enumerate(zip(scores, owners, strict=True)):
        if owner in wanted:
            count, least = last.get(owner, (0, score))
            if count < segments:
                count, least = last[owner] = (count + 1, score)
            if score >= least - doubt:
                chosen.append(position)
    return chosen


def check_vectors(vectors: Embeddings, dim: int) -> None:
    """ValueError for vectors of another dimension, or that are not finite and of unit length."""
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise ValueError(f"vectors of shape {vectors.shape}; the index holds {dim} numbers each")
    if not (np.abs(np.linalg.norm(vectors, axis=1) - 1) < 1e-3).all():  # nor is it for a NaN
        raise ValueError("a vector is not finite and of unit length")


def _remove_all_but(name: str, folder: Path) -> None:
    for path in folder.glob("vectors-*"):
        if path.name != name:
            path.unlink(missing_ok=True)


def _file_name(seq: int, token: str, kind: Kind) -> str:
    """A snapshot's name repeats its point and its kind, so that a damaged manifest contradicts itself, and
    what is made anew as another kind does not take the place of what the manifest still means."""
    return f"vectors-{seq:d}-{token}.faiss" if kind == "flat" else f"vectors-{seq:d}-{token}-{kind}.faiss"
