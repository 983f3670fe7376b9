"""Accuracy of a problem from several sampled answers: avg@k, pass@k, majority@k. Plain functions of counts and votes.

    avg@k      = c / n
    pass@k     = 1 - C(n - c, k) / C(n, k)           unbiased for k <= n samples   (Chen et al. 2021, arXiv 2107.03374)
    majority@k = P(the most frequent of k answers is right), ties broken uniformly at random

with n samples of one problem, c of them correct. The figure of a file is the mean over its problems.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb


def average_at_k(correct: Sequence[bool]) -> float:
    """Share of right answers among the samples of one problem. Raises ValueError without samples."""
    if not correct:
        raise ValueError("avg@k needs at least one sample")
    return sum(map(bool, correct)) / len(correct)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that at least one of k answers, drawn without replacement from the samples, is right.

    Raises ValueError unless 1 <= k <= samples and 0 <= correct <= samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs k between 1 and the number of samples, which is {samples}")
    if not 0 <= correct <= samples:
        raise ValueError(f"{correct} correct answers among {samples} samples")
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def majority_at_k(answers: Sequence[Hashable | None], correct: Sequence[bool], k: int | None = None) -> float:
    """Expected accuracy of the most frequent answer among k samples of one problem.

    answers: one voting key per sample (`Score.answer`); None abstains, and k abstentions earn 0. correct: the verdicts.
    When t answers share the first place, each counts 1/t: the expectation under a random choice among them. A key
    that received both verdicts (two ways of writing one number) counts with its share of right ones.
    k: votes per ballot, default all. More samples make floor(n / k) disjoint ballots, whose mean is returned; a
    remainder is left out, because ballots of another size have another expectation.
    """
    k = len(answers) if k is None else k
    if len(answers) != len(correct):
        raise ValueError(f"{len(answers)} answers but {len(correct)} verdicts")
    if not 1 <= k <= len(answers):
        raise ValueError(f"majority@{k} needs k between 1 and the number of samples, which is {len(answers)}")
    ballots = range(0, len(answers) - k + 1, k)
    return sum(_ballot(answers[i : i + k], correct[i : i + k]) for i in ballots) / len(ballots)


def _ballot(answers: Sequence[Hashable | None], correct: Sequence[bool]) -> float:
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    right = Counter(answer for answer, verdict in zip(answers, correct, strict=True) if verdict)
    most = max(votes.values())
    tied = [answer for answer, count in votes.items() if count == most]
    return sum(right[answer] / votes[answer] for answer in tied) / len(tied)
