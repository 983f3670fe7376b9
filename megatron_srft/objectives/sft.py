"""Supervised fine-tuning: the negative log-likelihood of the demonstrations.

    loss = mean_t -log policy(y_t | x, y_<t)        over the demonstrations' response tokens

Equation 1 of SRFT (arXiv 2506.19767). Rollout rows contribute nothing.
"""

from megatron_srft.config import SftConfig
from megatron_srft.objectives.terms import Mean, ObjectiveInputs, ObjectiveOutput, evaluate, mean_over
from megatron_srft.ops.token_losses import Term
from megatron_srft.sample import Counts


def sft(inputs: ObjectiveInputs, counts: Counts, config: SftConfig) -> ObjectiveOutput:
    """This micro-batch's share of the SFT loss."""
    mean = mean_over("demonstrations", counts, Mean(config.denominator, config.constant_length))
    return evaluate(inputs, counts, {"sft": Term(loss="nll", rows="demonstrations", **mean)}, of_rollouts=False)
