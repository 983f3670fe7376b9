"""ReLIFT (arXiv 2506.07527): reinforcement learning, interleaved with fine-tuning on the prompts it cannot solve.

    update on rollouts         - mean min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A)  -  c * mean_t H_t
    update on demonstrations     mean_t -log p_t  -  sft_entropy_coefficient * mean_t H_t

An update has sequences of one population, so one function serves both. The first is Dr.GRPO. Prompts none of whose
completions is right wait in a queue (routing.py); whenever it holds buffer_size of them, their demonstrations make one
update with the learning rate sft_lr after that of the step.

Differs from the released code, which has an optimizer of its own for the second kind: here both share AdamW's moments,
since a second set would be 8 bytes per parameter in memory and in every checkpoint. A prompt without a demonstration
does not wait (counted).
"""

from megatron_srft.config import ReliftConfig
from megatron_srft.objectives.terms import (
    ObjectiveInputs,
    ObjectiveOutput,
    clipped_surrogate,
    entropy_bonus,
    evaluate,
    likelihood,
)
from megatron_srft.sample import Counts


def relift(inputs: ObjectiveInputs, counts: Counts, config: ReliftConfig) -> ObjectiveOutput:
    """This micro-batch's share of the ReLIFT loss, of either kind of update."""
    terms = {
        "rollouts": clipped_surrogate(inputs, counts, config),
        "entropy_bonus": entropy_bonus("rollouts", counts, config.entropy_coefficient),
        "sft": likelihood(counts, 1.0),
        "sft_entropy_bonus": entropy_bonus("demonstrations", counts, config.sft_entropy_coefficient),
    }
    return evaluate(inputs, counts, terms, clips=True)
