"""avg@k, pass@k and majority@k against enumeration."""

import random
from collections import Counter
from fractions import Fraction
from itertools import combinations

import pytest

from megatron_srft.rewards.statistics import average_at_k, majority_at_k, pass_at_k


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(samples):
    for correct in range(samples + 1):
        verdicts = [True] * correct + [False] * (samples - correct)
        for k in range(1, samples + 1):
            subsets = [any(subset) for subset in combinations(verdicts, k)]
            assert pass_at_k(samples, correct, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-15)


def test_pass_at_k_of_many_samples_keeps_its_precision():
    assert pass_at_k(10_000, 1, 1) == pytest.approx(1e-4, rel=1e-9)
    assert pass_at_k(10_000, 9_999, 2) == 1.0


def test_average_is_pass_at_1():
    verdicts = [True, False, False, True, False]
    assert average_at_k(verdicts) == pytest.approx(pass_at_k(5, 2, 1)) == 0.4


def majority_by_enumeration(answers, gold):
    """Try every possible winner of the vote and average."""
    votes = Counter(a for a in answers if a is not None)
    winners = [a for a in votes if all(votes[a] >= votes[b] for b in votes)]
    return float(sum(Fraction(a == gold) for a in winners) / len(winners)) if winners else 0.0


def test_majority_against_enumeration_of_winners():
    draw = random.Random(0)
    for _ in range(300):
        answers = [draw.choice(["2", "3", "5", None]) for _ in range(draw.randint(1, 7))]
        got = majority_at_k(answers, [a == "3" for a in answers])
        assert got == pytest.approx(majority_by_enumeration(answers, "3"))


def test_majority_of_k_averages_disjoint_ballots():
    answers = ["1", "2", "2", "1", "1", "1", "9"]
    correct = [a == "1" for a in answers]
    assert majority_at_k(answers, correct, 3) == pytest.approx((0 + 1) / 2)
    assert majority_at_k(answers, correct, 2) == pytest.approx((0.5 + 0.5 + 1) / 3)


def test_a_tie_shares_the_credit_and_abstentions_do_not_vote():
    assert majority_at_k(["1", "2", None, None, None], [True, False, False, False, False]) == 0.5
    assert majority_at_k([None, None], [False, False]) == 0.0


@pytest.mark.parametrize("call", [
    lambda: pass_at_k(4, 1, 5), lambda: pass_at_k(4, 5, 1), lambda: pass_at_k(4, 1, 0), lambda: average_at_k([]),
    lambda: majority_at_k(["1"], [True], 2), lambda: majority_at_k(["1"], []),
])  # fmt: skip
def test_impossible_numbers_are_refused(call):
    with pytest.raises(ValueError):
        call()
