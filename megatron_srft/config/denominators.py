"""What objectives have in common: their denominators, and checks of their fields."""

from typing import Any, Literal

from megatron_srft.config.base import require

Denominator = Literal["tokens", "sequence_mean", "sequence_sum", "constant"]
"""How a sum over one token population becomes a mean; every count is global over the optimizer update.

tokens         sum over tokens / number of tokens                      (DAPO, SFT)
sequence_mean  mean over sequences of the mean over their tokens       (GRPO)
sequence_sum   mean over sequences of the sum over their tokens
constant       sum over tokens / (number of sequences * constant_length)   (Dr.GRPO)
"""


def require_positive(objective: Any, *names: str) -> None:
    for name in names:
        value = getattr(objective, name)
        require(value is None or value > 0, f"objective.{name} must be above 0, got {value}")


def require_clips(objective: Any, *names: str) -> None:
    for name in names:
        value = getattr(objective, name)
        require(value is None or value >= 0, f"objective.{name} must not be negative, got {value}")


def require_dual_clip(objective: Any) -> None:
    bound = objective.dual_clip
    require(bound is None or bound > 1, "objective.dual_clip must be above 1; null switches it off")
