"""Entropy weights, denominators and importance weights, by hand."""

import math

import pytest
import torch
from objective_rows import Sequence, counts_of, inputs_of

from megatron_srft.objectives import with_importance_weights
from megatron_srft.objectives.terms import (
    Mean,
    entropy_at_level,
    entropy_bonus,
    entropy_weight,
    evaluate,
    mean_over,
    population_size,
)
from megatron_srft.ops.token_losses import Term


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
    sequences = [Sequence([-1.0, -2.0, -3.0]), Sequence([math.nan, -math.inf], demonstration=True), Sequence([-10.0])]
    counts = counts_of(sequences)
    mean = mean_over("rollouts", counts, Mean(denominator, constant_length=8), coefficient=3.0)
    output = evaluate(inputs_of(sequences), counts, {"nll": Term(loss="nll", rows="rollouts", **mean)})
    assert output.loss.item() == pytest.approx(3 * expected)


@pytest.mark.parametrize("denominator", ["tokens", "sequence_mean", "sequence_sum", "constant"])
def test_an_empty_population_averages_to_zero_with_zero_gradient(denominator):
    sequences = [Sequence([-1.0, -2.0])]
    inputs, counts = inputs_of(sequences), counts_of(sequences)
    mean = mean_over("demonstrations", counts, Mean(denominator, constant_length=8))
    output = evaluate(inputs, counts, {"nll": Term(loss="nll", rows="demonstrations", **mean)})
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert inputs.logprobs.grad.tolist() == [0.0, 0.0]


def test_log_ratios_are_clamped_and_zero_without_old_logprobs():
    sequences = [Sequence([-1.0, -50.0, 0.0], old=[-1.25, -1.0, -90.0])]
    counts = counts_of(sequences)
    term = Term(loss="clipped", rows="rollouts", scale=1.0)
    output = evaluate(inputs_of(sequences), counts, {"ratio": term})
    assert output.loss.item() == pytest.approx(-math.exp(0.25) - math.exp(-20) - math.exp(20))
    assert output.metrics["kl/k1"].item() == pytest.approx(-0.25 / 3)
    fresh = evaluate(inputs_of([Sequence([-1.0, -50.0, 0.0])]), counts, {"ratio": term})
    assert fresh.loss.item() == -3.0


def test_entropy_bonus_lowers_the_loss_and_carries_a_gradient_only_when_used():
    sequences = [Sequence([-1.0, -1.0], entropy=[0.5, 1.5]), Sequence([-1.0], entropy=[4.0], demonstration=True)]
    inputs, counts = inputs_of(sequences), counts_of(sequences)

    def bonus(population, coefficient):
        return evaluate(inputs, counts, {"bonus": entropy_bonus(population, counts, coefficient)}).loss

    assert bonus("both", 0.3).item() == pytest.approx(-0.3 * 2.0)
    assert torch.autograd.grad(bonus("both", 0.3), inputs.entropy)[0].tolist() == pytest.approx([-0.1] * 3)
    assert bonus("rollouts", 0.3).item() == pytest.approx(-0.3)
    assert torch.autograd.grad(bonus("both", 0.0), inputs.entropy, allow_unused=True) == (None,)


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


def test_whole_completions_are_left_out_by_the_mean_over_their_tokens():
    sequences = [
        Sequence([-1.0, -1.0, -1.0], rollout=[-3.0, -1.0, -1.0]),  # mean of log r: 2/3, within log 2
        Sequence([-1.0, -1.0], rollout=[-1.7, -1.7]),  # 0.7, beyond it
        Sequence([-1.0, -1.0], rollout=[-0.3, -0.3]),  # -0.7
        Sequence([-1.0], demonstration=True, rollout=[5.0]),
    ]
    corrected = with_importance_weights(inputs_of(sequences), "mask_sequences", 2.0)
    assert corrected.importance_weights.tolist() == pytest.approx([2.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0])


def test_sizes_of_populations():
    counts = counts_of([Sequence([-1.0] * 3), Sequence([-1.0] * 2), Sequence([-1.0] * 7, demonstration=True)])
    sizes = {
        rows: population_size(counts, rows) for rows in ("rollouts", "demonstrations", "both", "positive_rollouts")
    }
    assert sizes == {"rollouts": (5, 2), "demonstrations": (7, 1), "both": (12, 3), "positive_rollouts": (5, 2)}
