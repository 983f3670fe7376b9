"""What objectives are made of: their inputs and output, the per-token losses, the entropy weights, the averages.

An objective is a sum of terms; a term is a token population, a per-token loss, a weight and a denominator. Denominators
come from `Counts`, which hold for the whole optimizer update, so a micro-batch's loss and metrics are shares that add
up to the update's, however it was cut into micro-batches and over ranks. An empty population contributes 0.

Rows are the response tokens of one micro-batch; all rows of a sequence are in it and stand together. Log-probs are
natural logarithms under the policy at the sampling temperature. Nothing here waits for the device.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_srft.config import Denominator
from megatron_srft.sample import Counts, PackedBatch, TokenStats

Population = Literal["rollouts", "demonstrations", "both"]

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +-this before exp; a token beyond it has lost its gradient anyway."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ObjectiveInputs:
    """The rows of one micro-batch as an objective sees them."""

    logprobs: Tensor
    """[rows] log-prob of the taken token, with gradient."""

    entropy: Tensor
    """[rows] entropy of the next-token distribution in nats, with gradient."""

    advantages: Tensor
    """[rows]."""

    is_demonstration: Tensor
    """[rows] bool; the other rows are rollouts."""

    correct: Tensor
    """[rows] bool; the verifier's verdict on the row's sequence."""

    sequence: Tensor
    """[rows] int64, never decreasing; index of the row's sequence in this micro-batch."""

    num_sequences: int
    """Sequences in this micro-batch."""

    response_lengths: Tensor
    """[rows] response tokens of the row's sequence."""

    rollout_logprobs: Tensor
    """[rows] the rollout engine's log-probs; meaningless on demonstrations."""

    old_logprobs: Tensor | None = None
    """[rows] log-probs before the step, without gradient. None: the current ones (the ratio is 1)."""

    pooled_entropy: Tensor | None = None
    """[rows] entropy before the step, averaged over the row's group or the batch; None unless the objective asks."""

    importance_weights: Tensor | None = None
    """[rows] weight of the rollout rows' losses that corrects for an engine unlike the trainer; None: 1."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ObjectiveOutput:
    """One micro-batch's share of the update's loss and metrics."""

    loss: Tensor
    """Scalar; the sum over micro-batches and data-parallel ranks is the update's loss."""

    metrics: dict[str, Tensor]
    """Scalars without gradient. They add up over micro-batches and data-parallel ranks, like the loss, except those
    whose name starts with `max/`, of which the largest counts. The names depend on the config and on which populations
    the update has, never on the micro-batch."""


def gather_inputs(batch: PackedBatch, stats: TokenStats) -> ObjectiveInputs:
    """The objective's inputs from a packed micro-batch and the policy's statistics on its rows."""
    return ObjectiveInputs(
        logprobs=stats.logprobs,
        entropy=stats.entropy,
        advantages=batch.advantages,
        is_demonstration=batch.is_demonstration,
        correct=batch.correct,
        sequence=batch.sequence,
        num_sequences=len(batch.sequence_ids),
        response_lengths=batch.response_lengths,
        rollout_logprobs=batch.rollout_logprobs,
        old_logprobs=batch.old_logprobs,
        pooled_entropy=batch.pooled_entropy,
    )


# ---------------------------------------------------------------- per-token losses


def log_ratio(inputs: ObjectiveInputs) -> Tensor:
    """[rows] log of policy / policy before the step, clamped."""
    return (inputs.logprobs - logprobs_before_step(inputs)).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def engine_log_ratio(inputs: ObjectiveInputs) -> Tensor:
    """[rows] log of policy before the step / rollout engine, clamped, without gradient; 0 on demonstrations."""
    difference = logprobs_before_step(inputs) - inputs.rollout_logprobs
    return torch.where(inputs.is_demonstration, 0, difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def logprobs_before_step(inputs: ObjectiveInputs) -> Tensor:
    return inputs.logprobs.detach() if inputs.old_logprobs is None else inputs.old_logprobs


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Tensor:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A); for A < 0 also no more than dual_clip * |A|.

    The gradient is -A grad r, and exactly 0 where the clip holds: r > 1 + clip_high with A >= 0, r < 1 - clip_low with
    A < 0, r > dual_clip with A < 0.
    """
    bounded = torch.where(advantages >= 0, ratio.clamp(max=1 + clip_high), ratio.clamp(min=1 - clip_low, max=dual_clip))
    return -advantages * bounded


def shaped_probability(logprobs: Tensor, shaping: Literal["none", "p_div_p_gamma"], gamma: float) -> Tensor:
    """p, or p / (p + gamma), whose gradient gamma p / (p + gamma)^2 grad log p favours unlikely tokens (LUFFY)."""
    probability = logprobs.exp()
    return probability if shaping == "none" else probability / (probability + gamma)


def entropy_weight(entropy: Tensor, constant: float, sign: Literal[-1, 0, 1], exponent_limit: float) -> Tensor:
    """constant * exp(sign * H), the exponent clamped, without gradient."""
    return constant * (sign * entropy.detach()).clamp(-exponent_limit, exponent_limit).exp()


def entropy_at_level(inputs: ObjectiveInputs, level: Literal["token", "sequence", "group", "batch"]) -> Tensor:
    """[rows] the entropy that weights a row: its own, or averaged over its sequence, group or batch; no gradient."""
    match level:
        case "token":
            return inputs.entropy.detach()
        case "sequence":
            return sequence_sums(inputs.entropy.detach(), inputs) / inputs.response_lengths
        case "group" | "batch":
            assert inputs.pooled_entropy is not None, f"entropy_level {level} needs entropies pooled before the step"
            return inputs.pooled_entropy


def sequence_sums(values: Tensor, inputs: ObjectiveInputs) -> Tensor:
    """[rows] the sum of a row's sequence, added up in row order (index_add is not deterministic on CUDA)."""
    edges = torch.arange(inputs.num_sequences + 1, device=values.device)
    offsets = torch.searchsorted(inputs.sequence, edges)
    sums = torch.segment_reduce(values, "sum", offsets=offsets, initial=0)
    return sums[inputs.sequence]


# ---------------------------------------------------------------- averages


def rows_of(inputs: ObjectiveInputs, population: Population) -> Tensor:
    """[rows] bool; the rows that belong to a population."""
    match population:
        case "rollouts":
            return ~inputs.is_demonstration
        case "demonstrations":
            return inputs.is_demonstration
        case "both":
            return torch.ones_like(inputs.is_demonstration)


def population_size(counts: Counts, population: Population) -> tuple[int, int]:
    """(tokens, sequences) of a population in the whole update."""
    match population:
        case "rollouts":
            return counts.rollout_tokens, counts.rollout_sequences
        case "demonstrations":
            return counts.demonstration_tokens, counts.demonstration_sequences
        case "both":
            return (
                counts.rollout_tokens + counts.demonstration_tokens,
                counts.rollout_sequences + counts.demonstration_sequences,
            )


def average(
    values: Tensor,
    mask: Tensor,
    inputs: ObjectiveInputs,
    counts: Counts,
    *,
    population: Population,
    denominator: Denominator,
    constant_length: int | None = None,
) -> Tensor:
    """This micro-batch's share of the mean of `values` over a population.

    Args:
        values: [rows]; what stands outside `mask` is ignored.
        mask: [rows] bool; the rows that are summed: the population, or a part of it (the rest then counts as 0).
        population: whose global size divides the sum.
        denominator: how; see `config.Denominator`.
        constant_length: tokens per sequence for the constant denominator.
    """
    tokens, sequences = population_size(counts, population)
    match denominator:
        case "tokens":
            divisor = tokens
        case "sequence_mean":
            values, divisor = values / inputs.response_lengths, sequences
        case "sequence_sum":
            divisor = sequences
        case "constant":
            assert constant_length, "the constant denominator needs a length; use a resolved config"
            divisor = sequences * constant_length
    return torch.where(mask, values, 0).sum() / max(divisor, 1)


def token_mean(values: Tensor, inputs: ObjectiveInputs, counts: Counts, population: Population) -> Tensor:
    """This micro-batch's share of the mean of `values` over all tokens of a population."""
    tokens, _ = population_size(counts, population)
    return torch.where(rows_of(inputs, population), values, 0).sum(dim=-1) / max(tokens, 1)


def entropy_bonus(inputs: ObjectiveInputs, counts: Counts, population: Population, coefficient: float) -> Tensor:
    """-coefficient * mean token entropy; without a gradient (and its cost) when the coefficient is 0."""
    entropy = inputs.entropy if coefficient else inputs.entropy.detach()
    return -coefficient * token_mean(entropy, inputs, counts, population)


def correct_for_engine(values: Tensor, inputs: ObjectiveInputs) -> Tensor:
    """[rows] rollout losses times their importance weights, if there are any."""
    return values if inputs.importance_weights is None else values * inputs.importance_weights


def with_importance_weights(
    inputs: ObjectiveInputs, kind: Literal["truncate", "mask"], limit: float
) -> ObjectiveInputs:
    """Inputs whose rollout rows are weighted by w = policy before the step / engine, for an engine unlike the trainer.

    truncate: min(w, limit). mask: w where 1/limit <= w <= limit, else 0.
    """
    weights = engine_log_ratio(inputs).exp()
    if kind == "truncate":
        weights = weights.clamp(max=limit)
    else:
        weights = torch.where((weights >= 1 / limit) & (weights <= limit), weights, 0)
    return dataclasses.replace(inputs, importance_weights=weights)
