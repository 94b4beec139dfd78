"""A store of vectors in lists, of which a search looks at the most promising only: for libraries beyond what
can be looked at whole for every question.

What it looks at is judged as in every other store, so all scores are right; what it does not look at may be
missing. How many lists are enough is not guessed but measured (`Recall`), by the index that holds the store.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from clasp_core.types import Embeddings
from clasp_core.vectors import HalfStore, Kind, Mask, Neighbours, StoreMaker, noise_of

RECALL_AT = 10
"""Recall is of the ten best recordings."""
DEPTH = 4 * RECALL_AT + 16
"""How many segments an index first looks for where ten recordings are asked for."""
SAMPLE_PER_LIST = 40
"""Vectors to train by for each list; FAISS warns below 39."""
_ROUNDS = 6
_AT_ONCE = 4096
NEARLY_ALL = 0.95
"""What lets so many pass is no filter: a few that were deleted of a mapped file, mostly."""
_CONFIDENCE = 2.0
"""Standard errors below the mean at which recall must still reach the floor: true in 39 cases of 40."""


@dataclass(frozen=True, slots=True)
class Recall:
    """What was measured: the share of the ten best recordings that is found with so many lists probed; what
    it is at least, with the confidence above; and how many vectors there were then."""

    share: float
    at_least: float
    probes: int
    count: int
    filtered: int
    """Under a filter: so many lists' worth of vectors that pass it are looked at. Measured for the same floor
    with filters that hide half of the space by regions, which for half of the questions is what is near."""


class GivenUp(Exception):
    """Nobody wants the result any more."""


Wanted = Callable[[], bool]


def lists_for(count: int) -> int:
    """Into how many lists so many vectors go: 4 x sqrt(count)."""
    return max(1, round(4 * math.sqrt(count)))


def train(sample: Embeddings, lists: int, given_up: Wanted = lambda: False) -> Embeddings:
    """Unit centres (lists, dim) of a sample of at least as many unit vectors, by spherical k-means.

    Ours and not FAISS's, because that one can neither be interrupted nor be told how much memory to take.
    Raises GivenUp soon after that is so.
    """
    chance = np.random.default_rng(0)
    centres = sample[chance.choice(len(sample), lists, replace=False)]
    for _ in range(_ROUNDS):
        quantizer = faiss.IndexFlatIP(sample.shape[1])
        quantizer.add(centres)
        sums = np.zeros(centres.shape, np.float64)
        counts = np.zeros(lists, np.int64)
        for start in range(0, len(sample), _AT_ONCE):
            if given_up():
                raise GivenUp
            part = sample[start : start + _AT_ONCE]
            nearest = quantizer.search(part, 1)[1][:, 0]
            order = np.argsort(nearest, kind="stable")
            owners, firsts = np.unique(nearest[order], return_index=True)
            sums[owners] += np.add.reduceat(part[order], firsts, axis=0)
            counts += np.bincount(nearest, minlength=lists)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        empty = lengths[:, 0] < 1e-6
        centres = (sums / np.maximum(lengths, 1e-6)).astype(np.float32)
        centres[empty] = sample[chance.choice(len(sample), int(empty.sum()), replace=False)]
    return centres


class IvfStore:
    """FAISS's inverted lists, 16 bits a number, in memory. Without centres it has one list.

    Until `recall` is set every search looks at every list. Of what a filter leaves, a search looks at as many
    vectors as was measured to be enough (`Recall.filtered`), in however many lists they are; where no more
    than `exhaustive_up_to` are left, at all of them.
    """

    exact = False

    def __init__(
        self, dim: int, *, centres: Embeddings | None = None, exhaustive_up_to: int = 200_000
    ) -> None:
        self.noise = noise_of(dim, half=True)
        self._recall: Recall | None = None
        self._dim = dim
        self._exhaustive_up_to = exhaustive_up_to
        self._centres = np.eye(1, dim, dtype=np.float32) if centres is None else centres
        quantizer = faiss.IndexFlatIP(dim)
        quantizer.add(self._centres)
        self._faiss = faiss.IndexIVFScalarQuantizer(
            quantizer,
            dim,
            len(self._centres),
            faiss.ScalarQuantizer.QT_fp16,
            faiss.METRIC_INNER_PRODUCT,
            False,  # not the difference to the centre, whose rounding would be another
        )
        self._faiss.is_trained = True  # 16 bits need no training, and the centres are there
        self._numbers = np.empty(0, np.int64)
        self._serials = np.empty(0, np.int64)
        """By place: what the vector is called in FAISS. Ascending, and none comes twice."""
        self._list_of = np.empty(0, np.int32)
        """By place: which list the vector is in."""
        self._sizes = np.zeros(self.lists, np.int64)
        """By list: how many vectors are in it."""

    @property
    def lists(self) -> int:
        return len(self._centres)

    @property
    def recall(self) -> Recall | None:
        """What was measured last, by which searches go. It is not written with the vectors."""
        return self._recall

    @recall.setter
    def recall(self, recall: Recall | None) -> None:
        if recall is not None and not (1 <= recall.probes <= self.lists and recall.filtered >= 1):
            raise ValueError(f"{recall} is not of {self.lists} lists")
        self._recall = recall

    @property
    def numbers(self) -> NDArray[np.int64]:
        return self._numbers

    def add(self, numbers: NDArray[np.int64], vectors: Embeddings) -> None:
        if not len(numbers):
            return
        first = int(self._serials[-1]) + 1 if len(self._serials) else 0
        serials = np.arange(first, first + len(numbers))
        vectors = np.ascontiguousarray(vectors)
        lists = self._faiss.quantizer.search(vectors, 1)[1][:, 0].copy()
        arrays = [faiss.swig_ptr(array) for array in (vectors, serials, lists)]
        self._faiss.add_core(len(numbers), *arrays)
        self._numbers = np.concatenate([self._numbers, numbers])
        self._serials = np.concatenate([self._serials, serials])
        self._list_of = np.concatenate([self._list_of, lists.astype(np.int32)])
        self._sizes += np.bincount(lists, minlength=self.lists)

    def remove(self, gone: Mask) -> None:
        chosen = _Chosen(self._serials[gone])
        self._faiss.remove_ids(chosen.selector)
        self._sizes -= np.bincount(self._list_of[gone], minlength=self.lists)
        self._numbers, self._serials = self._numbers[~gone], self._serials[~gone]
        self._list_of = self._list_of[~gone]

    def nearest(self, queries: Embeddings, count: int, among: Mask | None = None) -> Neighbours:
        passing = len(self._numbers) if among is None else int(np.count_nonzero(among))
        few = among is not None and passing <= self._exhaustive_up_to
        recall = self._recall
        if few or recall is None or recall.probes == self.lists or count == passing:
            return self.nearest_of_all(queries, count, among)
        # lists in the order in which each query looks at them, and how many candidates it has seen by each
        order = self._order(queries)
        inside = self._sizes if among is None else np.bincount(self._list_of[among], minlength=self.lists)
        seen = np.cumsum(inside[order], axis=1)
        deeper = max(1.0, count / DEPTH)
        least: float = count
        if passing < NEARLY_ALL * len(self._numbers):
            least = max(count, deeper * recall.filtered * len(self._numbers) / self.lists)
        needed = 1 + np.argmax(seen >= min(least, passing), axis=1)
        probes = np.maximum(needed, min(self.lists, math.ceil(deeper * recall.probes)))
        order = order[:, : int(probes.max())]
        order[np.arange(order.shape[1]) >= probes[:, None]] = -1
        return self._search(queries, count, among, order)

    def nearest_of_all(self, queries: Embeddings, count: int, among: Mask | None = None) -> Neighbours:
        """As `nearest`, looking at every list."""
        order = np.broadcast_to(np.arange(self.lists), (len(queries), self.lists))
        return self._search(queries, count, among, order)

    def _search(
        self, queries: Embeddings, count: int, among: Mask | None, lists: NDArray[np.int64]
    ) -> Neighbours:
        """What is nearest in each query's own lists (queries, most); -1 stands for none."""
        scores = np.empty((len(queries), count), np.float32)
        serials = np.empty((len(queries), count), np.int64)
        queries, lists = np.ascontiguousarray(queries), np.ascontiguousarray(lists)
        distances = np.zeros(lists.shape, np.float32)
        chosen = None if among is None else _Chosen(self._serials[among])
        settings = faiss.SearchParametersIVF(
            nprobe=lists.shape[1], sel=None if chosen is None else chosen.selector
        )
        arrays = [faiss.swig_ptr(array) for array in (lists, distances, scores, serials)]
        self._faiss.search_preassigned_c(
            len(queries), faiss.swig_ptr(queries), count, *arrays, False, settings
        )
        assert serials.min() >= 0, "fewer were found than there are"
        return scores, np.searchsorted(self._serials, serials)

    def _order(self, queries: Embeddings) -> NDArray[np.int64]:
        """The lists (queries, lists), the most promising first."""
        return np.argsort(-(queries @ self._centres.T), axis=1)

    def probes_needed(
        self, query: NDArray[np.float32], owners: NDArray[np.int64], open_lists: Mask | None = None
    ) -> NDArray[np.int64]:
        """How many lists must be probed to find each of the ten best recordings: up to ten numbers.

        `owners` says whose each place is. A recording counts as found with the list that its best segment
        is in, so that recall by these is not above what a search has. With `open_lists` (lists,) it is under
        a filter that passes these lists only, and the numbers are lists' worth of vectors that pass.
        """
        among = None if open_lists is None else open_lists[self._list_of]
        passing = len(self._numbers) if among is None else int(np.count_nonzero(among))
        if not passing:
            return np.empty(0, np.int64)
        count = min(DEPTH, passing)
        while True:
            places = self.nearest_of_all(query[None], count, among)[1][0]
            best = np.sort(np.unique(owners[places], return_index=True)[1])[:RECALL_AT]
            if len(best) == RECALL_AT or count == passing:
                break
            count = min(4 * count, passing)
        order = self._order(query[None])[0]
        needed = np.empty(self.lists, np.int64)
        needed[order] = np.arange(1, self.lists + 1)
        if among is not None:
            seen = np.cumsum(np.bincount(self._list_of[among], minlength=self.lists)[order])
            needed[order] = np.ceil(seen * self.lists / len(self._numbers))
        ranks: NDArray[np.int64] = needed[self._list_of[places[best]]]
        return ranks

    def some_regions(self, chance: np.random.Generator) -> Mask:
        """About half of the lists (lists,): those around half of sixteen places."""
        around = self._centres[chance.choice(self.lists, min(16, self.lists), replace=False)]
        passes = chance.permutation(len(around)) < len(around) / 2
        chosen: Mask = passes[np.argmax(self._centres @ around.T, axis=1)]
        return chosen

    def rows(self, places: NDArray[np.int64]) -> Embeddings:
        """The rounded vectors; each is looked for in its list, so ask for few."""
        rows = np.empty((len(places), self._dim), np.float32)
        lists = self._faiss.invlists
        for row, place in enumerate(places):
            number = int(self._list_of[place])
            size = int(lists.list_size(number))
            offset = np.argmax(faiss.rev_swig_ptr(lists.get_ids(number), size) == self._serials[place])
            codes = faiss.rev_swig_ptr(lists.get_codes(number), 2 * size * self._dim)
            rows[row] = codes.view("<f2").reshape(size, self._dim)[offset]
        return rows

    def write(self, path: Path) -> None:
        """With the numbers by place: an IndexIDMap whose index has serials for ids."""
        whole = faiss.IndexIDMap(faiss.IndexFlatIP(self._dim))
        whole.index, whole.own_fields, whole.ntotal = self._faiss, False, self._faiss.ntotal
        faiss.copy_array_to_vector(self._numbers, whole.id_map)
        faiss.write_index(whole, str(path))

    def read(self, path: Path, *, mapped: bool = False) -> None:
        loaded = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
        if not isinstance(loaded, faiss.IndexIDMap) or loaded.d != self._dim:
            raise ValueError(f"{path} holds an index of another kind")
        lists = faiss.downcast_index(loaded.index)
        if not isinstance(lists, faiss.IndexIVFScalarQuantizer) or lists.by_residual:
            raise ValueError(f"{path} holds vectors that are kept in another way")
        self._whole, self._faiss = loaded, lists
        quantizer = faiss.downcast_index(lists.quantizer)
        count = lists.nlist * self._dim
        self._centres = faiss.rev_swig_ptr(quantizer.get_xb(), count).reshape(-1, self._dim).copy()
        sizes = np.array([lists.get_list_size(number) for number in range(lists.nlist)])
        parts = [
            faiss.rev_swig_ptr(lists.invlists.get_ids(number), int(size))
            for number, size in enumerate(sizes)
            if size
        ]
        serials = np.concatenate(parts) if parts else np.empty(0, np.int64)
        order = np.argsort(serials)
        self._serials = serials[order]
        self._list_of = np.repeat(np.arange(lists.nlist, dtype=np.int32), sizes)[order]
        self._sizes = sizes.astype(np.int64)
        self._numbers = faiss.vector_to_array(loaded.id_map)


class _Chosen:
    """FAISS's selector of some serials, which are ascending, and the memory that it looks at: keep both."""

    def __init__(self, serials: NDArray[np.int64]) -> None:
        bits = np.zeros((int(serials[-1]) if len(serials) else 0) + 1, np.bool_)
        bits[serials] = True
        self._bits = np.packbits(bits, bitorder="little")
        self.selector: Any = faiss.IDSelectorBitmap(len(self._bits), faiss.swig_ptr(self._bits))


def fewest_probes(needed: list[NDArray[np.int64]], floor: float, *, lists: int) -> tuple[int, float, float]:
    """The fewest lists to probe for recall to be at least `floor`: chosen by one half of the questions
    (`probes_needed` of each), and confirmed or raised by the other. Of that one are the share found, and what
    it is at least."""
    half = len(needed) // 2
    chosen = 1
    share = at_least = 0.0
    for questions in (needed[:half], needed[half:]):
        candidates = np.unique(np.concatenate([[], *questions])).astype(np.int64)
        for chosen in [chosen, *candidates[candidates > chosen].tolist()]:  # noqa: B020 - goes on from there
            shares = np.array([np.mean(ranks <= chosen) for ranks in questions if len(ranks)])
            if not len(shares):
                return lists, 1.0, 1.0
            # a question more that finds nothing: where all find everything, that is not yet certain
            doubt = _CONFIDENCE * np.sqrt(shares.var() / len(shares)) + 1 / (len(shares) + 1)
            share = float(shares.mean())
            at_least = max(0.0, share - float(doubt))
            if at_least >= floor:
                break
        else:
            return lists, 1.0, 1.0
    return chosen, share, at_least


ON_THE_CPU: dict[Kind, StoreMaker] = {"half": HalfStore, "ivf": IvfStore}
"""The kinds beside "flat", where nobody says otherwise."""
