"""Log-prob of the taken token and entropy of its distribution, with gradients, over a vocabulary cut across ranks.

The statistics, their merge and the closed-form gradient are in `softmax_statistics`; here are the two entry points,
from logits and from hidden states (a chunk of the vocabulary at a time), and what each keeps for its backward pass.

Shapes: `rows` tokens that are scored, `vocab_shard` this rank's columns of the vocabulary (they may differ per rank).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_srft.distributed import Group
from megatron_srft.ops.softmax_statistics import finish, fold, full_type, local_labels, logit_gradient, merge


def token_logprob(
    logits: Tensor,
    labels: Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    temperature: float = 1.0,
    group: Group = None,
) -> tuple[Tensor, Tensor]:
    """Score `labels` under softmax(logits / temperature).

    Args:
        logits: [rows, vocab_shard], any float type.
        labels: [rows] int64 ids of the whole vocabulary, the same on every rank of `group`.
        vocab_start: id of this rank's first column.
        vocab_size: real size of the whole vocabulary; later columns are padding.
        group: the ranks that hold the other shards.

    Returns:
        (logprobs, entropy), both [rows] float32 in nats (float64 for float64 logits), equal on every rank.

    Raises:
        ValueError: the temperature is not positive, or (on CPU) a label is no token of the vocabulary. On CUDA, where
            the check would stall the device, such a label's log-prob is NaN.
    """
    _check(labels, vocab_size, temperature)
    return _TokenLogprob.apply(logits, labels, vocab_start, vocab_size, temperature, group)


def linear_token_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    temperature: float = 1.0,
    group: Group = None,
    chunk_bytes: int = 32 << 20,
    saved_logits_bytes: int = 1 << 30,
) -> tuple[Tensor, Tensor]:
    """Score `labels` under softmax(hidden @ weight.T / temperature), a chunk of the vocabulary at a time.

    The gradient of `hidden` is the partial sum over this rank's columns; summing it over the tensor-parallel ranks is
    left to the region function (all-reduce, or reduce-scatter under sequence parallelism) that produced `hidden`.

    Args:
        hidden: [rows, hidden], the same on every rank of `group`.
        weight: [vocab_shard, hidden] of the same type.
        labels, vocab_start, vocab_size, temperature, group: as in `token_logprob`.
        chunk_bytes: size of one chunk of full-precision logits; about three of them are alive at a time.
        saved_logits_bytes: keep the logits (in the type of `hidden`) for the backward pass if they fit into this;
            otherwise the backward pass computes them again.

    Returns, Raises: as `token_logprob`.
    """
    assert hidden.dtype == weight.dtype, (hidden.dtype, weight.dtype)
    _check(labels, vocab_size, temperature)
    saved_bytes = hidden.shape[0] * weight.shape[0] * hidden.element_size()
    keep = torch.is_grad_enabled() and saved_bytes <= saved_logits_bytes
    return _LinearTokenLogprob.apply(
        hidden, weight, labels, vocab_start, vocab_size, temperature, group, chunk_bytes, keep
    )


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, vocab_start, vocab_size, temperature, group):
        ctx.set_materialize_grads(False)
        columns = _valid_columns(logits.shape[1], vocab_start, vocab_size)
        local, found = local_labels(labels, vocab_start, columns)
        parts = [
            fold(logits[rows, :columns], local[rows], found[rows], temperature)[0]
            for rows in _slices(logits.shape[0], columns * full_type(logits).itemsize, _block_bytes(logits))
        ]
        stats = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        logprobs, entropy, normaliser = finish(stats, labels, vocab_size, group)
        ctx.save_for_backward(logits, local, found, normaliser, entropy)
        ctx.columns, ctx.temperature = columns, temperature
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, logprob_gradient, entropy_gradient):
        logits, local, found, normaliser, entropy = ctx.saved_tensors
        columns = ctx.columns
        blocks = _slices(logits.shape[0], columns * full_type(logits).itemsize, _block_bytes(logits))
        row_terms = (-normaliser, local, found, entropy, logprob_gradient, entropy_gradient)
        if len(blocks) == 1 and columns == logits.shape[1]:
            gradient = logit_gradient(logits, 1 / ctx.temperature, *row_terms, ctx.temperature).to(logits.dtype)
            return gradient, None, None, None, None, None
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        gradient[:, columns:] = 0
        for rows in blocks:
            of_rows = (None if term is None else term[rows] for term in row_terms)
            block = logit_gradient(logits[rows, :columns], 1 / ctx.temperature, *of_rows, ctx.temperature)
            gradient[rows, :columns] = block
        return gradient, None, None, None, None, None


class _LinearTokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, vocab_start, vocab_size, temperature, group, chunk_bytes, keep):
        ctx.set_materialize_grads(False)
        columns = _valid_columns(weight.shape[0], vocab_start, vocab_size)
        chunks = _slices(columns, hidden.shape[0] * full_type(hidden).itemsize, chunk_bytes)
        parts, kept = [], []
        for chunk in chunks:
            logits = _matmul(hidden, weight[chunk].t())  # [rows, chunk]
            local, found = local_labels(labels, vocab_start + chunk.start, chunk.stop - chunk.start)
            stats, shifted = fold(logits, local, found, temperature, out=logits)
            parts.append(stats)
            if keep:
                kept.append(shifted.to(hidden.dtype))  # half precision errs least where the probability is largest
        logprobs, entropy, normaliser = finish(merge(parts), labels, vocab_size, group)
        maxima = [stats[0] for stats in parts] if keep else []
        ctx.save_for_backward(hidden, weight, labels, normaliser, entropy, *kept, *maxima)
        ctx.chunks, ctx.vocab_start, ctx.temperature = chunks, vocab_start, temperature
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, logprob_gradient, entropy_gradient):
        hidden, weight, labels, normaliser, entropy, *saved = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden_gradient = None  # full precision until all chunks are in
        weight_gradient = torch.empty_like(weight) if needs_weight else None
        for index, chunk in enumerate(ctx.chunks):
            if saved:
                values, scale, offset = saved[index], 1.0, saved[index + len(ctx.chunks)] - normaliser
            else:
                values, scale, offset = _matmul(hidden, weight[chunk].t()), 1 / ctx.temperature, -normaliser
            local, found = local_labels(labels, ctx.vocab_start + chunk.start, chunk.stop - chunk.start)
            row_terms = (offset, local, found, entropy, logprob_gradient, entropy_gradient)
            gradient = logit_gradient(values, scale, *row_terms, ctx.temperature).to(hidden.dtype)
            if needs_hidden:
                partial = _matmul(gradient, weight[chunk])
                hidden_gradient = partial if hidden_gradient is None else hidden_gradient.add_(partial)
            if needs_weight:
                weight_gradient[chunk] = _matmul(gradient.t(), hidden)
        if needs_hidden:
            hidden_gradient = hidden_gradient.to(hidden.dtype)
        if needs_weight:
            weight_gradient[ctx.chunks[-1].stop :] = 0
        return hidden_gradient, weight_gradient, None, None, None, None, None, None, None


def _check(labels: Tensor, vocab_size: int, temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"the temperature of log-probs must be positive, got {temperature}")
    if labels.is_cuda or labels.numel() == 0:
        return
    low, high = labels.aminmax()
    if low < 0 or high >= vocab_size:
        raise ValueError(f"labels must lie in [0, {vocab_size}), got {int(low)} to {int(high)}; check the tokenizer")


def _valid_columns(columns: int, vocab_start: int, vocab_size: int) -> int:
    """How many of a shard's columns are tokens; the rest is padding."""
    return max(0, min(columns, vocab_size - vocab_start))


def _slices(length: int, item_bytes: int, limit_bytes: int) -> list[slice]:
    """Cut `length` items into slices of at most `limit_bytes` (at least one item each); one slice when empty."""
    step = max(1, limit_bytes // max(1, item_bytes))
    return [slice(start, min(start + step, length)) for start in range(0, max(length, 1), step)]


def _block_bytes(logits: Tensor) -> int:
    """Working memory per block of rows: a share of a CPU's cache, or enough to fill a GPU."""
    return 256 << 20 if logits.is_cuda else 4 << 20


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in full precision: half-precision inputs keep their float32 accumulator."""
    if left.dtype not in (torch.bfloat16, torch.float16):
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
