"""Retrieval figures over a similarity matrix: rows are queries, columns are candidates.

Pure arithmetic; who the queries are, and which candidates are right, is `clasp_core.evaluation`'s
matter. Matrices are read in blocks of rows, so that 12,000 x 12,000 costs little beyond itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Scores: TypeAlias = NDArray[np.floating[Any]]
"""(queries, candidates), higher is better; no NaN."""

Figures: TypeAlias = dict[str, Any]
"""Ready for JSON: `n` queries, `pool` candidates each, the means of `MEANS`, `threshold`, and `ci95`: for
each of the means, its 95 % interval [low, high]."""

MEANS = ("hits@1", "hits@5", "hits@10", "mrr", "mean_rank", "macro_f1", "golden_accuracy")

_BLOCK_CELLS = 1 << 22
"""Numbers looked at together."""


def known_item_ranks(scores: Scores, relevant: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The rank of each query's best right candidate, (queries,), from 1.

    1 + the number of wrong candidates scoring strictly higher + half of those scoring the same: the
    expected rank if ties were broken at random, so that a constant score cannot look good. Other right
    candidates neither help nor hurt.

    `relevant` has the shape of `scores`. Raises ValueError for other shapes, an empty matrix, NaN, and
    a query without a right candidate.
    """
    _check(scores)
    if relevant.shape != scores.shape:
        raise ValueError(f"scores are {scores.shape} but relevant is {relevant.shape}")
    if not relevant.any(axis=1).all():
        raise ValueError("every query needs at least one right candidate")
    ranks = np.empty(len(scores))
    for rows in _blocks(*scores.shape):
        block, right = scores[rows], relevant[rows]
        best = np.max(block, axis=1, where=right, initial=-np.inf, keepdims=True)
        higher = ((block > best) & ~right).sum(1)
        same = ((block == best) & ~right).sum(1)
        ranks[rows] = 1 + higher + same / 2
    return ranks


@dataclass(frozen=True, slots=True)
class Measured:
    """What is known of each query by itself; all figures, and comparisons of them, come from it."""

    per_query: NDArray[np.float64]
    """(queries, 9): came first; rank <= 5; rank <= 10; 1 / rank; rank; and of its pairs with all candidates
    the true positives, the wrongly predicted, the true negatives and the positives."""
    pool: int
    threshold: float
    rows: NDArray[np.int64] | None = None
    """(queries,): which rows of the matrix they are, where some were left out; None: all of them."""

    def figures(self, *, resamples: int = 1000, seed: int = 0) -> Figures:
        """Means over the queries, with percentile bootstrap intervals that are the same for the same seed.

        Raises ValueError for fewer than one resample.
        """
        return {
            "n": len(self.per_query),
            "pool": self.pool,
            **_named(_means(self.per_query.mean(0))),
            "threshold": self.threshold,
            "ci95": _intervals(self._resampled(resamples, seed)),
        }

    def difference_from(
        self, other: "Measured", *, paired: bool = True, resamples: int = 1000, seed: int = 0
    ) -> dict[str, dict[str, Any]]:
        """For each of `MEANS`, how much higher it is here than there: `difference`, `ci95` and `p`.

        Both are about the same queries in the same order, and are resampled together (the paired
        bootstrap of Koehn 2004), so what is hard for both tells nothing; a query that one side left out is
        left out on both. Not `paired`, they are about any queries, each resampled by itself. `p` is
        two-sided: how often a difference of zero or beyond comes up.

        Raises ValueError for another number of queries in a pair, and for fewer than one resample.
        """
        here, there = self._shared_with(other) if paired else (self, other)
        drawn = here._resampled(resamples, seed)
        differences = drawn - there._resampled(resamples, seed if paired else seed + 1)
        values = _named(_means(here.per_query.mean(0)) - _means(there.per_query.mean(0)))
        beyond = np.minimum((differences <= 0).sum(0), (differences >= 0).sum(0))
        chances = _named(np.minimum(1.0, 2 * (beyond + 1) / (resamples + 1)))
        intervals = _intervals(differences)
        return {
            name: {"difference": values[name], "ci95": intervals[name], "p": chances[name]} for name in MEANS
        }

    def _shared_with(self, other: "Measured") -> tuple["Measured", "Measured"]:
        """Both, with the queries alone that neither left out."""
        if self.rows is None and other.rows is None:
            if len(other.per_query) != len(self.per_query):
                raise ValueError("a paired comparison needs the same queries on both sides")
            return self, other
        mine, theirs = (
            np.arange(len(side.per_query)) if side.rows is None else side.rows for side in (self, other)
        )
        rows, here, there = np.intersect1d(mine, theirs, return_indices=True)
        if not len(rows):
            raise ValueError("a paired comparison needs queries that neither side left out")
        return (
            replace(self, per_query=self.per_query[here], rows=rows),
            replace(other, per_query=other.per_query[there], rows=rows),
        )

    def _resampled(self, resamples: int, seed: int) -> NDArray[np.float64]:
        """(resamples, figures): the means of queries drawn with replacement."""
        if resamples < 1:
            raise ValueError("an interval needs at least one resample")
        n = len(self.per_query)
        random = np.random.default_rng(seed)
        return np.concatenate(
            [
                _means(self.per_query[random.integers(n, size=(stop - start, n))].mean(1))
                for start, stop in _bounds(resamples, self.per_query.size)
            ]
        )


def macro_average(groups: Sequence[Measured], *, resamples: int = 1000, seed: int = 0) -> Figures:
    """The mean over groups of each group's own figures: every language counts the same, however many clips.

    `groups` is how many there are, `n` their queries together. Intervals resample the queries inside each
    group: they are about these groups, not about others that might have been asked. Raises ValueError
    where there is no group, and for fewer than one resample.
    """
    if not groups:
        raise ValueError("a mean over groups needs at least one")
    values = np.mean([_means(group.per_query.mean(0)) for group in groups], axis=0)
    drawn = [group._resampled(resamples, seed + place) for place, group in enumerate(groups)]
    return {
        "groups": len(groups),
        "n": sum(len(group.per_query) for group in groups),
        **_named(values),
        "threshold": groups[0].threshold,
        "ci95": _intervals(np.mean(drawn, axis=0)),
    }


def figures(
    scores: Scores,
    relevant: NDArray[np.bool_],
    *,
    threshold: float = 0.5,
    resamples: int = 1000,
    seed: int = 0,
) -> Figures:
    """The figures of `known_item_ranks`: see `measure` and `Measured.figures`, whose errors it raises."""
    return measure(scores, relevant, threshold=threshold).figures(resamples=resamples, seed=seed)


def measure(scores: Scores, relevant: NDArray[np.bool_], *, threshold: float = 0.5) -> Measured:
    """Queries by `known_item_ranks`: hits@k is the share of ranks <= k, mrr the mean of 1 / rank.

    macro_f1 (CLASP, section 4) takes every (query, candidate) pair as a sample, positive where
    relevant, predicted positive where score >= threshold: the mean of both classes' F1, pooled over all
    pairs. golden_accuracy is the share of the positive pairs that are predicted (notebook
    `Training-Evaluation`, cells 36-38).

    Raises ValueError as `known_item_ranks` does.
    """
    ranks = known_item_ranks(scores, relevant)
    pairs = np.empty((3, len(scores)))
    for rows in _blocks(*scores.shape):
        predicted, right = scores[rows] >= threshold, relevant[rows]
        pairs[:, rows] = (predicted & right).sum(1), predicted.sum(1), right.sum(1)
    return _measured(ranks, ranks <= 1, pairs, scores.shape[1], threshold)


def paper_figures(
    scores: Scores,
    *,
    candidates: int | None = None,
    skip_tied_duplicates: bool = False,
    threshold: float = 0.5,
    resamples: int = 1000,
    seed: int = 0,
) -> Figures:
    """The figures by the paper's rules: see `paper_measure` and `Measured.figures`, whose errors it raises.

    The same seed draws the candidates and the resamples.
    """
    measured = paper_measure(
        scores,
        candidates=candidates,
        skip_tied_duplicates=skip_tied_duplicates,
        threshold=threshold,
        seed=seed,
    )
    return measured.figures(resamples=resamples, seed=seed)


def paper_measure(
    scores: Scores,
    *,
    candidates: int | None = None,
    skip_tied_duplicates: bool = False,
    threshold: float = 0.5,
    seed: int = 0,
) -> Measured:
    """Queries by the rules of CLASP's own notebooks, to stand beside the paper's tables.

    Row i's only right answer is column i, repeated sentences notwithstanding. hits@1 asks whether the
    first maximum is the right one; the rank behind all other figures is 1 + the number scoring strictly
    higher, which favours the right one in ties. So hits@1 may be below the share of ranks of 1.

    candidates: None ranks all columns (the paper's stages 3 and 4). N ranks the right one, put last,
        among N - 1 others drawn anew for each row (stages 1 and 2, where N is 5, 10 or 100, and
        `threshold` mostly 0.4).
    skip_tied_duplicates: leave out, from n and from every figure, the rows where another column came
        first with exactly the right one's score (stage 3: rows speech, columns text; at stage 4 rows
        are text and nothing is skipped).

    Raises ValueError for a matrix that is not square, is empty or has NaN, for a number of candidates
    outside 1 to its size.
    """
    _check(scores)
    n = len(scores)
    if scores.shape != (n, n):
        raise ValueError(f"the paper's rules need as many queries as candidates, not {scores.shape}")
    if candidates is not None and not 1 <= candidates <= n:
        raise ValueError(f"cannot draw {candidates} candidates from {n}")
    random = np.random.default_rng(seed)
    pool = n if candidates is None else candidates
    right = np.diagonal(scores)
    ranks, pairs = np.empty(n), np.empty((3, n))
    first, skipped = np.empty(n, np.bool_), np.zeros(n, np.bool_)
    for rows in _blocks(n, pool):
        gold = right[rows, None]
        places = np.arange(n)[rows]
        if candidates is None:
            block = scores[rows]
        else:
            others = [random.choice(n - 1, pool - 1, replace=False, shuffle=False) for _ in places]
            drawn = np.array(others, np.int64).reshape(len(places), pool - 1)
            drawn += drawn >= places[:, None]  # the row's own column is not among the others
            block = np.hstack((np.take_along_axis(scores[rows], drawn, axis=1), gold))
            places = np.full(len(places), pool - 1)
        winner = block.argmax(1)
        first[rows] = winner == places
        ranks[rows] = 1 + (block > gold).sum(1)
        pairs[:, rows] = right[rows] >= threshold, (block >= threshold).sum(1), np.ones(len(block))
        if skip_tied_duplicates:
            skipped[rows] = ~first[rows] & (ranks[rows] == 1)
    kept = ~skipped
    if not kept.any():
        raise ValueError("every row is skipped: no right candidate came first alone")
    measured = _measured(ranks[kept], first[kept], pairs[:, kept], pool, threshold)
    return replace(measured, rows=np.flatnonzero(kept)) if skipped.any() else measured


def _measured(
    ranks: NDArray[np.float64],
    first: NDArray[np.bool_],
    pairs: NDArray[np.float64],
    pool: int,
    threshold: float,
) -> Measured:
    """ranks, first (queries,); pairs (3, queries): each's true positives, predicted positives, positives."""
    true_positives, predicted, positives = pairs
    wrong = predicted + positives - 2 * true_positives  # false positives and false negatives
    true_negatives = pool - wrong - true_positives
    columns = (
        first,
        ranks <= 5,
        ranks <= 10,
        1 / ranks,
        ranks,
        true_positives,
        wrong,
        true_negatives,
        positives,
    )
    return Measured(np.stack(columns, axis=1).astype(np.float64), pool, threshold)


def _means(averages: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., 9) averages over queries to (..., 7) figures in the order of `MEANS`."""
    true_positives, wrong, true_negatives, positives = np.moveaxis(averages[..., 5:], -1, 0)
    correct = np.stack((true_positives, true_negatives), axis=-1)
    total = 2 * correct + wrong[..., None]
    # As in scikit-learn, a class that neither occurs nor is predicted takes no part in the mean.
    f1 = np.divide(2 * correct, total, out=np.zeros_like(total), where=total > 0)
    macro_f1 = f1.sum(-1) / (total > 0).sum(-1)
    golden = true_positives / positives  # every query has a right candidate
    return np.concatenate((averages[..., :5], macro_f1[..., None], golden[..., None]), axis=-1)


def _named(values: NDArray[np.float64]) -> dict[str, float]:
    return dict(zip(MEANS, values.tolist(), strict=True))


def _intervals(resampled: NDArray[np.float64]) -> dict[str, list[float]]:
    """For each of the means, its 95 % percentile interval [low, high]."""
    low, high = np.percentile(resampled, (2.5, 97.5), axis=0).tolist()
    return {name: [low[place], high[place]] for place, name in enumerate(MEANS)}


def _check(scores: Scores) -> None:
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(f"scores must be a matrix with a query and a candidate, not {scores.shape}")
    if any(np.isnan(scores[rows]).any() for rows in _blocks(*scores.shape)):
        raise ValueError("scores must not be NaN")


def _blocks(rows: int, cells: int) -> Iterator[slice]:
    """Slices over rows of so many cells each."""
    return (slice(*bounds) for bounds in _bounds(rows, cells))


def _bounds(rows: int, cells: int) -> Iterator[tuple[int, int]]:
    step = max(1, _BLOCK_CELLS // max(1, cells))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))
