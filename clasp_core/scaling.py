"""Which kind of index a library of a size has, and how another is made beside the one in use."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

from clasp_core.errors import IndexUnavailable
from clasp_core.index import Index, Reader, VectorIndex, read_vectors
from clasp_core.ivf import SAMPLE_PER_LIST, IvfStore, Wanted, lists_for, train
from clasp_core.vectors import (
    FaissStore,
    HalfStore,
    Kind,
    MappedStore,
    StoreMaker,
    VectorStore,
    store_for,
)

Choice: TypeAlias = Literal["auto"] | Kind
Follow: TypeAlias = Callable[[VectorIndex, Wanted], None]
"""Brings an index up to everything the catalogue has committed. Raises GivenUp."""

_KINDS: tuple[Kind, ...] = ("flat", "half", "ivf")


@dataclass(frozen=True, slots=True)
class Scaling:
    """Up to `flat_up_to` vectors an index is flat, up to `half_up_to` half, then ivf; or what `kind` says.

    It goes back only below half of a bound, so that no library is rebuilt again and again at one of them.
    """

    kind: Choice = "auto"
    flat_up_to: int = 200_000
    half_up_to: int = 400_000
    floor: float = 0.95
    """Recall at ten that ivf must have; see `VectorIndex.calibrate`."""
    mapped: bool = False
    """Whether what is loaded is left in its file (`MappedStore`)."""
    flat: StoreMaker = FaissStore
    half: StoreMaker = HalfStore
    ivf: Callable[..., VectorStore] = IvfStore
    """Which takes `centres`."""

    @property
    def makers(self) -> Mapping[Kind, StoreMaker]:
        return {"flat": self.flat, "half": self.half, "ivf": self.ivf}

    @property
    def loaders(self) -> Mapping[Kind, StoreMaker]:
        """The stores that snapshots are read into."""
        if not self.mapped:
            return self.makers
        return {kind: partial(MappedStore, new_store=maker) for kind, maker in self.makers.items()}

    def wanted(self, count: int, now: Kind) -> Kind:
        """The kind for so many vectors, where the index is of the kind `now`."""
        if self.kind != "auto":
            return self.kind
        ranks = [(size > self.flat_up_to) + (size > self.half_up_to) for size in (count, 2 * count)]
        return _KINDS[min(max(_KINDS.index(now), ranks[0]), ranks[1])]

    def wants_another(self, index: VectorIndex) -> bool:
        """Whether the index should be made anew: as another kind, or because it has grown or shrunk so much
        (about four times) that its lists are too large or too many."""
        kind = self.wanted(len(index), index.kind)
        if kind != "ivf" or index.kind != "ivf":
            return kind != index.kind
        return not index.lists / 2 < _lists(len(index)) < 2 * index.lists

    def wants_measuring(self, index: Index) -> bool:
        """Whether the recall was never measured, or with a quarter more or less vectors."""
        if index.kind != "ivf":
            return False
        count = 0 if index.recall is None else index.recall.count
        return not 0.75 * count <= len(index) <= 1.25 * count


BY_SIZE = Scaling()
"""FAISS on the CPU, with the default bounds."""


def scaling_for(
    store: str,
    device: str,
    *,
    kind: Choice = "auto",
    half_mirror: bool = False,
    floor: float = 0.95,
    flat_up_to: int = 200_000,
    half_up_to: int = 400_000,
    mapped: bool = False,
) -> Scaling:
    """As the settings want it, with `store` and `device` as in `store_for`. Raises IndexUnavailable.

    torch has no lists: by itself it stays half, whatever the size.
    """
    if mapped and (store != "faiss" or device == "cuda"):
        raise IndexUnavailable(
            "CLASP_INDEX_MMAP needs CLASP_VECTOR_STORE=faiss and CLASP_DEVICE=cpu or auto."
        )
    if kind == "ivf" and store == "torch":
        raise IndexUnavailable("CLASP_VECTOR_INDEX=ivf needs CLASP_VECTOR_STORE=faiss.")
    where = "cpu" if mapped else device
    return Scaling(
        kind=kind,
        flat_up_to=flat_up_to,
        half_up_to=max(flat_up_to, half_up_to) if store == "faiss" else 1 << 62,
        floor=floor,
        mapped=mapped,
        flat=store_for(store, where, half=half_mirror),
        half=store_for(store, where, kind="half"),
        ivf=partial(IvfStore, exhaustive_up_to=flat_up_to),
    )


def made_aside(
    index: VectorIndex, scaling: Scaling, read: Reader, follow: Follow, given_up: Wanted
) -> VectorIndex:
    """Another index, of the kind that this one's size wants, from the catalogue; this one answers meanwhile.

    Takes the memory of the new one, a sample of `SAMPLE_PER_LIST` vectors a list while it trains, and no
    more than one block of changes at a time. Raises GivenUp soon after that is so.
    """
    kind = scaling.wanted(len(index), index.kind)
    maker = scaling.makers[kind]
    if kind == "ivf":
        lists = _lists(len(index))
        sample = read_vectors(read, index.drawn(SAMPLE_PER_LIST * lists), index.dim)
        centres = train(sample, lists, given_up) if lists <= len(sample) else None
        maker = partial(scaling.ivf, centres=centres)
    another = VectorIndex(index.dim, index.model, maker, kind=kind, read=read, flat=scaling.flat)
    follow(another, given_up)
    another.calibrate(scaling.floor, given_up)
    follow(another, given_up)
    return another


def _lists(count: int) -> int:
    return max(1, min(lists_for(count), count // SAMPLE_PER_LIST))
