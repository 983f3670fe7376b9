"""LUFFY: rollouts and demonstrations in one policy-gradient loss; the demonstrations' probability is shaped.

    loss = - (1/Z) ( sum_demonstrations sum_t f(p_t) A  +  sum_rollouts sum_t r_t A )  -  c * mean_t H_t
    p_t  = policy(y_t | x, y_<t)        f(p) = p / (p + gamma)        r_t = p_t / p_t before the step

Equations 4-6 of arXiv 2504.14945. Z counts both populations together; A is the advantage over the group with its
demonstration. A demonstration has the behaviour probability 1 and is never clipped.

Follows the paper's runs rather than its equations: no clip on rollouts, a constant length in place of the token count,
no standard deviation in the advantage. Differs from the released code: it divides by the constant length but not by
the number of sequences and averages over ranks, so its loss scales with the cluster; here Z is the number of sequences
times the constant length, and the entropy mean runs over the whole update.
"""

import torch

from megatron_srft.config import LuffyConfig
from megatron_srft.objectives.metrics import clip_metrics, demonstration_metrics, rollout_metrics
from megatron_srft.objectives.terms import (
    ObjectiveInputs,
    ObjectiveOutput,
    average,
    clipped_surrogate,
    correct_for_engine,
    entropy_bonus,
    log_ratio,
    shaped_probability,
)
from megatron_srft.sample import Counts


def luffy(inputs: ObjectiveInputs, counts: Counts, config: LuffyConfig) -> ObjectiveOutput:
    """This micro-batch's share of the LUFFY loss."""
    clip = torch.inf if config.clip is None else config.clip
    on_policy = clipped_surrogate(log_ratio(inputs).exp(), inputs.advantages, clip, clip)
    off_policy = -inputs.advantages * shaped_probability(inputs.logprobs, config.shaping, config.gamma)
    shares = dict(population="both", denominator=config.denominator, constant_length=config.constant_length)
    rollouts = average(correct_for_engine(on_policy, inputs), ~inputs.is_demonstration, inputs, counts, **shares)
    demonstrations = average(off_policy, inputs.is_demonstration, inputs, counts, **shares)
    bonus = entropy_bonus(inputs, counts, "both", config.entropy_coefficient)
    loss = rollouts + demonstrations + bonus
    clipping = {} if config.clip is None else clip_metrics(inputs, inputs.advantages, counts, clip, clip)
    return ObjectiveOutput(
        loss=loss,
        metrics={
            "loss": loss.detach(),
            "loss/rollouts": rollouts.detach(),
            "loss/demonstrations": demonstrations.detach(),
            "loss/entropy_bonus": bonus.detach(),
            **clipping,
            **rollout_metrics(inputs, counts),
            **demonstration_metrics(inputs, counts),
        },
    )
