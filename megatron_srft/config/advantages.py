"""How rewards become advantages."""

from typing import Literal

from megatron_srft.config.base import require, require_at_least, section


@section
class AdvantageConfig:
    kind: Literal["group", "leave_one_out", "none", "gae"] | None = None
    """group: reward minus the group's mean (GRPO). leave_one_out: minus the mean of the others (RLOO). none: the return
    itself (REINFORCE, REINFORCE++). gae: against a critic's values (PPO). null: the objective's published setting."""

    normalize_std: bool | None = None
    """Divide by the group's standard deviation (GRPO) or not (Dr.GRPO). null: the objective's published setting."""

    normalize_batch: bool | None = None
    """Then subtract the mean over all rollout tokens of the step, and divide by their standard deviation (REINFORCE++,
    PPO). null: the objective's published setting."""

    include_demonstration: bool | None = None
    """Count the demonstration as a member of its group. null: the objective's published setting."""

    lam: float = 1.0
    """gae: the weight of later errors of the values. 1 (arXiv 2502.03373) is the return minus the value, 0 the one-step
    error; below 1 all rewards need the same gamma. The value behind the last token is 0, also of a cut response."""

    std_epsilon: float = 1e-6
    """Added to a standard deviation; a group with equal rewards gets advantage 0 whatever this is."""

    def __post_init__(self):
        require_at_least(0, self, "advantage", "std_epsilon")
        require(0 <= self.lam <= 1, f"advantage.lam must lie between 0 and 1, not {self.lam}")
