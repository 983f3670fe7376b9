"""Per-token losses, entropy weights and denominators, by hand."""

import math

import pytest
import torch
from objective_rows import Sequence, counts_of, inputs_of, random_sequences

from megatron_srft.objectives import with_importance_weights
from megatron_srft.objectives.terms import (
    average,
    clipped_surrogate,
    entropy_at_level,
    entropy_bonus,
    entropy_weight,
    log_ratio,
    rows_of,
    shaped_probability,
)
from megatron_srft.sample import Counts


def surrogate_with_gradient(ratio, advantage, **clips):
    leaf = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    loss = clipped_surrogate(leaf, torch.tensor([advantage], dtype=torch.float64), **clips)
    loss.sum().backward()
    return loss.item(), leaf.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.1, 2.0, -2.2, -2.0),
        (1.27, 2.0, -2.54, -2.0),  # below 1 + clip_high = 1.28, above 1 + clip_low
        (1.5, 2.0, -2.56, 0.0),  # clipped above
        (0.5, 2.0, -1.0, -2.0),  # a positive advantage is not clipped below
        (0.9, -2.0, 1.8, 2.0),
        (0.5, -2.0, 1.6, 0.0),  # clipped below at 1 - 0.2
        (1.5, -2.0, 3.0, 2.0),  # a negative advantage is not clipped above ...
        (2.9, -2.0, 5.8, 2.0),
        (3.5, -2.0, 6.0, 0.0),  # ... but by the dual clip
        (3.5, 2.0, -2.56, 0.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_clipped_surrogate(ratio, advantage, loss, gradient):
    assert surrogate_with_gradient(ratio, advantage, clip_low=0.2, clip_high=0.28, dual_clip=3.0) == pytest.approx(
        (loss, gradient)
    )


def test_clipped_surrogate_is_the_minimum_of_the_paper():
    ratio, advantages = torch.rand(500, dtype=torch.float64) * 3, torch.randn(500, dtype=torch.float64)
    expected = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    torch.testing.assert_close(clipped_surrogate(ratio, advantages, 0.2, 0.28), expected)


def test_shaping_and_its_gradient_weight():
    """d f(p) / d log p = gamma p / (p + gamma)^2, and p without shaping."""
    logprobs = torch.tensor([-0.01, -1.0, -5.0, -30.0], dtype=torch.float64, requires_grad=True)
    p = logprobs.detach().exp()
    shaped = shaped_probability(logprobs, "p_div_p_gamma", 0.1)
    torch.testing.assert_close(shaped.detach(), p / (p + 0.1))
    torch.testing.assert_close(torch.autograd.grad(shaped.sum(), logprobs)[0], 0.1 * p / (p + 0.1) ** 2)
    plain = shaped_probability(logprobs, "none", 0.1)
    torch.testing.assert_close(torch.autograd.grad(plain.sum(), logprobs)[0], p)


def test_entropy_weights():
    entropy = torch.tensor([0.1, 1.0, 3.0, 9.0], dtype=torch.float64, requires_grad=True)
    down = entropy_weight(entropy, 0.5, -1, 5.0)
    up = entropy_weight(entropy, 0.1, 1, 5.0)
    assert down.tolist() == pytest.approx([0.5 * math.exp(-x) for x in (0.1, 1, 3, 5)])
    assert up.tolist() == pytest.approx([0.1 * math.exp(x) for x in (0.1, 1, 3, 5)])
    assert entropy_weight(entropy, 0.5, 0, 5.0).tolist() == [0.5] * 4
    assert not down.requires_grad and not up.requires_grad


def test_entropy_levels():
    sequences = [
        Sequence([-1.0, -1.0, -1.0], entropy=[1.0, 2.0, 6.0], pooled_entropy=0.3),
        Sequence([-1.0], entropy=[5.0], pooled_entropy=0.3),
        Sequence([-1.0, -1.0], entropy=[0.5, 1.5], pooled_entropy=0.7),
    ]
    inputs = inputs_of(sequences)
    assert entropy_at_level(inputs, "token").tolist() == [1, 2, 6, 5, 0.5, 1.5]
    assert entropy_at_level(inputs, "sequence").tolist() == [3, 3, 3, 5, 1, 1]
    assert entropy_at_level(inputs, "group").tolist() == entropy_at_level(inputs, "batch").tolist()
    assert entropy_at_level(inputs, "batch").tolist() == [0.3, 0.3, 0.3, 0.3, 0.7, 0.7]
    assert not any(entropy_at_level(inputs, level).requires_grad for level in ("token", "sequence", "batch"))


@pytest.mark.parametrize(
    ("denominator", "expected"),
    [
        ("tokens", (1 + 2 + 3 + 10) / 4),
        ("sequence_mean", (2 + 10) / 2),
        ("sequence_sum", (6 + 10) / 2),
        ("constant", (6 + 10) / (2 * 8)),
    ],
)
def test_denominators(denominator, expected):
    sequences = [Sequence([0.0] * 3), Sequence([0.0] * 2, demonstration=True), Sequence([0.0])]
    inputs = inputs_of(sequences)
    values = torch.tensor([1.0, 2.0, 3.0, torch.nan, torch.inf, 10.0], dtype=torch.float64)
    result = average(
        values, rows_of(inputs, "rollouts"), inputs, counts_of(sequences),
        population="rollouts", denominator=denominator, constant_length=8,
    )  # fmt: skip
    assert result.item() == pytest.approx(expected)


@pytest.mark.parametrize("denominator", ["tokens", "sequence_mean", "sequence_sum", "constant"])
def test_an_empty_population_averages_to_zero_with_zero_gradient(denominator):
    sequences = [Sequence([-1.0, -2.0])]
    inputs = inputs_of(sequences)
    result = average(
        -inputs.logprobs, inputs.is_demonstration, inputs, counts_of(sequences),
        population="demonstrations", denominator=denominator, constant_length=8,
    )  # fmt: skip
    result.backward()
    assert result.item() == 0.0
    assert inputs.logprobs.grad.tolist() == [0.0, 0.0]


def test_log_ratio_is_clamped_and_is_zero_without_old_logprobs():
    inputs = inputs_of([Sequence([-1.0, -50.0, 0.0], old=[-1.25, -1.0, -90.0])])
    assert log_ratio(inputs).tolist() == pytest.approx([0.25, -20.0, 20.0])
    fresh = log_ratio(inputs_of([Sequence([-1.0, -2.0])]))
    assert fresh.tolist() == [0.0, 0.0] and fresh.requires_grad


def test_entropy_bonus_lowers_the_loss_and_carries_a_gradient_only_when_used():
    sequences = [Sequence([-1.0, -1.0], entropy=[0.5, 1.5]), Sequence([-1.0], entropy=[4.0], demonstration=True)]
    inputs, counts = inputs_of(sequences), counts_of(sequences)
    bonus = entropy_bonus(inputs, counts, "both", 0.3)
    assert bonus.item() == pytest.approx(-0.3 * 2.0)
    assert torch.autograd.grad(bonus, inputs.entropy)[0].tolist() == pytest.approx([-0.1] * 3)
    assert entropy_bonus(inputs, counts, "rollouts", 0.3).item() == pytest.approx(-0.3)
    assert not entropy_bonus(inputs, counts, "both", 0.0).requires_grad


def test_importance_weights_for_an_engine_unlike_the_trainer():
    sequences = [
        Sequence([-1.0, -1.0, -1.0], rollout=[-1.5, -3.0, 0.5]),
        Sequence([-1.0], demonstration=True, rollout=[5.0]),
    ]
    inputs = inputs_of(sequences)
    truncated = with_importance_weights(inputs, "truncate", 2.0)
    masked = with_importance_weights(inputs, "mask", 2.0)
    assert truncated.importance_weights.tolist() == pytest.approx([math.exp(0.5), 2.0, math.exp(-1.5), 1.0])
    assert masked.importance_weights.tolist() == pytest.approx([math.exp(0.5), 0.0, 0.0, 1.0])


def test_population_masks_cover_the_rows():
    sequences = random_sequences(4, 3)
    inputs = inputs_of(sequences)
    assert (rows_of(inputs, "rollouts") ^ rows_of(inputs, "demonstrations")).all()
    assert rows_of(inputs, "both").all()
    assert counts_of(sequences) == Counts(
        rollout_tokens=int(rows_of(inputs, "rollouts").sum()),
        rollout_sequences=4,
        demonstration_tokens=int(rows_of(inputs, "demonstrations").sum()),
        demonstration_sequences=3,
    )
