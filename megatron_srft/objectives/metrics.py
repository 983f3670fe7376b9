"""Per-token figures that every objective reports, each a share of the update's mean (see ObjectiveOutput)."""

import torch
from torch import Tensor

from megatron_srft.objectives.terms import ObjectiveInputs, log_ratio, rows_of, token_mean
from megatron_srft.sample import Counts


def demonstration_metrics(inputs: ObjectiveInputs, counts: Counts) -> dict[str, Tensor]:
    """Mean negative log-likelihood and entropy over demonstration tokens; nothing if the update has none."""
    if counts.demonstration_tokens == 0:
        return {}
    return {
        "nll/demonstrations": token_mean(-inputs.logprobs.detach(), inputs, counts, "demonstrations"),
        "entropy/demonstrations": token_mean(inputs.entropy.detach(), inputs, counts, "demonstrations"),
    }


def rollout_metrics(inputs: ObjectiveInputs, counts: Counts) -> dict[str, Tensor]:
    """Entropy, importance ratio, KL and mismatch with the engine over rollout tokens; nothing if the update has none.

    kl/k1 and kl/k3 estimate KL(policy before the step || policy) by -log r and by r - 1 - log r, with r the importance
    ratio. mismatch/* is |trainer - engine| of the log-probs before the step, in nats.
    """
    if counts.rollout_tokens == 0:
        return {}
    logprobs = inputs.logprobs.detach()
    difference = log_ratio(inputs).detach()
    ratio = difference.exp()
    mismatch = ((logprobs if inputs.old_logprobs is None else inputs.old_logprobs) - inputs.rollout_logprobs).abs()
    means = {
        "nll/rollouts": -logprobs,
        "entropy/rollouts": inputs.entropy.detach(),
        "ratio/mean": ratio,
        "kl/k1": -difference,
        "kl/k3": ratio - 1 - difference,
        "mismatch/mean": mismatch,
    }
    out = {name: token_mean(values, inputs, counts, "rollouts") for name, values in means.items()}
    out["max/ratio"] = largest(ratio, rows_of(inputs, "rollouts"))
    out["max/mismatch"] = largest(mismatch, rows_of(inputs, "rollouts"))
    return out


def clip_metrics(
    inputs: ObjectiveInputs, advantages: Tensor, counts: Counts, clip_low: float, clip_high: float
) -> dict[str, Tensor]:
    """Share of rollout tokens whose gradient the lower and the upper clip removes."""
    if counts.rollout_tokens == 0:
        return {}
    ratio = log_ratio(inputs).detach().exp()
    clipped_low = (advantages < 0) & (ratio < 1 - clip_low)
    clipped_high = (advantages > 0) & (ratio > 1 + clip_high)
    return {
        "clip_fraction/low": token_mean(clipped_low.to(ratio.dtype), inputs, counts, "rollouts"),
        "clip_fraction/high": token_mean(clipped_high.to(ratio.dtype), inputs, counts, "rollouts"),
    }


def largest(values: Tensor, mask: Tensor) -> Tensor:
    """The largest of non-negative `values` within `mask`; 0 when there is none."""
    if values.numel() == 0:
        return values.new_zeros(())
    return torch.where(mask, values, 0).amax()
