"""Hybrid post-training (HPT, arXiv 2509.04419): each prompt teaches by its completions or by its demonstration.

    loss = - mean r_t A  +  sft_weight * mean_t -log p_t  -  c * mean_t H_t
             rollouts        demonstrations

    right / completions <= gate:  the demonstration stays, the completions go
    otherwise:                    the completions stay, with the advantage over them alone; the demonstration goes

The gate is routing.gate; here every sequence that is left counts in the mean of its population. The surrogate has no
clip and a constant length, as in the released code. Differs from it: the likelihood is a mean over the update's tokens,
and a prompt under the gate without a demonstration keeps its completions. HPT-soft, whose coefficients come from a
table by the number of right answers, is not here.
"""

from megatron_srft.config import HptConfig
from megatron_srft.objectives.rl_sft import rl_sft
from megatron_srft.objectives.terms import ObjectiveInputs, ObjectiveOutput
from megatron_srft.sample import Counts


def hpt(inputs: ObjectiveInputs, counts: Counts, config: HptConfig) -> ObjectiveOutput:
    """This micro-batch's share: RL with an SFT loss over the sequences that have passed the gate."""
    return rl_sft(inputs, counts, config)
