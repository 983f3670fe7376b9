"""Rollout/trainer mismatch: measured every step, and corrected when the run was told to go on in spite of it.

    w_t = exp(old policy log-prob - rollout log-prob)       both of the sampled token at the sampling temperature

truncate: advantage * min(w_t, limit); mask: advantage * w_t, and 0 where w_t lies outside [1 / limit, limit].
The weight corrects for sampling from the engine's distribution instead of the trainer's, so it multiplies rollout
tokens only; demonstrations keep their advantage.
"""

import torch

from megatron_srft.config import ParityConfig
from megatron_srft.sample import Counts, PackedBatch


def correct_advantages(
    batch: PackedBatch, old_logprobs: torch.Tensor, counts: Counts, config: ParityConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Advantages [rows] after correction, and mismatch metrics as partial sums over the update's rollout tokens."""
    is_rollout = ~batch.is_demonstration
    difference = torch.where(is_rollout, old_logprobs - batch.rollout_logprobs, 0.0)
    weight = difference.exp()
    tokens = max(1, counts.rollout_tokens)
    zero = difference.new_zeros(())
    metrics = {
        "parity/mean": difference.abs().sum() / tokens,
        "parity/k3": torch.where(is_rollout, weight - 1 - difference, 0.0).sum() / tokens,
        "max/parity/max": difference.abs().max() if len(difference) else zero,
    }
    if config.on_failure == "stop":
        return batch.advantages, metrics
    outside = weight > config.importance_limit
    if config.on_failure == "truncate":
        weight = weight.clamp(max=config.importance_limit)
    else:
        outside = outside | (weight < 1 / config.importance_limit)
        weight = torch.where(outside, 0.0, weight)
    metrics["parity/corrected_share"] = (outside & is_rollout).sum() / tokens
    return torch.where(is_rollout, batch.advantages * weight, batch.advantages), metrics
