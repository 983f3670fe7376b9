"""Log-prob of the taken token and entropy of its distribution, with gradients, over a vocabulary cut across ranks.

With logits x, temperature T and label y, each shard (or chunk of columns) r contributes four numbers per row,

    m_r = max_j x_j/T     s_r = sum_j exp(x_j/T - m_r)     u_r = sum_j (x_j/T - m_r) exp(x_j/T - m_r)
    z_r = x_y/T if y is one of its columns, else 0

which merge in fixed order, so that every rank gets the same bits:

    m = max m_r    a_r = exp(m_r - m)    S = sum a_r s_r    U = sum a_r (u_r + (m_r - m) s_r)    z = sum z_r
    logprob = z - m - ln S               entropy = ln S - U/S

and, with lp_j = x_j/T - m - ln S, p_j = exp(lp_j) and upstream gradients g (of logprob) and h (of entropy),

    dL/dx_j = (1/T) (1[j = y] g - p_j (g + h (lp_j + entropy)))

Statistics are float32 (float64 for float64 logits) whatever the logits' type. Columns at or beyond `vocab_size` are
padding: outside the softmax, gradient 0. A shard made only of padding, and a -inf logit, contribute nothing. A row
whose valid logits are all -inf has no distribution and gives NaN.

Shapes: `rows` tokens that are scored, `vocab_shard` this rank's columns of the vocabulary (they may differ per rank).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_srft import distributed
from megatron_srft.distributed import Group

Stats = Tensor
"""[4, rows]: m, s, u, z of one shard or chunk, stacked so that one collective carries them."""

EXP_IS_ZERO = -1e4
"""exp of this is 0 in float32 and float64. Clamping exponents to it keeps 0 * -inf out of the weighted sums."""


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
        local, found = _local_labels(labels, vocab_start, columns)
        parts = [
            _fold(logits[rows, :columns], local[rows], found[rows], temperature)
            for rows in _slices(logits.shape[0], columns * _full(logits).itemsize, _block_bytes(logits))
        ]
        stats = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        logprobs, entropy, normaliser = _finish(stats, labels, vocab_size, group)
        ctx.save_for_backward(logits, local, found, normaliser, entropy)
        ctx.columns, ctx.temperature = columns, temperature
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, logprob_gradient, entropy_gradient):
        logits, local, found, normaliser, entropy = ctx.saved_tensors
        columns = ctx.columns
        blocks = _slices(logits.shape[0], columns * _full(logits).itemsize, _block_bytes(logits))
        row_terms = (local, found, normaliser, entropy, logprob_gradient, entropy_gradient)
        if len(blocks) == 1 and columns == logits.shape[1]:
            gradient = _logit_gradient(logits, *row_terms, ctx.temperature).to(logits.dtype)
            return gradient, None, None, None, None, None
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        gradient[:, columns:] = 0
        for rows in blocks:
            of_rows = (None if term is None else term[rows] for term in row_terms)
            gradient[rows, :columns] = _logit_gradient(logits[rows, :columns], *of_rows, ctx.temperature)
        return gradient, None, None, None, None, None


class _LinearTokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, vocab_start, vocab_size, temperature, group, chunk_bytes, keep):
        ctx.set_materialize_grads(False)
        columns = _valid_columns(weight.shape[0], vocab_start, vocab_size)
        chunks = _slices(columns, hidden.shape[0] * _full(hidden).itemsize, chunk_bytes)
        parts, kept = [], []
        for chunk in chunks:
            logits = _matmul(hidden, weight[chunk].t())  # [rows, chunk]
            local, found = _local_labels(labels, vocab_start + chunk.start, chunk.stop - chunk.start)
            parts.append(_fold(logits, local, found, temperature))
            if keep:
                kept.append(logits.to(hidden.dtype))
        logprobs, entropy, normaliser = _finish(_merge(parts), labels, vocab_size, group)
        ctx.save_for_backward(hidden, weight, labels, normaliser, entropy, *kept)
        ctx.chunks, ctx.vocab_start, ctx.temperature = chunks, vocab_start, temperature
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, logprob_gradient, entropy_gradient):
        hidden, weight, labels, normaliser, entropy, *kept = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden_gradient = None  # full precision until all chunks are in
        weight_gradient = torch.empty_like(weight) if needs_weight else None
        for index, chunk in enumerate(ctx.chunks):
            logits = kept[index] if kept else _matmul(hidden, weight[chunk].t())
            local, found = _local_labels(labels, ctx.vocab_start + chunk.start, chunk.stop - chunk.start)
            gradient = _logit_gradient(
                logits, local, found, normaliser, entropy, logprob_gradient, entropy_gradient, ctx.temperature
            ).to(hidden.dtype)
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


def _fold(logits: Tensor, local: Tensor, found: Tensor, temperature: float) -> Stats:
    """Statistics of some columns (all valid) of some rows."""
    full = _full(logits)
    rows, columns = logits.shape
    if columns == 0:
        empty = logits.new_zeros(4, rows, dtype=full)
        empty[0] = -torch.inf
        return empty
    maximum = logits.amax(dim=1).to(full) / temperature
    reference = maximum.masked_fill(maximum == -torch.inf, 0)  # exp(-inf - -inf) must be 0
    shifted = torch.add(-reference[:, None], logits, alpha=1 / temperature).clamp_min_(EXP_IS_ZERO)
    exponentials = shifted.exp()
    label_logits = logits.gather(1, local[:, None])[:, 0].to(full) / temperature
    return torch.stack(
        (
            maximum,
            exponentials.sum(dim=1),
            exponentials.mul_(shifted).sum(dim=1),
            label_logits.masked_fill_(~found, 0),
        )
    )


def _merge(parts: list[Stats]) -> Stats:
    """Statistics of the union of disjoint sets of columns, in the order given."""
    if len(parts) == 1:
        return parts[0]
    maxima, sums, weighted, label_logits = torch.stack(parts, dim=1)  # each [parts, rows]
    maximum = maxima.amax(dim=0)
    reference = maximum.masked_fill(maximum == -torch.inf, 0)
    shifts = (maxima - reference).clamp_min_(EXP_IS_ZERO)
    scales = shifts.exp()
    return torch.stack(
        (
            maximum,
            (scales * sums).sum(dim=0),
            (scales * (weighted + shifts * sums)).sum(dim=0),
            label_logits.sum(dim=0),
        )
    )


def _finish(stats: Stats, labels: Tensor, vocab_size: int, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropy and log of the softmax's normaliser from this rank's statistics; one all-gather."""
    if labels.numel() > 0:
        stats = _merge(distributed.all_gather(stats, group))
    maximum, total, weighted, label_logits = stats
    log_total = total.log()
    normaliser = maximum + log_total
    # Not label_logits - normaliser: that would lose the digits of log_total to a large maximum.
    logprobs = (label_logits - maximum) - log_total
    if labels.is_cuda:
        logprobs = logprobs.masked_fill((labels < 0) | (labels >= vocab_size), torch.nan)
    return logprobs, log_total - weighted / total, normaliser


def _logit_gradient(
    logits: Tensor,
    local: Tensor,
    found: Tensor,
    normaliser: Tensor,
    entropy: Tensor,
    logprob_gradient: Tensor | None,
    entropy_gradient: Tensor | None,
    temperature: float,
) -> Tensor:
    """Gradient of some columns (all valid) of some rows, [rows, columns] in full precision."""
    logprobs = torch.add(-normaliser[:, None], logits, alpha=1 / temperature)
    if logprob_gradient is None and entropy_gradient is None:
        return logprobs.zero_()
    if entropy_gradient is None:
        gradient = logprobs.exp_().mul_((logprob_gradient / -temperature)[:, None])
    else:
        gradient = logprobs.exp()
        scale = (entropy_gradient / -temperature)[:, None]
        factor = logprobs.clamp_min_(EXP_IS_ZERO).add_(entropy[:, None]).mul_(scale)
        if logprob_gradient is not None:
            factor.add_((logprob_gradient / -temperature)[:, None])
        gradient.mul_(factor)
    if logprob_gradient is not None and gradient.shape[1] > 0:
        # gather + scatter: one column per row, hence deterministic on CUDA too, unlike scatter_add.
        at_label = (logprob_gradient / temperature).masked_fill(~found, 0)[:, None]
        gradient.scatter_(1, local[:, None], gradient.gather(1, local[:, None]) + at_label)
    return gradient


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


def _local_labels(labels: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Each label's column (0 where it lies elsewhere), and whether it lies here."""
    local = labels - start
    found = (local >= 0) & (local < columns)
    return local.masked_fill_(~found, 0), found


def _slices(length: int, item_bytes: int, limit_bytes: int) -> list[slice]:
    """Cut `length` items into slices of at most `limit_bytes` (at least one item each); one slice when empty."""
    step = max(1, limit_bytes // max(1, item_bytes))
    return [slice(start, min(start + step, length)) for start in range(0, max(length, 1), step)]


def _block_bytes(logits: Tensor) -> int:
    """Working memory per block of rows: a share of a CPU's cache, or enough to fill a GPU."""
    return 256 << 20 if logits.is_cuda else 4 << 20


def _full(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in full precision: half-precision inputs keep their float32 accumulator."""
    if left.dtype not in (torch.bfloat16, torch.float16):
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
