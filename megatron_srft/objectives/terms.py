"""What objectives are made of: their inputs and output, their terms' means and weights, and `evaluate`.

An objective is a table of terms; a term is a token population, a per-token loss (ops/token_losses.py), a weight and a
denominator. One op gives the loss, its gradient and every per-token figure (ops/clipped_ratio.py). Denominators come
from `Counts`, which hold for the whole optimizer update, so a micro-batch's loss and metrics are shares that add up to
the update's, however it was cut into micro-batches and over ranks. An empty population contributes 0.

Rows are the response tokens of one micro-batch; all rows of a sequence are in it and stand together. Log-probs are
natural logarithms under the policy at the sampling temperature. Nothing here waits for the device.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from megatron_srft.config import Denominator, GrpoConfig, SurrogateConfig
from megatron_srft.objectives.metrics import Metrics, demonstration_places, rollout_places, term_places
from megatron_srft.ops.clipped_ratio import clipped_ratio
from megatron_srft.ops.token_losses import ROWS, Term, clamped_exp
from megatron_srft.sample import Counts, PackedBatch, TokenStats

Population = Literal["rollouts", "demonstrations", "both"]


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

    reference_logprobs: Tensor | None = None
    """[rows] log-probs of the reference policy, without gradient; None unless the loss holds the policy near it."""

    reference_kl: Tensor | None = None
    """[rows] divergence between the policy's and the reference's whole distributions, with gradient; None unless the
    objective asks."""

    group: Tensor | None = None
    """[rows] int64; index of the row's group within the step."""

    pooled_entropy: Tensor | None = None
    """[rows] entropy before the step, averaged over the row's group or the batch; None unless the objective asks."""

    importance_weights: Tensor | None = None
    """[rows] weight of the rollout rows' losses that corrects for an engine unlike the trainer; None: 1."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ObjectiveOutput:
    """One micro-batch's share of the update's loss and metrics."""

    loss: Tensor
    """Scalar; the sum over micro-batches and data-parallel ranks is the update's loss."""

    metrics: Metrics
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
        reference_logprobs=batch.reference_logprobs,
        reference_kl=stats.reference_kl,
        group=batch.group,
        pooled_entropy=batch.pooled_entropy,
    )


# ---------------------------------------------------------------- evaluation


def evaluate(
    inputs: ObjectiveInputs,
    counts: Counts,
    terms: dict[str, Term],
    *,
    of_rollouts: bool = True,
    of_demonstrations: bool = True,
    clips: bool = False,
    demonstration_ratios: bool = False,
    weights: dict[str, str] | None = None,
) -> ObjectiveOutput:
    """This micro-batch's share of the sum of the terms, and the metrics.

    Args:
        terms: by the name under which its part of the loss is reported (when there are several).
        of_rollouts, of_demonstrations: report figures of these tokens.
        clips: report how many tokens were clipped, of the population that has ratios.
        demonstration_ratios: that population are the demonstrations; report their ratios.
        weights: report these weights; name of the metric -> name of the term.
    """
    entropy_counts = any(term.loss == "entropy" and term.scale != 0 for term in terms.values())
    loss, figures = clipped_ratio(
        inputs.logprobs,
        inputs.entropy if entropy_counts else inputs.entropy.detach(),  # its gradient is not for free
        list(terms.values()),
        is_demonstration=inputs.is_demonstration,
        response_lengths=inputs.response_lengths,
        engine_logprobs=inputs.rollout_logprobs,
        old_logprobs=inputs.old_logprobs,
        importance_weights=inputs.importance_weights,
        tokens=(counts.rollout_tokens, counts.demonstration_tokens),
    )
    known = {metric: name for metric, name in (weights or {}).items() if population_size(counts, terms[name].rows)[0]}
    places = term_places(list(terms), known)
    if of_rollouts:
        places |= rollout_places(counts, clips=clips, corrected=inputs.importance_weights is not None)
    if of_demonstrations:
        ratios = demonstration_ratios
        places |= demonstration_places(counts, ratios=ratios, clips=ratios and clips)
    return ObjectiveOutput(loss=loss, metrics=Metrics(figures.values, places))


# ---------------------------------------------------------------- means


class Mean(NamedTuple):
    """How the losses of a population become a mean, as an objective's config says."""

    denominator: Denominator
    constant_length: int | None = None
    """Tokens per sequence for the constant denominator."""


def mean_over(population: Population, counts: Counts, mean: Mean, coefficient: float = 1.0) -> dict[str, Any]:
    """The fields of a `Term` that make it `coefficient` times a mean over a population of the whole update.

    Tokens of the population that the term does not select count as 0.
    """
    tokens, sequences = population_size(counts, population)
    match mean.denominator:
        case "tokens":
            divisor = tokens
        case "sequence_mean" | "sequence_sum":
            divisor = sequences
        case "constant":
            assert mean.constant_length, "the constant denominator needs a length; use a resolved config"
            divisor = sequences * mean.constant_length
    return dict(scale=coefficient / max(divisor, 1), per_length=mean.denominator == "sequence_mean")


def token_mean_over(population: Population, counts: Counts, coefficient: float = 1.0) -> dict[str, Any]:
    return mean_over(population, counts, Mean("tokens"), coefficient)


def population_size(counts: Counts, rows: str) -> tuple[int, int]:
    """(tokens, sequences) in the whole update of the populations that a term's rows are from."""
    rollouts, demonstrations = (
        int(ROWS[rows] & ROWS[population] != 0) for population in ("rollouts", "demonstrations")
    )
    return (
        rollouts * counts.rollout_tokens + demonstrations * counts.demonstration_tokens,
        rollouts * counts.rollout_sequences + demonstrations * counts.demonstration_sequences,
    )


def clipped_surrogate(
    inputs: ObjectiveInputs,
    counts: Counts,
    config: GrpoConfig | SurrogateConfig,
    coefficient: float = 1.0,
    dual_clip: float | None = None,
) -> Term:
    """-coefficient * mean min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) over the rollouts; config is resolved."""
    return Term(
        loss="clipped",
        rows="rollouts",
        advantages=inputs.advantages,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=dual_clip,
        **mean_over("rollouts", counts, Mean(config.denominator, config.constant_length), coefficient),
    )


def likelihood(counts: Counts, coefficient: float, weights: Tensor | None = None) -> Term:
    """coefficient * mean -w log p over the demonstrations' tokens; weights: [rows], None: 1."""
    return Term(
        loss="nll", rows="demonstrations", weights=weights, **token_mean_over("demonstrations", counts, coefficient)
    )


def entropy_bonus(population: Population, counts: Counts, coefficient: float) -> Term:
    """-coefficient * mean token entropy."""
    mean = token_mean_over(population, counts, coefficient)
    return Term(loss="entropy", rows=population, corrected=False, **mean)


# ---------------------------------------------------------------- weights


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
    return sums_by_sequence(values, inputs)[inputs.sequence]


def sums_by_sequence(values: Tensor, inputs: ObjectiveInputs) -> Tensor:
    """[sequences] the sum of each sequence's rows."""
    edges = torch.arange(inputs.num_sequences + 1, device=values.device)
    offsets = torch.searchsorted(inputs.sequence, edges)
    return torch.segment_reduce(values, "sum", offsets=offsets, initial=0)


def with_importance_weights(
    inputs: ObjectiveInputs, kind: Literal["truncate", "mask", "mask_sequences"], limit: float
) -> ObjectiveInputs:
    """Inputs whose rollout rows are weighted by w = policy before the step / engine, for an engine unlike the trainer.

    truncate: min(w, limit). mask: w where 1/limit <= w <= limit, else 0. mask_sequences: min(w, limit) where the
    geometric mean of w over the whole response lies within those bounds, else 0. On demonstrations w = 1.
    """
    before_step = inputs.logprobs.detach() if inputs.old_logprobs is None else inputs.old_logprobs
    difference = (before_step - inputs.rollout_logprobs).masked_fill(inputs.is_demonstration, 0)
    _, weights, _ = clamped_exp(difference)
    if kind == "mask":
        weights = torch.where((weights >= 1 / limit) & (weights <= limit), weights, 0)
    else:
        weights = weights.clamp(max=limit)
    if kind == "mask_sequences":
        sums = difference.new_zeros(inputs.num_sequences).index_add(0, inputs.sequence, difference)
        mean = sums[inputs.sequence] / inputs.response_lengths
        weights = torch.where(mean.abs() <= math.log(limit), weights, 0)
    return dataclasses.replace(inputs, importance_weights=weights)
