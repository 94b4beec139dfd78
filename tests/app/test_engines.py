"""All engines that search vectors give the same answers: a small run of `python -m tests.engines_agree`."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests import engines_agree
from tests.engines_agree import ENGINES, Agreement, Engine, EngineAbsent, Pool, compare, complaints, measure


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pool, Path]:
    made, folder = Pool(vectors=6000, dim=32, questions=20), tmp_path_factory.mktemp("engines")
    made.fill(folder)
    return made, folder


SLOW = ("torch", "milvus lite", "milvus", "milvus ivf")
"""What takes seconds to import, or to start a server of; their own tests are elsewhere."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in ENGINES]
)
def test_an_engine_agrees_with_arithmetic(name: str, pool: tuple[Pool, Path]) -> None:
    """Which engine searches is a matter of size and machines; what is found must not depend on it."""
    try:
        result = measure(name, ENGINES[name], pool[1], pool[0])
    except EngineAbsent as absent:
        pytest.skip(str(absent))
    if ENGINES[name].exact:
        assert result["complaints"] == []
    else:  # so few questions tell a share of 0.95 to within 0.04 (two standard errors, as seen)
        assert all(one["recall"] >= engines_agree.FLOOR - 0.04 for one in result["agreement"].values())
    assert len(result["agreement"]) == len(engines_agree.kinds())


def test_a_wrong_answer_is_noticed() -> None:
    """A comparison that is always content proves nothing."""
    right = [[(f"r{n}", 0, 0.9 - n / 100) for n in range(12)]]
    best = right[0][:10]
    good = compare(right, [best], [0.001])
    assert (good.recall, good.equal, good.off) == (1, 1, 0)
    swapped = compare(right, [[best[1], best[0], *best[2:]]], [0.001])
    short = compare(right, [best[:-1]], [0.001])
    other = compare(right, [[*best[:-1], ("else", 0, best[-1][2])]], [0.001])
    scaled = compare(right, [[(name, place, score + 1e-3) for name, place, score in best]], [0.001])
    assert (swapped.equal, short.equal, other.equal) == (0, 0, 0)
    assert (swapped.recall, short.recall, other.recall) == (1, 0.9, 0.9)
    assert scaled.off > engines_agree.WITHIN
    exact, approximate = Engine({}), Engine({}, exact=False)

    def told(engine: Engine, agreement: Agreement) -> bool:
        return bool(complaints("an engine", engine, {"plain": agreement}))

    assert not told(exact, good)
    assert all(told(exact, wrong) for wrong in (swapped, short, other, scaled))
    assert not told(approximate, swapped)
    assert told(approximate, replace(good, recall=0.94))
