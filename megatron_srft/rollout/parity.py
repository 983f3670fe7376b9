"""The parity gate: do trainer and engine give the same tokens the same log-probs?

With d = trainer log-prob - engine log-prob of one sampled token, a run is sound when d is rounding noise. The gate
measures |d|, the percentiles of the ratio exp(d), and KL(engine || trainer) by Schulman's k3 estimator
mean(exp(d) - 1 - d) (joschu.net/blog/kl-approx.html), and reads a cause from where the differences lie.

Beyond the limits a run stops, unless it was told to go on; importance weights (objectives/terms.py) then correct it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_srft.config import ParityConfig


class ParityError(RuntimeError):
    """Trainer and rollout engine disagree; the message is a diagnosis."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ParityReport:
    """Differences d = trainer - engine log-prob over all compared tokens, in nats.

    Example: tokens=5120, mean_difference=3e-7, max_difference=2e-6, ratio_percentiles=(1.0, 1.0, 1.0).
    """

    tokens: int
    mean_difference: float
    """Mean |d|."""
    max_difference: float
    """Largest |d|; inf when a log-prob is not finite."""
    ratio_percentiles: tuple[float, float, float]
    """exp(d) at percentiles 1, 50 and 99."""
    kl: float
    """k3 estimate of KL(engine || trainer)."""
    worst_sequence: int
    """Index of the sequence that holds the largest |d|."""
    worst_position: int
    """Its position in the response, from 0."""
    quartile_differences: tuple[float, float, float, float]
    """Mean |d| in each quarter of the responses' positions."""
    causes: tuple[str, ...]
    """What the pattern of the differences points to, likeliest first; only worth reading beyond the limits."""

    def metrics(self) -> dict[str, float]:
        """The figures for the log."""
        low, median, high = self.ratio_percentiles
        return {
            "parity/mean_difference": self.mean_difference,
            "parity/max_difference": self.max_difference,
            "parity/ratio_p1": low,
            "parity/ratio_p50": median,
            "parity/ratio_p99": high,
            "parity/kl": self.kl,
        }


@dataclass(frozen=True, slots=True, eq=False)
class _Tokens:
    """Every compared token in one long row; arrays are [tokens]."""

    difference: np.ndarray
    engine: np.ndarray
    sequence: np.ndarray
    position: np.ndarray
    length: np.ndarray
    """Length of the token's sequence."""

    @property
    def size(self) -> np.ndarray:
        return np.abs(self.difference)


def compare(trainer_logprobs: list[np.ndarray], rollout_logprobs: list[np.ndarray]) -> ParityReport:
    """Compare the log-probs of the same tokens, one [response] array per sequence on each side.

    Raises:
        ValueError: the sides have other numbers of sequences or tokens, or none at all.
    """
    tokens = _lay_out(trainer_logprobs, rollout_logprobs)
    # Log-probs further apart than e^50 are as wrong as it gets; the bound keeps exp finite.
    bounded = np.clip(np.nan_to_num(tokens.difference, nan=50.0), -50.0, 50.0)
    size = np.where(np.isfinite(tokens.difference), tokens.size, np.inf)
    worst = int(size.argmax())
    quarter = tokens.position * 4 // tokens.length
    return ParityReport(
        tokens=len(size),
        mean_difference=float(size.mean()),
        max_difference=float(size[worst]),
        ratio_percentiles=tuple(float(p) for p in np.percentile(np.exp(bounded), (1, 50, 99))),
        kl=float(np.mean(np.expm1(bounded) - bounded)),
        worst_sequence=int(tokens.sequence[worst]),
        worst_position=int(tokens.position[worst]),
        quartile_differences=tuple(float(size[quarter == q].mean()) if (quarter == q).any() else 0.0 for q in range(4)),
        causes=_causes(tokens),
    )


def within_limits(report: ParityReport, config: ParityConfig) -> bool:
    return report.mean_difference <= config.max_mean_difference and report.max_difference <= config.max_difference


def check_parity(
    report: ParityReport,
    config: ParityConfig,
    context: str = "",
    investigate: Callable[[], tuple[str, ...]] = tuple,
) -> bool:
    """Whether the report keeps the limits.

    Args:
        context: says when, for the message: "before the first update", "in step 40".
        investigate: finds out more when the run is about to stop; its findings come first in the message.

    Raises:
        ParityError: it does not, and config.on_failure is "stop".
    """
    sound = within_limits(report, config)
    if not sound and config.on_failure == "stop":
        raise ParityError(_diagnosis(report, config, context, investigate()))
    return sound


def _lay_out(trainer: list[np.ndarray], rollout: list[np.ndarray]) -> _Tokens:
    lengths = np.array([len(sequence) for sequence in rollout], np.int64)
    if len(trainer) != len(rollout):
        raise ValueError(f"{len(trainer)} sequences of the trainer against {len(rollout)} of the engine")
    for i, sequence in enumerate(trainer):
        if len(sequence) != lengths[i]:
            raise ValueError(f"sequence {i}: {len(sequence)} log-probs of the trainer, {lengths[i]} of the engine")
    if lengths.sum() == 0:
        raise ValueError("there are no tokens to compare")
    engine = np.concatenate(rollout).astype(np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.concatenate(trainer).astype(np.float64) - engine
    return _Tokens(
        difference=difference,
        engine=engine,
        sequence=np.repeat(np.arange(len(lengths)), lengths),
        position=np.concatenate([np.arange(length) for length in lengths]),
        length=np.repeat(lengths, lengths),
    )


def _causes(tokens: _Tokens) -> tuple[str, ...]:
    """Read the likely cause from the pattern of the differences."""
    if not np.isfinite(tokens.difference).all():
        count = int((~np.isfinite(tokens.difference)).sum())
        return (f"{count} log-probs are not finite: overflow, or weights that are NaN on one side",)
    return tuple(
        cause for cause in (_ends_only(tokens), _few_sequences(tokens), _offset(tokens), _by_position(tokens)) if cause
    )


def _ends_only(tokens: _Tokens) -> str | None:
    last = tokens.position == tokens.length - 1
    if tokens.size[last].sum() < 0.8 * tokens.size.sum() or last.mean() > 0.5:
        return None
    return (
        "only the last token of the responses differs: the end-of-sequence token (another id on one side, or a "
        "position too many or too few at the end of a sequence)"
    )


def _few_sequences(tokens: _Tokens) -> str | None:
    sums = np.bincount(tokens.sequence, tokens.size)
    order = np.argsort(-sums)
    few = order[: max(1, len(sums) // 10)]
    if len(sums) < 4 or sums[few].sum() < 0.8 * sums.sum():
        return None
    named = ", ".join(str(i) for i in few[:5])
    return (
        f"most of it lies in few sequences ({named}): tokens of those that differ from what was sampled (tokenizer, "
        "truncation, packing), or completions of stale weights"
    )


def _offset(tokens: _Tokens) -> str | None:
    mean, spread = tokens.difference.mean(), tokens.difference.std()
    if abs(mean) > 0 and spread < 0.25 * abs(mean):
        return (
            f"a constant offset of {mean:+.3g}: vocabulary padding columns in one softmax and not in the other, or "
            "another temperature"
        )
    if spread > 0 and tokens.engine.std() > 0:
        correlation = np.corrcoef(tokens.difference, tokens.engine)[0, 1]
        if abs(correlation) > 0.9:
            return f"it is proportional to the log-prob itself (correlation {correlation:+.2f}): another temperature"
    return None


def _by_position(tokens: _Tokens) -> str | None:
    quarter = tokens.position * 4 // tokens.length
    first, last = tokens.size[quarter == 0], tokens.size[quarter == 3]
    if len(first) == 0 or len(last) == 0:
        return None
    if last.mean() > 3 * first.mean():
        return (
            f"it grows along the response ({first.mean():.3g} in the first quarter, {last.mean():.3g} in the last): "
            "rope settings, position ids, or a sliding window on one side"
        )
    return (
        f"it is there from the first tokens on ({first.mean():.3g} in the first quarter): weights not in step, the "
        "embedding or output layer, a layer's name table, or another dtype"
    )


def _diagnosis(report: ParityReport, config: ParityConfig, context: str, findings: tuple[str, ...]) -> str:
    low, median, high = report.ratio_percentiles
    quartiles = ", ".join(f"{value:.3g}" for value in report.quartile_differences)
    causes = "".join(f"\n  - {cause}" for cause in report.causes) or "\n  - no clear pattern"
    found = "Found:" + "".join(f"\n  - {finding}" for finding in findings) + "\n" if findings else ""
    return (
        f"trainer and rollout engine disagree{context and ' '}{context}: over {report.tokens} tokens the log-prob "
        f"difference has mean {report.mean_difference:.3g} (parity.max_mean_difference "
        f"{config.max_mean_difference:g}) and maximum {report.max_difference:.3g} (parity.max_difference "
        f"{config.max_difference:g}), at sequence {report.worst_sequence}, position {report.worst_position}.\n"
        f"Ratio percentiles 1/50/99: {low:.4g} / {median:.4g} / {high:.4g}; KL {report.kl:.3g}; "
        f"mean by quarter of the response: {quartiles}.\n"
        f"{found}Likely causes:{causes}\n"
        "To go on with importance weights instead, set parity.on_failure to warn, and parity.correction to truncate, "
        "mask or mask_sequences."
    )
