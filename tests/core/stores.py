"""Every vector store there is, for the tests that all of them must pass."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from clasp_core.errors import IndexUnavailable
from clasp_core.ivf import IvfStore
from clasp_core.vectors import (
    DEEPEST,
    FaissStore,
    HalfStore,
    Kind,
    MappedStore,
    MirroredHalfStore,
    MirroredStore,
    OwnerThread,
    StoreMaker,
    TorchStore,
    store_for,
)


class FlatIndexWithAGpusManners:
    """A flat index of FAISS in main memory that can do no more than one on a GPU, and asserts its rules:
    one thread from its first moment on, one call at a time, and no search deeper than DEEPEST."""

    def __init__(self, dim: int, *, half: bool = False) -> None:
        self._flat: Any = (
            faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
            if half
            else faiss.IndexFlatIP(dim)
        )
        self._owner = threading.get_ident()
        self._busy = threading.Lock()
        self.searches = 0
        self.added = 0

    def add(self, vectors: NDArray[np.float32]) -> None:
        self.added += len(vectors)
        self._alone(lambda: self._flat.add(vectors))

    def reset(self) -> None:
        self._alone(self._flat.reset)

    def search(self, queries: NDArray[np.float32], count: int) -> Any:
        assert 1 <= count <= DEEPEST, "GPU FAISS refuses this"
        self.searches += len(queries)
        return self._alone(lambda: self._flat.search(queries, count))

    def _alone(self, call: Callable[[], Any]) -> Any:
        assert threading.get_ident() == self._owner, "called on another thread"
        assert self._busy.acquire(blocking=False), "two calls at once"
        try:
            return call()
        finally:
            self._busy.release()


_OWNER = OwnerThread("a test's device")


def mirrored(*, half: bool = False) -> StoreMaker:
    """The store for GPU FAISS, with an index in main memory in the GPU's stead."""
    new_mirror = partial(FlatIndexWithAGpusManners, half=half)
    return partial(MirroredStore, new_mirror=new_mirror, owner=_OWNER, half=half)


def seven_lists(dim: int) -> IvfStore:
    """All of which are looked at, as long as nobody says that fewer are enough."""
    centres = np.random.default_rng(7).normal(size=(7, dim))
    return IvfStore(dim, centres=(centres / np.linalg.norm(centres, axis=1, keepdims=True)).astype("f4"))


IN_MAIN_MEMORY: dict[str, StoreMaker] = {
    "faiss": FaissStore,
    "torch": TorchStore,
    "mirrored": mirrored(),
    "mirrored-half": mirrored(half=True),
    "mapped": partial(MappedStore, new_store=FaissStore),
}
ROUNDED: dict[str, StoreMaker] = {
    "half": HalfStore,
    "torch-half": partial(TorchStore, half=True),
    "mirrored-half-of-half": partial(
        MirroredHalfStore, new_mirror=partial(FlatIndexWithAGpusManners, half=True), owner=_OWNER
    ),
    "ivf": seven_lists,
    "mapped-half": partial(MappedStore, new_store=HalfStore),
    "mapped-ivf": partial(MappedStore, new_store=seven_lists),
}
"""Those that keep 16 bits a number, and are told the others."""
ON_A_GPU: dict[str, Callable[[], StoreMaker]] = {
    "torch-cuda": partial(store_for, "torch", "cuda"),
    "faiss-cuda": partial(store_for, "faiss", "cuda"),
    "faiss-cuda-half": partial(store_for, "faiss", "cuda", half=True),
    "faiss-cuda-half-of-half": partial(store_for, "faiss", "cuda", kind="half"),
    "torch-cuda-half": partial(store_for, "torch", "cuda", kind="half"),
}
_LIKE_OTHERS = ("torch-half", "mirrored-half-of-half", "mapped-half")
"""Made of parts that others test as well: not in every run."""
EVERY_STORE = [
    *IN_MAIN_MEMORY,
    *(pytest.param(name, marks=[pytest.mark.slow] * (name in _LIKE_OTHERS)) for name in ROUNDED),
    *(pytest.param(name, marks=pytest.mark.gpu) for name in ON_A_GPU),
]


def kind_of(name: str) -> Kind:
    """What that store's snapshots are called; those of one kind read each other's."""
    if "ivf" in name:
        return "ivf"
    return "half" if name in ROUNDED or name in ("faiss-cuda-half-of-half", "torch-cuda-half") else "flat"


def store_named(name: str) -> StoreMaker:
    """That store; skips the test, and says why, where this machine has no GPU for it."""
    if name in IN_MAIN_MEMORY | ROUNDED:
        return (IN_MAIN_MEMORY | ROUNDED)[name]
    try:
        return ON_A_GPU[name]()
    except IndexUnavailable as error:
        pytest.skip(error.detail)
