"""Full-vocabulary KL divergence between the policy and a reference, from hidden states and LM-head shards.

With logits x = hidden @ weight.T / T, y those of the reference, p = softmax(x), q = softmax(y), a row's upstream
gradient g:

    policy_reference:  KL(p||q) = sum_v p_v (ln p_v - ln q_v)    dL/dx_v = g p_v (ln p_v - ln q_v - KL)
    reference_policy:  KL(q||p) = sum_v q_v (ln q_v - ln p_v)    dL/dx_v = g (p_v - q_v)

Either is a divergence of one distribution f from another s, for which each chunk of columns contributes five numbers,

    m_f = max f_v    S_f = sum exp(f_v - m_f)    W = sum exp(f_v - m_f) ((f_v - m_f) - (s_v - m_s))    m_s    S_s

(f_v, s_v for the scaled logits) which merge in fixed order over chunks and ranks into KL = W / S_f - (ln S_f - ln S_s).
The logits of both are computed a chunk of the vocabulary at a time, and again in the backward pass.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_srft import distributed
from megatron_srft.distributed import Group
from megatron_srft.ops import linear_chunks, shards
from megatron_srft.ops.linear_chunks import chunks_of, for_product, product_into
from megatron_srft.ops.softmax_statistics import EXP_IS_ZERO, finite, full_type

Direction = Literal["policy_reference", "reference_policy"]

DIRECTIONS: tuple[Direction, ...] = ("policy_reference", "reference_policy")

LOGITS_ALIVE = 3
"""Matrices of a chunk that exist at once: both models' logits and one of what is computed from them."""


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    temperature: float = 1.0,
    group: Group = None,
    direction: Direction = "policy_reference",
    weight_gradient: Tensor | None = None,
    chunk_columns: int | None = None,
) -> Tensor:
    """KL(policy || reference), or KL(reference || policy), of the next-token distribution of every row, in nats.

    The gradient of `hidden` is the partial sum over this rank's columns; summing it over the tensor-parallel ranks is
    left to the region function that produced `hidden`, as in `linear_token_logprob`.

    Args:
        hidden: [rows, hidden] of the policy, the same on every rank of `group`.
        weight: [vocab_shard, hidden] of the same type.
        reference_hidden: [rows, reference_hidden] of the reference, a constant; its width may differ, and so may its
            type unless one of them is float64.
        reference_weight: [vocab_shard, reference_hidden] of the reference, a constant, cut as `weight` is.
        vocab_start, vocab_size, temperature, group: as in `token_logprob`.
        direction: which of the two divergences.
        weight_gradient: [vocab_shard, hidden], usually float32. The backward pass adds the weight's gradient to it,
            and autograd gets none for `weight`.
        chunk_columns: columns per chunk; None: as many as make linear_chunks.CHUNK_BYTES over all that is computed of
            them, but not less than NARROWEST_CHUNK.

    Returns:
        [rows] float32 (float64 for float64 hidden states), equal on every rank. A token that the second distribution
        rules out and the first does not gives inf, and a gradient that is not finite.

    Raises:
        ValueError: an argument has the wrong shape, type or device, or the ranks' shards do not make up the vocabulary.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    linear_chunks.check(hidden, weight, weight_gradient, chunk_columns)
    linear_chunks.check_factors("reference_hidden", reference_hidden, "reference_weight", reference_weight)
    _check_alike(hidden, weight, reference_hidden, reference_weight)
    shards.check_shard(len(weight), vocab_start, vocab_size, temperature, group)
    return _LinearKL.apply(
        hidden,
        weight,
        reference_hidden.detach(),
        reference_weight.detach(),
        weight_gradient,
        group,
        direction == "policy_reference",
        shards.valid_columns(len(weight), vocab_start, vocab_size),
        1 / temperature,
        chunk_columns or linear_chunks.columns_at_once(LOGITS_ALIVE * len(hidden) * full_type(hidden).itemsize),
    )


def _check_alike(hidden: Tensor, weight: Tensor, reference_hidden: Tensor, reference_weight: Tensor) -> None:
    for name, own, reference in (("hidden", hidden, reference_hidden), ("weight", weight, reference_weight)):
        if len(own) != len(reference) or own.device != reference.device or full_type(own) != full_type(reference):
            raise ValueError(
                f"reference_{name} must have as many rows as {name}, on its device, and both or neither be float64, "
                f"got {len(reference)} {reference.dtype} on {reference.device} beside {len(own)} {own.dtype} on "
                f"{own.device}"
            )


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, reference_hidden, reference_weight, weight_gradient, group, policy_first, *numbers
    ):
        models = (hidden, weight, reference_hidden, reference_weight)
        parts = [
            _statistics(*(own, other) if policy_first else (other, own)) for _, own, other in _logits(models, *numbers)
        ]
        statistics = _merge(torch.stack(parts))
        if len(hidden) > 0:
            statistics = _merge(torch.stack(distributed.all_gather(statistics, group)))
        normalisers, divergence = _finish(statistics)
        ctx.save_for_backward(*models, divergence)
        ctx.policy, ctx.reference = normalisers if policy_first else normalisers[::-1]
        ctx.weight_gradient, ctx.policy_first, ctx.numbers = weight_gradient, policy_first, numbers
        return divergence

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        *models, divergence = ctx.saved_tensors
        hidden, weight = models[:2]
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        own = needs_weight and ctx.weight_gradient is None
        weight_gradient = torch.zeros_like(weight) if own else ctx.weight_gradient if needs_weight else None
        hidden_gradient = torch.zeros_like(hidden, dtype=full_type(hidden)) if needs_hidden else None
        factor = (upstream * ctx.numbers[1])[:, None]
        for start, policy, reference in _logits(models, *ctx.numbers):
            _to_log_softmax(policy, ctx.policy)
            _to_log_softmax(reference, ctx.reference)
            gradient = _gradient(policy, reference, divergence if ctx.policy_first else None)
            gradient = gradient.mul_(factor).to(hidden.dtype)
            linear_chunks.add_products(gradient, hidden, weight, start, hidden_gradient, weight_gradient, not own)
        return (
            hidden_gradient.to(hidden.dtype) if needs_hidden else None,
            weight_gradient if own else None,
            *[None] * 8,
        )


def _logits(models, columns: int, inverse_temperature: float, chunk: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Of each chunk: where it starts, and the scaled logits [rows, columns] of policy and reference.

    The next chunk's are written over them.
    """
    hidden, weight, reference_hidden, reference_weight = models
    factors = (for_product(hidden), weight), (for_product(reference_hidden), reference_weight)
    workspaces = torch.empty(2, len(hidden) * min(chunk, columns), dtype=full_type(hidden), device=hidden.device)
    for start, stop in chunks_of(columns, chunk):
        pair = workspaces[:, : len(hidden) * (stop - start)].view(2, len(hidden), stop - start)
        for logits, (left, head) in zip(pair, factors, strict=True):
            product_into(logits, left, head[start:stop].t())
        yield start, *pair.mul_(inverse_temperature)


class _Normaliser(NamedTuple):
    maximum: Tensor
    log_total: Tensor
    """Two numbers per row, not one: their sum would lose the digits of log_total to a large maximum."""


def _to_log_softmax(logits: Tensor, normaliser: _Normaliser) -> None:
    logits.sub_(finite(normaliser.maximum)[:, None]).sub_(normaliser.log_total[:, None])


def _gradient(policy: Tensor, reference: Tensor, divergence: Tensor | None) -> Tensor:
    """By the scaled logits, from log-probs; KL(policy||reference) if its value is given. Writes over both."""
    if divergence is None:
        return policy.exp_().sub_(reference.exp_())
    gap = torch.sub(policy, reference, out=reference).sub_(divergence[:, None])
    probabilities = policy.exp_()
    return gap.mul_(probabilities).masked_fill_(probabilities == 0, 0)  # where -inf - -inf is NaN


def _statistics(first: Tensor, second: Tensor) -> Tensor:
    """[5, rows]: m_f, S_f, W, m_s, S_s of a chunk's scaled logits [rows, columns]. Writes over both."""
    if first.shape[1] == 0:
        empty = first.new_zeros(5, len(first))
        empty[[0, 3]] = -torch.inf
        return empty
    first_maximum, second_maximum = first.amax(dim=1), second.amax(dim=1)
    first.sub_(finite(first_maximum)[:, None])
    second.sub_(finite(second_maximum)[:, None])
    second_sum = second.exp().sum(dim=1)
    gap = torch.sub(first, second, out=second)
    weights = first.exp_()
    weighted = gap.mul_(weights).masked_fill_(weights == 0, 0)  # where -inf - -inf is NaN
    return torch.stack((first_maximum, weights.sum(dim=1), weighted.sum(dim=1), second_maximum, second_sum))


def _merge(parts: Tensor) -> Tensor:
    """[parts, 5, rows] -> [5, rows]: statistics of the union of disjoint sets of columns, in the order given."""
    if len(parts) == 1:
        return parts[0]
    first_maxima, first_sums, weighted, second_maxima, second_sums = parts.unbind(1)
    first_maximum, second_maximum = first_maxima.amax(dim=0), second_maxima.amax(dim=0)
    first_shifts = (first_maxima - finite(first_maximum)).clamp_min_(EXP_IS_ZERO)
    # A part that was all -inf had 0 for its point of reference: it stays there, and its sums are 0.
    second_shifts = (second_maxima - finite(second_maximum)).masked_fill_(second_maxima == -torch.inf, 0)
    scales = first_shifts.exp()
    shifted = scales * (weighted + (first_shifts - second_shifts) * first_sums)
    return torch.stack(
        (
            first_maximum,
            (scales * first_sums).sum(dim=0),
            shifted.masked_fill_(scales == 0, 0).sum(dim=0),
            second_maximum,
            (second_shifts.exp() * second_sums).sum(dim=0),
        )
    )


def _finish(statistics: Tensor) -> tuple[tuple[_Normaliser, _Normaliser], Tensor]:
    """Normalisers of both distributions, and KL(first||second), each number [rows]."""
    first_maximum, first_sum, weighted, second_maximum, second_sum = statistics.unbind(0)
    first, second = _Normaliser(first_maximum, first_sum.log()), _Normaliser(second_maximum, second_sum.log())
    return (first, second), weighted / first_sum - (first.log_total - second.log_total)
