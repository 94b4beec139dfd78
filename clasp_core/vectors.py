"""Stores of numbered vectors: where the vector index keeps them, and what multiplies them with a query.

`store_for` names the three: FAISS on the CPU, FAISS with a copy on a GPU, and plain torch on either; each
with 32 or with 16 bits a number. All look at every vector and find the same; those of as many bits read each
other's files. `MappedStore` leaves a file where it is. Locks, recordings and snapshots are the index's; what
looks at a part of the vectors only is `clasp_core.ivf`.
"""

import ctypes
import importlib.metadata
import logging
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar

import faiss
import numpy as np
from numpy.typing import NDArray

from clasp_core.errors import IndexUnavailable
from clasp_core.types import Embeddings

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)
T = TypeVar("T")

# One query gains nothing from more threads, and suffers under load.
faiss.omp_set_num_threads(1)
# FAISS uses matrix products only for batches where queries x dim reaches this; its default (128,000)
# leaves all of ours one by one. See docs/decisions.md.
_BATCH = 3072
faiss.cvar.distance_compute_blas_threshold = _BATCH

Mask: TypeAlias = NDArray[np.bool_]
Neighbours: TypeAlias = tuple[NDArray[np.float32], NDArray[np.int64]]
Kind: TypeAlias = Literal["flat", "half", "ivf"]
"""How vectors are kept: float32; float16; float16 in lists, of which a search looks at some."""


class VectorStore(Protocol):
    """Unit vectors (n, dim), float32, each with a number, in an order. A place is a position in that order,
    and good until the next change. Thread rule: many reads together, or one change alone."""

    noise: float
    """No score of `nearest` is further than this from the exact one."""
    exact: bool
    """Whether `rows` are what was added, bit for bit, and not rounded."""

    @property
    def numbers(self) -> NDArray[np.int64]:
        """The numbers (n,), in order; not to be written to, and valid until the next change."""
        ...

    def add(self, numbers: NDArray[np.int64], vectors: Embeddings) -> None:
        """Put these after the others. No number may be there already."""
        ...

    def remove(self, gone: Mask) -> None:
        """Drop those places (n,); the others keep their order."""
        ...

    def nearest(self, queries: Embeddings, count: int, among: Mask | None = None) -> Neighbours:
        """The scores and the places (queries, count) of the largest inner products, best first.

        `among` (n,) says which places count; there must be `count` of them, and at least one.
        """
        ...

    def rows(self, places: NDArray[np.int64]) -> Embeddings:
        """The vectors at these places, as far as they are kept."""
        ...

    def write(self, path: Path) -> None:
        """All of it as a file, which every store of this kind can read."""
        ...

    def read(self, path: Path, *, mapped: bool = False) -> None:
        """What a file holds, into a store that is empty. RuntimeError or ValueError for another's file.

        `mapped`: leave it there, to be read through the page cache, and never change the store then. The
        file may be unlinked, but not written to."""
        ...


StoreMaker: TypeAlias = Callable[[int], VectorStore]
"""From the dimension to an empty store."""


def store_for(
    name: str, device: str = "cpu", *, half: bool = False, kind: Literal["flat", "half"] = "flat"
) -> StoreMaker:
    """The store of that name ("faiss", "torch") and kind on that device ("cpu", "cuda", or "auto").

    "auto" takes a GPU that the store can use. With `half`, FAISS's copy on a GPU has 16 bits a number, as it
    always has where the host's has.
    Raises IndexUnavailable for "cuda" where this machine, or the FAISS that is installed, cannot do it.
    """
    if name == "torch":
        return partial(TorchStore, device=_torch_device(device), half=kind == "half")
    if name != "faiss":
        raise IndexUnavailable(f"There is no vector store {name!r}: CLASP_VECTOR_STORE is faiss or torch.")
    host = FaissStore if kind == "flat" else HalfStore
    if device == "cpu":
        return host
    obstacle = _obstacle_to_gpu_faiss()
    if obstacle is None:
        if kind == "half":
            return partial(MirroredHalfStore, new_mirror=partial(_gpu_index, True), owner=_GPU_OWNER)
        return partial(MirroredStore, new_mirror=partial(_gpu_index, half), owner=_GPU_OWNER, half=half)
    if device == "cuda":
        raise IndexUnavailable(
            f"CLASP_VECTOR_STORE=faiss with CLASP_DEVICE=cuda, but {obstacle}"
            " CLASP_VECTOR_STORE=torch searches on the GPU without FAISS's GPU package;"
            " CLASP_DEVICE=auto keeps the index on the CPU and lets the model use a GPU."
        )
    if _overwritten():
        _log.warning("the vector index stays on the CPU: %s", obstacle)
    return host


def _obstacle_to_gpu_faiss() -> str | None:
    """Why FAISS cannot use a GPU here, as the end of a sentence; None where it can."""
    if not hasattr(faiss, "StandardGpuResources"):
        if _overwritten():
            return (
                "the files of faiss-cpu lie over those of faiss-gpu, in the one folder of both."
                " `pip install --force-reinstall --no-deps 'faiss-gpu>=1.15,<1.16'` puts that right."
            )
        return "the installed FAISS is for the CPU only; the extra `gpu` has the other."
    if faiss.get_num_gpus() == 0:
        return "FAISS sees no GPU."
    return None


def _overwritten() -> bool:
    """Whether faiss-gpu was installed and yet is not what `import faiss` gives."""
    try:
        importlib.metadata.distribution("faiss-gpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return not hasattr(faiss, "StandardGpuResources")


def noise_of(dim: int, *, half: bool = False) -> float:
    """How far a product of unit vectors, summed in float32 in any order, can be from the exact one.

    dim x 2**-24 (Higham, Accuracy and Stability of Numerical Algorithms, 3.1). In half precision each
    vector is rounded to 11 significant bits first, which changes the product by 2**-11 at most.
    """
    return 1.01 * (dim * 2.0**-24 + (2 * 2.0**-11 if half else 0))  # 1.01: unit length is to 1e-3


_BLOCK = 2048
"""Vectors multiplied at a time where that is not done where they lie: few enough to stay in a cache."""
_MERGED = 32
"""Blocks whose neighbours are kept apart; with more, the best of them are picked."""


class FaissStore:
    """FAISS's flat inner-product index, in memory."""

    exact = True

    def __init__(self, dim: int) -> None:
        self.noise = noise_of(dim)
        self._dim = dim
        self._faiss = faiss.IndexIDMap(self._flat(dim))
        self._paged = (0, 0)
        self._mapped = False
        self._changed()

    @staticmethod
    def _flat(dim: int) -> Any:  # noqa: ANN401 - FAISS has no types
        return faiss.IndexFlatIP(dim)

    def _changed(self) -> None:
        """Look where FAISS has everything now."""
        count = int(self._faiss.ntotal)
        flat = faiss.downcast_index(self._faiss.index)
        self._numbers: NDArray[np.int64] = np.empty(0, np.int64)
        self._vectors: NDArray[Any] = np.empty((0, self._dim), np.float32 if self.exact else "<f2")
        if count:
            self._numbers = faiss.rev_swig_ptr(self._faiss.id_map.data(), count)
            if self.exact:
                values = faiss.rev_swig_ptr(flat.get_xb(), count * self._dim)
            else:
                values = faiss.rev_swig_ptr(flat.codes.data(), 2 * count * self._dim).view("<f2")
            self._vectors = values.reshape(count, self._dim)
        if not self._mapped:
            self._paged = _in_huge_pages(self._vectors, self._paged)

    @property
    def numbers(self) -> NDArray[np.int64]:
        return self._numbers

    def add(self, numbers: NDArray[np.int64], vectors: Embeddings) -> None:
        self._faiss.add_with_ids(vectors, numbers)
        self._changed()

    def remove(self, gone: Mask) -> None:
        self._faiss.remove_ids(self.numbers[gone])
        self._changed()

    def nearest(self, queries: Embeddings, count: int, among: Mask | None = None) -> Neighbours:
        # for these FAISS would go through the vectors once for each query
        one_by_one = among is not None or not self.exact
        if one_by_one and queries.size >= _BATCH and count <= _BLOCK // 8:
            return self._nearest_by_blocks(queries, count, among)
        flat = self._faiss.index
        if among is None:
            scores, places = flat.search(queries, count)
        else:
            bits = np.packbits(among, bitorder="little")
            selector = faiss.IDSelectorBitmap(len(bits), faiss.swig_ptr(bits))
            scores, places = flat.search(queries, count, params=faiss.SearchParameters(sel=selector))
        return scores, places

    def _nearest_by_blocks(self, queries: Embeddings, count: int, among: Mask | None) -> Neighbours:
        """The same by matrix products of blocks of what counts, as float32."""
        places = None if among is None else np.flatnonzero(among)
        total = len(self._numbers) if places is None else len(places)
        queries = np.ascontiguousarray(queries)
        best: list[Neighbours] = []
        for start in range(0, total, _BLOCK):
            block = slice(start, start + _BLOCK)
            rows = _widened(self._vectors[block if places is None else places[block]])
            scores, found = faiss.knn(queries, rows, min(count, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)
            best.append((scores, found + start))
            if len(best) == _MERGED:
                best = [_best_of(best, count)]
        scores, found = _best_of(best, count)
        return scores, found if places is None else places[found]

    def rows(self, places: NDArray[np.int64]) -> Embeddings:
        return _widened(self._vectors[places])

    def write(self, path: Path) -> None:
        faiss.write_index(self._faiss, str(path))

    def read(self, path: Path, *, mapped: bool = False) -> None:
        loaded = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
        if not isinstance(loaded, faiss.IndexIDMap) or loaded.d != self._dim:
            raise ValueError(f"{path} holds an index of another kind")
        mine, theirs = (faiss.downcast_index(one.index) for one in (self._faiss, loaded))
        same = (type(mine), mine.metric_type) == (type(theirs), theirs.metric_type)
        if not same or mine.sa_code_size() != theirs.sa_code_size():
            raise ValueError(f"{path} holds vectors that are kept in another way")
        self._faiss, self._mapped, self._paged = loaded, mapped, (0, 0)
        self._changed()


class HalfStore(FaissStore):
    """The same with 16 bits a number: half the memory, and quicker. Its scores are off by up to 0.001."""

    exact = False

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.noise = noise_of(dim, half=True)

    @staticmethod
    def _flat(dim: int) -> Any:  # noqa: ANN401
        return faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)


def _widened(vectors: NDArray[Any]) -> Embeddings:
    """As float32. By torch, which is many times as fast as numpy."""
    if vectors.dtype == np.float32:
        return vectors
    import torch

    widened: Embeddings = torch.from_numpy(vectors).float().numpy()
    return widened


def _best_of(parts: "list[Neighbours]", count: int) -> Neighbours:
    """The largest of several stores' or blocks' neighbours, best first."""
    scores = np.concatenate([scores for scores, _ in parts], axis=1)
    places = np.concatenate([places for _, places in parts], axis=1)
    if scores.shape[1] > 4 * count:
        likely = np.argpartition(scores, -count, axis=1)[:, -count:]
        scores, places = np.take_along_axis(scores, likely, 1), np.take_along_axis(places, likely, 1)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(scores, best, 1), np.take_along_axis(places, best, 1)


_HUGE_PAGE = 1 << 21
_MADV_COLLAPSE = 25


def _in_huge_pages(vectors: NDArray[Any], before: tuple[int, int]) -> tuple[int, int]:
    """Have the kernel put them in pages of 2 MB, which it does only where asked: in pages of 4 KB a good
    part of a search's time goes on finding them. `before` is where they were, from and to, when this was last
    asked; returns where they are now.

    Takes some 0.3 s a gigabyte, once. Linux from 6.1 on; elsewhere nothing happens.
    """
    start = -(-vectors.ctypes.data // _HUGE_PAGE) * _HUGE_PAGE
    end = (vectors.ctypes.data + vectors.nbytes) // _HUGE_PAGE * _HUGE_PAGE
    todo = before[1] if before[0] == start and before[1] <= end else start
    if todo < end and sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(todo), ctypes.c_size_t(end - todo), _MADV_COLLAPSE
            )  # what it answers changes nothing
    return start, max(start, end)


class MappedStore:
    """A file's vectors where they lie, and in memory what changed since.

    Processes that map the same file have one copy of it, in the page cache, and start without reading it.
    What is removed of the file is left out of what is found; what is added lies beside it, in a flat store
    of as many bits. `write` makes one file of both.
    """

    def __init__(self, dim: int, *, new_store: StoreMaker) -> None:
        self._new_store = new_store
        self._dim = dim
        self._path: Path | None = None
        self.base = new_store(dim)
        self._added = FaissStore(dim) if self.base.exact else HalfStore(dim)
        self.noise, self.exact = self.base.noise, self.base.exact
        self._left = np.empty(0, np.int64)
        """The places in the file of what is not gone, ascending."""
        self._numbers = np.empty(0, np.int64)

    @property
    def changed(self) -> int:
        """How many vectors were added or removed since the file."""
        return len(self.base.numbers) - len(self._left) + len(self._added.numbers)

    @property
    def numbers(self) -> NDArray[np.int64]:
        return self._numbers

    def _renumber(self) -> None:
        self._numbers = np.concatenate([self.base.numbers[self._left], self._added.numbers])

    def add(self, numbers: NDArray[np.int64], vectors: Embeddings) -> None:
        self._added.add(numbers, vectors)
        self._renumber()

    def remove(self, gone: Mask) -> None:
        first = len(self._left)
        self._left = self._left[~gone[:first]]
        if gone[first:].any():
            self._added.remove(gone[first:])
        self._renumber()

    def nearest(self, queries: Embeddings, count: int, among: Mask | None = None) -> Neighbours:
        first = len(self._left)
        left = self._left if among is None else self._left[among[:first]]
        found = []
        if len(left):
            inside = None
            if len(left) < len(self.base.numbers):
                inside = np.zeros(len(self.base.numbers), np.bool_)
                inside[left] = True
            scores, places = self.base.nearest(queries, min(count, len(left)), inside)
            found.append((scores, np.searchsorted(self._left, places)))
        inside = None if among is None else among[first:]
        added = len(self._added.numbers) if inside is None else int(np.count_nonzero(inside))
        if added:
            scores, places = self._added.nearest(queries, min(count, added), inside)
            found.append((scores, places + first))
        return _best_of(found, count)

    def rows(self, places: NDArray[np.int64]) -> Embeddings:
        rows = np.empty((len(places), self._dim), np.float32)
        mapped = places < len(self._left)
        rows[mapped] = self.base.rows(self._left[places[mapped]])
        rows[~mapped] = self._added.rows(places[~mapped] - len(self._left))
        return rows

    def write(self, path: Path) -> None:
        """As ever; the whole is in memory meanwhile. FileNotFoundError where the file has been unlinked: then
        there is a newer one."""
        whole = self._new_store(self._dim)
        if self._path is not None:
            whole.read(self._path)
            gone = np.ones(len(whole.numbers), np.bool_)
            gone[self._left] = False
            if gone.any():
                whole.remove(gone)
        added = self._added.numbers
        if len(added):
            whole.add(added, self._added.rows(np.arange(len(added))))
        whole.write(path)

    def read(self, path: Path, *, mapped: bool = True) -> None:
        self.base.read(path, mapped=True)
        self._path = path
        self._left = np.arange(len(self.base.numbers))
        self._renumber()


class OwnerThread:
    """One thread that everything of a kind is done on, however many threads ask. It starts when needed.

    GPU FAISS shares scratch memory and a stream between all its calls, so no two may overlap.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        # its put may be called from a finaliser that interrupts another put, which a Queue's may not
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def call(self, function: Callable[..., T], *arguments: Any) -> T:  # noqa: ANN401 - any function's
        """What the function returns or raises there."""
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
        future: Future[T] = Future()
        self._tasks.put((future, function, arguments))
        return future.result()

    def later(self, function: Callable[[], object]) -> None:
        """Have it done when it is its turn."""
        self._tasks.put((Future(), function, ()))

    def _run(self) -> None:
        while True:
            future, function, arguments = self._tasks.get()
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)
            del future, function, arguments  # nothing of a device may be kept alive by waiting here


DEEPEST = 2048
"""How many neighbours GPU FAISS can select (GPU_MAX_SELECTION_K)."""


class MirroredStore(FaissStore):
    """FAISS on the CPU, with a copy of the vectors in a flat index on a device, which answers what it can.

    GPU FAISS's flat index can add, search and be emptied; it cannot remove, filter, or go deeper than
    DEEPEST. So what is removed stays in the mirror, marked, until it is a quarter of it; the mirror is
    searched somewhat deeper than asked, and what is gone or not among is left out of its answer. Where
    too little is left, the host's copy answers. The host's copy also gives the exact vectors, so that a
    mirror in half precision costs depth and no precision.
    """

    def __init__(
        self, dim: int, *, new_mirror: Callable[[int], Any], owner: OwnerThread, half: bool = False
    ) -> None:
        super().__init__(dim)
        self.noise = noise_of(dim, half=half or not self.exact)
        self._new_mirror = new_mirror
        self._owner = owner
        self._mirror: list[Any] = []
        """The device's index, once there is one. Only the owner touches it, up to its end."""
        self._places = np.empty(0, np.int64)
        """Of each row of the mirror, its place here now; -1 if it is gone. Ascending but for those."""
        self._gone = 0
        self._trusted = True
        """False from the start of an addition to its end; one that failed left who knows how much."""
        weakref.finalize(self, owner.later, self._mirror.clear).atexit = False

    def remove(self, gone: Mask) -> None:
        super().remove(gone)
        moved = np.where(gone, -1, np.cumsum(~gone) - 1)
        here = self._places >= 0
        self._places[here] = moved[self._places[here]]
        self._gone = int(np.count_nonzero(self._places < 0))

    def nearest(self, queries: Embeddings, count: int, among: Mask | None = None) -> Neighbours:
        scores = np.empty((len(queries), count), np.float32)
        places = np.empty((len(queries), count), np.int64)
        missing = self._owner.call(self._ask_mirror, queries, among, scores, places)
        if missing.any():
            scores[missing], places[missing] = super().nearest(queries[missing], count, among)
        return scores, places

    def _ask_mirror(
        self, queries: Embeddings, among: Mask | None, scores: NDArray[np.float32], places: NDArray[np.int64]
    ) -> Mask:
        """Fill in what the mirror knows; the queries (n,) for which it knows too little. On the owner."""
        mirror = self._up_to_date()
        total, count = len(self._places), scores.shape[1]
        wanted = len(self.numbers) if among is None else int(np.count_nonzero(among))
        # if those wanted lie anywhere in the order, this deep there are enough of them
        likely = count if wanted == total else 3 * count * total // (2 * wanted) + 16
        depth = min(likely, total)
        if depth > DEEPEST:
            return np.ones(len(queries), np.bool_)
        found_scores, found = mirror.search(queries, depth)
        found = self._places[found]
        kept = found >= 0
        if among is not None:
            kept &= among[found]
        best = np.argsort(~kept, axis=1, kind="stable")[:, :count]
        scores[:] = np.take_along_axis(found_scores, best, 1)
        places[:] = np.take_along_axis(found, best, 1)
        missing: Mask = np.count_nonzero(kept, axis=1) < count
        return missing

    def _up_to_date(self) -> Any:  # noqa: ANN401 - FAISS has no types
        """The mirror, with everything in it that is here. On the owner."""
        if not self._mirror:
            self._mirror.append(self._new_mirror(self._dim))
        mirror = self._mirror[0]
        if 4 * self._gone > len(self._places) or not self._trusted:
            mirror.reset()
            self._places = np.empty(0, np.int64)
            self._gone = 0
        mirrored, total = len(self._places) - self._gone, len(self.numbers)
        if mirrored < total:
            self._trusted = False
            for start in range(mirrored, total, _ROWS_AT_ONCE):
                mirror.add(self.rows(np.arange(start, min(start + _ROWS_AT_ONCE, total))))
            self._trusted = True
            self._places = np.concatenate([self._places, np.arange(mirrored, total)])
        return mirror


class MirroredHalfStore(MirroredStore, HalfStore):
    """The same where the host's copy has 16 bits a number, too."""


_GPU_OWNER = OwnerThread("faiss-gpu")


@cache
def _gpu_resources() -> Any:  # noqa: ANN401
    """Scratch memory and a stream, once for the process. On the owner, like all that uses them."""
    return faiss.StandardGpuResources()


def _gpu_index(half: bool, dim: int) -> Any:  # noqa: ANN401
    """An empty flat index on the first GPU. FAISS itself keeps float32 products out of TF32, and sums of half
    precision in float32 (its math mode is CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)."""
    config = faiss.GpuIndexFlatConfig()
    config.device = 0
    config.useFloat16 = half
    return faiss.GpuIndexFlatIP(_gpu_resources(), dim, config)


_SCORES_AT_ONCE = 1 << 28
"""Products held in memory at a time (1 GiB)."""
_ROWS_AT_ONCE = 1 << 16
"""Vectors moved at a time when others are removed."""


class TorchStore:
    """One matrix on a torch device: a product, then the largest. With `half` it is float16.

    Products are float32's either way, also on a GPU, as long as nobody in the process turns on TF32, which
    torch leaves off. A float16 matrix is widened by parts: torch's own half products are not accurate enough.
    """

    def __init__(self, dim: int, *, device: str = "cpu", half: bool = False) -> None:
        import torch

        self.noise = noise_of(dim, half=half)
        self.exact = not half
        self._torch = torch
        self._dim = dim
        self._numbers = np.empty(0, np.int64)
        self._new_host: StoreMaker = HalfStore if half else FaissStore
        self._matrix = torch.empty((0, dim), dtype=torch.float16 if half else torch.float32, device=device)
        """The first len(self._numbers) rows are in use."""

    @property
    def numbers(self) -> NDArray[np.int64]:
        return self._numbers

    def _vectors(self) -> "torch.Tensor":
        return self._matrix[: len(self._numbers)]

    def add(self, numbers: NDArray[np.int64], vectors: Embeddings) -> None:
        before, after = len(self._numbers), len(self._numbers) + len(numbers)
        if after > len(self._matrix):
            larger = self._matrix.new_empty((max(after, len(self._matrix) * 3 // 2), self._dim))
            larger[:before] = self._vectors()
            self._matrix = larger
        self._matrix[before:after] = self._torch.tensor(vectors)
        self._numbers = np.concatenate([self._numbers, numbers])

    def remove(self, gone: Mask) -> None:
        kept = np.flatnonzero(~gone)
        first = int(np.argmax(gone)) if gone.any() else len(gone)
        # forwards and in parts: each part is copied out before it is written to places already read
        for start in range(first, len(kept), _ROWS_AT_ONCE):
            part = self._tensor(kept[start : start + _ROWS_AT_ONCE])
            self._matrix[start : start + len(part)] = self._matrix[part]
        self._numbers = self._numbers[kept]

    def nearest(self, queries: Embeddings, count: int, among: Mask | None = None) -> Neighbours:
        vectors = self._vectors()
        hidden = None if among is None else self._tensor(~among)
        scores, places = [], []
        for part in self._torch.split(self._tensor(queries), max(1, _SCORES_AT_ONCE // len(vectors))):
            products = self._products(part, vectors)
            if hidden is not None:
                products.masked_fill_(hidden, -self._torch.inf)
            best = self._torch.topk(products, count, dim=1)
            scores.append(best.values.cpu().numpy())
            places.append(best.indices.cpu().numpy())
        return np.concatenate(scores), np.concatenate(places)

    def _products(self, queries: "torch.Tensor", vectors: "torch.Tensor") -> "torch.Tensor":
        if self.exact:
            return queries @ vectors.T
        parts = self._torch.split(vectors, _ROWS_AT_ONCE)
        return self._torch.cat([queries @ part.float().T for part in parts], dim=1)

    def rows(self, places: NDArray[np.int64]) -> Embeddings:
        chosen: Embeddings = self._matrix[self._tensor(places)].float().cpu().numpy()
        return chosen

    def _tensor(self, values: NDArray[Any]) -> "torch.Tensor":
        return self._torch.tensor(values, device=self._matrix.device)

    def write(self, path: Path) -> None:
        host = self._new_host(self._dim)
        host.add(self._numbers, self._vectors().float().cpu().numpy())
        host.write(path)

    def read(self, path: Path, *, mapped: bool = False) -> None:
        host = self._new_host(self._dim)
        host.read(path)
        everything = np.arange(len(host.numbers))
        self.add(host.numbers, host.rows(everything))


def _torch_device(device: str) -> str:
    import torch

    if device == "cpu" or torch.cuda.is_available():
        return "cpu" if device == "cpu" else "cuda"
    if device == "cuda":
        raise IndexUnavailable(
            "CLASP_VECTOR_STORE=torch with CLASP_DEVICE=cuda, but torch sees no CUDA device."
            " CLASP_DEVICE=auto takes the CPU where there is none."
        )
    return "cpu"
