"""Log-prob and entropy straight from hidden states and the LM-head shard, a chunk of the vocabulary at a time.

Forward, per chunk c of columns: logits = hidden @ weight_c.T in full precision, folded into the softmax statistics
(see `softmax_statistics`) and then either dropped or, when all of them fit the budget, kept as t_j = x_j/T - m_c in
the type of the hidden states (half precision errs least where the probability is largest).

Backward from kept logits: their gradient is written over them, then two matrix products over the whole shard. Without
them: each chunk's logits are computed again. Either way the hidden states' gradient accumulates in full precision, and
the weight's is added to a full-precision buffer if the caller has one. Chunks run over the vocabulary, not over tokens,
because then every row of the weight's gradient is written once.
"""

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from megatron_srft.distributed import Group
from megatron_srft.ops import linear_chunks, shards
from megatron_srft.ops.implementations import choose, declare, kernel
from megatron_srft.ops.linear_chunks import chunks_of, for_product, product_into
from megatron_srft.ops.softmax_statistics import Coefficients, Statistics, full_type, gradient_coefficients, merge

SAVED_LOGITS_BYTES = 4 << 30
"""Default budget for kept logits; only one micro-batch's are alive at a time."""

RECOMPUTED_AT_ONCE = 8
"""Forward chunks that the recomputing backward pass takes together on a GPU: each costs a pass over hidden_gradient."""


def linear_token_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    temperature: float = 1.0,
    group: Group = None,
    weight_gradient: Tensor | None = None,
    saved_logits_bytes: int = SAVED_LOGITS_BYTES,
    chunk_columns: int | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Score `labels` under softmax(hidden @ weight.T / temperature).

    The gradient of `hidden` is the partial sum over this rank's columns; summing it over the tensor-parallel ranks is
    left to the region function (all-reduce, or reduce-scatter under sequence parallelism) that produced `hidden`.

    Args:
        hidden: [rows, hidden], the same on every rank of `group`.
        weight: [vocab_shard, hidden] of the same type.
        labels, vocab_start, vocab_size, temperature, group, implementation: as in `token_logprob`.
        weight_gradient: [vocab_shard, hidden], usually float32. The backward pass adds the weight's gradient to it,
            and autograd gets none for `weight`.
        saved_logits_bytes: keep the logits (in the type of `hidden`) for the backward pass if they fit into this;
            otherwise the backward pass computes them again.
        chunk_columns: columns per chunk; None: as many as make CHUNK_BYTES, but not less than NARROWEST_CHUNK.

    Returns, Raises: as `token_logprob`.
    """
    linear_chunks.check(hidden, weight, weight_gradient, chunk_columns)
    shards.check_shard(len(weight), vocab_start, vocab_size, temperature, group)
    shards.check_labels(labels, len(hidden), hidden, vocab_size)
    columns = shards.valid_columns(len(weight), vocab_start, vocab_size)
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    statistics = _Linear.apply(
        hidden,
        weight,
        labels,
        weight_gradient,
        needs_gradient and len(hidden) * columns * hidden.itemsize <= saved_logits_bytes,
        choose(implementation, hidden),
        vocab_start,
        columns,
        1 / temperature,
        chunk_columns or linear_chunks.columns_at_once(len(hidden) * full_type(hidden).itemsize),
    )
    return shards.combine(statistics, labels, vocab_size, group)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, labels, weight_gradient, keep, implementation, *numbers
    ):  # fmt: skip
        statistics, kept, maxima = kernel("linear_softmax_statistics", implementation)(
            hidden, weight, labels, *numbers, keep
        )
        ctx.save_for_backward(hidden, weight, labels, statistics, kept, maxima)
        ctx.weight_gradient, ctx.numbers, ctx.keep, ctx.implementation = weight_gradient, numbers, keep, implementation
        return statistics

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight, labels, statistics, kept, maxima = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        coefficients = gradient_coefficients(statistics, gradient, ctx.numbers[2])
        own = needs_weight and ctx.weight_gradient is None
        weight_gradient = torch.empty_like(weight) if own else ctx.weight_gradient if needs_weight else None
        hidden_gradient = kernel("linear_softmax_gradient", ctx.implementation)(
            hidden, weight, labels, coefficients, kept, maxima, *ctx.numbers, ctx.keep, needs_hidden,
            weight_gradient, not own,
        )  # fmt: skip
        if ctx.keep:
            increment_version(kept)  # a second backward pass then finds that the kept logits are gone
        return (
            hidden_gradient if needs_hidden else None,
            weight_gradient if own else None,
            *[None] * 8,
        )


# ---------------------------------------------------------------- as torch ops, made of the softmax kernels


def _forward(
    implementation: str,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocab_start: int,
    columns: int,
    inverse_temperature: float,
    chunk: int,
    keep: bool,
) -> tuple[Statistics, Tensor, Tensor]:
    """Statistics of the shard; the kept t_j [rows, columns] and their chunks' maxima [chunks, rows], else empty."""
    rows, full = len(hidden), full_type(hidden)
    in_place = keep and hidden.dtype == full  # the kept logits are the matrix product's own output
    kept = hidden.new_empty(rows, columns) if keep else hidden.new_empty(0, 0)
    workspace = hidden.new_empty(0 if in_place else rows * min(chunk, columns), dtype=full)
    left = for_product(hidden)
    parts = []
    for start, stop in chunks_of(columns, chunk):
        target = kept[:, start:stop] if in_place else workspace[: rows * (stop - start)].view(rows, stop - start)
        product_into(target, left, weight[start:stop].t())
        arguments = (target, labels, vocab_start + start, stop - start, inverse_temperature)
        if keep:
            parts.append(kernel("softmax_statistics_keep", implementation)(*arguments, kept[:, start:stop]))
        else:
            parts.append(kernel("softmax_statistics", implementation)(*arguments))
    stacked = torch.stack(parts)
    return merge(stacked).clone(), kept, stacked[:, 0].contiguous() if keep else hidden.new_empty(0, 0, dtype=full)


def _backward(
    implementation: str,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    coefficients: Coefficients,
    kept: Tensor,
    maxima: Tensor,
    vocab_start: int,
    columns: int,
    inverse_temperature: float,
    chunk: int,
    keep: bool,
    needs_hidden: bool,
    weight_gradient: Tensor | None,
    accumulate: bool,
) -> Tensor:
    """The hidden states' gradient (empty unless needed); writes over `kept`, writes or adds to `weight_gradient`."""
    if keep:
        _gradient_over_kept(implementation, kept, labels, coefficients, maxima, vocab_start, chunk)
        steps = [(0, columns)] if hidden.is_cuda or hidden.dtype == full_type(hidden) else chunks_of(columns, chunk)
    else:
        steps = chunks_of(columns, chunk * RECOMPUTED_AT_ONCE if hidden.is_cuda else chunk)
    hidden_gradient = torch.zeros_like(hidden, dtype=full_type(hidden)) if needs_hidden else None
    left = for_product(hidden)
    for start, stop in steps:
        if keep:
            gradient = kept[:, start:stop]
        else:
            logits = hidden.new_empty(len(hidden), stop - start, dtype=full_type(hidden))
            product_into(logits, left, weight[start:stop].t())
            arguments = (labels, coefficients, vocab_start + start, stop - start, inverse_temperature)
            kernel("softmax_gradient_", implementation)(logits, *arguments)
            gradient = logits.to(hidden.dtype)
        linear_chunks.add_products(gradient, hidden, weight, start, hidden_gradient, weight_gradient, accumulate)
    if weight_gradient is not None and not accumulate:
        weight_gradient[columns:] = 0
    return hidden_gradient.to(hidden.dtype) if needs_hidden else hidden.new_empty(0)


def _gradient_over_kept(implementation, kept, labels, coefficients, maxima, vocab_start, chunk) -> None:
    """t_j were kept relative to their chunk's maximum; the coefficients refer to the shard's."""
    reference = coefficients[0].masked_fill(coefficients[0] == -torch.inf, 0)
    for maximum, (start, stop) in zip(maxima, chunks_of(kept.shape[1], chunk), strict=True):
        shift = reference - maximum.masked_fill(maximum == -torch.inf, 0)
        shifted = torch.cat((shift[None], coefficients[1:]))
        kernel("softmax_gradient_", implementation)(
            kept[:, start:stop], labels, shifted, vocab_start + start, stop - start, 1.0
        )


def _fake_forward(hidden, weight, labels, vocab_start, columns, inverse_temperature, chunk, keep):
    rows, full = hidden.shape[0], full_type(hidden)
    chunks = len(chunks_of(columns, chunk)) if keep else 0
    return (
        hidden.new_empty(4, rows, dtype=full),
        hidden.new_empty(rows if keep else 0, columns if keep else 0),
        hidden.new_empty(chunks, rows if keep else 0, dtype=full),
    )


def _fake_backward(hidden, weight, *arguments):
    needs_hidden = arguments[-3]
    return torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0)


declare(
    "linear_softmax_statistics",
    "(Tensor hidden, Tensor weight, Tensor labels, int vocab_start, int columns, float inverse_temperature, int chunk,"
    " bool keep) -> (Tensor, Tensor, Tensor)",
    fake=_fake_forward,
    composed=_forward,
)
declare(
    "linear_softmax_gradient",
    "(Tensor hidden, Tensor weight, Tensor labels, Tensor coefficients, Tensor(a!) kept, Tensor maxima,"
    " int vocab_start, int columns, float inverse_temperature, int chunk, bool keep, bool needs_hidden,"
    " Tensor(b!)? weight_gradient, bool accumulate) -> Tensor",
    fake=_fake_backward,
    composed=_backward,
)
