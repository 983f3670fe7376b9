"""Supervised reinforcement fine-tuning (SRFT): demonstrations and rollouts in one stage, weighted by entropy.

    loss = mean_demonstrations  w_sft (-log p_t)                        supervised
         + mean_demonstrations  -A f(p_t)                               demonstrations as off-policy samples
         + mean_rollouts        [a > 0] w_rl (-a g_t) + [a <= 0] (-a g_t)      positive and negative rollouts
         - c * mean_t H_t
    w_sft = sft_weight * exp(sft_entropy_sign * H)        w_rl = rl_weight * exp(rl_entropy_sign * H)

with p_t the policy's probability of the token, A the advantage over the group with its demonstration, H an entropy
without gradient. arXiv 2506.19767v1, equations 7-13, and its released code differ; each is a preset:

                          srft-paper                          srft-released
    w_sft                 0.5 exp(-H)                         0.5 exp(+H)
    H averaged over       not said; the sequence here         single tokens
    a                     +1 if correct, else -1              group advantage
    g_t                   log p_t                             importance ratio, not clipped
    f(p)                  p                                   p / (p + 0.1)
    c                     0                                   0.001
    mean of the RL terms  tokens of each population           constant length, both populations counted together

Chosen here where the sources are silent: the supervised term is a token mean under every preset; both rollout terms
are divided by all rollouts, not by the correct and the wrong ones apart. The constant denominator counts sequences
over the whole update, which the released code leaves to the size of the cluster (docs/objectives.md).
"""

import torch
from torch import Tensor

from megatron_srft.config import SrftConfig
from megatron_srft.objectives.metrics import clip_metrics, demonstration_metrics, largest, rollout_metrics
from megatron_srft.objectives.terms import (
    ObjectiveInputs,
    ObjectiveOutput,
    average,
    clipped_surrogate,
    correct_for_engine,
    entropy_at_level,
    entropy_bonus,
    entropy_weight,
    log_ratio,
    shaped_probability,
    token_mean,
)
from megatron_srft.sample import Counts


def srft(inputs: ObjectiveInputs, counts: Counts, config: SrftConfig) -> ObjectiveOutput:
    """This micro-batch's share of the SRFT loss."""
    entropy = entropy_at_level(inputs, config.entropy_level)
    w_sft = entropy_weight(entropy, config.sft_weight, config.sft_entropy_sign, config.exponent_limit)
    w_rl = entropy_weight(entropy, config.rl_weight, config.rl_entropy_sign, config.exponent_limit)
    advantages = rollout_advantages(inputs, config)
    on_policy = correct_for_engine(rollout_losses(inputs, advantages, config), inputs)
    off_policy = -inputs.advantages * shaped_probability(inputs.logprobs, config.demonstration_shaping, config.gamma)

    def rl_mean(values: Tensor, mask: Tensor, population: str) -> Tensor:
        population = "both" if config.joint_rl_count else population
        shares = dict(population=population, denominator=config.denominator, constant_length=config.constant_length)
        return average(values, mask, inputs, counts, **shares)

    is_rollout, positive = ~inputs.is_demonstration, advantages > 0
    terms = {
        "sft": token_mean(w_sft * -inputs.logprobs, inputs, counts, "demonstrations"),
        "rl_demonstrations": config.demonstration_rl_weight
        * rl_mean(off_policy, inputs.is_demonstration, "demonstrations"),
        "rl_positive": rl_mean(w_rl * on_policy, is_rollout & positive, "rollouts"),
        "rl_negative": rl_mean(on_policy, is_rollout & ~positive, "rollouts"),
        "entropy_bonus": entropy_bonus(inputs, counts, "both", config.entropy_coefficient),
    }
    loss = sum(terms.values())
    return ObjectiveOutput(
        loss=loss,
        metrics={
            "loss": loss.detach(),
            **{f"loss/{name}": term.detach() for name, term in terms.items()},
            **weight_metrics(inputs, counts, w_sft, w_rl),
            **(
                clip_metrics(inputs, advantages, counts, config.clip_low, config.clip_high)
                if config.rollout_surrogate == "clipped_ratio"
                else {}
            ),
            **rollout_metrics(inputs, counts),
            **demonstration_metrics(inputs, counts),
        },
    )


def rollout_advantages(inputs: ObjectiveInputs, config: SrftConfig) -> Tensor:
    """[rows] +1/-1 by the verifier's verdict (a failed verification counts as wrong), or the group advantage."""
    if config.rollout_advantage == "group":
        return inputs.advantages
    return torch.where(inputs.correct, 1.0, -1.0).to(inputs.logprobs.dtype)


def rollout_losses(inputs: ObjectiveInputs, advantages: Tensor, config: SrftConfig) -> Tensor:
    """[rows] -a g of the rollouts, before the entropy weight."""
    match config.rollout_surrogate:
        case "logprob":
            return -advantages * inputs.logprobs
        case "ratio":
            return -advantages * log_ratio(inputs).exp()
        case "clipped_ratio":
            return clipped_surrogate(log_ratio(inputs).exp(), advantages, config.clip_low, config.clip_high)


def weight_metrics(inputs: ObjectiveInputs, counts: Counts, w_sft: Tensor, w_rl: Tensor) -> dict[str, Tensor]:
    """Mean and largest w_sft over demonstration tokens, w_rl over all rollout tokens (also where it is not applied)."""
    out = {}
    if counts.demonstration_tokens:
        out["weight/sft"] = token_mean(w_sft, inputs, counts, "demonstrations")
        out["max/weight_sft"] = largest(w_sft, inputs.is_demonstration)
    if counts.rollout_tokens:
        out["weight/rl"] = token_mean(w_rl, inputs, counts, "rollouts")
        out["max/weight_rl"] = largest(w_rl, ~inputs.is_demonstration)
    return out
