"""How much fine-tuning changed the probability of each token of given texts.

    d_t = p_after(y_t | y_<t) - p_before(y_t | y_<t)        both by teacher forcing on the same tokens

after SRFT (arXiv 2506.19767, section 3.1.1), which shades lower, similar and higher tokens and leaves open who
generates and where "similar" ends. Both are choices here, and the shares below are given for several thresholds,
because a share of changed tokens means nothing without one.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_srft.analysis.sequences import response
from megatron_srft.config import require
from megatron_srft.sample import TrainingSequence
from megatron_srft.trainer.step import SequenceStats

THRESHOLDS = (0.01, 0.05, 0.1, 0.2, 0.5)
"""Symmetric thresholds at which the shares are given beside those that were asked for."""

BINS = 40
"""Of the histogram, from -1 to 1."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Change:
    """Probabilities of the response tokens of some texts, before and after."""

    tokens: list[np.ndarray]
    """[response] ids of each text."""
    before: list[np.ndarray]
    """[response] float64 probabilities."""
    after: list[np.ndarray]

    @property
    def differences(self) -> list[np.ndarray]:
        """[response] d_t of each text."""
        return [after - before for before, after in zip(self.before, self.after, strict=True)]

    @property
    def all(self) -> np.ndarray:
        """[tokens] d_t of all texts."""
        return np.concatenate(self.differences)


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Shares of the tokens; they add up to 1."""

    lower: float
    similar: float
    higher: float

    @property
    def changed(self) -> float:
        return self.lower + self.higher


@dataclass(frozen=True, kw_only=True)
class TokenChange:
    """One token of the vocabulary over all its occurrences."""

    token: int
    count: int
    mean: float
    """Mean d_t."""
    lower: float
    """Share of its occurrences that are lower."""
    higher: float


def change(
    sequences: Sequence[TrainingSequence], before: Sequence[SequenceStats], after: Sequence[SequenceStats]
) -> Change:
    """From teacher-forced statistics of the same sequences."""
    return Change(
        tokens=[response(one) for one in sequences],
        before=[np.exp(stats.logprobs.astype(np.float64)) for stats in before],
        after=[np.exp(stats.logprobs.astype(np.float64)) for stats in after],
    )


def check_thresholds(lower: float, higher: float) -> None:
    """Raises ConfigError unless -1 <= lower <= 0 <= higher <= 1."""
    fit = -1 <= lower <= 0 <= higher <= 1
    require(fit, f"--lower {lower:g} must lie in [-1, 0], and --higher {higher:g} in [0, 1]: they are differences of "
                 "probabilities")  # fmt: skip


def shares(differences: np.ndarray, lower: float, higher: float) -> Shares:
    """Which tokens are below `lower`, which above `higher`."""
    below, above = float(np.mean(differences < lower)), float(np.mean(differences > higher))
    return Shares(lower=below, similar=1 - below - above, higher=above)


def token_changes(found: Change, lower: float, higher: float) -> list[TokenChange]:
    """Every token that occurs, from the most lowered to the most raised on average."""
    by_token: dict[int, list[float]] = defaultdict(list)
    for tokens, differences in zip(found.tokens, found.differences, strict=True):
        for token, difference in zip(tokens.tolist(), differences.tolist(), strict=True):
            by_token[token].append(difference)
    rows = []
    for token, values in by_token.items():
        part = shares(np.array(values), lower, higher)
        rows.append(
            TokenChange(
                token=token, count=len(values), mean=float(np.mean(values)), lower=part.lower, higher=part.higher
            )
        )
    return sorted(rows, key=lambda row: (row.mean, row.token))


def histogram(differences: np.ndarray) -> tuple[list[float], list[int]]:
    """([BINS + 1] edges from -1 to 1, [BINS] counts)."""
    counts, edges = np.histogram(np.clip(differences, -1, 1), bins=BINS, range=(-1, 1))
    return edges.tolist(), counts.tolist()


def to_json(found: Change, texts: Sequence[dict[str, str]], lower: float, higher: float) -> dict[str, Any]:
    """All figures as a plain tree.

    Args:
        texts: what else is to stand beside each text, for example prompt and response.
    """
    differences = found.all
    asked = shares(differences, lower, higher)
    edges, counts = histogram(differences)
    return {
        "tokens": len(differences),
        "thresholds": {"lower": lower, "higher": higher},
        "shares": _shares_tree(asked),
        "shares_at": {str(t): _shares_tree(shares(differences, -t, t)) for t in THRESHOLDS},
        "mean": float(differences.mean()),
        "mean_absolute": float(np.abs(differences).mean()),
        "histogram": {"edges": edges, "counts": counts},
        "by_token": [vars(row) for row in token_changes(found, lower, higher)],
        "texts": [
            {**text, "token_ids": tokens.tolist(), "before": before.tolist(), "after": after.tolist()}
            for text, tokens, before, after in zip(texts, found.tokens, found.before, found.after, strict=True)
        ],
    }


def _shares_tree(part: Shares) -> dict[str, float]:
    return {"changed": part.changed, **vars(part)}
