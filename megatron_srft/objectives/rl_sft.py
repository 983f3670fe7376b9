"""RL with an SFT loss: a policy gradient on the rollouts plus the likelihood of the demonstrations.

    loss = - mean min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A)     over the rollouts
           + sft_weight * mean_t -log p_t                                  over the demonstrations
           - c * mean_t H_t                                                over both

with A the advantage over the rollouts alone. The baseline "RL w/ SFT loss" of LUFFY (arXiv 2504.14945), which has no
clip and divides by a constant length, and the plain sum of SRFT (arXiv 2506.19767, section 3.2.2), which says nothing
more; here that one has GRPO's clip and mean.

Differs from the released code: the likelihood is a mean over the update's tokens, not over those of a micro-batch.
"""

from megatron_srft.config import HptConfig, RlSftConfig
from megatron_srft.objectives.terms import (
    ObjectiveInputs,
    ObjectiveOutput,
    clipped_surrogate,
    entropy_bonus,
    evaluate,
    likelihood,
)
from megatron_srft.sample import Counts


def rl_sft(inputs: ObjectiveInputs, counts: Counts, config: RlSftConfig | HptConfig) -> ObjectiveOutput:
    """This micro-batch's share of the loss."""
    terms = {
        "rollouts": clipped_surrogate(inputs, counts, config),
        "sft": likelihood(counts, config.sft_weight),
        "entropy_bonus": entropy_bonus("both", counts, config.entropy_coefficient),
    }
    return evaluate(inputs, counts, terms, clips=True)
