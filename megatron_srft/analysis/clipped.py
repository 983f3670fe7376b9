"""Which tokens a ratio clip leaves alone, found from the old and the updated policy.

    r_t = p_new(y_t | y_<t) / p_old(y_t | y_<t)       by teacher forcing
    clipped   where A_t > 0 and r_t > 1 + clip_high, or A_t < 0 and r_t < 1 - clip_low

On demonstrations A = 1, which is PSFT (arXiv 2508.17784); on dumped rollouts A is the advantage that their scores give,
which is GRPO; a token of advantage 0 has no gradient to clip and is not counted.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_srft.analysis.sequences import response
from megatron_srft.config import require
from megatron_srft.sample import TrainingSequence
from megatron_srft.trainer.step import SequenceStats

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +- this before exp, as in the objectives."""


@dataclass(frozen=True, kw_only=True)
class ClippedToken:
    """One token of the vocabulary over its occurrences with an advantage."""

    token: int
    count: int
    above: int
    """Occurrences clipped at 1 + clip_high."""
    below: int
    """Occurrences clipped at 1 - clip_low."""
    share: float
    """Clipped ones of all."""
    mean_ratio: float
    """Over all occurrences."""
    mean_clipped_ratio: float | None
    """Over the clipped ones; None without any."""


@dataclass(frozen=True, kw_only=True)
class Clipped:
    """All tokens together, and each of the vocabulary, the most often clipped first."""

    tokens: int
    without_advantage: int
    above: float
    """Share of the tokens (with an advantage) clipped above."""
    below: float
    mean_ratio: float
    by_token: list[ClippedToken]


def check_clips(clip_low: float, clip_high: float) -> None:
    """Raises ConfigError unless 0 <= clip_low <= 1 and clip_high is at least 0 and finite."""
    require(0 <= clip_low <= 1, f"--clip-low must lie in [0, 1], not {clip_low:g}")
    require(0 <= clip_high < math.inf, f"--clip-high must be a number of at least 0, not {clip_high:g}")


def clipped_tokens(
    sequences: Sequence[TrainingSequence],
    old: Sequence[SequenceStats],
    new: Sequence[SequenceStats],
    clip_low: float,
    clip_high: float,
) -> Clipped:
    """Count, from teacher-forced statistics of the same sequences.

    Raises:
        ConfigError: no token has an advantage.
    """
    advantages = np.concatenate([one.advantages for one in sequences]) if sequences else np.zeros(0)
    has = advantages != 0
    require(
        bool(has.any()),
        "no token has an advantage, so none could be clipped: in each group all rewards are equal; take other files",
    )
    tokens = np.concatenate([response(one) for one in sequences])[has]
    change = [n.logprobs.astype(np.float64) - o.logprobs for o, n in zip(old, new, strict=True)]
    ratios = np.exp(np.clip(np.concatenate(change)[has], -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    above = (advantages[has] > 0) & (ratios > 1 + clip_high)
    below = (advantages[has] < 0) & (ratios < 1 - clip_low)
    return Clipped(
        tokens=int(has.sum()),
        without_advantage=int((~has).sum()),
        above=float(above.mean()),
        below=float(below.mean()),
        mean_ratio=float(ratios.mean()),
        by_token=_by_token(tokens, ratios, above, below),
    )


def _by_token(tokens: np.ndarray, ratios: np.ndarray, above: np.ndarray, below: np.ndarray) -> list[ClippedToken]:
    places: dict[int, list[int]] = defaultdict(list)
    for place, token in enumerate(tokens.tolist()):
        places[token].append(place)
    rows = []
    for token, where in places.items():
        clipped = (above | below)[where]
        rows.append(
            ClippedToken(
                token=token,
                count=len(where),
                above=int(above[where].sum()),
                below=int(below[where].sum()),
                share=float(clipped.mean()),
                mean_ratio=float(ratios[where].mean()),
                mean_clipped_ratio=float(ratios[where][clipped].mean()) if clipped.any() else None,
            )
        )
    return sorted(rows, key=lambda row: (-row.above - row.below, -row.share, row.token))


def to_json(found: Clipped, words: dict[int, str], clip_low: float, clip_high: float) -> dict[str, Any]:
    """Everything as a plain tree, with each token's text."""
    tree = asdict(found) | {"clip_low": clip_low, "clip_high": clip_high}
    tree["by_token"] = [{"text": words[row["token"]], **row} for row in tree["by_token"]]
    return tree
