"""Which inputs go through a network together."""

from collections.abc import Iterator, Sequence


def batches(lengths: Sequence[int], budget: int, *, equal: bool = False) -> Iterator[list[int]]:
    """Places of inputs, in batches of similar length, longest first; every place once.

    A batch padded to its longest member is at most `budget` long in all, unless that member alone is
    longer; its shortest member is at least half as long as its longest, so that less than half of the
    work is padding. `equal` allows one length only: no padding at all.
    """
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if batch:
            longest = lengths[batch[0]]
            least = longest if equal else longest / 2
            if lengths[place] < least or longest * (len(batch) + 1) > budget:
                yield batch
                batch = []
        batch.append(place)
    if batch:
        yield batch
