"""GRPO and its presets by hand."""

import math

import pytest
import torch
from objective_rows import Sequence, counts_of, inputs_of, random_sequences, resolved, run

from megatron_srft.config import GrpoConfig
from megatron_srft.objectives import compute, with_importance_weights

SEQUENCES = [
    Sequence([-1.0, -1.0], advantage=1.0, old=[-1.0 - math.log(1.25), -1.0 - math.log(1.5)]),  # ratios 1.25, 1.5
    Sequence([-1.0], advantage=-2.0, old=[-1.0 - math.log(0.5)]),  # ratio 0.5
    Sequence([-1.0, -7.0], demonstration=True, advantage=100.0),
]


@pytest.mark.parametrize(
    ("config", "loss", "gradient"),
    [
        # clip 1.2 holds for both positive tokens, 0.8 for the negative one
        (GrpoConfig(), (-1.2 + 1.6) / 2, [0, 0, 0]),
        # upper clip 1.28: the first token is free, gradient -A r / tokens
        (GrpoConfig(preset="dapo"), (-1.25 - 1.28 + 1.6) / 3, [-1.25 / 3, 0, 0]),
        (GrpoConfig(preset="dr_grpo", constant_length=10), (-2.4 + 1.6) / 20, [0, 0, 0]),
        (GrpoConfig(denominator="sequence_sum", clip_high=9.0), (-2.75 + 1.6) / 2, [-0.625, -0.75, 0]),
    ],
)
def test_presets_by_hand(config, loss, gradient):
    output, inputs = run(config, SEQUENCES)
    assert output.loss.item() == pytest.approx(loss)
    assert inputs.logprobs.grad.tolist() == pytest.approx([*gradient, 0, 0])


def test_metrics_by_hand():
    output, _ = run(GrpoConfig(preset="dapo"), SEQUENCES)
    metrics = {name: value.item() for name, value in output.metrics.items()}
    logs = [math.log(1.25), math.log(1.5), math.log(0.5)]
    assert metrics["clip_fraction/high"] == pytest.approx(1 / 3)
    assert metrics["clip_fraction/low"] == pytest.approx(1 / 3)
    assert metrics["ratio/mean"] == pytest.approx((1.25 + 1.5 + 0.5) / 3)
    assert metrics["max/ratio"] == pytest.approx(1.5)
    assert metrics["kl/k1"] == pytest.approx(-sum(logs) / 3)
    assert metrics["kl/k3"] == pytest.approx(sum(math.exp(x) - 1 - x for x in logs) / 3)
    assert "nll/demonstrations" not in metrics and "entropy/demonstrations" not in metrics
    assert metrics["entropy/rollouts"] == pytest.approx(1.0)


def test_equal_rewards_give_zero_loss_and_gradient():
    sequences = random_sequences(6, 2)
    for sequence in sequences:
        sequence.advantage = 0.0
    output, inputs = run(GrpoConfig(), sequences)
    assert output.loss.item() == 0.0
    assert (inputs.logprobs.grad == 0).all()


def test_on_policy_gradient_is_reinforce():
    sequences = [Sequence([-1.0, -3.0], advantage=0.5), Sequence([-2.0], advantage=-1.5)]
    _, inputs = run(GrpoConfig(preset="dapo"), sequences)
    assert inputs.logprobs.grad.tolist() == pytest.approx([-0.5 / 3, -0.5 / 3, 0.5])


def test_dual_clip_bounds_negative_advantages():
    sequences = [Sequence([-1.0], advantage=-2.0, old=[-1.0 - math.log(10.0)])]
    free, inputs = run(GrpoConfig(), sequences)
    bounded, bounded_inputs = run(GrpoConfig(dual_clip=3.0), sequences)
    assert (free.loss.item(), inputs.logprobs.grad.item()) == pytest.approx((20.0, 20.0))
    assert (bounded.loss.item(), bounded_inputs.logprobs.grad.item()) == pytest.approx((6.0, 0.0))


def test_entropy_bonus_covers_rollouts_only():
    _, inputs = run(GrpoConfig(entropy_coefficient=0.3), SEQUENCES)
    assert inputs.entropy.grad.tolist() == pytest.approx([-0.1, -0.1, -0.1, 0, 0])


def test_importance_weights_multiply_the_rollout_losses():
    sequences = random_sequences(5, 2)
    inputs, counts, config = inputs_of(sequences), counts_of(sequences), resolved(GrpoConfig(preset="dapo"))
    corrected = with_importance_weights(inputs, "truncate", 1.05)
    output = compute(corrected, counts, config)
    by_hand = 0.0
    for s in sequences:
        if not s.demonstration:
            for logprob, old, rollout in zip(s.logprobs, s.old, s.rollout, strict=True):
                ratio = math.exp(logprob - old)
                clipped = min(max(ratio, 0.8), 1.28)
                weight = min(math.exp(old - rollout), 1.05)
                by_hand -= weight * min(ratio * s.advantage, clipped * s.advantage) / counts.rollout_tokens
    assert output.loss.item() == pytest.approx(by_hand)
    truncated = [
        math.exp(o - r) > 1.05 for s in sequences if not s.demonstration for o, r in zip(s.old, s.rollout, strict=True)
    ]  # noqa: E501
    assert output.metrics["mismatch/corrected_share"].item() == pytest.approx(sum(truncated) / len(truncated))


def test_mismatch_with_the_engine_is_reported():
    sequences = [Sequence([-1.0, -2.0], rollout=[-1.25, -1.5]), Sequence([-1.0], rollout=[-1.0], demonstration=True)]
    output, _ = run(GrpoConfig(), sequences)
    assert output.metrics["mismatch/mean"].item() == pytest.approx((0.25 + 0.5) / 2)
    assert output.metrics["max/mismatch"].item() == pytest.approx(0.5)
    k3 = (math.exp(0.25) - 1 - 0.25 + math.exp(-0.5) - 1 + 0.5) / 2
    assert output.metrics["mismatch/k3"].item() == pytest.approx(k3)


def test_only_demonstrations_give_zero():
    sequences = [Sequence([-1.0, -2.0], demonstration=True, advantage=3.0)]
    output, inputs = run(GrpoConfig(), sequences)
    assert output.loss.item() == 0.0
    assert (inputs.logprobs.grad == 0).all()
    assert torch.isfinite(torch.stack(list(output.metrics.values()))).all()
