"""LUFFY by hand: one denominator for both populations, shaped demonstrations, unclipped rollouts."""

import math

import pytest
import torch
from objective_rows import Sequence, random_sequences, run

from megatron_srft.config import GrpoConfig, LuffyConfig

SEQUENCES = [
    Sequence([-1.0, -1.0], advantage=-0.5, old=[-1.0 - math.log(3.0), -1.0 - math.log(0.25)]),
    Sequence([math.log(0.4), math.log(0.1)], demonstration=True, advantage=0.5),
]


def test_joint_constant_denominator():
    output, inputs = run(LuffyConfig(constant_length=10, entropy_coefficient=0.0), SEQUENCES)
    rollouts = 0.5 * (3.0 + 0.25) / 20
    demonstrations = -0.5 * (0.4 / 0.5 + 0.1 / 0.2) / 20
    assert output.metrics["loss/rollouts"].item() == pytest.approx(rollouts)
    assert output.metrics["loss/demonstrations"].item() == pytest.approx(demonstrations)
    assert output.loss.item() == pytest.approx(rollouts + demonstrations)
    weights = [0.1 * p / (p + 0.1) ** 2 for p in (0.4, 0.1)]
    expected = [0.5 * 3.0, 0.5 * 0.25, -0.5 * weights[0], -0.5 * weights[1]]
    assert inputs.logprobs.grad.tolist() == pytest.approx([g / 20 for g in expected])
    assert "clip_fraction/low" not in output.metrics


def test_joint_token_denominator_and_entropy_over_both():
    output, inputs = run(LuffyConfig(denominator="tokens", entropy_coefficient=0.4), SEQUENCES)
    assert output.metrics["loss/rollouts"].item() == pytest.approx(0.5 * 3.25 / 4)
    assert inputs.entropy.grad.tolist() == pytest.approx([-0.1] * 4)


def test_without_shaping_the_gradient_is_the_probability():
    _, inputs = run(LuffyConfig(shaping="none", denominator="sequence_sum", entropy_coefficient=0.0), SEQUENCES)
    assert inputs.logprobs.grad[2:].tolist() == pytest.approx([-0.5 * 0.4 / 2, -0.5 * 0.1 / 2])


@pytest.mark.parametrize(
    ("shaping", "gamma", "loss", "slope"),
    [
        ("none", 0.1, lambda p: p, lambda p: 1.0),
        ("p_div_p_gamma", 0.3, lambda p: p / (p + 0.3), lambda p: 0.3 / (p + 0.3) ** 2),
        ("logp", 0.1, math.log, lambda p: 1 / p),
        ("p_logp", 0.2, lambda p: p + 0.2 * math.log(p), lambda p: 1 + 0.2 / p),
        ("power", 0.5, math.sqrt, lambda p: 0.5 / math.sqrt(p)),
    ],
)
def test_shapings(shaping, gamma, loss, slope):
    config = LuffyConfig(shaping=shaping, gamma=gamma, denominator="tokens", entropy_coefficient=0.0)
    output, inputs = run(config, SEQUENCES)
    assert output.metrics["loss/demonstrations"].item() == pytest.approx(-0.5 * (loss(0.4) + loss(0.1)) / 4)
    assert inputs.logprobs.grad[2:].tolist() == pytest.approx([-0.5 * p * slope(p) / 4 for p in (0.4, 0.1)])


def test_clip_applies_to_rollouts():
    output, inputs = run(LuffyConfig(clip=0.2, denominator="tokens", entropy_coefficient=0.0), SEQUENCES)
    assert output.metrics["loss/rollouts"].item() == pytest.approx(0.5 * (3.0 + 0.8) / 4)
    assert inputs.logprobs.grad[1].item() == 0.0
    assert output.metrics["clip_fraction/low"].item() == pytest.approx(0.5)


@pytest.mark.parametrize("denominator", ["tokens", "sequence_mean", "sequence_sum", "constant"])
def test_without_demonstrations_it_is_grpo(denominator):
    sequences = random_sequences(7, 0)
    ours, our_inputs = run(
        LuffyConfig(clip=0.2, denominator=denominator, constant_length=9, entropy_coefficient=0.02), sequences
    )
    grpo, grpo_inputs = run(GrpoConfig(denominator=denominator, constant_length=9, entropy_coefficient=0.02), sequences)
    assert ours.loss.item() == pytest.approx(grpo.loss.item(), rel=1e-14)
    torch.testing.assert_close(our_inputs.logprobs.grad, grpo_inputs.logprobs.grad, rtol=1e-14, atol=0)
