"""Policy losses over tokens: a weighted sum of terms, its gradient and all per-token figures, in one pass.

    loss = sum_terms sum_rows s l(log p_t, A, H_t)        s = scale * weight * importance weight [/ response length]

A term says which rows it sums, which loss l it takes of each (token_losses.py), and the factor s of every row, which
carries the mean's denominator and no gradient. A row that belongs to no term contributes nothing, whatever its numbers.
Scalars are run-time arguments; sums run in a fixed order, so that equal inputs give equal bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_srft.ops import implementations
from megatron_srft.ops.token_figures import FIRST_TERM, POPULATIONS, SUMS, TERM_FIGURES, Figures
from megatron_srft.ops.token_losses import (
    ADVANTAGES,
    CLIPPED,
    CORRECTED,
    ENTROPY,
    LOSSES,
    NUMBERS,
    PER_LENGTH,
    ROWS,
    WEIGHTS,
    Parameters,
    Term,
    Tokens,
    clamped_exp,
)

ROUNDING = 1e-5
"""An importance weight counts as corrected when it differs from the ratio it came from by more than this share."""

MAX_TERMS = 8


def clipped_ratio(
    logprobs: Tensor,
    entropy: Tensor,
    terms: Sequence[Term],
    *,
    is_demonstration: Tensor,
    response_lengths: Tensor,
    engine_logprobs: Tensor,
    old_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    tokens: tuple[int, int],
    implementation: str | None = None,
) -> tuple[Tensor, Figures]:
    """Loss over some rows, with gradients to `logprobs` and (from terms of the loss "entropy") to `entropy`.

    Args:
        logprobs: [rows] log-prob of the taken token, float32, or float64, beside which the others may be float32.
        entropy: [rows] in nats.
        is_demonstration: [rows] bool; the other rows are rollouts.
        response_lengths: [rows] tokens of the row's response.
        engine_logprobs: [rows] of the rollout engine; ignored on demonstrations.
        old_logprobs: [rows] before the step. None: the current ones, so that the ratio is 1.
        importance_weights: [rows] for an engine unlike the trainer; None: 1.
        tokens: rollout and demonstration tokens that the figures' means run over, at least those of this call.
        implementation: see `implementations.choose`.

    Returns:
        (loss, figures).

    Raises:
        ValueError: an argument has another shape, type, device or memory layout, or a term says something impossible.
    """
    given = {
        "logprobs": logprobs, "entropy": entropy, "response_lengths": response_lengths,
        "engine_logprobs": engine_logprobs, "old_logprobs": old_logprobs, "importance_weights": importance_weights,
    }  # fmt: skip
    _check_rows(given, is_demonstration)
    _check_terms(terms, logprobs)
    advantages, weights = _matrix([t.advantages for t in terms]), _matrix([t.weights for t in terms])
    op = implementations.kernel("clipped_ratio", implementations.choose(implementation, logprobs))
    with torch.no_grad():
        loss, gradients, figures = op(
            logprobs,
            entropy,
            is_demonstration,
            response_lengths,
            engine_logprobs,
            old_logprobs,
            importance_weights,
            advantages,
            weights,
            [NUMBERS[term.loss] for term in terms],
            [term.row_bits for term in terms],
            [number for term in terms for number in term.parameters],
            list(tokens),
        )
    return _Loss.apply(logprobs, entropy, loss, gradients), Figures(figures)


# ---------------------------------------------------------------- the op


@torch.no_grad()
def reference(
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
    """The op in plain torch: (loss, gradients, figures), see `_fake` for their shapes."""
    one = torch.ones_like(logprobs)
    old = logprobs if old_logprobs is None else old_logprobs
    log_ratio, ratio, slope = clamped_exp(logprobs - old)
    engine_gap, engine_ratio, _ = clamped_exp((old - engine_logprobs).masked_fill(is_demonstration, 0))
    corrected = (
        torch.zeros_like(one)
        if importance_weights is None
        else ((importance_weights - engine_ratio).abs() > ROUNDING * engine_ratio).to(one.dtype)
    )
    low, high, of_terms = torch.zeros_like(one), torch.zeros_like(one), []
    gradients = logprobs.new_zeros(2 if ENTROPY in losses else 1, logprobs.shape[0])
    for index, (number, mask) in enumerate(zip(losses, rows, strict=True)):
        numbers = Parameters(*parameters[5 * index : 5 * index + 5])
        advantage = advantages[index] if mask & ADVANTAGES else one
        weight = weights[index] if mask & WEIGHTS else one
        tokens_now = Tokens(logprobs, entropy, ratio, slope, advantage)
        chosen = selected(mask, is_demonstration, advantage)
        factor = numbers.scale * weight
        if mask & PER_LENGTH:
            factor = factor / response_lengths
        if mask & CORRECTED and importance_weights is not None:
            factor = factor * importance_weights
        loss, by_logprob, by_entropy = list(LOSSES.values())[number](tokens_now, numbers)
        gradients[0] += torch.where(chosen, factor * by_logprob, 0)
        if number == ENTROPY:
            gradients[1] += torch.where(chosen, factor * by_entropy, 0)
        if number == CLIPPED:
            low += chosen & (advantage < 0) & (ratio < numbers.lower)
            high += chosen & (advantage > 0) & (ratio > numbers.upper)
        kept = torch.where(in_populations_of(mask, is_demonstration), weight, 0)
        of_terms += [torch.where(chosen, factor * loss, 0).sum(), kept.sum() / tokens_of(mask, tokens), largest(kept)]
    values = torch.stack(
        [-logprobs, entropy, ratio, -log_ratio, ratio - 1 - log_ratio, low, high]
        + [engine_gap.abs(), engine_ratio - 1 - engine_gap, corrected, ratio, engine_gap.abs()]
    )
    of_populations = []
    for population, size in ((~is_demonstration, tokens[0]), (is_demonstration, tokens[1])):
        kept = torch.where(population, values, 0)
        of_populations += [kept[:SUMS].sum(dim=1) / max(size, 1), largest(kept[SUMS:])]
    return torch.stack(of_terms[::3]).sum(), gradients, torch.cat([*of_populations, torch.stack(of_terms)])


def selected(rows: int, is_demonstration: Tensor, advantages: Tensor) -> Tensor:
    """[rows] bool; whether a term sums a row."""
    kind = 2 * is_demonstration.int() + ~(advantages > 0)
    return (rows >> kind) & 1 == 1


def in_populations_of(rows: int, is_demonstration: Tensor) -> Tensor:
    """[rows] bool; the rows of a term's populations, whatever the sign of A."""
    return torch.where(is_demonstration, rows & ROWS["demonstrations"] != 0, rows & ROWS["rollouts"] != 0)


def tokens_of(rows: int, tokens: list[int]) -> int:
    """How many tokens a term's populations have in the whole, at least 1."""
    return max(1, sum(size for name, size in zip(POPULATIONS, tokens, strict=True) if rows & ROWS[name]))


def largest(values: Tensor) -> Tensor:
    """The largest along the last dimension, at least 0 (the largest of nothing)."""
    return torch.cat([values, values.new_zeros(*values.shape[:-1], 1)], dim=-1).amax(dim=-1)


def _fake(logprobs, entropy, is_demonstration, response_lengths, engine_logprobs, old_logprobs, importance_weights,
          advantages, weights, losses, rows, parameters, tokens):  # fmt: skip
    """loss [], gradients [1 or 2, rows] by log-prob (and entropy), figures [of both populations, then of each term]."""
    figures = FIRST_TERM + len(TERM_FIGURES) * len(losses)
    gradients = 2 if ENTROPY in losses else 1
    return logprobs.new_empty(()), logprobs.new_empty(gradients, logprobs.shape[0]), logprobs.new_empty(figures)


class _Loss(torch.autograd.Function):
    """The op's loss with its gradient, not registered with the op: torch's bookkeeping would then cost more than it."""

    @staticmethod
    def forward(ctx, logprobs, entropy, loss, gradients):
        ctx.save_for_backward(gradients)
        return loss.detach()

    @staticmethod
    def backward(ctx, upstream):
        (gradients,) = ctx.saved_tensors
        by_logprob, *by_entropy = [row * upstream for row in gradients.unbind()]
        return by_logprob, by_entropy[0] if by_entropy else None, None, None


implementations.declare(
    "clipped_ratio",
    "(Tensor logprobs, Tensor entropy, Tensor is_demonstration, Tensor response_lengths, Tensor engine_logprobs, "
    "Tensor? old_logprobs, Tensor? importance_weights, Tensor? advantages, Tensor? weights, "
    "int[] losses, int[] rows, float[] parameters, int[] tokens) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=reference,
    triton="megatron_srft.ops.triton.clipped_ratio",
)


# ---------------------------------------------------------------- arguments


def _matrix(of_terms: list[Tensor | None]) -> Tensor | None:
    """[terms, rows] with any values for terms that have none; None when no term has any; a view when all agree."""
    given = [tensor for tensor in of_terms if tensor is not None]
    if not given:
        return None
    if all(tensor is given[0] for tensor in given):
        return given[0].expand(len(of_terms), -1)
    return torch.stack([given[0] if tensor is None else tensor for tensor in of_terms])


def _check_rows(given: dict[str, Tensor | None], is_demonstration: Tensor) -> None:
    logprobs = given["logprobs"]
    if logprobs.dtype not in (torch.float32, torch.float64) or logprobs.dim() != 1:
        raise ValueError(f"logprobs must be [rows] float32 or float64, not {_described(logprobs)}")
    for name, tensor in given.items():
        if tensor is not None:
            _check_row_tensor(name, tensor, logprobs, (logprobs.dtype, torch.float32))
    _check_row_tensor("is_demonstration", is_demonstration, logprobs, (torch.bool,))


def _check_row_tensor(name: str, tensor: Tensor, logprobs: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    alike = tensor.shape == logprobs.shape and tensor.dtype in dtypes and tensor.device == logprobs.device
    if not alike or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be [{logprobs.shape[0]}] {_short(dtypes[0])} on {logprobs.device} like logprobs, "
            f"contiguous, not {_described(tensor)}"
        )


def _check_terms(terms: Sequence[Term], logprobs: Tensor) -> None:
    if not 1 <= len(terms) <= MAX_TERMS:
        raise ValueError(f"terms must be 1 to {MAX_TERMS}, not {len(terms)}")
    for term in terms:
        if term.loss not in NUMBERS or term.rows not in ROWS:
            raise ValueError(
                f"terms: no such loss or rows: {term.loss!r}, {term.rows!r}; "
                f"known are {', '.join(NUMBERS)} and {', '.join(ROWS)}"
            )
        for name in ("advantages", "weights"):
            if (tensor := getattr(term, name)) is not None:
                _check_row_tensor(name, tensor, logprobs, (logprobs.dtype, torch.float32))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _described(tensor: Tensor) -> str:
    layout = "" if tensor.is_contiguous() else ", not contiguous"
    return f"{list(tensor.shape)} {_short(tensor.dtype)} on {tensor.device}{layout}"
