"""Per-token figures that every objective reports, each a share of the update's mean (see ObjectiveOutput)."""

import torch
from torch import Tensor

from megatron_srft.objectives.terms import (
    ObjectiveInputs,
    Population,
    engine_log_ratio,
    log_ratio,
    population_size,
    token_mean,
)
from megatron_srft.sample import Counts


def demonstration_metrics(inputs: ObjectiveInputs, counts: Counts) -> dict[str, Tensor]:
    """Mean negative log-likelihood and entropy over demonstration tokens; nothing if the update has none."""
    values = {"nll/demonstrations": -inputs.logprobs.detach(), "entropy/demonstrations": inputs.entropy.detach()}
    return token_means(values, inputs, counts, "demonstrations")


def rollout_metrics(inputs: ObjectiveInputs, counts: Counts) -> dict[str, Tensor]:
    """Likelihood, entropy, importance ratio, KL and mismatch over rollout tokens; nothing if the update has none.

    kl/k1 and kl/k3 estimate KL(policy before the step || policy) by -log r and r - 1 - log r, with r the importance
    ratio. mismatch/* compares the policy before the step with the rollout engine: mean |difference| of the log-probs
    in nats, k3, and the share of tokens whose importance weight was truncated or masked.
    """
    difference = log_ratio(inputs).detach()
    ratio = difference.exp()
    engine = engine_log_ratio(inputs)
    engine_ratio = engine.exp()
    values = {
        "nll/rollouts": -inputs.logprobs.detach(),
        "entropy/rollouts": inputs.entropy.detach(),
        "ratio/mean": ratio,
        "kl/k1": -difference,
        "kl/k3": ratio - 1 - difference,
        "mismatch/mean": engine.abs(),
        "mismatch/k3": engine_ratio - 1 - engine,
    }
    if inputs.importance_weights is not None:
        values["mismatch/corrected_share"] = (inputs.importance_weights != engine_ratio).to(ratio.dtype)
    out = token_means(values, inputs, counts, "rollouts")
    if out:
        out["max/ratio"] = largest(ratio, ~inputs.is_demonstration)
        out["max/mismatch"] = largest(engine.abs(), ~inputs.is_demonstration)
    return out


def clip_metrics(
    inputs: ObjectiveInputs, advantages: Tensor, counts: Counts, clip_low: float, clip_high: float
) -> dict[str, Tensor]:
    """Share of rollout tokens whose gradient the lower and the upper clip removes."""
    ratio = log_ratio(inputs).detach().exp()
    values = {
        "clip_fraction/low": ((advantages < 0) & (ratio < 1 - clip_low)).to(ratio.dtype),
        "clip_fraction/high": ((advantages > 0) & (ratio > 1 + clip_high)).to(ratio.dtype),
    }
    return token_means(values, inputs, counts, "rollouts")


def token_means(
    values: dict[str, Tensor], inputs: ObjectiveInputs, counts: Counts, population: Population
) -> dict[str, Tensor]:
    """Shares of the means of several [rows] tensors over a population; empty if the update has none of its tokens."""
    if population_size(counts, population)[0] == 0:
        return {}
    means = token_mean(torch.stack(list(values.values())), inputs, counts, population)
    return dict(zip(values, means.unbind(), strict=True))


def largest(values: Tensor, mask: Tensor) -> Tensor:
    """The largest of non-negative `values` within `mask`; 0 when there is none."""
    if values.numel() == 0:
        return values.new_zeros(())
    return torch.where(mask, values, 0).amax()
