"""Supervised fine-tuning: the negative log-likelihood of the demonstrations.

    loss = mean_t -log policy(y_t | x, y_<t)        over the demonstrations' response tokens

Equation 1 of SRFT (arXiv 2506.19767). Rollout rows contribute nothing.
"""

from megatron_srft.config import SftConfig
from megatron_srft.objectives.metrics import demonstration_metrics
from megatron_srft.objectives.terms import ObjectiveInputs, ObjectiveOutput, average
from megatron_srft.sample import Counts


def sft(inputs: ObjectiveInputs, counts: Counts, config: SftConfig) -> ObjectiveOutput:
    """This micro-batch's share of the SFT loss."""
    loss = average(
        -inputs.logprobs,
        inputs.is_demonstration,
        inputs,
        counts,
        population="demonstrations",
        denominator=config.denominator,
        constant_length=config.constant_length,
    )
    return ObjectiveOutput(loss=loss, metrics={"loss": loss.detach(), **demonstration_metrics(inputs, counts)})
