"""What the ops from hidden states and the LM-head shard share: checks, chunks of the vocabulary, matrix products.

With logits = hidden @ weight.T, a chunk's gradient G of the logits [rows, columns] gives

    hidden_gradient += G @ weight[chunk]        weight_gradient[chunk] (+)= G.T @ hidden

Chunks run over the vocabulary, not over tokens, because then every row of the weight's gradient is written once.
"""

import torch
from torch import Tensor

from megatron_srft.ops import shards
from megatron_srft.ops.softmax_statistics import full_type

CHUNK_BYTES = 32 << 20
"""Full-precision logits of one chunk: they stay in the L2 cache of a data-centre GPU."""

NARROWEST_CHUNK = 1024
"""Columns below which matrix products become inefficient; more rows than CHUNK_BYTES allows make chunks larger."""


def check(hidden: Tensor, weight: Tensor, weight_gradient: Tensor | None, chunk_columns: int | None) -> None:
    """Whether hidden states, head and buffer fit together."""
    check_factors("hidden", hidden, "weight", weight)
    if weight_gradient is not None and (
        weight_gradient.shape != weight.shape or weight_gradient.device != weight.device
    ):
        raise ValueError(
            f"weight_gradient must have the weight's shape {tuple(weight.shape)} on {weight.device}, got "
            f"{tuple(weight_gradient.shape)} on {weight_gradient.device}"
        )
    if chunk_columns is not None and chunk_columns < 1:
        raise ValueError(f"chunk_columns must be positive, got {chunk_columns}")


def check_factors(hidden_name: str, hidden: Tensor, weight_name: str, weight: Tensor) -> None:
    """Whether hidden @ weight.T can be taken."""
    shards.check_matrix(hidden_name, hidden)
    shards.check_matrix(weight_name, weight)
    if hidden.dtype != weight.dtype or hidden.device != weight.device:
        raise ValueError(
            f"{hidden_name} and {weight_name} must have one type and device, got {hidden.dtype} on {hidden.device} and "
            f"{weight.dtype} on {weight.device}"
        )
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{hidden_name} and {weight_name} must have rows of one length, got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}"
        )


def columns_at_once(column_bytes: int) -> int:
    """Columns of a chunk: as many as make CHUNK_BYTES, in steps of 128, but not less than NARROWEST_CHUNK."""
    return max(NARROWEST_CHUNK, CHUNK_BYTES // max(column_bytes, 1) // 128 * 128)


def chunks_of(columns: int, chunk: int) -> list[tuple[int, int]]:
    """Bounds of the chunks; a single empty one for a shard made only of padding."""
    return [(start, min(start + chunk, columns)) for start in range(0, max(columns, 1), chunk)]


def for_product(matrix: Tensor) -> Tensor:
    """On a CPU half-precision factors are widened: its products would round their result to half precision."""
    return matrix if matrix.is_cuda else matrix.to(full_type(matrix))


def product_into(out: Tensor, left: Tensor, right: Tensor, accumulate: bool = False) -> None:
    """out (+)= left @ right, accumulated in full precision."""
    beta = 1 if accumulate else 0
    if out.dtype == left.dtype == right.dtype:
        torch.addmm(out, left, right, beta=beta, out=out)
    elif out.is_cuda:
        torch.addmm(out, left, right, out_dtype=out.dtype, beta=beta, out=out)
    else:
        product = for_product(left) @ for_product(right)
        out.add_(product) if accumulate else out.copy_(product)


def add_products(
    gradient: Tensor,
    hidden: Tensor,
    weight: Tensor,
    start: int,
    hidden_gradient: Tensor | None,
    weight_gradient: Tensor | None,
    accumulate: bool,
) -> None:
    """Take the logits' gradient [rows, columns] of the chunk that begins at `start` back to what is wanted.

    Adds to `hidden_gradient` [rows, hidden]; writes to the chunk's rows of `weight_gradient` [vocab_shard, hidden], or
    adds to them with `accumulate`.
    """
    stop = start + gradient.shape[1]
    if hidden_gradient is not None:
        product_into(hidden_gradient, gradient, weight[start:stop], accumulate=True)
    if weight_gradient is not None:
        product_into(weight_gradient[start:stop], gradient.t(), hidden, accumulate)
