"""SFT held near a reference policy (SFT-KL), the baseline of PSFT (arXiv 2508.17784) and SRFT (2506.19767).

    loss = mean_t -log p_t  +  kl_coefficient * mean_t D_t        over the demonstrations' tokens
    k3:    D_t = exp(d_t) - d_t - 1,    d_t = log reference(y_t | x, y_<t) - log p_t
    full:  D_t = KL(policy || reference) of the next-token distribution at t, or KL(reference || policy)

The reference is the policy at the stage's start. Neither paper writes the divergence down; k3 is what the code that
PSFT rests on has: one number per demonstration token, never negative, 0 with gradient 0 where the policy is the
reference. On tokens that the policy has not sampled it is a penalty, not an unbiased estimate of
KL(policy || reference). Its gradient by log p is 1 - exp(d): it bounds how far a token rises (at most 1, so that with a
coefficient below 1 SFT always wins), and pulls up what has fallen. `full` is the divergence itself along the
demonstrations (ops/linear_kl.py); it needs the reference's weights (trainer/beside_reference.py), k3 only its log-probs
(trainer/old_policy.py). Rollout rows contribute nothing.
"""

import dataclasses

from torch import Tensor

from megatron_srft.config import SftKlConfig
from megatron_srft.objectives.terms import Mean, ObjectiveInputs, ObjectiveOutput, evaluate, mean_over
from megatron_srft.ops.divergence import divergence
from megatron_srft.ops.token_losses import Term
from megatron_srft.sample import Counts


def sft_kl(inputs: ObjectiveInputs, counts: Counts, config: SftKlConfig) -> ObjectiveOutput:
    """This micro-batch's share of the SFT-KL loss."""
    mean = mean_over("demonstrations", counts, Mean(config.denominator, config.constant_length))
    full = config.estimator == "full"
    terms = {"sft": Term(loss="nll", rows="demonstrations", **mean)}
    output = evaluate(inputs, counts, terms, of_rollouts=False, demonstration_ratios=not full)
    rows = full_divergence(inputs) if full else k3_divergence(inputs)
    shares = rows / inputs.response_lengths if mean["per_length"] else rows
    penalty = config.kl_coefficient * mean["scale"] * shares.sum()
    loss = output.loss + penalty
    parts = {"loss": loss.detach(), "loss/sft": output.loss.detach(), "loss/kl": penalty.detach()}
    if full and counts.demonstration_tokens:
        parts["kl/demonstrations_full"] = rows.detach().sum() / counts.demonstration_tokens
    return dataclasses.replace(output, loss=loss, metrics=output.metrics | parts)


def k3_divergence(inputs: ObjectiveInputs) -> Tensor:
    """[rows], 0 on rollouts."""
    reference = inputs.logprobs.detach() if inputs.old_logprobs is None else inputs.old_logprobs
    return divergence(inputs.logprobs, reference, "k3").masked_fill(~inputs.is_demonstration, 0)


def full_divergence(inputs: ObjectiveInputs) -> Tensor:
    """[rows], 0 on rollouts."""
    assert inputs.reference_kl is not None, "the divergence from the reference was not computed"
    return inputs.reference_kl.masked_fill(~inputs.is_demonstration, 0)
