"""Stores of numbered vectors: where the vector index keeps them, and what multiplies them with a query.

`store_for` names the three: FAISS on the CPU, FAISS with a copy on a GPU, and plain torch on either. All
are exact, find the same and read each other's files. Locks, recordings and snapshots are the index's.
"""

import importlib.metadata
import logging
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

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
faiss.cvar.distance_compute_blas_threshold = 3072

Mask: TypeAlias = NDArray[np.bool_]
Neighbours: TypeAlias = tuple[NDArray[np.float32], NDArray[np.int64]]


class VectorStore(Protocol):
    """Unit vectors (n, dim), float32, each with a number, in an order. A place is a position in that order,
    and good until the next change. Thread rule: many reads together, or one change alone."""

    noise: float
    """No score of `nearest` is further than this from the exact one."""

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
        """The vectors at these places, bit for bit as they were added."""
        ...

    def write(self, path: Path) -> None:
        """All of it as a file, which every store can read."""
        ...

    def read(self, path: Path) -> None:
        """What a file holds, into a store that is empty. RuntimeError or ValueError for another's file."""
        ...


StoreMaker: TypeAlias = Callable[[int], VectorStore]
"""From the dimension to an empty store."""


def store_for(name: str, device: str = "cpu", *, half: bool = False) -> StoreMaker:
    """The store of that name ("faiss", "torch") on that device ("cpu", "cuda", or "auto").

    "auto" takes a GPU that the store can use. With `half`, FAISS's copy on a GPU has 16 bits a number.
    Raises IndexUnavailable for "cuda" where this machine, or the FAISS that is installed, cannot do it.
    """
    if name == "torch":
        return partial(TorchStore, device=_torch_device(device))
    if name != "faiss":
        raise IndexUnavailable(f"There is no vector store {name!r}: CLASP_VECTOR_STORE is faiss or torch.")
    if device == "cpu":
        return FaissStore
    obstacle = _obstacle_to_gpu_faiss()
    if obstacle is None:
        return partial(MirroredStore, new_mirror=partial(_gpu_index, half), owner=_GPU_OWNER, half=half)
    if device == "cuda":
        raise IndexUnavailable(
            f"CLASP_VECTOR_STORE=faiss with CLASP_DEVICE=cuda, but {obstacle}"
            " CLASP_VECTOR_STORE=torch searches on the GPU without FAISS's GPU package;"
            " CLASP_DEVICE=auto keeps the index on the CPU and lets the model use a GPU."
        )
    if _overwritten():
        _log.warning("the vector index stays on the CPU: %s", obstacle)
    return FaissStore


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


def _noise(dim: int, *, half: bool = False) -> float:
    """How far a product of unit vectors, summed in float32 in any order, can be from the exact one.

    dim x 2**-24 (Higham, Accuracy and Stability of Numerical Algorithms, 3.1). In half precision each
    vector is rounded to 11 significant bits first, which changes the product by 2**-11 at most.
    """
    return 1.01 * (dim * 2.0**-24 + (2 * 2.0**-11 if half else 0))  # 1.01: unit length is to 1e-3


class FaissStore:
    """FAISS's flat inner-product index, in memory."""

    def __init__(self, dim: int) -> None:
        self.noise = _noise(dim)
        self._dim = dim
        self._faiss = faiss.IndexIDMap2(faiss.IndexFlatIP(dim))

    @property
    def numbers(self) -> NDArray[np.int64]:
        count = int(self._faiss.ntotal)
        if not count:
            return np.empty(0, np.int64)
        view: NDArray[np.int64] = faiss.rev_swig_ptr(self._faiss.id_map.data(), count)
        return view

    def _vectors(self) -> Embeddings:
        """All of them, not copied; valid until the next change."""
        count = int(self._faiss.ntotal)
        if not count:
            return np.empty((0, self._dim), np.float32)
        flat = faiss.downcast_index(self._faiss.index)
        view: Embeddings = faiss.rev_swig_ptr(flat.get_xb(), count * self._dim).reshape(count, self._dim)
        return view

    def add(self, numbers: NDArray[np.int64], vectors: Embeddings) -> None:
        self._faiss.add_with_ids(vectors, numbers)

    def remove(self, gone: Mask) -> None:
        self._faiss.remove_ids(self.numbers[gone])

    def nearest(self, queries: Embeddings, count: int, among: Mask | None = None) -> Neighbours:
        flat = self._faiss.index
        if among is None:
            scores, places = flat.search(queries, count)
        else:
            bits = np.packbits(among, bitorder="little")
            selector = faiss.IDSelectorBitmap(len(bits), faiss.swig_ptr(bits))
            scores, places = flat.search(queries, count, params=faiss.SearchParameters(sel=selector))
        return scores, places

    def rows(self, places: NDArray[np.int64]) -> Embeddings:
        return self._vectors()[places]

    def write(self, path: Path) -> None:
        faiss.write_index(self._faiss, str(path))

    def read(self, path: Path) -> None:
        loaded = faiss.read_index(str(path))
        if not isinstance(loaded, faiss.IndexIDMap2) or loaded.d != self._dim:
            raise ValueError(f"{path} holds an index of another kind")
        self._faiss = loaded


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
        self.noise = _noise(dim, half=half)
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
        vectors = self._vectors()
        mirrored = len(self._places) - self._gone
        if mirrored < len(vectors):
            self._trusted = False
            mirror.add(vectors[mirrored:])
            self._trusted = True
            self._places = np.concatenate([self._places, np.arange(mirrored, len(vectors))])
        return mirror


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
    """One float32 matrix on a torch device: a product, then the largest.

    Full float32 on a GPU, too, as long as nobody in the process turns on TF32, which torch leaves off.
    """

    def __init__(self, dim: int, *, device: str = "cpu") -> None:
        import torch

        self.noise = _noise(dim)
        self._torch = torch
        self._dim = dim
        self._numbers = np.empty(0, np.int64)
        self._matrix = torch.empty((0, dim), dtype=torch.float32, device=device)
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
            products = part @ vectors.T
            if hidden is not None:
                products.masked_fill_(hidden, -self._torch.inf)
            best = self._torch.topk(products, count, dim=1)
            scores.append(best.values.cpu().numpy())
            places.append(best.indices.cpu().numpy())
        return np.concatenate(scores), np.concatenate(places)

    def rows(self, places: NDArray[np.int64]) -> Embeddings:
        chosen: Embeddings = self._matrix[self._tensor(places)].cpu().numpy()
        return chosen

    def _tensor(self, values: NDArray[Any]) -> "torch.Tensor":
        return self._torch.tensor(values, device=self._matrix.device)

    def write(self, path: Path) -> None:
        host = FaissStore(self._dim)
        host.add(self._numbers, self._vectors().cpu().numpy())
        host.write(path)

    def read(self, path: Path) -> None:
        host = FaissStore(self._dim)
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
