"""Softmax statistics of a vocabulary that is cut over ranks and chunks, and the gradient they give.

With logits x, temperature T and label y, each shard (or chunk of columns) r contributes four numbers per row,

    m_r = max_j x_j/T     s_r = sum_j exp(x_j/T - m_r)     u_r = sum_j (x_j/T - m_r) exp(x_j/T - m_r)
    z_r = x_y/T if y is one of its columns, else 0

which merge in fixed order, so that every rank gets the same bits:

    m = max m_r    a_r = exp(m_r - m)    S = sum a_r s_r    U = sum a_r (u_r + (m_r - m) s_r)    z = sum z_r
    logprob = z - m - ln S               entropy = ln S - U/S

The results do not depend on the reference point m, so m counts as a constant, and the gradient of a loss through the
other three is, with t_j = x_j/T - m_r,

    dL/dx_j = (1/T) (exp(t_j) (dL/ds_r + dL/du_r (1 + t_j)) + 1[j = y] dL/dz_r)

which is, put together, (1/T) (1[j = y] g - p_j (g + h (ln p_j + entropy))) for upstream gradients g of the log-prob
and h of the entropy.

Statistics are float32 (float64 for float64 logits) whatever the logits' type. Columns at or beyond `columns` are
padding: outside the softmax, gradient 0. A shard made only of padding, and a -inf logit, contribute nothing. A row
whose valid logits are all -inf has no distribution and gives NaN.
"""

import torch
from torch import Tensor

from megatron_srft.ops.implementations import declare, kernel

Statistics = Tensor
"""[4, rows]: m, s, u, z of one shard or chunk, stacked so that one collective carries them."""

Coefficients = Tensor
"""[4, rows]: r, a, b, c of a gradient exp(t_j) (a + b t_j) + 1[j = y] c, where t_j = scale * logits_j - r."""

EXP_IS_ZERO = -1e4
"""exp of this is 0 in float32 and float64. Clamping exponents to it keeps 0 * -inf out of the weighted sums."""


def merge(parts: Tensor) -> Statistics:
    """[parts, 4, rows] -> [4, rows]: statistics of the union of disjoint sets of columns, added up in the order given.

    Differentiable in s, u and z.
    """
    if len(parts) == 1:
        return parts[0]
    maxima, sums, weighted, label_logits = parts.unbind(1)  # each [parts, rows]
    maxima = maxima.detach()
    maximum = maxima.amax(dim=0)
    shifts = (maxima - finite(maximum)).clamp_min_(EXP_IS_ZERO)
    scales = shifts.exp()
    return torch.stack(
        (
            maximum,
            (scales * sums).sum(dim=0),
            (scales * (weighted + shifts * sums)).sum(dim=0),
            label_logits.sum(dim=0),
        )
    )


def finish(statistics: Statistics) -> tuple[Tensor, Tensor]:
    """(log-prob of the label, entropy), both [rows], from the statistics of the whole vocabulary."""
    maximum, total, weighted, label_logits = statistics.unbind(0)
    log_total = total.log()
    # Not label_logits - (maximum + log_total): that would lose the digits of log_total to a large maximum.
    return (label_logits - maximum.detach()) - log_total, log_total - weighted / total


def gradient_coefficients(statistics: Statistics, gradient: Tensor, inverse_temperature: float) -> Coefficients:
    """The row terms of the logits' gradient from the upstream gradient [4, rows] of their statistics."""
    _, of_sum, of_weighted, of_label = gradient.unbind(0)
    return torch.stack(
        (
            statistics[0],
            (of_sum + of_weighted) * inverse_temperature,
            of_weighted * inverse_temperature,
            of_label * inverse_temperature,
        )
    )


def full_type(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


# ---------------------------------------------------------------- the kernels in plain torch


def statistics_reference(
    logits: Tensor,
    labels: Tensor,
    vocab_start: int,
    columns: int,
    inverse_temperature: float,
    kept: Tensor | None = None,
) -> Statistics:
    """Statistics of the first `columns` of logits [rows, width]; writes t_j to `kept` [rows, width] if given."""
    rows, full = len(logits), full_type(logits)
    found, local = _local(labels, vocab_start, columns)
    result = torch.empty(4, rows, dtype=full, device=logits.device)
    for block in _row_blocks(rows, columns * full.itemsize, logits.is_cuda):
        result[:, block] = _block_statistics(
            logits[block, :columns], local[block], found[block], inverse_temperature,
            None if kept is None else kept[block, :columns],
        )  # fmt: skip
    return result


def _block_statistics(logits, local, found, inverse_temperature, kept) -> Statistics:
    full = full_type(logits)
    if logits.shape[1] == 0:
        empty = logits.new_zeros(4, len(logits), dtype=full)
        empty[0] = -torch.inf
        return empty
    maximum = logits.amax(dim=1).to(full) * inverse_temperature
    label_logits = logits.gather(1, local[:, None])[:, 0].to(full) * inverse_temperature
    shifted = torch.add(-finite(maximum)[:, None], logits, alpha=inverse_temperature).clamp_min_(EXP_IS_ZERO)
    if kept is not None:
        kept.copy_(shifted)
    exponentials = shifted.exp()
    sums = exponentials.sum(dim=1)
    return torch.stack((maximum, sums, exponentials.mul_(shifted).sum(dim=1), label_logits.masked_fill_(~found, 0)))


def gradient_reference(
    logits: Tensor, labels: Tensor, coefficients: Coefficients, vocab_start: int, columns: int, scale: float
) -> Tensor:
    """Gradient of the logits [rows, width] in their type; 0 beyond `columns`."""
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _write_gradient(gradient, logits, labels, coefficients, vocab_start, columns, scale)
    return gradient


def gradient_reference_(
    logits: Tensor, labels: Tensor, coefficients: Coefficients, vocab_start: int, columns: int, scale: float
) -> None:
    """The same, written over the logits."""
    _write_gradient(logits, logits, labels, coefficients, vocab_start, columns, scale)


def _write_gradient(out, logits, labels, coefficients, vocab_start, columns, scale) -> None:
    found, local = _local(labels, vocab_start, columns)
    out[:, columns:] = 0
    for block in _row_blocks(len(logits), columns * full_type(logits).itemsize, logits.is_cuda):
        terms = coefficients[:, block]
        out[block, :columns] = _block_gradient(logits[block, :columns], terms, local[block], found[block], scale)


def _block_gradient(logits, coefficients, local, found, scale) -> Tensor:
    reference, constant, slope, at_label = coefficients
    exponents = torch.add(-finite(reference)[:, None], logits, alpha=scale).clamp_min_(EXP_IS_ZERO)
    gradient = exponents.exp()
    gradient.mul_(exponents.mul_(slope[:, None]).add_(constant[:, None]))
    if logits.shape[1] > 0:
        # gather + scatter: one column per row, hence deterministic on CUDA too, unlike scatter_add.
        at_label = at_label.masked_fill(~found, 0)[:, None]
        gradient.scatter_(1, local[:, None], gradient.gather(1, local[:, None]) + at_label)
    return gradient


def finite(maximum: Tensor) -> Tensor:
    """The maximum as a point of reference: exp(-inf - -inf) must be 0."""
    return maximum.masked_fill(maximum == -torch.inf, 0)


def _local(labels: Tensor, vocab_start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Whether each label is one of the shard's columns, and which (0 where it is none)."""
    local = labels - vocab_start
    found = (local >= 0) & (local < columns)
    return found, local.masked_fill_(~found, 0)


def _row_blocks(rows: int, row_bytes: int, on_gpu: bool) -> list[slice]:
    """Blocks of rows whose working memory is a share of a CPU's cache, or enough to fill a GPU."""
    step = max(1, (256 << 20 if on_gpu else 4 << 20) // max(1, row_bytes))
    return [slice(start, start + step) for start in range(0, rows, step)]


# ---------------------------------------------------------------- the kernels as torch ops


def _fake_statistics(logits, labels, vocab_start, columns, inverse_temperature, kept=None):
    return logits.new_empty(4, logits.shape[0], dtype=full_type(logits))


def _fake_gradient(logits, labels, coefficients, vocab_start, columns, scale):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_statistics(ctx, inputs, output):
    logits, labels, *ctx.numbers = inputs
    ctx.save_for_backward(logits, labels, output)


def _statistics_backward(ctx, gradient):
    logits, labels, statistics = ctx.saved_tensors
    vocab_start, columns, inverse_temperature = ctx.numbers
    coefficients = gradient_coefficients(statistics, gradient, inverse_temperature)
    gradient = kernel("softmax_gradient", ctx.implementation)(
        logits, labels, coefficients, vocab_start, columns, inverse_temperature
    )
    return gradient, None, None, None, None


_TRITON = "megatron_srft.ops.triton.softmax_statistics"

declare(
    "softmax_statistics",
    "(Tensor logits, Tensor labels, int vocab_start, int columns, float inverse_temperature) -> Tensor",
    fake=_fake_statistics,
    reference=statistics_reference,
    triton=_TRITON,
    setup_context=_setup_statistics,
    backward=_statistics_backward,
)
declare(
    "softmax_statistics_keep",
    "(Tensor logits, Tensor labels, int vocab_start, int columns, float inverse_temperature, Tensor(a!) kept)"
    " -> Tensor",
    fake=_fake_statistics,
    reference=statistics_reference,
    triton=_TRITON,
)
declare(
    "softmax_gradient",
    "(Tensor logits, Tensor labels, Tensor coefficients, int vocab_start, int columns, float scale) -> Tensor",
    fake=_fake_gradient,
    reference=gradient_reference,
    triton=_TRITON,
)
declare(
    "softmax_gradient_",
    "(Tensor(a!) logits, Tensor labels, Tensor coefficients, int vocab_start, int columns, float scale) -> ()",
    fake=lambda *args: None,
    reference=gradient_reference_,
    triton=_TRITON,
)
