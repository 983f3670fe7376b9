"""Per-token losses of policies: the loss of each token, its derivative, and the paper it is from.

This file is the definition; `token_loss` in csrc/core/clipped_ratio.h and in ops/triton/clipped_ratio.py compute the
same. A further loss is one function here with its line in `LOSSES`, and one case there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Literal, NamedTuple

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +-this before exp, and have no gradient beyond it."""

ROWS = {
    "rollouts": 0b0011,
    "demonstrations": 0b1100,
    "both": 0b1111,
    "positive_rollouts": 0b0001,
    "other_rollouts": 0b0010,
}
"""The rows a term sums, a bit for each of: rollouts with A > 0, other rollouts, demonstrations with A > 0, others."""

PER_LENGTH, CORRECTED, ADVANTAGES, WEIGHTS = (1 << bit for bit in range(4, 8))
"""Further bits: what a row's loss is multiplied by, and whether the term has advantages and weights (else 1)."""


class Parameters(NamedTuple):
    """A term's run-time scalars, in the order in which kernels take them."""

    scale: float
    lower: float
    """1 - clip_low."""
    upper: float
    """1 + clip_high."""
    dual_clip: float
    gamma: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Term:
    """One term of a loss over tokens."""

    loss: Literal["nll", "logprob", "clipped", "probability", "shaped", "entropy", "power", "blended"]
    """Which loss each row has; a key of `LOSSES`."""

    rows: Literal["rollouts", "demonstrations", "both", "positive_rollouts", "other_rollouts"]
    """Which rows are summed; a key of `ROWS`."""

    scale: float
    """Factor of every row: the term's coefficient over the denominator of its mean."""

    per_length: bool = False
    """Divide each row by its response's length, for a mean over sequences of the mean over their tokens."""

    corrected: bool = True
    """Multiply the rows by their importance weights, if there are any."""

    advantages: Tensor | None = None
    """[rows] without gradient; None: 1."""

    weights: Tensor | None = None
    """[rows] without gradient; None: 1."""

    clip_low: float = inf
    clip_high: float = inf
    dual_clip: float | None = None
    """See `clipped`."""

    gamma: float = 0.1
    """See `shaped`, `power`, `blended`."""

    @property
    def row_bits(self) -> int:
        factors = PER_LENGTH * self.per_length | CORRECTED * self.corrected
        given = ADVANTAGES * (self.advantages is not None) | WEIGHTS * (self.weights is not None)
        return ROWS[self.rows] | factors | given

    @property
    def parameters(self) -> Parameters:
        dual_clip = inf if self.dual_clip is None else self.dual_clip
        return Parameters(self.scale, 1 - self.clip_low, 1 + self.clip_high, dual_clip, self.gamma)


class Tokens(NamedTuple):
    """What per-token losses are made of; [rows] each, without gradient."""

    logprobs: Tensor
    entropy: Tensor
    ratio: Tensor
    """policy / policy before the step, from the clamped log-ratio."""
    ratio_slope: Tensor
    """Its derivative by the log-prob: the ratio, or 0 where the log-ratio is clamped."""
    advantages: Tensor


Loss = tuple[Tensor, Tensor, Tensor]
"""[rows] each: the loss, its derivative by the log-prob, its derivative by the entropy."""


def nll(tokens: Tokens, parameters: Parameters) -> Loss:
    """-log p. Supervised fine-tuning; SRFT (arXiv 2506.19767) equation 1."""
    zero = torch.zeros_like(tokens.logprobs)
    return -tokens.logprobs, zero - 1, zero


def logprob(tokens: Tokens, parameters: Parameters) -> Loss:
    """-A log p. REINFORCE; SRFT equations 11-12."""
    return -tokens.advantages * tokens.logprobs, -tokens.advantages, torch.zeros_like(tokens.logprobs)


def clipped(tokens: Tokens, parameters: Parameters) -> Loss:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A); for A < 0 also no more than dual_clip * |A|.

    No gradient where the clip holds: r > 1 + clip_high with A >= 0, r < 1 - clip_low or r > dual_clip with A < 0.
    PPO (arXiv 1707.06347) equation 7, DAPO (2503.14476) equation 10, dual clip (1912.09729); the plain ratio when the
    clips are infinite; PSFT (2508.17784) on demonstrations with A = 1.
    """
    ratio, advantages = tokens.ratio, tokens.advantages
    bounded = torch.where(
        advantages >= 0, ratio.clamp(max=parameters.upper), ratio.clamp(parameters.lower, parameters.dual_clip)
    )
    held = (ratio > bounded) | (ratio < bounded)
    slope = -advantages * tokens.ratio_slope.masked_fill(held, 0)
    return -advantages * bounded, slope, torch.zeros_like(ratio)


def probability(tokens: Tokens, parameters: Parameters) -> Loss:
    """-A p: the ratio to a behaviour policy that is sure of the token. SRFT equations 9-10."""
    loss = -tokens.advantages * tokens.logprobs.exp()
    return loss, loss, torch.zeros_like(loss)


def shaped(tokens: Tokens, parameters: Parameters) -> Loss:
    """-A p / (p + gamma), whose derivative -A gamma p / (p + gamma)^2 favours unlikely tokens.

    LUFFY (arXiv 2504.14945) equations 5-6.
    """
    p, gamma = tokens.logprobs.exp(), parameters.gamma
    loss = -tokens.advantages * p / (p + gamma)
    return loss, loss * gamma / (p + gamma), torch.zeros_like(loss)


def entropy(tokens: Tokens, parameters: Parameters) -> Loss:
    """-H, the entropy bonus."""
    zero = torch.zeros_like(tokens.entropy)
    return -tokens.entropy, zero, zero - 1


def power(tokens: Tokens, parameters: Parameters) -> Loss:
    """-A p^gamma, between log p (gamma near 0, up to a factor) and p (gamma 1). LUFFY's released code."""
    loss = -tokens.advantages * (parameters.gamma * tokens.logprobs).exp()
    return loss, parameters.gamma * loss, torch.zeros_like(loss)


def blended(tokens: Tokens, parameters: Parameters) -> Loss:
    """-A (p + gamma log p): a policy gradient with likelihood beside it. LUFFY's released code."""
    p, gamma = tokens.logprobs.exp(), parameters.gamma
    loss = -tokens.advantages * (p + gamma * tokens.logprobs)
    return loss, -tokens.advantages * (p + gamma), torch.zeros_like(loss)


LOSSES: dict[str, Callable[[Tokens, Parameters], Loss]] = {
    "nll": nll,
    "logprob": logprob,
    "clipped": clipped,
    "probability": probability,
    "shaped": shaped,
    "entropy": entropy,
    "power": power,
    "blended": blended,
}
"""Every per-token loss; its place in the table is the number by which kernels know it."""

SHAPINGS = {
    "none": "probability",
    "p_div_p_gamma": "shaped",
    "logp": "logprob",
    "p_logp": "blended",
    "power": "power",
}
"""Losses of a demonstration as an off-policy sample, by the names that configs have for them."""

NUMBERS = {name: number for number, name in enumerate(LOSSES)}
CLIPPED, ENTROPY = NUMBERS["clipped"], NUMBERS["entropy"]


def clamped_exp(log_ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The clamped log-ratio, its exp, and the exp's derivative by the log-ratio before clamping."""
    clamped = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = clamped.exp()
    return clamped, ratio, ratio.masked_fill(log_ratio.abs() > LOG_RATIO_LIMIT, 0)
