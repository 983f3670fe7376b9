"""CHORD (arXiv 2508.11408): a policy gradient and the likelihood of demonstrations, whose shares shift over the steps.

    loss = (1 - mu) * -mean_t min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A)  +  mu * mean_t -w_t log p_t
                       rollouts                                                        demonstrations
    w_t  = 1, or p_t (1 - p_t) without gradient (phi), or p_t without gradient (DFT, arXiv 2508.05629)

CHORD-mu lets mu fall along half a cosine with w = 1; CHORD-phi holds mu and spares the tokens of which the policy is
sure either way. A is the advantage over the rollouts alone. `scheduled` gives mu its value at a step.

Differs from the released code: both means run over the tokens of the update, not of a micro-batch weighted by its
sequences; the share of demonstrations in a batch (0.2 there) is that of the data here.
"""

import dataclasses
import math

from torch import Tensor

from megatron_srft.config import ChordConfig, ObjectiveConfig
from megatron_srft.objectives.terms import (
    ObjectiveInputs,
    ObjectiveOutput,
    clipped_surrogate,
    entropy_bonus,
    evaluate,
    likelihood,
)
from megatron_srft.sample import Counts


def chord(inputs: ObjectiveInputs, counts: Counts, config: ChordConfig) -> ObjectiveOutput:
    """This micro-batch's share of the CHORD loss, with mu as it stands in the config."""
    weights = token_weights(inputs.logprobs, config)
    terms = {
        "rollouts": clipped_surrogate(inputs, counts, config, 1 - config.mu),
        "sft": likelihood(counts, config.mu, weights),
        "entropy_bonus": entropy_bonus("rollouts", counts, config.entropy_coefficient),
    }
    return evaluate(inputs, counts, terms, clips=True, weights={} if weights is None else {"sft": "sft"})


def token_weights(logprobs: Tensor, config: ChordConfig) -> Tensor | None:
    """[rows] without gradient; None: 1."""
    p = logprobs.detach().exp()
    match config.token_weight:
        case "phi":
            return p * (1 - p)
        case "probability":
            return p
    return None


def scheduled(objective: ObjectiveConfig, stage_step: int) -> ObjectiveConfig:
    """The objective as it is at a step of its stage (from 0): CHORD with the mu of that step, others as they are."""
    if not isinstance(objective, ChordConfig):
        return objective
    return dataclasses.replace(objective, mu=mu_at(objective, stage_step))


def mu_at(config: ChordConfig, stage_step: int) -> float:
    """A rise from 0 to mu over the warm-up, half a cosine from there to mu_end, then mu_end."""
    if stage_step < config.mu_warmup_steps:
        return config.mu * stage_step / config.mu_warmup_steps
    after = stage_step - config.mu_warmup_steps
    if after >= config.mu_decay_steps:
        return config.mu_end
    falling = 0.5 * (1 + math.cos(math.pi * after / config.mu_decay_steps))
    return config.mu_end + (config.mu - config.mu_end) * falling
