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

from typing import Any

import torch
from torch import Tensor

from megatron_srft.config import SrftConfig
from megatron_srft.objectives.terms import (
    Mean,
    ObjectiveInputs,
    ObjectiveOutput,
    Population,
    entropy_at_level,
    entropy_bonus,
    entropy_weight,
    evaluate,
    mean_over,
    token_mean_over,
)
from megatron_srft.ops.token_losses import SHAPINGS, Term
from megatron_srft.sample import Counts


def srft(inputs: ObjectiveInputs, counts: Counts, config: SrftConfig) -> ObjectiveOutput:
    """This micro-batch's share of the SRFT loss."""
    entropy = entropy_at_level(inputs, config.entropy_level)
    w_sft = entropy_weight(entropy, config.sft_weight, config.sft_entropy_sign, config.exponent_limit)
    w_rl = entropy_weight(entropy, config.rl_weight, config.rl_entropy_sign, config.exponent_limit)

    def rl_mean(population: Population, coefficient: float = 1.0) -> dict[str, Any]:
        mean = Mean(config.denominator, config.constant_length)
        return mean_over("both" if config.joint_rl_count else population, counts, mean, coefficient)

    on_policy = rollout_surrogate(inputs, config) | rl_mean("rollouts")
    terms = {
        "sft": Term(loss="nll", rows="demonstrations", weights=w_sft, **token_mean_over("demonstrations", counts)),
        "rl_demonstrations": Term(
            loss=SHAPINGS[config.demonstration_shaping],
            rows="demonstrations",
            advantages=inputs.advantages,
            gamma=config.gamma,
            **rl_mean("demonstrations", config.demonstration_rl_weight),
        ),
        "rl_positive": Term(rows="positive_rollouts", weights=w_rl, **on_policy),
        "rl_negative": Term(rows="other_rollouts", **on_policy),
        "entropy_bonus": entropy_bonus("both", counts, config.entropy_coefficient),
    }
    clips = config.rollout_surrogate == "clipped_ratio"
    return evaluate(inputs, counts, terms, clips=clips, weights={"sft": "sft", "rl": "rl_positive"})


def rollout_surrogate(inputs: ObjectiveInputs, config: SrftConfig) -> dict[str, Any]:
    """The fields of a `Term` for -a g."""
    advantages = rollout_advantages(inputs, config)
    match config.rollout_surrogate:
        case "logprob":
            return dict(loss="logprob", advantages=advantages)
        case "ratio":
            return dict(loss="clipped", advantages=advantages)
        case "clipped_ratio":
            clips = dict(clip_low=config.clip_low, clip_high=config.clip_high)
            return dict(loss="clipped", advantages=advantages, **clips)


def rollout_advantages(inputs: ObjectiveInputs, config: SrftConfig) -> Tensor:
    """[rows] +1/-1 by the verifier's verdict (a failed verification counts as wrong), or the group advantage."""
    if config.rollout_advantage == "group":
        return inputs.advantages
    return torch.where(inputs.correct, 1.0, -1.0).to(inputs.logprobs.dtype)
