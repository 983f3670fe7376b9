"""The rules of Best-of-N against closed forms over all orders, hand counts, and the statistics of evaluate."""

from itertools import permutations
from math import comb

import numpy as np
import pytest

from megatron_srft.best_of_n.sweep import (
    LONGEST,
    MAJORITY,
    ORACLE,
    RANDOM,
    SHORTEST,
    SWIFT,
    VOTE,
    Question,
    ballots,
    chosen,
    interval,
    selectors,
    sweep,
    vote,
)
from megatron_srft.rewards.statistics import majority_at_k, pass_at_k

NAN = float("nan")


def question(correct, scores=None, answers=None, lengths=None, **external):
    n = len(correct)
    named = {} if scores is None else {SWIFT: scores}
    return Question(
        correct=np.array(correct, bool),
        lengths=np.array(lengths or range(1, n + 1)),
        answers=np.array(answers or [-1] * n),
        scores={name: np.array(values, float) for name, values in (named | external).items()},
    )


def in_all_orders(one):
    return one.take(np.array(list(permutations(range(len(one.correct))))))


def first(some, n):
    """The first n of every order, by another road than the sweep's."""
    cut = {name: values[:, :n] for name, values in some.scores.items()}
    return Question(correct=some.correct[:, :n], lengths=some.lengths[:, :n], answers=some.answers[:, :n], scores=cut)


def random_question(seed, n=6):
    draw = np.random.default_rng(seed)
    answers = draw.integers(-1, 3, n)
    correct = answers == 0
    return question(correct, draw.normal(size=n), list(answers), list(draw.integers(1, 9, n)), rm=draw.normal(size=n))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_all_orders_give_the_closed_forms(seed, n):
    """Best of n out of 6 without replacement: the candidate with i better ones is chosen in C(5 - i, n - 1) of C(6, n)
    subsets; the oracle is pass@n; the majority is the mean over all ballots."""
    one = random_question(seed)
    every, rules = first(in_all_orders(one), n), selectors(one)
    by_score = one.correct[np.argsort(-one.scores[SWIFT])]
    expected = sum(right * comb(5 - i, n - 1) for i, right in enumerate(by_score)) / comb(6, n)
    assert rules[SWIFT](every).mean() == pytest.approx(expected)
    assert rules[ORACLE](every).mean() == pytest.approx(pass_at_k(6, int(one.correct.sum()), n))
    assert rules[RANDOM](every).mean() == pytest.approx(one.correct.mean())
    answers = [[None if a < 0 else int(a) for a in row] for row in every.answers]
    ballot = [majority_at_k(a, list(c)) for a, c in zip(answers, every.correct, strict=True)]
    assert rules[MAJORITY](every) == pytest.approx(ballot)


def test_votes_by_hand():
    one = question([1, 1, 0, 0, 0], answers=[7, 7, 3, 3, -1])
    row = one.take(np.arange(5)[None])
    assert vote(row, np.ones((1, 5))) == pytest.approx([0.5])  # 7 and 3 tie
    assert vote(row, np.array([[0.2, 0.2, 0.3, 0.2, 9.0]])) == pytest.approx([0.0])  # abstentions have no weight
    assert vote(row, np.array([[0.2, 0.4, 0.3, 0.2, 0.0]])) == pytest.approx([1.0])
    # A key with both verdicts counts with its share of right ones.
    mixed = question([1, 0, 0], answers=[7, 7, 3]).take(np.arange(3)[None])
    assert vote(mixed, np.ones((1, 3))) == pytest.approx([0.5])
    nothing = question([1, 1], answers=[-1, -1]).take(np.arange(2)[None])
    assert vote(nothing, np.ones((1, 2))) == pytest.approx([0.0])


def test_equal_weights_tie_in_whatever_order_they_are_added():
    """0.1 + 0.2 + 0.3 and 0.3 + 0.2 + 0.1 differ in the last digit."""
    one = question([1, 1, 1, 0, 0, 0], answers=[1, 1, 1, 2, 2, 2]).take(np.arange(6)[None])
    assert vote(one, np.array([[0.1, 0.2, 0.3, 0.3, 0.2, 0.1]])) == pytest.approx([0.5])


def test_swift_vote_weighs_answers_by_probability():
    """Three unlikely votes for 3 (0.05 each) against one likely vote for 7 (0.9)."""
    one = question([0, 0, 0, 1], [-3.0, -3.0, -3.0, 2.2], answers=[3, 3, 3, 7])
    some = one.take(np.arange(4)[None])
    rules = selectors(one)
    assert rules[MAJORITY](some) == pytest.approx([0.0])
    assert rules[VOTE](some) == pytest.approx([1.0])


def test_ties_and_missing_scores():
    one = question([0, 1, 1], [2.0, 2.0, NAN]).take(np.array([[0, 1, 2], [1, 0, 2], [2, 0, 1]]))
    assert chosen(one, one.scores[SWIFT]).tolist() == [0, 1, 0]  # the first of equals; never the one without a score
    none = question([1, 0], [NAN, NAN]).take(np.arange(2)[None])
    assert chosen(none, none.scores[SWIFT]).tolist() == [0.5]


def test_fusion_in_the_sweep_uses_the_candidates_at_hand():
    """At N = 3 rank selection chooses A (ranks 0 and 1); D and E push it down, and C is chosen at N = 5."""
    one = question([1, 0, 0, 0, 0], [3.0, 2, 1, 0, -1], rm=[0.2, 0.1, 0.5, 0.4, 0.3])
    some, rule = one.take(np.arange(5)[None]), selectors(one)["swift + rm (ranks)"]
    assert [rule(first(some, n))[0] for n in (1, 3, 5)] == [1, 1, 0]
    scaled = selectors(one, [1.0, 0.0])["swift + rm (scaled)"]
    assert scaled(some) == [1]
    assert selectors(one, [0.0, 1.0])["swift + rm (scaled)"](some) == [0]


@pytest.fixture(scope="module")
def swept():
    draw = np.random.default_rng(0)
    questions = []
    for _ in range(120):
        correct = draw.random(11) < draw.uniform(0.1, 0.6)
        questions.append(
            question(correct, correct + draw.normal(size=11), [0 if c else int(draw.integers(1, 9)) for c in correct])
        )
    return questions, sweep(questions, 11, orders=32)


def test_the_oracle_never_falls_and_nothing_beats_it(swept):
    _, result = swept
    oracle = result.curves[ORACLE]
    for some in (lambda point: point.accuracy, lambda point: point.first):
        values = [some(point) for point in oracle]
        assert values == sorted(values)
        for name, curve in result.curves.items():
            assert all(some(point) <= best + 1e-12 for point, best in zip(curve, values, strict=True)), name


def test_the_sweep_is_unbiased_and_says_how_sure_it_is(swept):
    questions, result = swept
    assert [point.n for point in result.curves[SWIFT]] == ballots(11) == [1, 2, 4, 8, 11]
    average = np.mean([one.correct.mean() for one in questions])
    exact = np.mean([pass_at_k(11, int(one.correct.sum()), 4) for one in questions])
    assert result.curves[RANDOM][4].accuracy == pytest.approx(average)
    assert result.curves[ORACLE][2].accuracy == pytest.approx(exact, abs=0.02)
    at_most = result.curves[SWIFT][4]
    assert at_most.accuracy == at_most.first == np.mean([one.correct[one.scores[SWIFT].argmax()] for one in questions])
    assert at_most.low < at_most.accuracy < at_most.high
    assert at_most.gain == pytest.approx(at_most.accuracy - average)
    assert 0 < at_most.gain_low < at_most.gain < at_most.gain_high
    gap, low, high = result.over_majority[SWIFT][4]
    assert gap == pytest.approx(at_most.accuracy - result.curves[MAJORITY][4].accuracy) and low < gap < high
    assert LONGEST in result.curves and MAJORITY not in result.over_majority


def test_first_is_the_order_of_sampling():
    one, other = question([1, 0, 0, 0], [0.0, 1, 2, 3]), question([0, 1, 0, 1], [0.0, 5, 1, 2])
    result = sweep([one, other], 4, orders=8)
    assert [point.first for point in result.curves[SWIFT]] == [0.5, 0.5, 0.5]
    assert [point.first for point in result.curves[ORACLE]] == [0.5, 1.0, 1.0]
    assert [point.first for point in result.curves[SHORTEST]] == [0.5, 0.5, 0.5]
    assert MAJORITY not in result.curves and VOTE not in result.curves  # nobody has an answer to vote for


def test_auroc_within_questions_by_hand():
    """The first question: the right one beats 1 of 2 wrong ones; the second: 1 of 1; the third has no wrong one."""
    questions = [
        question([1, 0, 0], [2.0, 1.0, 3.0], lengths=[5, 5, 6]),
        question([1, 0, 1], [9.0, 8.0, NAN], lengths=[7, 4, 1]),
        question([1, 1, 1], [0.0, 1.0, 2.0]),
    ]
    result = sweep(questions, 3, orders=2)
    assert result.auroc[SWIFT] == pytest.approx((0.5 + 1.0) / 2)
    assert result.auroc[SHORTEST] == pytest.approx((0.75 + 0.0) / 2)
    assert result.auroc_questions == 2


def test_the_interval_is_that_of_the_mean():
    draw = np.random.default_rng(1)
    values = (draw.random(900) < 0.3).astype(float)
    low, high = interval(values, draw.integers(900, size=(2000, 900)))
    error = 1.96 * values.std() / 30
    assert low == pytest.approx(values.mean() - error, abs=0.004)
    assert high == pytest.approx(values.mean() + error, abs=0.004)
