"""Policy losses in Triton: a kernel over blocks of rows, and one that adds up the blocks' figures in fixed order.

What the losses are stands in ops/token_losses.py, what the op returns in ops/clipped_ratio.py. A further loss is a case
of `_token_loss`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_srft.ops import clipped_ratio as op
from megatron_srft.ops import token_figures, token_losses

BLOCK = 512
WARPS = 4
BLOCKS_AT_ONCE = 128
"""Partial figures that one round of the second kernel adds up."""

LOG_RATIO_LIMIT = tl.constexpr(token_losses.LOG_RATIO_LIMIT)
ROUNDING = tl.constexpr(op.ROUNDING)
NLL, LOGPROB, CLIPPED, PROBABILITY, SHAPED, ENTROPY, POWER, BLENDED = (
    tl.constexpr(number) for number in token_losses.NUMBERS.values()
)
ROLLOUTS, DEMONSTRATIONS = (tl.constexpr(token_losses.ROWS[name]) for name in token_figures.POPULATIONS)
PER_LENGTH, CORRECTED = tl.constexpr(token_losses.PER_LENGTH), tl.constexpr(token_losses.CORRECTED)
ADVANTAGES, WEIGHTS = tl.constexpr(token_losses.ADVANTAGES), tl.constexpr(token_losses.WEIGHTS)
POPULATION_FIGURES, SUMS = tl.constexpr(len(token_figures.POPULATION_FIGURES)), tl.constexpr(token_figures.SUMS)
TERM_FIGURES = tl.constexpr(len(token_figures.TERM_FIGURES))


def clipped_ratio(
    logprobs: Tensor,
    entropy: Tensor,
    is_demonstration: Tensor,
    response_lengths: Tensor,
    engine_logprobs: Tensor,
    old_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    advantages: Tensor | None,
    weights: Tensor | None,
    losses: list[int],
    rows: list[int],
    parameters: list[float],
    tokens: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradients, figures), see `ops.clipped_ratio`."""
    count, terms = logprobs.shape[0], len(losses)
    blocks = triton.cdiv(count, BLOCK)
    figures = logprobs.new_empty(token_figures.FIRST_TERM + len(token_figures.TERM_FIGURES) * terms)
    gradients = logprobs.new_empty(2 if token_losses.ENTROPY in losses else 1, count)
    partial = logprobs.new_empty(figures.shape[0], blocks)
    with torch.cuda.device_of(logprobs):
        if blocks > 0:
            rows_kernel[(blocks,)](
                logprobs,
                entropy,
                is_demonstration.view(torch.uint8),
                response_lengths,
                engine_logprobs,
                old_logprobs,
                importance_weights,
                advantages,
                0 if advantages is None else advantages.stride(0),
                weights,
                0 if weights is None else weights.stride(0),
                tuple(parameters),
                tuple(1 / op.tokens_of(bits, tokens) for bits in rows),
                1 / max(tokens[0], 1),
                1 / max(tokens[1], 1),
                gradients,
                partial,
                count,
                blocks,
                LOSSES=tuple(losses),
                ROWS=tuple(rows),
                ENTROPY_GRADIENT=len(gradients) == 2,
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
        total_kernel[(figures.shape[0],)](
            partial, figures, blocks, BLOCK=BLOCKS_AT_ONCE, num_warps=1, enable_fp_fusion=True
        )
    of_terms = figures[token_figures.FIRST_TERM :]
    return of_terms[:: len(token_figures.TERM_FIGURES)].sum(), gradients, figures


@triton.jit(do_not_specialize=("advantages_stride", "weights_stride", "count", "blocks"))
def rows_kernel(
    logprobs,
    entropy,
    is_demonstration,
    response_lengths,
    engine_logprobs,
    old_logprobs,
    importance_weights,
    advantages,
    advantages_stride,
    weights,
    weights_stride,
    parameters,
    weight_shares,
    rollout_share,
    demonstration_share,
    gradients,
    partial,
    count,
    blocks,
    LOSSES: tl.constexpr,
    ROWS: tl.constexpr,
    ENTROPY_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    row = block * BLOCK + tl.arange(0, BLOCK)
    exists = row < count
    demonstration = tl.load(is_demonstration + row, mask=exists, other=0) != 0
    rollout = exists & (demonstration == 0)
    logprob = tl.load(logprobs + row, mask=exists, other=0.0)
    h = tl.load(entropy + row, mask=exists, other=0.0)
    old = logprob
    if old_logprobs is not None:
        old = tl.load(old_logprobs + row, mask=exists, other=0.0)
    engine = tl.load(engine_logprobs + row, mask=exists, other=0.0)
    log_ratio, ratio, slope = _clamped_exp(logprob - old)
    gap, engine_ratio, _ = _clamped_exp(tl.where(rollout, old - engine, 0.0))
    corrected = tl.zeros((BLOCK,), tl.float32)
    if importance_weights is not None:
        importance = tl.load(importance_weights + row, mask=exists, other=1.0)
        corrected = tl.where(tl.abs(importance - engine_ratio) > ROUNDING * engine_ratio, 1.0, 0.0)

    out = partial + block
    by_logprob = tl.zeros((BLOCK,), tl.float32)
    by_entropy = tl.zeros((BLOCK,), tl.float32)
    low = tl.zeros((BLOCK,), tl.float32)
    high = tl.zeros((BLOCK,), tl.float32)
    for index in tl.static_range(len(LOSSES)):
        advantage = tl.full((BLOCK,), 1.0, tl.float32)
        if ADVANTAGES & ROWS[index]:
            advantage = tl.load(advantages + index * advantages_stride + row, mask=exists, other=1.0)
        weight = tl.full((BLOCK,), 1.0, tl.float32)
        if WEIGHTS & ROWS[index]:
            weight = tl.load(weights + index * weights_stride + row, mask=exists, other=1.0)
        factor = parameters[5 * index] * weight
        if PER_LENGTH & ROWS[index]:
            factor = factor / tl.load(response_lengths + row, mask=exists, other=1.0)
        if CORRECTED & ROWS[index]:
            if importance_weights is not None:
                factor = factor * importance
        value, logprob_slope, entropy_slope, raised, lowered = _token_loss(
            LOSSES[index], logprob, h, ratio, slope, advantage,
            parameters[5 * index + 1], parameters[5 * index + 2], parameters[5 * index + 3], parameters[5 * index + 4],
        )  # fmt: skip
        kind = 2 * demonstration.to(tl.int32) + tl.where(advantage > 0, 0, 1)
        chosen = exists & (((ROWS[index] >> kind) & 1) != 0)
        by_logprob += tl.where(chosen, factor * logprob_slope, 0.0)
        by_entropy += tl.where(chosen, factor * entropy_slope, 0.0)
        low += tl.where(chosen, raised, 0.0)
        high += tl.where(chosen, lowered, 0.0)
        counted = (rollout & ((ROLLOUTS & ROWS[index]) != 0)) | (
            exists & demonstration & ((DEMONSTRATIONS & ROWS[index]) != 0)
        )
        figure = 2 * POPULATION_FIGURES + index * TERM_FIGURES
        _add(out, figure, blocks, value * factor, chosen, 1.0)
        _add(out, figure + 1, blocks, weight, counted, weight_shares[index])
        _add_largest(out, figure + 2, blocks, weight, counted)

    for population in tl.static_range(2):
        counts = rollout if population == 0 else exists & demonstration
        share = rollout_share if population == 0 else demonstration_share
        figure = population * POPULATION_FIGURES
        _add(out, figure, blocks, -logprob, counts, share)
        _add(out, figure + 1, blocks, h, counts, share)
        _add(out, figure + 2, blocks, ratio, counts, share)
        _add(out, figure + 3, blocks, -log_ratio, counts, share)
        _add(out, figure + 4, blocks, ratio - 1.0 - log_ratio, counts, share)
        _add(out, figure + 5, blocks, low, counts, share)
        _add(out, figure + 6, blocks, high, counts, share)
        _add(out, figure + 7, blocks, tl.abs(gap), counts, share)
        _add(out, figure + 8, blocks, engine_ratio - 1.0 - gap, counts, share)
        _add(out, figure + 9, blocks, corrected, counts, share)
        _add_largest(out, figure + 10, blocks, ratio, counts)
        _add_largest(out, figure + 11, blocks, tl.abs(gap), counts)

    tl.store(gradients + row, by_logprob, mask=exists)
    if ENTROPY_GRADIENT:
        tl.store(gradients + count.to(tl.int64) + row, by_entropy, mask=exists)


@triton.jit
def _token_loss(LOSS: tl.constexpr, logprob, entropy, ratio, slope, advantage, lower, upper, dual_clip, gamma):
    """Loss, its derivatives by log-prob and entropy, 1 where it was clipped below, 1 where above."""
    zero = tl.zeros_like(logprob)
    if LOSS == NLL:
        return -logprob, zero - 1.0, zero, zero, zero
    elif LOSS == LOGPROB:
        return -advantage * logprob, -advantage, zero, zero, zero
    elif LOSS == CLIPPED:
        pulls = advantage >= 0
        most = tl.where(pulls, upper, dual_clip)
        least = tl.where(pulls, float("-inf"), lower)
        bounded = tl.where(ratio > most, most, ratio)
        bounded = tl.where(bounded < least, least, bounded)
        held = (bounded > ratio) | (bounded < ratio)
        raised = tl.where(bounded > ratio, 1.0, 0.0)
        lowered = tl.where((bounded < ratio) & (advantage > 0), 1.0, 0.0)
        return -advantage * bounded, -advantage * tl.where(held, 0.0, slope), zero, raised, lowered
    elif LOSS == PROBABILITY:
        value = -advantage * tl.exp(logprob)
        return value, value, zero, zero, zero
    elif LOSS == SHAPED:
        probability = tl.exp(logprob)
        value = -advantage * probability / (probability + gamma)
        return value, value * gamma / (probability + gamma), zero, zero, zero
    elif LOSS == ENTROPY:
        return -entropy, zero, zero - 1.0, zero, zero
    elif LOSS == POWER:
        value = -advantage * tl.exp(gamma * logprob)
        return value, value * gamma, zero, zero, zero
    else:
        tl.static_assert(LOSS == BLENDED)
        probability = tl.exp(logprob)
        value = -advantage * (probability + gamma * logprob)
        return value, -advantage * (probability + gamma), zero, zero, zero


@triton.jit
def _clamped_exp(log_ratio):
    """The clamped log-ratio, its exp, and the exp's derivative by the log-ratio before clamping; NaN passes."""
    beyond = tl.abs(log_ratio) > LOG_RATIO_LIMIT
    clamped = tl.where(beyond, tl.where(log_ratio > 0, LOG_RATIO_LIMIT, -LOG_RATIO_LIMIT), log_ratio)
    ratio = tl.exp(clamped)
    return clamped, ratio, tl.where(beyond, 0.0, ratio)


@triton.jit
def _add(out, figure, blocks, values, counts, share):
    tl.store(out + figure * blocks, tl.sum(tl.where(counts, values, 0.0)) * share)


@triton.jit
def _add_largest(out, figure, blocks, values, counts):
    kept = tl.where(counts, values, 0.0)
    tl.store(out + figure * blocks, _with_nan(kept, tl.max(kept)))


@triton.jit
def _with_nan(values, largest):
    """The largest, or NaN if there is one: tl.max skips it."""
    return tl.where(tl.sum((values != values).to(tl.int32)) > 0, float("nan"), largest)


@triton.jit(do_not_specialize=("blocks",))
def total_kernel(partial, figures, blocks, BLOCK: tl.constexpr):
    figure = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float64)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        values = tl.load(partial + figure.to(tl.int64) * blocks + block, mask=block < blocks, other=0.0)
        total += values.to(tl.float64)
        largest = tl.where((values > largest) | (values != values), values, largest)
    after = figure - 2 * POPULATION_FIGURES
    is_largest = ((after < 0) & (figure % POPULATION_FIGURES >= SUMS)) | ((after >= 0) & (after % TERM_FIGURES == 2))
    if is_largest:
        tl.store(figures + figure, _with_nan(largest, tl.max(largest)))
    else:
        tl.store(figures + figure, tl.sum(total).to(tl.float32))
