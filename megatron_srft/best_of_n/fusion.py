"""Several scores of the same candidates put together, by the two rules of SWIFT (arXiv 2505.12225, eval/bon_eval.py).

    rank selection      rank every score, best 0; a candidate is as good as the worst of its ranks; the least wins
    scaled averaging    every score scaled to [0, 1] within the group, then the weighted mean; the greatest wins

Both look at one group, the candidates to choose from, so they depend on N. Ties go to the candidate that comes first;
rank selection has many, because two candidates that swap their ranks are always tied. A group whose scores are all the
same is scaled to 1.

All arrays are [..., candidates] float64 and NaN where a candidate has no score: it ranks last, and is averaged to -inf.
"""

from collections.abc import Sequence

import numpy as np


def ranks(scores: np.ndarray) -> np.ndarray:
    """[..., candidates] int64: 0 for the highest score; equal scores in their order, NaN last."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    return np.argsort(order, axis=-1, kind="stable")


def worst_rank(streams: Sequence[np.ndarray]) -> np.ndarray:
    """The largest of each candidate's ranks; the least of them is rank selection's choice."""
    return np.max([ranks(scores) for scores in streams], axis=0)


def scaled(scores: np.ndarray) -> np.ndarray:
    """(score - least) / (greatest - least) within the group; 1 where all are the same, NaN where there is no score."""
    present = ~np.isnan(scores)
    least = np.min(scores, axis=-1, keepdims=True, initial=np.inf, where=present)
    spread = np.max(scores, axis=-1, keepdims=True, initial=-np.inf, where=present) - least
    with np.errstate(invalid="ignore"):  # a group without any score: inf - inf
        share = (scores - least) / np.where(spread > 0, spread, 1.0)
    return np.where(present & ~(spread > 0), 1.0, share)


def scaled_average(streams: Sequence[np.ndarray], weights: Sequence[float] | None = None) -> np.ndarray:
    """Weighted mean of the scaled scores, -inf for a candidate that lacks one of them.

    Args:
        weights: one for each stream, not all zero; None: the same for all, as in the paper.

    Raises:
        ValueError: the weights do not fit the streams, or are negative or all zero.
    """
    weights = [1.0] * len(streams) if weights is None else list(weights)
    if len(weights) != len(streams):
        raise ValueError(f"{len(weights)} weights for {len(streams)} scores; give one for each")
    if not all(0 <= weight < np.inf for weight in weights) or not any(weights):
        raise ValueError(f"weights of scores must be finite, at least 0 and not all 0, got {weights}")
    total = sum(weight * scaled(scores) for weight, scores in zip(weights, streams, strict=True)) / sum(weights)
    return np.where(np.isnan(total), -np.inf, total)
