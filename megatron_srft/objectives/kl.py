"""The penalty in the loss that holds the policy near another one.

    loss + kl.coefficient * mean_t k(log policy(y_t) - log reference(y_t))        over the rollouts' tokens
    loss + kl.coefficient * mean_t k(log old(y_t) - log policy(y_t))

The first is GRPO's with k3 (arXiv 2402.03300, equation 4), under the mean of its surrogate. The second is the penalty
form of TRPO's and PPO's trust region (arXiv 1707.06347, equation 8), KL(old || policy): the old policy has sampled the
tokens, so k1 and k3 estimate it without bias, and so do their gradients. The estimators: ops/divergence.py.
"""

import dataclasses

import torch
from torch import Tensor

from megatron_srft.config import KlConfig, ObjectiveConfig
from megatron_srft.objectives.terms import Mean, ObjectiveInputs, ObjectiveOutput, mean_over, token_mean_over
from megatron_srft.ops.divergence import divergence
from megatron_srft.sample import Counts


def add_penalty(
    output: ObjectiveOutput, inputs: ObjectiveInputs, counts: Counts, objective: ObjectiveConfig, kl: KlConfig
) -> ObjectiveOutput:
    """With kl.place loss, the objective's loss with kl.coefficient times the mean divergence of the rollouts' tokens.

    The mean is the objective's own over rollouts (its `denominator`), or the one over tokens where it has none.
    Metrics: the penalty as loss/kl, and wherever it stands kl/reference_k1, _k3 (means over tokens).
    """
    parts = reference_figures(inputs, counts) if kl.against == "reference" else {}
    if not kl.in_loss:
        return dataclasses.replace(output, metrics=output.metrics | parts)
    denominator = getattr(objective, "denominator", "tokens")
    mean = mean_over("rollouts", counts, Mean(denominator, getattr(objective, "constant_length", None)), kl.coefficient)
    if kl.against == "old":
        old = inputs.logprobs.detach() if inputs.old_logprobs is None else inputs.old_logprobs
        rows = divergence(old, inputs.logprobs, kl.estimator)
    else:
        rows = divergence(inputs.logprobs, inputs.reference_logprobs, kl.estimator)
    rows = rows.masked_fill(inputs.is_demonstration, 0)
    if mean["per_length"]:
        rows = rows / inputs.response_lengths
    penalty = mean["scale"] * rows.sum()
    loss = output.loss + penalty
    parts |= {"loss": loss.detach(), "loss/kl": penalty.detach()}
    return dataclasses.replace(output, loss=loss, metrics=output.metrics | parts)


def reference_figures(inputs: ObjectiveInputs, counts: Counts) -> dict[str, Tensor]:
    """kl/reference_k1 and _k3: shares of the means over the rollouts' tokens."""
    assert inputs.reference_logprobs is not None, "the reference policy's log-probs were not measured"
    scale = token_mean_over("rollouts", counts)["scale"]
    with torch.no_grad():
        return {
            f"kl/reference_{name}": scale
            * divergence(inputs.logprobs, inputs.reference_logprobs, name).masked_fill(inputs.is_demonstration, 0).sum()
            for name in ("k1", "k3")
        }
