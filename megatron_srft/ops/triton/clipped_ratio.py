"""Policy losses in Triton: a kernel over blocks of rows, and one that adds up the blocks' figures in fixed order.

What the losses are stands in ops/token_losses.py, what the op returns in ops/clipped_ratio.py. A further loss is a case
of `_token_loss`.
"""

from typing import Any

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
FIRST_TERM, TERM_FIGURES = tl.constexpr(token_figures.FIRST_TERM), tl.constexpr(len(token_figures.TERM_FIGURES))


def clipped_ratio(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradients, figures); takes and returns what `ops.clipped_ratio.reference` does."""
    logprobs, entropy, is_demonstration, response_lengths, engine_logprobs, old_logprobs, *rest = arguments
    importance_weights, advantages, weights, losses, rows, parameters, tokens = rest
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
    logprobs, entropy, is_demonstration, response_lengths, engine_logprobs, old_logprobs, importance_weights,
    advantages, advantages_stride, weights, weights_stride, parameters, weight_shares, rollout_share,
    demonstration_share, gradients, partial, count, blocks,
    LOSSES: tl.constexpr, ROWS: tl.constexpr, ENTROPY_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    row = block * BLOCK + tl.arange(0, BLOCK)
    exists = row < count
    demonstration = exists & (tl.load(is_demonstration + row, mask=exists, other=0) != 0)
    rollout = exists & (demonstration == 0)
    logprob = tl.load(logprobs + row, mask=exists, other=0.0)
    h = tl.load(entropy + row, mask=exists, other=0.0)
    old = logprob if old_logprobs is None else tl.load(old_logprobs + row, mask=exists, other=0.0)
    engine = tl.load(engine_logprobs + row, mask=exists, other=0.0)
    policy = _clamped_exp(logprob - old)
    behaviour = _clamped_exp(tl.where(rollout, old - engine, 0.0))
    importance = None if importance_weights is None else tl.load(importance_weights + row, mask=exists, other=1.0)

    out = partial + block
    by_logprob = tl.zeros((BLOCK,), tl.float32)
    by_entropy, low, high = by_logprob, by_logprob, by_logprob
    for index in tl.static_range(len(LOSSES)):
        advantage = _given(ADVANTAGES & ROWS[index], advantages, index * advantages_stride + row, exists)
        weight = _given(WEIGHTS & ROWS[index], weights, index * weights_stride + row, exists)
        factor = _factor(ROWS[index], parameters[5 * index] * weight, response_lengths, row, exists, importance)
        loss = _token_loss(
            LOSSES[index], logprob, h, policy[1], policy[2], advantage,
            parameters[5 * index + 1], parameters[5 * index + 2], parameters[5 * index + 3], parameters[5 * index + 4],
        )  # fmt: skip
        chosen = _chosen(ROWS[index], exists, demonstration, advantage)
        by_logprob += tl.where(chosen, factor * loss[1], 0.0)
        by_entropy += tl.where(chosen, factor * loss[2], 0.0)
        low += tl.where(chosen, loss[3], 0.0)
        high += tl.where(chosen, loss[4], 0.0)
        _add(out, FIRST_TERM + index * TERM_FIGURES, blocks, loss[0] * factor, chosen, 1.0)
        counted = _counted(ROWS[index], rollout, demonstration)
        _add(out, FIRST_TERM + index * TERM_FIGURES + 1, blocks, weight, counted, weight_shares[index])
        _add_largest(out, FIRST_TERM + index * TERM_FIGURES + 2, blocks, weight, counted)

    corrected = _corrected(importance, behaviour[1])
    values = (logprob, h, policy, low, high, behaviour, corrected)
    _add_population(0, out, blocks, rollout, rollout_share, values)
    _add_population(1, out, blocks, demonstration, demonstration_share, values)
    tl.store(gradients + row, by_logprob, mask=exists)
    if ENTROPY_GRADIENT:
        tl.store(gradients + count.to(tl.int64) + row, by_entropy, mask=exists)


@triton.jit
def _given(GIVEN: tl.constexpr, values, place, exists):
    """A term's advantages or weights; 1 if it has none."""
    if GIVEN:
        return tl.load(values + place, mask=exists, other=1.0)
    else:
        return tl.full(place.shape, 1.0, tl.float32)


@triton.jit
def _factor(ROWS: tl.constexpr, factor, response_lengths, row, exists, importance):
    """What a term's rows are multiplied by, from the scale times the weight."""
    if PER_LENGTH & ROWS:
        factor = factor / tl.load(response_lengths + row, mask=exists, other=1.0)
    if CORRECTED & ROWS:
        if importance is not None:
            factor = factor * importance
    return factor


@triton.jit
def _chosen(ROWS: tl.constexpr, exists, demonstration, advantage):
    """Whether a term sums a row."""
    kind = 2 * demonstration.to(tl.int32) + tl.where(advantage > 0, 0, 1)
    return exists & (((ROWS >> kind) & 1) != 0)


@triton.jit
def _counted(ROWS: tl.constexpr, rollout, demonstration):
    """Whether a row is of a term's populations."""
    return (rollout & ((ROLLOUTS & ROWS) != 0)) | (demonstration & ((DEMONSTRATIONS & ROWS) != 0))


@triton.jit
def _corrected(importance, engine_ratio):
    """1 where the importance weight is not the ratio that it came from."""
    if importance is None:
        return tl.zeros_like(engine_ratio)
    else:
        return tl.where(tl.abs(importance - engine_ratio) > ROUNDING * engine_ratio, 1.0, 0.0)


@triton.jit
def _add_population(POPULATION: tl.constexpr, out, blocks, counts, share, values):
    """A population's figures, in the order of token_figures.POPULATION_FIGURES."""
    logprob, entropy, policy, low, high, behaviour, corrected = values
    figure = POPULATION * POPULATION_FIGURES
    _add(out, figure, blocks, -logprob, counts, share)
    _add(out, figure + 1, blocks, entropy, counts, share)
    _add(out, figure + 2, blocks, policy[1], counts, share)
    _add(out, figure + 3, blocks, -policy[0], counts, share)
    _add(out, figure + 4, blocks, policy[1] - 1.0 - policy[0], counts, share)
    _add(out, figure + 5, blocks, low, counts, share)
    _add(out, figure + 6, blocks, high, counts, share)
    _add(out, figure + 7, blocks, tl.abs(behaviour[0]), counts, share)
    _add(out, figure + 8, blocks, behaviour[1] - 1.0 - behaviour[0], counts, share)
    _add(out, figure + 9, blocks, corrected, counts, share)
    _add_largest(out, figure + 10, blocks, policy[1], counts)
    _add_largest(out, figure + 11, blocks, tl.abs(behaviour[0]), counts)


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
    after = figure - FIRST_TERM
    is_largest = ((after < 0) & (figure % POPULATION_FIGURES >= SUMS)) | ((after >= 0) & (after % TERM_FIGURES == 2))
    if is_largest:
        tl.store(figures + figure, _with_nan(largest, tl.max(largest)))
    else:
        tl.store(figures + figure, tl.sum(total).to(tl.float32))
