"""Group relative policy optimisation: the clipped surrogate on rollouts, with group advantages.

    loss = - mean min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A)  -  c * mean_t H_t
    r_t  = policy(y_t | x, y_<t) / policy before the step(y_t | x, y_<t)

GRPO: arXiv 2402.03300. DAPO (arXiv 2503.14476) is the preset with a higher upper clip and the mean over all tokens;
Dr.GRPO (arXiv 2503.20783) the one with the constant denominator and advantages without the standard deviation. Dual
clip (arXiv 1912.09729) bounds the ratio of negative advantages.

Demonstration rows contribute nothing. Differs from the papers: no KL term to a reference policy (DAPO and Dr.GRPO drop
it as well).
"""

from megatron_srft.config import GrpoConfig
from megatron_srft.objectives.metrics import clip_metrics, rollout_metrics
from megatron_srft.objectives.terms import (
    ObjectiveInputs,
    ObjectiveOutput,
    average,
    clipped_surrogate,
    correct_for_engine,
    entropy_bonus,
    log_ratio,
)
from megatron_srft.sample import Counts


def grpo(inputs: ObjectiveInputs, counts: Counts, config: GrpoConfig) -> ObjectiveOutput:
    """This micro-batch's share of the GRPO loss."""
    losses = clipped_surrogate(
        log_ratio(inputs).exp(), inputs.advantages, config.clip_low, config.clip_high, config.dual_clip
    )
    policy = average(
        correct_for_engine(losses, inputs),
        ~inputs.is_demonstration,
        inputs,
        counts,
        population="rollouts",
        denominator=config.denominator,
        constant_length=config.constant_length,
    )
    bonus = entropy_bonus(inputs, counts, "rollouts", config.entropy_coefficient)
    loss = policy + bonus
    return ObjectiveOutput(
        loss=loss,
        metrics={
            "loss": loss.detach(),
            "loss/rollouts": policy.detach(),
            "loss/entropy_bonus": bonus.detach(),
            **clip_metrics(inputs, inputs.advantages, counts, config.clip_low, config.clip_high),
            **rollout_metrics(inputs, counts),
        },
    )
