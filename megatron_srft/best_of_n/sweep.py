"""How often each rule of choosing is right, for N = 1, 2, 4, ... candidates.

    random        the mean over the candidates: what no rule gives
    shortest      fewest tokens: what a score that only measures length would reach
    longest       most tokens
    majority      the most frequent final answer; who has none abstains
    swift         the highest score of the head
    swift vote    the answer with the largest sum of sigmoid(score)
    NAME          the highest external score; swift + NAME (ranks), (scaled): both put together, see fusion.py
    oracle        whether any candidate is right (pass@N): what no rule can beat

A question's N candidates are the first N of it in some order. `first` takes the order in which they were sampled, as
the paper does: one draw, and so noisy. `accuracy` is the mean over several shuffled orders, the same for all rules, in
which the first N candidates contain the first N / 2: unbiased, and the oracle cannot fall. For two rules on the same
orders the difference is paired. Intervals are the bootstrap's over questions (percentiles, the same draws for all), so
they cover which questions were asked, not which head was trained.

Ties go to the candidate that comes first; votes that tie share the choice. A candidate without a score is chosen only
where no other has one, and then at random. A candidate without a verdict counts as wrong; both are counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_srft.best_of_n.fusion import scaled_average, worst_rank
from megatron_srft.hidden_reward.quality import sigmoid, within_auroc

SWIFT = "swift"
RANDOM, SHORTEST, LONGEST, MAJORITY, VOTE, ORACLE = "random", "shortest", "longest", "majority", "swift vote", "oracle"
LEVEL = 0.95
"""Of the intervals."""
DRAWS = 2000
"""Of the bootstrap."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """The candidates of one question, in the order in which they were sampled; all arrays [candidates]."""

    correct: np.ndarray
    """bool; without a verdict: False."""
    lengths: np.ndarray
    """int64 tokens."""
    answers: np.ndarray
    """int64: equal for equal final answers, -1 where there is none."""
    scores: dict[str, np.ndarray]
    """float64 by name (`SWIFT` is the head's), NaN where there is none."""

    def take(self, order: np.ndarray) -> "Question":
        """Candidates in other orders: every array becomes [orders, candidates]."""
        return Question(
            correct=self.correct[order],
            lengths=self.lengths[order],
            answers=self.answers[order],
            scores={name: values[order] for name, values in self.scores.items()},
        )


@dataclass(frozen=True, kw_only=True)
class Point:
    """One rule at one N."""

    n: int
    accuracy: float
    """Mean over questions and orders."""
    low: float
    high: float
    """The interval."""
    first: float
    """Accuracy with the first N candidates as they were sampled."""
    gain: float
    """accuracy - that of `random`."""
    gain_low: float
    gain_high: float


@dataclass(frozen=True, kw_only=True)
class Sweep:
    questions: int
    orders: int
    curves: dict[str, tuple[Point, ...]]
    """By rule, in the order of the table."""
    over_majority: dict[str, tuple[tuple[float, float, float], ...]]
    """By rule and N: accuracy - that of `majority`, and its interval; empty without votes."""
    auroc: dict[str, float | None]
    """Within-question AUROC of each score, and of preferring short responses."""
    auroc_questions: int
    """Questions with right and wrong candidates that all scores' AUROC are over, where every candidate has a score."""


def sweep(
    questions: Sequence[Question],
    most: int,
    *,
    orders: int = 64,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Sweep:
    """Accuracy of every rule.

    Args:
        most: the largest N; every question has at least so many candidates.
        orders: shuffled orders of each question's candidates.
        weights: of the head's score and each external one in scaled averaging; None: all the same.
        seed: of the orders and of the bootstrap.
    """
    short = next((i for i, question in enumerate(questions) if len(question.correct) < most), None)
    assert short is None, f"question {short} has fewer than {most} candidates"
    generator = np.random.default_rng(seed)
    rules, sizes = selectors(questions[0], weights), ballots(most)
    accuracy = np.empty((len(rules), len(sizes), len(questions)))
    first = np.empty_like(accuracy)
    for number, question in enumerate(questions):
        width = len(question.correct)
        shuffled = question.take(generator.permuted(np.tile(np.arange(width), (orders, 1)), axis=1))
        sampled = question.take(np.arange(width)[None])
        for row, rule in enumerate(rules.values()):
            for column, n in enumerate(sizes):
                accuracy[row, column, number] = rule(_head(shuffled, n)).mean()
                first[row, column, number] = rule(_head(sampled, n)).mean()
    draws = generator.integers(len(questions), size=(DRAWS, len(questions)))
    return _summary(list(rules), sizes, accuracy, first, draws, questions, orders)


def ballots(most: int) -> list[int]:
    """1, 2, 4, ... below the largest N, and that."""
    return [2**i for i in range(most.bit_length()) if 2**i < most] + [most]


def selectors(
    question: Question, weights: Sequence[float] | None = None
) -> dict[str, Callable[[Question], np.ndarray]]:
    """By name, from [orders, N] candidates to the probability of being right, [orders].

    Args:
        question: any of the questions; they all have the same scores.
    """
    external = [name for name in question.scores if name != SWIFT]
    rules: dict[str, Callable[[Question], np.ndarray]] = {
        RANDOM: lambda some: some.correct.mean(axis=-1),
        SHORTEST: lambda some: chosen(some, -some.lengths.astype(np.float64)),
        LONGEST: lambda some: chosen(some, some.lengths.astype(np.float64)),
        MAJORITY: lambda some: vote(some, np.ones(some.correct.shape)),
    }
    if SWIFT in question.scores:
        rules[SWIFT] = lambda some: chosen(some, some.scores[SWIFT])
        rules[VOTE] = lambda some: vote(some, _probabilities(some.scores[SWIFT]))
    for name in external:
        rules[name] = lambda some, name=name: chosen(some, some.scores[name])
    if external and SWIFT in question.scores:
        names = " + ".join([SWIFT, *external])
        every = [SWIFT, *external]
        rules[f"{names} (ranks)"] = lambda some: chosen(some, -worst_rank([some.scores[n] for n in every]))
        rules[f"{names} (scaled)"] = lambda some: chosen(some, scaled_average([some.scores[n] for n in every], weights))
    rules[ORACLE] = lambda some: some.correct.any(axis=-1).astype(np.float64)
    return rules


def chosen(some: Question, scores: np.ndarray) -> np.ndarray:
    """[orders] whether the first candidate with the highest score is right; the mean where no candidate has a score."""
    unscored = np.isnan(scores) | (scores == -np.inf)
    best = np.argmax(np.where(unscored, -np.inf, scores), axis=-1)
    right = np.take_along_axis(some.correct, best[..., None], axis=-1)[..., 0]
    return np.where(unscored.all(axis=-1), some.correct.mean(axis=-1), right)


def vote(some: Question, weights: np.ndarray) -> np.ndarray:
    """[orders] whether the answer with the largest sum of weights is right.

    Answers that tie share the choice; an answer that received both verdicts (two ways of writing one number) counts
    with its share of right ones; nothing but abstentions is wrong. With weights of 1 this is majority@k.
    """
    keys = np.arange(some.answers.max(initial=-1) + 1)
    if not len(keys):
        return np.zeros(some.answers.shape[:-1])
    votes = some.answers[..., None] == keys
    sums = (votes * weights[..., None]).sum(axis=-2)
    right = (votes & some.correct[..., None]).sum(axis=-2) / np.maximum(votes.sum(axis=-2), 1)
    # Sums of equal weights in another order may differ in their last digit.
    tied = (sums >= sums.max(axis=-1, keepdims=True) * (1 - 1e-12)) & votes.any(axis=-2)
    return np.where(tied.any(axis=-1), (tied * right).sum(axis=-1) / np.maximum(tied.sum(axis=-1), 1), 0.0)


def _probabilities(scores: np.ndarray) -> np.ndarray:
    """Of being right; 0 where there is no score."""
    return sigmoid(np.where(np.isnan(scores), -np.inf, scores))


def _head(some: Question, n: int) -> Question:
    return Question(
        correct=some.correct[:, :n],
        lengths=some.lengths[:, :n],
        answers=some.answers[:, :n],
        scores={name: values[:, :n] for name, values in some.scores.items()},
    )


# ---------------------------------------------------------------- figures over questions


def _summary(
    names: list[str],
    sizes: list[int],
    accuracy: np.ndarray,
    first: np.ndarray,
    draws: np.ndarray,
    questions: Sequence[Question],
    orders: int,
) -> Sweep:
    base, votes = accuracy[names.index(RANDOM)], accuracy[names.index(MAJORITY)]
    voted = any((question.answers >= 0).any() for question in questions)
    curves, over_majority = {}, {}
    for row, name in enumerate(names):
        if name in (MAJORITY, VOTE) and not voted:
            continue
        points = []
        for column, n in enumerate(sizes):
            values, gains = accuracy[row, column], accuracy[row, column] - base[column]
            low, high = interval(values, draws)
            gain_low, gain_high = interval(gains, draws)
            points.append(
                Point(
                    n=n,
                    accuracy=float(values.mean()),
                    low=low,
                    high=high,
                    first=float(first[row, column].mean()),
                    gain=float(gains.mean()),
                    gain_low=gain_low,
                    gain_high=gain_high,
                )
            )
        curves[name] = tuple(points)
        if voted and name != MAJORITY:
            gaps = accuracy[row] - votes
            over_majority[name] = tuple((float(gap.mean()), *interval(gap, draws)) for gap in gaps)
    auroc, over = _aurocs(questions)
    return Sweep(
        questions=len(questions),
        orders=orders,
        curves=curves,
        over_majority=over_majority,
        auroc=auroc,
        auroc_questions=over,
    )


def interval(values: np.ndarray, draws: np.ndarray) -> tuple[float, float]:
    """Percentiles of the mean over bootstrap draws of questions.

    Args:
        values: [questions].
        draws: [draws, questions] indices.
    """
    means = values[draws].mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _aurocs(questions: Sequence[Question]) -> tuple[dict[str, float | None], int]:
    names = list(questions[0].scores)
    owner = np.concatenate([np.full(len(question.correct), i) for i, question in enumerate(questions)])
    correct = np.concatenate([question.correct for question in questions])
    columns = {name: np.concatenate([question.scores[name] for question in questions]) for name in names}
    columns[SHORTEST] = -np.concatenate([question.lengths for question in questions]).astype(np.float64)
    present = np.all([np.isfinite(values) for values in columns.values()], axis=0)
    found = {name: within_auroc(values[present], correct[present], owner[present]) for name, values in columns.items()}
    return {name: value for name, (value, _) in found.items()}, found[SHORTEST][1]
