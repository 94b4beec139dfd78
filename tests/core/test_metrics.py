"""The figures against slow, obvious versions of themselves, on inputs full of ties."""

import json
import math
import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clasp_core import metrics
from clasp_core.metrics import (
    MEANS,
    figures,
    known_item_ranks,
    macro_average,
    measure,
    paper_figures,
)

LEVELS = (-1.0, -0.25, 0.25, 0.4, 0.5, 0.75)
"""Few scores, so that ties are the rule; both of the paper's thresholds are among them."""


@st.composite
def problems(draw):
    """Scores (queries, candidates) and who is right, at least one in every row."""
    queries, candidates = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    row = st.lists(st.sampled_from(LEVELS), min_size=candidates, max_size=candidates)
    right = st.sets(st.integers(0, candidates - 1), min_size=1, max_size=candidates)
    scores = draw(st.lists(row, min_size=queries, max_size=queries))
    rights = draw(st.lists(right, min_size=queries, max_size=queries))
    return scores, [[place in places for place in range(candidates)] for places in rights]


@st.composite
def squares(draw):
    size = draw(st.integers(1, 9))
    row = st.lists(st.sampled_from(LEVELS), min_size=size, max_size=size)
    return draw(st.lists(row, min_size=size, max_size=size))


def slow_rank(scores, right):
    best = max(score for score, is_right in zip(scores, right, strict=True) if is_right)
    wrong = [score for score, is_right in zip(scores, right, strict=True) if not is_right]
    return 1 + sum(score > best for score in wrong) + sum(score == best for score in wrong) / 2


def slow_macro_f1(samples):
    """samples: (truth, prediction) of every pair. As scikit-learn, over the classes that occur."""
    f1 = []
    for label in {label for sample in samples for label in sample}:
        hits = sum(truth == label and prediction == label for truth, prediction in samples)
        truths = sum(truth == label for truth, _ in samples)
        predictions = sum(prediction == label for _, prediction in samples)
        f1.append(2 * hits / (truths + predictions))
    return sum(f1) / len(f1)


def slow_golden_accuracy(samples):
    """The notebooks': of the pairs that belong together, the share predicted to."""
    gold = [prediction for truth, prediction in samples if truth]
    return sum(gold) / len(gold)


def slow_summary(first, ranks, samples):
    n = len(ranks)
    return {
        "n": n,
        "hits@1": sum(first) / n,
        "hits@5": sum(rank <= 5 for rank in ranks) / n,
        "hits@10": sum(rank <= 10 for rank in ranks) / n,
        "mrr": sum(1 / rank for rank in ranks) / n,
        "mean_rank": sum(ranks) / n,
        "macro_f1": slow_macro_f1(samples),
        "golden_accuracy": slow_golden_accuracy(samples),
    }


def slow_paper(matrix, threshold, skip):
    """The notebooks' full-pool evaluation, as section D of the reference retells it."""
    first, ranks, samples = [], [], []
    for row, scores in enumerate(matrix):
        winner = scores.index(max(scores))
        if skip and winner != row and scores[winner] == scores[row]:
            continue
        first.append(winner == row)
        ranks.append(1 + sum(score > scores[row] for score in scores))
        samples += [(column == row, score >= threshold) for column, score in enumerate(scores)]
    return slow_summary(first, ranks, samples)


def assert_figures(measured, expected):
    assert {name: measured[name] for name in expected} == pytest.approx(expected, abs=1e-12)


@given(problems())
def test_ranks_equal_the_definition(problem):
    """The contract's rule of ranking, ties and several right answers included: every figure rests on it."""
    scores, relevant = problem
    expected = [slow_rank(*row) for row in zip(scores, relevant, strict=True)]
    assert known_item_ranks(np.array(scores), np.array(relevant)).tolist() == expected


@given(problems(), st.sampled_from([0.4, 0.5]))
def test_figures_equal_the_definition(problem, threshold):
    """Each figure is its textbook formula over ranks and pairs; a reader compares them across systems."""
    scores, relevant = problem
    ranks = [slow_rank(*row) for row in zip(scores, relevant, strict=True)]
    samples = [
        (truth, score >= threshold)
        for row, truths in zip(scores, relevant, strict=True)
        for score, truth in zip(row, truths, strict=True)
    ]
    measured = figures(np.array(scores), np.array(relevant), threshold=threshold, resamples=3)
    assert_figures(measured, slow_summary([rank <= 1 for rank in ranks], ranks, samples))
    assert measured["pool"] == len(scores[0])
    assert measured["threshold"] == threshold


@given(squares(), st.booleans(), st.sampled_from([0.4, 0.5]))
def test_the_papers_full_pool_figures_equal_its_loop(matrix, skip, threshold):
    """Stages 3 and 4 as the notebooks count them, or a comparison with the paper means nothing."""
    expected = slow_paper(matrix, threshold, skip)
    measured = paper_figures(np.array(matrix), skip_tied_duplicates=skip, threshold=threshold, resamples=3)
    assert_figures(measured, expected)
    assert measured["pool"] == len(matrix)


@given(squares())
def test_all_candidates_are_the_whole_pool_with_the_gold_last(matrix):
    """N = everyone leaves nothing to chance, so the sampled path can be checked exactly; there every tie
    costs hits@1, since the right candidate comes last."""
    size = len(matrix)
    moved = [row[:i] + row[i + 1 :] + [row[i]] for i, row in enumerate(matrix)]
    ranks = [1 + sum(score > row[-1] for score in row) for row in moved]
    first = [row.index(max(row)) == size - 1 for row in moved]
    samples = [(place == size - 1, score >= 0.4) for row in moved for place, score in enumerate(row)]
    measured = paper_figures(np.array(matrix), candidates=size, threshold=0.4, resamples=3)
    assert_figures(measured, slow_summary(first, ranks, samples))


def test_sampled_candidates_are_others_drawn_evenly():
    """Every other column is drawn equally often, and a row's own never: a biased draw flatters or hurts."""
    size, wanted, seeds = 6, 3, 400
    for other in range(size):
        # Nothing but column `other` beats a right candidate, so ranks above 1 count its draws.
        scores = np.eye(size)
        scores[:, other] = 2.0
        draws = 0.0
        for seed in range(seeds):
            measured = paper_figures(scores, candidates=wanted, seed=seed, resamples=1)
            assert (measured["n"], measured["pool"]) == (size, wanted)
            draws += (measured["mean_rank"] - 1) * size
        assert draws / seeds / (size - 1) == pytest.approx((wanted - 1) / (size - 1), abs=0.045)


def test_sampled_candidates_agree_with_a_plain_simulation():
    """The whole stage-1 protocol against `random.sample`, the notebooks' own way, on noisy scores: equal
    in the mean over many draws."""
    generator = np.random.default_rng(5)
    scores = generator.standard_normal((40, 40)) + 1.5 * np.eye(40)
    plain = random.Random(0)
    trials = []
    for _ in range(300):
        for gold in range(40):
            others = plain.sample([place for place in range(40) if place != gold], 9)
            candidates = [scores[gold, place] for place in [*others, gold]]
            trials.append(candidates.index(max(candidates)) == 9)
    measured = [paper_figures(scores, candidates=10, seed=seed, resamples=1)["hits@1"] for seed in range(300)]
    assert np.mean(measured) == pytest.approx(np.mean(trials), abs=0.015)


def test_a_case_by_hand():
    """Three queries worked out on paper, so that the oracles themselves have a witness."""
    scores = np.array([[0.9, 0.1, 0.5, 0.5], [0.6, 0.6, 0.2, 0.1], [0.7, 0.8, 0.6, 0.6]])
    relevant = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]], bool)
    assert known_item_ranks(scores, relevant).tolist() == [1.0, 1.5, 3.0]
    measured = figures(scores, relevant)
    assert (measured["n"], measured["pool"]) == (3, 4)
    assert measured["hits@1"] == pytest.approx(1 / 3)
    assert measured["hits@5"] == 1.0
    assert measured["mrr"] == pytest.approx((1 + 2 / 3 + 1 / 3) / 3)
    assert measured["mean_rank"] == pytest.approx(5.5 / 3)
    # 9 pairs at or above 0.5, the 4 right ones among them; the 3 others are wrong and below.
    assert measured["macro_f1"] == pytest.approx((8 / 13 + 6 / 11) / 2)


def test_hits_end_exactly_at_their_k():
    """Ranks 1, 1.5, 5, 5.5, 10, 10.5 and 11: a rank between two places counts from the lower one on."""
    relevant = np.zeros((7, 12), bool)
    relevant[:, 0] = True
    scores = np.zeros((7, 12))
    scores[:, 1:] = -1.0
    for query, (higher, same) in enumerate([(0, 0), (0, 1), (4, 0), (4, 1), (9, 0), (9, 1), (10, 0)]):
        scores[query, 1 : 1 + higher] = 1.0
        scores[query, 1 + higher : 1 + higher + same] = 0.0
    measured = figures(scores, relevant)
    expected = {"hits@1": 1 / 7, "hits@5": 3 / 7, "hits@10": 5 / 7, "mean_rank": 44.5 / 7}
    assert {name: measured[name] for name in expected} == pytest.approx(expected)


def test_a_constant_score_is_no_better_than_chance():
    """A broken model gives everything the same score; half credit for ties keeps it from winning."""
    measured = figures(np.zeros((20, 20)), np.eye(20, dtype=bool))
    assert measured["hits@1"] == 0.0
    assert measured["mean_rank"] == 10.5


def test_other_right_answers_do_not_push_a_rank_down():
    """Five recordings of one sentence are five right answers, not four rivals of the fifth."""
    scores = np.array([[0.9, 0.8, 0.7, 0.1]])
    assert known_item_ranks(scores, np.array([[True, True, True, False]])).tolist() == [1.0]


def test_a_right_answer_counts_even_at_minus_infinity():
    """The fill value of the search for the best right score must not outrank a real score."""
    scores = np.array([[-math.inf, -math.inf, 0.0]])
    assert known_item_ranks(scores, np.array([[True, False, False]])).tolist() == [2.5]


def test_the_papers_duplicates_cost_a_hit_or_the_row():
    """Texts 0 and 1 are the same: row 1 loses to column 0 by position alone. Stage 3 drops such rows from
    n, which removes only misses; stage 4 counts them as misses."""
    scores = np.array([[0.9, 0.9, 0.1], [0.8, 0.8, 0.3], [0.2, 0.3, 0.7]])
    counted = paper_figures(scores)
    dropped = paper_figures(scores, skip_tied_duplicates=True)
    assert (counted["n"], counted["hits@1"], counted["mrr"]) == (3, pytest.approx(2 / 3), 1.0)
    assert (dropped["n"], dropped["hits@1"], dropped["pool"]) == (2, 1.0, 3)


def test_a_case_by_hand_in_the_papers_way():
    """Four texts against four recordings, counted on paper by section D of the reference. Row 0 wins alone;
    row 1 ties with a later column, so the first maximum is its own; row 2 ties with an earlier one, which
    costs hits@1 and not the rank; row 3 loses to two."""
    scores = np.array(
        [
            [0.9, 0.1, 0.4, 0.2],
            [0.3, 0.5, 0.5, 0.1],
            [0.6, 0.2, 0.6, 0.3],
            [0.7, 0.4, 0.5, 0.45],
        ]
    )
    measured = paper_figures(scores)
    assert (measured["n"], measured["pool"], measured["hits@1"]) == (4, 4, 0.5)
    assert measured["mrr"] == pytest.approx((1 + 1 + 1 + 1 / 3) / 4)
    assert measured["mean_rank"] == pytest.approx(6 / 4)
    # At 0.5 seven pairs are predicted, three right ones among them; of the nine left, one is right.
    assert measured["golden_accuracy"] == 3 / 4
    assert measured["macro_f1"] == pytest.approx((2 * 3 / (7 + 4) + 2 * 8 / (9 + 12)) / 2)
    # At 0.45 the fourth right one is predicted too, and nothing else; at 0.95 nothing is.
    lower = paper_figures(scores, threshold=0.45)
    assert lower["golden_accuracy"] == 1.0
    assert lower["macro_f1"] == pytest.approx((2 * 4 / (8 + 4) + 2 * 8 / (8 + 12)) / 2)
    higher = paper_figures(scores, threshold=0.95)
    assert higher["golden_accuracy"] == 0.0
    assert higher["macro_f1"] == pytest.approx((0 + 2 * 12 / (16 + 12)) / 2)
    # Stage 3 leaves row 2 out, with its pairs; row 1 stays, whose own column came first.
    stage_3 = paper_figures(scores, skip_tied_duplicates=True)
    assert (stage_3["n"], stage_3["pool"], stage_3["hits@1"]) == (3, 4, pytest.approx(2 / 3))
    assert stage_3["golden_accuracy"] == pytest.approx(2 / 3)
    # Among candidates the right one stands last, so the tie of row 1 costs its hit as well.
    last = paper_figures(scores, candidates=4)
    assert (last["hits@1"], last["mrr"]) == (0.25, measured["mrr"])


def drawn(per_query, seed, resamples):
    """The rows of each resample, as the figures draw them."""
    random_rows = np.random.default_rng(seed)
    return [per_query[random_rows.integers(len(per_query), size=len(per_query))] for _ in range(resamples)]


def test_a_mean_over_groups_is_the_mean_of_their_figures():
    """A language of 300 clips and one of 30 count the same; the interval is that of the mean, drawn inside
    each group, so it is narrower than a group's own."""
    generator = np.random.default_rng(7)
    groups = [
        measure(generator.standard_normal((n, n)) + lift * np.eye(n), np.eye(n, dtype=bool))
        for n, lift in ((30, 1.0), (90, 2.0), (45, 3.0))
    ]
    together = macro_average(groups, resamples=400)
    own = [group.figures(resamples=400) for group in groups]
    for name in MEANS:
        assert together[name] == pytest.approx(np.mean([figures[name] for figures in own]))
    assert (together["groups"], together["n"]) == (3, 165)
    slow = np.mean(
        [
            [rows[:, 0].mean() for rows in drawn(group.per_query, place, 400)]
            for place, group in enumerate(groups)
        ],
        axis=0,
    )
    assert together["ci95"]["hits@1"] == pytest.approx(np.percentile(slow, (2.5, 97.5)))
    widths = [np.subtract(*reversed(figures["ci95"]["mrr"])) for figures in [together, *own]]
    assert widths[0] < min(widths[1:])
    with pytest.raises(ValueError, match="at least one"):
        macro_average([])


def test_a_paired_comparison_is_that_of_the_same_draws():
    """Which queries are drawn is one draw for both sides: against the differences of their own resamples."""
    generator = np.random.default_rng(8)
    right = np.eye(60, dtype=bool)
    noise = generator.standard_normal((60, 60))
    better, worse = (measure(noise + lift * right, right) for lift in (2.5, 1.5))
    compared = better.difference_from(worse, resamples=300, seed=3)
    slow = [
        ours[:, 3].mean() - theirs[:, 3].mean()
        for ours, theirs in zip(drawn(better.per_query, 3, 300), drawn(worse.per_query, 3, 300), strict=True)
    ]
    assert compared["mrr"]["ci95"] == pytest.approx(np.percentile(slow, (2.5, 97.5)))
    expected = better.figures()["mrr"] - worse.figures()["mrr"]
    assert compared["mrr"]["difference"] == pytest.approx(expected)
    assert compared["mrr"]["ci95"][0] > 0
    assert compared["mrr"]["p"] == pytest.approx(2 / 301)  # no resample is on the other side
    back = worse.difference_from(better, resamples=300, seed=3)
    assert back["mrr"]["difference"] == -compared["mrr"]["difference"]
    with pytest.raises(ValueError, match="same queries"):
        better.difference_from(measure(noise[:50], right[:50]))


def test_a_system_does_not_differ_from_itself():
    """Equal systems must not be told apart by chance, whatever the resamples."""
    scores = np.random.default_rng(9).standard_normal((40, 40))
    measured = measure(scores, np.eye(40, dtype=bool))
    assert measured.difference_from(measured)["hits@1"] == {"difference": 0.0, "ci95": [0.0, 0.0], "p": 1.0}


def test_chance_differences_are_called_so():
    """Of many pairs of systems that are equally good, about one in twenty may have an interval without zero,
    or every second experiment would be a discovery."""
    generator = np.random.default_rng(10)
    right = np.eye(80, dtype=bool)
    found = 0
    for _ in range(100):
        one, other = (measure(generator.standard_normal((80, 80)) + 2 * right, right) for _ in range(2))
        low, high = one.difference_from(other, resamples=200)["mrr"]["ci95"]
        found += not low <= 0 <= high
    assert found <= 14  # 5 expected; more than 14 has a chance of 0.0001


def test_intervals_hold_the_value_and_narrow_with_more_queries():
    """An interval that misses its value, or that does not shrink, would mislead about small test sets."""
    generator = np.random.default_rng(1)
    widths = []
    for n in (30, 480):
        scores = generator.standard_normal((n, 50)) + 2 * (np.arange(50) == np.arange(n)[:, None] % 50)
        measured = figures(scores, np.arange(50) == np.arange(n)[:, None] % 50)
        for name in MEANS:
            low, high = measured["ci95"][name]
            assert low <= measured[name] <= high
        widths.append(np.subtract(*reversed(measured["ci95"]["mrr"])))
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.5)  # as the square root of 16


def test_the_interval_of_a_share_is_the_binomial_one():
    """Against the formula for shares, so that the bootstrap is known to cover what it says."""
    n, hits = 400, 240
    scores = np.zeros((n, 2))
    scores[:hits, 0] = 1
    scores[hits:, 1] = 1
    low, high = figures(scores, np.tile([True, False], (n, 1)), resamples=4000)["ci95"]["hits@1"]
    half = 1.96 * math.sqrt(0.6 * 0.4 / n)
    assert [low, high] == pytest.approx([0.6 - half, 0.6 + half], abs=0.006)


def test_the_same_seed_gives_the_same_report_as_json():
    """Reports are compared and committed; two runs on the same numbers must not differ by a byte."""
    scores = np.random.default_rng(2).standard_normal((60, 60)).astype(np.float32)
    relevant = np.eye(60, dtype=bool)
    first, again = (json.dumps(figures(scores, relevant, seed=4)) for _ in range(2))
    assert first == again
    sampled, sampled_again = (json.dumps(paper_figures(scores, candidates=10, seed=4)) for _ in range(2))
    assert sampled == sampled_again
    assert figures(scores, relevant, seed=5)["ci95"] != figures(scores, relevant, seed=4)["ci95"]
    assert paper_figures(scores, candidates=10, seed=5) != paper_figures(scores, candidates=10, seed=4)


@pytest.mark.parametrize("cells", [1, 7, 100, 1 << 20])
def test_figures_do_not_depend_on_the_block_size(cells, monkeypatch):
    """How much is looked at together is about memory alone."""
    generator = np.random.default_rng(3)
    scores = generator.choice(LEVELS, (23, 23))
    relevant = np.eye(23, dtype=bool) | (generator.random((23, 23)) < 0.1)

    def reports():
        return (
            figures(scores, relevant, resamples=50),
            figures(scores.T, relevant.T | np.eye(23, dtype=bool), resamples=50),
            paper_figures(scores, skip_tied_duplicates=True, resamples=50),
            paper_figures(scores, candidates=5, resamples=50),
        )

    expected = reports()
    monkeypatch.setattr(metrics, "_BLOCK_CELLS", cells)
    assert reports() == expected


def test_memory_follows_the_block_and_not_the_matrix(monkeypatch):
    """12,000 x 12,000 must fit beside its matrix; here in small, 36 MB of scores and blocks of 0.25 MB."""
    monkeypatch.setattr(metrics, "_BLOCK_CELLS", 1 << 16)
    scores = np.random.default_rng(4).standard_normal((3000, 3000), dtype=np.float32)
    relevant = np.eye(3000, dtype=bool)
    tracemalloc.start()
    try:
        figures(scores, relevant, resamples=20)
        paper_figures(scores.T, resamples=20)
        paper_figures(scores, candidates=100, resamples=20)
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("scores", "relevant", "complaint"),
    [
        (np.zeros((2, 2)), np.array([[True, False], [False, False]]), "right candidate"),
        (np.zeros((2, 2)), np.ones((2, 3), bool), "relevant is"),
        (np.array([[np.nan, 1.0]]), np.array([[True, False]]), "NaN"),
        (np.zeros((0, 3)), np.zeros((0, 3), bool), "matrix"),
        (np.zeros((3, 0)), np.zeros((3, 0), bool), "matrix"),
        (np.zeros(3), np.ones(3, bool), "matrix"),
    ],
)
def test_figures_refuse_what_has_no_answer(scores, relevant, complaint):
    """NaN compares as neither higher nor equal and would look like rank 1; nothing may pass in silence."""
    with pytest.raises(ValueError, match=complaint):
        figures(scores, relevant)


@pytest.mark.parametrize(
    ("scores", "options", "complaint"),
    [
        (np.zeros((2, 3)), {}, "as many queries"),
        (np.full((2, 2), np.nan), {}, "NaN"),
        (np.zeros((2, 2)), {"candidates": 0}, "draw 0"),
        (np.zeros((2, 2)), {"candidates": 3}, "draw 3"),
        (np.zeros((2, 2)), {"candidates": 2, "skip_tied_duplicates": True}, "every row"),
        (np.zeros((2, 2)), {"resamples": 0}, "resample"),
    ],
)
def test_the_papers_figures_refuse_what_has_no_answer(scores, options, complaint):
    """The same for the paper's rules, whose right answers are the diagonal."""
    with pytest.raises(ValueError, match=complaint):
        paper_figures(scores, **options)


def test_one_query_and_one_candidate_have_figures():
    """A group of one item is common under `--by`; no class of pairs may divide by zero there."""
    for measured in (
        figures(np.array([[0.7]]), np.array([[True]])),
        paper_figures(np.array([[0.7]])),
        paper_figures(np.array([[0.7]]), candidates=1),
    ):
        assert [measured[name] for name in MEANS] == [1.0] * len(MEANS)
