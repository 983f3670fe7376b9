"""The parity gate: figures against closed forms, and a diagnosis for each pattern with a known cause."""

import numpy as np
import pytest

from megatron_srft.config import ParityConfig
from megatron_srft.rollout.parity import ParityError, check_parity, compare

LIMITS = ParityConfig()


def engine_side(sequences=40, length=32) -> list[np.ndarray]:
    numbers = np.random.default_rng(0)
    lengths = numbers.integers(length // 2, length + 1, size=sequences)
    return [-numbers.exponential(size=n).astype(np.float32) for n in lengths]


def perturb(engine, change) -> list[np.ndarray]:
    """change(sequence index, positions, log-probs) -> difference."""
    numbers = np.random.default_rng(1)
    return [
        (x + change(i, np.arange(len(x)), x) + 1e-6 * numbers.normal(size=len(x))).astype(np.float32)
        for i, x in enumerate(engine)
    ]


def test_figures_of_two_sequences():
    engine = [np.array([-1.0, -2.0], np.float32), np.array([-0.5, -1.5, -0.25, -1.0], np.float32)]
    trainer = [np.array([-1.5, -2.0], np.float32), np.array([-0.5, -1.5, -0.25, 0.0], np.float32)]
    report = compare(trainer, engine)
    d = np.array([-0.5, 0, 0, 0, 0, 1.0])
    assert report.tokens == 6
    assert report.mean_difference == pytest.approx(1.5 / 6)
    assert report.max_difference == 1.0
    assert (report.worst_sequence, report.worst_position) == (1, 3)
    assert report.kl == pytest.approx(np.mean(np.exp(d) - 1 - d))
    assert report.ratio_percentiles == pytest.approx(tuple(np.quantile(np.exp(d), (0.01, 0.5, 0.99))))
    assert report.quartile_differences == pytest.approx((0.25, 0.0, 0.0, 1.0))
    assert report.metrics()["parity/mean_difference"] == report.mean_difference


def test_rounding_noise_passes():
    engine = engine_side()
    report = compare(perturb(engine, lambda i, p, x: 0), engine)
    assert check_parity(report, LIMITS, "before the first update")
    assert report.max_difference < 1e-5


PATTERNS = {
    "weights": (lambda i, p, x: np.random.default_rng(i).normal(size=len(p)), ("first tokens on", "weights")),
    "rope": (lambda i, p, x: 0.1 * p * np.random.default_rng(i).choice([-1, 1], size=len(p)), ("grows", "rope")),
    "padding": (lambda i, p, x: np.full(len(p), -0.3), ("constant offset of -0.3", "padding")),
    "temperature": (lambda i, p, x: 0.4 * x, ("proportional", "temperature")),
    "end token": (lambda i, p, x: np.where(p == len(p) - 1, -6.0, 0.0), ("last token", "end-of-sequence")),
    "stale": (
        lambda i, p, x: 4.0 * (i in (7, 21)) * np.random.default_rng(i).normal(size=len(p)),
        ("few sequences (", "stale"),
    ),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_diagnosis_names_the_cause(pattern):
    change, words = PATTERNS[pattern]
    engine = engine_side()
    with pytest.raises(ParityError) as caught:
        check_parity(compare(perturb(engine, change), engine), LIMITS, "in step 40")
    message = str(caught.value)
    first = message.split("Likely causes:\n")[1].splitlines()[0]
    assert all(word in first for word in words), message
    assert "in step 40" in message
    assert "parity.max_mean_difference 0.02" in message
    if pattern == "stale":
        assert "21" in first
        assert "7" in first


def test_a_log_prob_that_is_not_finite_never_passes():
    engine = engine_side(4)
    trainer = [x.copy() for x in engine]
    trainer[2][5] = np.nan
    report = compare(trainer, engine)
    assert (report.worst_sequence, report.worst_position) == (2, 5)
    with pytest.raises(ParityError, match="1 log-probs are not finite"):
        check_parity(report, ParityConfig(max_mean_difference=1e9, max_difference=1e9))


def test_told_to_go_on_the_gate_only_reports():
    engine = engine_side()
    report = compare(perturb(engine, PATTERNS["weights"][0]), engine)
    assert check_parity(report, ParityConfig(on_failure="warn")) is False


def test_lists_that_do_not_belong_together_are_refused():
    one, two = np.zeros(1, np.float32), np.zeros(2, np.float32)
    with pytest.raises(ValueError, match="1 sequences of the trainer against 2"):
        compare([one], [one, one])
    with pytest.raises(ValueError, match="sequence 1: 2 log-probs of the trainer, 1"):
        compare([one, two], [one, one])
    with pytest.raises(ValueError, match="no tokens"):
        compare([], [])
