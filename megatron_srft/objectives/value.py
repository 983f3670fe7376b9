"""The critic's loss, with PPO's clip around the values from before the step (arXiv 1707.06347; 2502.03373's code).

    loss = loss_coefficient * mean_t max((V_t - G_t)^2, (clip(V_t, V_old,t - c, V_old,t + c) - G_t)^2)

over the tokens of all rollouts of the update; G_t is V_old,t plus the advantage before any normalisation.
"""

import numpy as np
import torch
from torch import Tensor

from megatron_srft.config import CriticConfig
from megatron_srft.objectives.metrics import Metrics
from megatron_srft.objectives.terms import ObjectiveOutput, token_mean_over
from megatron_srft.sample import Counts, PackedBatch, TrainingSequence


def value_loss(values: Tensor, batch: PackedBatch, counts: Counts, config: CriticConfig) -> ObjectiveOutput:
    """This micro-batch's share of the critic's loss.

    Args:
        values: [rows] the critic's, with gradient.
        batch: has values (from before the step) and returns; its rows are rollouts'.

    Returns:
        the loss, and shares of value/loss and value/clip_fraction (tokens without a gradient because of the clip).
    """
    assert batch.values is not None and batch.returns is not None, "the critic's values were not measured"
    errors = (values - batch.returns).square()
    clipped = errors
    if config.value_clip is not None:
        near = batch.values + (values - batch.values).clamp(-config.value_clip, config.value_clip)
        clipped = (near - batch.returns).square()
    scale = token_mean_over("rollouts", counts)["scale"]
    loss = config.loss_coefficient * scale * torch.maximum(errors, clipped).sum()
    figures = torch.stack([loss.detach().float(), scale * (clipped > errors).sum()])
    return ObjectiveOutput(loss=loss, metrics=Metrics(figures, {"value/loss": 0, "value/clip_fraction": 1}))


def value_figures(sequences: list[TrainingSequence]) -> dict[str, float]:
    """How the values from before the step fit: over all tokens, in the words of docs/metrics.md."""
    if not any(s.response_length for s in sequences):
        return {}
    values, returns = (
        np.concatenate([getattr(s, name) for s in sequences]).astype(np.float64) for name in ("values", "returns")
    )
    spread = returns.var()
    explained = {"value/explained_variance": float(1 - (returns - values).var() / spread)} if spread > 0 else {}
    return {"value/mean": float(values.mean()), "value/return": float(returns.mean()), **explained}
