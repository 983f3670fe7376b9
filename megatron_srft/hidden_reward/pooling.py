"""From hidden states to scores: a layer's share of gate and reward, and the tokens of each response that count."""

from typing import Literal

import torch

from megatron_srft.hidden_reward.head import HeadConfig
from megatron_srft.ops.gated_pooling import gated_projection
from megatron_srft.sample import PackedBatch

ALL = slice(None)


def add_layer(
    accumulated: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    config: HeadConfig,
    columns: slice = ALL,
) -> torch.Tensor:
    """Add one layer's share of gate and reward to the running sum.

    Args:
        accumulated: [tokens, 2] float32; None for the first layer.
        hidden: [tokens, hidden] states of the layer, all columns: a normalisation needs them.
        weight: [2, hidden] float32 of the layer, all columns.
        columns: those that this rank projects (`gated_pooling.share_of_hidden`).

    Returns:
        A fresh [tokens, 2]; differentiable in `accumulated` and `weight`, without gradients for `hidden` where it
        requires none.
    """
    part, rows = hidden[:, columns], weight[:, columns]
    if config.normalisation == "none":
        return gated_projection(accumulated, part, rows)
    share = gated_projection(None, part, rows) * inverse_rms(hidden, config.epsilon)
    return share if accumulated is None else accumulated + share


def inverse_rms(hidden: torch.Tensor, epsilon: float) -> torch.Tensor:
    """[tokens, 1]: 1 / sqrt(mean square + epsilon) of each state, in float32 or wider."""
    full = torch.promote_types(hidden.dtype, torch.float32)
    norm = torch.linalg.vector_norm(hidden, dim=1, keepdim=True, dtype=full)
    return (norm.square() / hidden.shape[1] + epsilon).rsqrt()


def scored_sequences(batch: PackedBatch, last_token: Literal["excluded", "included"]) -> torch.Tensor:
    """[sequences, 2] int64: first token and end (exclusive) of what is scored of each sequence of a micro-batch, in
    the order of `batch.sequence_ids`; empty where a response has no token to score. Stalls no GPU."""
    count = len(batch.sequence_ids)
    lengths = batch.sequence.new_zeros(count).index_add_(0, batch.sequence, torch.ones_like(batch.sequence))
    ends = batch.cu_seqlens[1 : count + 1].long()
    starts = ends - lengths
    if last_token == "excluded":
        ends = torch.maximum(ends - 1, starts)
    return torch.stack((starts, ends), dim=1)
