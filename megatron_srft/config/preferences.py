"""Objectives that learn from preferences: pairs of a chosen and a rejected answer."""

import math
from typing import ClassVar, Literal

from megatron_srft.config.base import require, require_at_least, section


@section
class DpoConfig:
    kind: Literal["dpo"] = "dpo"
    samples_rollouts: ClassVar[bool] = False
    learns_from_demonstrations: ClassVar[bool] = False

    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid: the negative log-likelihood of the preference (DPO). ipo: the squared distance of the margin from
    1 / (2 beta)."""

    beta: float = 0.1
    """Strength of the hold on the reference policy, that at the stage's start; IPO calls it tau. Length-normalised
    margins are smaller and take a larger one: Tulu 3 has 5."""

    length_normalised: bool | None = None
    """Take the mean of an answer's log-ratios over its tokens in place of their sum. null: true for ipo, whose authors
    had it so, false for sigmoid."""

    label_smoothing: float = 0.0
    """Share of the pairs that are assumed to be labelled the wrong way round (conservative DPO); only with sigmoid."""

    sft_coefficient: float = 0.0
    """Weight of the negative log-likelihood of the chosen answers, each divided by its length (RPO has 1)."""

    def __post_init__(self):
        require_at_least(0, self, "objective", "sft_coefficient")
        require(0 < self.beta < math.inf, f"objective.beta must be a number above 0, not {self.beta}")
        require(
            0 <= self.label_smoothing < 0.5,
            f"objective.label_smoothing must be at least 0 and below 0.5, not {self.label_smoothing}: from one half on "
            "the rejected answers are taken for the better ones",
        )
        require(
            self.loss == "sigmoid" or self.label_smoothing == 0,
            "objective.label_smoothing belongs to objective.loss sigmoid; with ipo set it to 0",
        )

    @property
    def per_token(self) -> bool:
        """Whether log-ratios are averaged over an answer's tokens."""
        return self.loss == "ipo" if self.length_normalised is None else self.length_normalised
