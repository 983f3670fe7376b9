"""Softmax statistics of a vocabulary that is cut over ranks and chunks, and the gradient they give.

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
"""

import torch
from torch import Tensor

from megatron_srft import distributed
from megatron_srft.distributed import Group

Stats = Tensor
"""[4, rows]: m, s, u, z of one shard or chunk, stacked so that one collective carries them."""

EXP_IS_ZERO = -1e4
"""exp of this is 0 in float32 and float64. Clamping exponents to it keeps 0 * -inf out of the weighted sums."""


def fold(
    logits: Tensor, local: Tensor, found: Tensor, temperature: float, out: Tensor | None = None
) -> tuple[Stats, Tensor]:
    """Statistics of some columns (all valid) of some rows, and x_j/T - m (written to `out`)."""
    full = full_type(logits)
    rows, columns = logits.shape
    if columns == 0:
        empty = logits.new_zeros(4, rows, dtype=full)
        empty[0] = -torch.inf
        return empty, logits
    maximum = logits.amax(dim=1).to(full) / temperature
    reference = maximum.masked_fill(maximum == -torch.inf, 0)  # exp(-inf - -inf) must be 0
    label_logits = logits.gather(1, local[:, None])[:, 0].to(full) / temperature
    shifted = torch.add(-reference[:, None], logits, alpha=1 / temperature, out=out).clamp_min_(EXP_IS_ZERO)
    exponentials = shifted.exp()
    stats = torch.stack(
        (
            maximum,
            exponentials.sum(dim=1),
            exponentials.mul_(shifted).sum(dim=1),
            label_logits.masked_fill_(~found, 0),
        )
    )
    return stats, shifted


def merge(parts: list[Stats]) -> Stats:
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


def finish(stats: Stats, labels: Tensor, vocab_size: int, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropy and log of the softmax's normaliser from this rank's statistics; one all-gather."""
    if labels.numel() > 0:
        stats = merge(distributed.all_gather(stats, group))
    maximum, total, weighted, label_logits = stats
    log_total = total.log()
    normaliser = maximum + log_total
    # Not label_logits - normaliser: that would lose the digits of log_total to a large maximum.
    logprobs = (label_logits - maximum) - log_total
    if labels.is_cuda:
        logprobs = logprobs.masked_fill((labels < 0) | (labels >= vocab_size), torch.nan)
    return logprobs, log_total - weighted / total, normaliser


def logit_gradient(
    values: Tensor,
    scale: float,
    offset: Tensor,
    local: Tensor,
    found: Tensor,
    entropy: Tensor,
    logprob_gradient: Tensor | None,
    entropy_gradient: Tensor | None,
    temperature: float,
) -> Tensor:
    """Gradient of some columns' logits (all valid), [rows, columns] in full precision.

    Their log-probs are values * scale + offset, from the logits themselves or from what `fold` left of them.
    """
    logprobs = torch.add(offset[:, None], values, alpha=scale)
    if logprob_gradient is None and entropy_gradient is None:
        return logprobs.zero_()
    if entropy_gradient is None:
        gradient = logprobs.exp_().mul_((logprob_gradient / -temperature)[:, None])
    else:
        gradient = logprobs.exp()
        factor = logprobs.clamp_min_(EXP_IS_ZERO).add_(entropy[:, None])
        factor.mul_((entropy_gradient / -temperature)[:, None])
        if logprob_gradient is not None:
            factor.add_((logprob_gradient / -temperature)[:, None])
        gradient.mul_(factor)
    if logprob_gradient is not None and gradient.shape[1] > 0:
        # gather + scatter: one column per row, hence deterministic on CUDA too, unlike scatter_add.
        at_label = (logprob_gradient / temperature).masked_fill(~found, 0)[:, None]
        gradient.scatter_(1, local[:, None], gradient.gather(1, local[:, None]) + at_label)
    return gradient


def local_labels(labels: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Each label's column (0 where it lies elsewhere), and whether it lies here."""
    local = labels - start
    found = (local >= 0) & (local < columns)
    return local.masked_fill_(~found, 0), found


def full_type(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
