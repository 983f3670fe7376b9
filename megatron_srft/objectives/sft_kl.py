"""SFT held near a reference policy (SFT-KL), the baseline of PSFT (arXiv 2508.17784) and SRFT (2506.19767).

    loss = mean_t -log p_t  +  kl_coefficient * mean_t (exp(d_t) - d_t - 1)        over the demonstrations' tokens
    d_t  = log reference(y_t | x, y_<t) - log p_t

The reference is the policy at the stage's start (trainer/old_policy.py). Neither paper writes the divergence down; this
is the estimator k3, as the code that PSFT rests on has it: one number per demonstration token, never negative, 0 with
gradient 0 where the policy is the reference. On tokens that the policy has not sampled it is a penalty, not an unbiased
estimate of KL(policy || reference). Its gradient by log p is 1 - exp(d): it bounds how far a token rises (at most 1, so
that with a coefficient below 1 SFT always wins), and pulls up what has fallen. Rollout rows contribute nothing.
"""

import dataclasses

from megatron_srft.config import SftKlConfig
from megatron_srft.objectives.terms import Mean, ObjectiveInputs, ObjectiveOutput, evaluate, mean_over
from megatron_srft.ops.divergence import divergence
from megatron_srft.ops.token_losses import Term
from megatron_srft.sample import Counts


def sft_kl(inputs: ObjectiveInputs, counts: Counts, config: SftKlConfig) -> ObjectiveOutput:
    """This micro-batch's share of the SFT-KL loss."""
    mean = mean_over("demonstrations", counts, Mean(config.denominator, config.constant_length))
    likelihood = Term(loss="nll", rows="demonstrations", **mean)
    output = evaluate(inputs, counts, {"sft": likelihood}, of_rollouts=False, demonstration_ratios=True)
    reference = inputs.logprobs.detach() if inputs.old_logprobs is None else inputs.old_logprobs
    k3 = divergence(inputs.logprobs, reference, "k3").masked_fill(~inputs.is_demonstration, 0)
    if mean["per_length"]:
        k3 = k3 / inputs.response_lengths
    penalty = config.kl_coefficient * mean["scale"] * k3.sum()
    loss = output.loss + penalty
    parts = {"loss": loss.detach(), "loss/sft": output.loss.detach(), "loss/kl": penalty.detach()}
    return dataclasses.replace(output, loss=loss, metrics=output.metrics | parts)
