"""How good scores are: do right responses score above wrong ones, and is the score a probability?

Best-of-N asks only for the order within a question, which an AUROC over all responses does not measure: easy questions
have high scores and right responses, so it is high even for scores that say nothing about one question's responses.

    AUROC           share of the pairs (right, wrong) in which the right one scores higher, ties counting half
    within          the mean over questions that have both of the question's own AUROC; 0.5 is chance
    overall         over all pairs, of different questions too
    by length       the same two for the score -tokens: what a rule that prefers short responses would reach
    Brier           mean of (p - y)^2 with p = sigmoid(score)
    ECE             expected calibration error (Guo et al., arXiv 1706.04599): over BINS equal bins of p, the mean of
                    |share of right responses - mean p|, weighted by how many responses a bin has
    accuracy        share of responses with (score > 0) = y

Everything here is of verdicts that were reached and scores that are numbers; who has none is counted elsewhere.
"""

from dataclasses import dataclass

import numpy as np

BINS = 10


@dataclass(frozen=True, kw_only=True)
class ReliabilityBin:
    """The responses whose probability lies in (low, high]; the first bin has 0 too."""

    low: float
    high: float
    responses: int
    mean_probability: float | None
    """None where the bin is empty."""
    share_right: float | None


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Of the scores of some responses. Figures that there is nothing to compute from are None."""

    responses: int
    right: int
    questions: int
    questions_with_both: int
    """Questions with right and wrong responses: those that `within_auroc` is over."""
    within_auroc: float | None
    overall_auroc: float | None
    within_auroc_by_length: float | None
    overall_auroc_by_length: float | None
    brier: float | None
    ece: float | None
    accuracy: float | None
    bins: tuple[ReliabilityBin, ...]


def quality(scores: np.ndarray, labels: np.ndarray, questions: np.ndarray, lengths: np.ndarray) -> Quality:
    """All figures.

    Args:
        scores: [responses] finite logits.
        labels: [responses] bool.
        questions: [responses]; equal for the responses to one question.
        lengths: [responses] tokens.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, bool)
    probabilities = sigmoid(scores)
    within, both = within_auroc(scores, labels, questions)
    bins = reliability(probabilities, labels)
    some = len(scores) > 0
    return Quality(
        responses=len(scores),
        right=int(labels.sum()),
        questions=len(np.unique(questions)),
        questions_with_both=both,
        within_auroc=within,
        overall_auroc=auroc(scores, labels),
        within_auroc_by_length=within_auroc(-np.asarray(lengths), labels, questions)[0],
        overall_auroc_by_length=auroc(-np.asarray(lengths), labels),
        brier=float(np.mean((probabilities - labels) ** 2)) if some else None,
        ece=calibration_error(bins) if some else None,
        accuracy=float(np.mean((scores > 0) == labels)) if some else None,
        bins=bins,
    )


def auroc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """From ranks: (rank sum of the right ones - n(n+1)/2) / (n m), equal scores sharing their mean rank (Mann and
    Whitney's U); None unless there are right and wrong ones."""
    labels = np.asarray(labels, bool)
    right, wrong = int(labels.sum()), int((~labels).sum())
    if right == 0 or wrong == 0:
        return None
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2
    return float((mean_rank[place][labels].sum() - right * (right + 1) / 2) / (right * wrong))


def within_auroc(scores: np.ndarray, labels: np.ndarray, questions: np.ndarray) -> tuple[float | None, int]:
    """(mean over the questions that have right and wrong responses, their number)."""
    order = np.argsort(questions, kind="stable")
    _, starts = np.unique(np.asarray(questions)[order], return_index=True)
    found = [
        value
        for part in np.split(order, starts[1:])
        if (value := auroc(np.asarray(scores)[part], np.asarray(labels)[part])) is not None
    ]
    return (float(np.mean(found)) if found else None), len(found)


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> tuple[ReliabilityBin, ...]:
    """The curve of a calibrated score is the diagonal: mean_probability = share_right in every bin."""
    edges = np.linspace(0, 1, bins + 1)
    place = np.searchsorted(edges[1:-1], probabilities)
    found = []
    for number in range(bins):
        inside = place == number
        some = bool(inside.any())
        found.append(
            ReliabilityBin(
                low=float(edges[number]),
                high=float(edges[number + 1]),
                responses=int(inside.sum()),
                mean_probability=float(probabilities[inside].mean()) if some else None,
                share_right=float(np.asarray(labels)[inside].mean()) if some else None,
            )
        )
    return tuple(found)


def calibration_error(bins: tuple[ReliabilityBin, ...]) -> float:
    """ECE from its bins."""
    total = sum(one.responses for one in bins)
    gaps = (one.responses * abs(one.share_right - one.mean_probability) for one in bins if one.responses)
    return sum(gaps) / total


def sigmoid(scores: np.ndarray) -> np.ndarray:
    """Without overflow for scores of any size."""
    return np.exp(-np.logaddexp(0, -np.asarray(scores, np.float64)))
