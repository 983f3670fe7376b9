"""RL with an SFT loss by hand, and as the sum of the objectives that it is made of."""

import math

import pytest
import torch
from objective_rows import Sequence, counts_of, inputs_of, random_sequences, resolved, run

from megatron_srft.config import GrpoConfig, HptConfig, KlConfig, ReliftConfig, RlSftConfig, SftConfig
from megatron_srft.objectives import compute

SEQUENCES = [
    Sequence([-1.0, -1.0], advantage=1.0, old=[-1.0 - math.log(1.25), -1.0 - math.log(0.5)]),  # ratios 1.25, 0.5
    Sequence([-1.0], advantage=-2.0, old=[-1.0 - math.log(3.0)]),
    Sequence([-3.0, -5.0], demonstration=True, advantage=7.0),
]


@pytest.mark.parametrize("config", [RlSftConfig(constant_length=10), HptConfig(constant_length=10)])
def test_as_luffy_and_hpt_run_it_by_hand(config):
    """No clip, a constant length, an entropy bonus over both populations; no advantage on the demonstration."""
    output, inputs = run(config, SEQUENCES)
    assert output.metrics["loss/rollouts"].item() == pytest.approx((-1.25 - 0.5 + 6.0) / 20)
    assert output.metrics["loss/sft"].item() == pytest.approx(4.0)
    assert output.metrics["loss/entropy_bonus"].item() == pytest.approx(-0.001)
    assert output.loss.item() == pytest.approx(4.25 / 20 + 4.0 - 0.001)
    assert inputs.logprobs.grad.tolist() == pytest.approx([-1.25 / 20, -0.5 / 20, 6.0 / 20, -0.5, -0.5])
    assert inputs.entropy.grad.tolist() == pytest.approx([-0.0002] * 5)


def test_the_plain_sum_by_hand():
    output, inputs = run(RlSftConfig(preset="sft-plus-rl", sft_weight=0.5), SEQUENCES)
    assert output.loss.item() == pytest.approx(((-1.2 - 0.5) / 2 + 6.0) / 2 + 0.5 * 4.0)
    assert inputs.logprobs.grad.tolist() == pytest.approx([0, -0.125, 3.0, -0.25, -0.25])
    assert output.metrics["clip_fraction/high"].item() == pytest.approx(1 / 3)


def test_relift_by_hand_in_both_of_its_updates():
    config = ReliftConfig(constant_length=10, entropy_coefficient=0.3, sft_entropy_coefficient=0.02)
    output, inputs = run(config, SEQUENCES[:2])
    assert output.loss.item() == pytest.approx((-1.2 - 0.5 + 6.0) / 20 - 0.3)
    assert inputs.entropy.grad.tolist() == pytest.approx([-0.1] * 3)
    output, inputs = run(config, SEQUENCES[2:])
    assert output.loss.item() == pytest.approx(4.0 - 0.02)
    assert inputs.logprobs.grad.tolist() == pytest.approx([-0.5, -0.5])
    assert inputs.entropy.grad.tolist() == pytest.approx([-0.01] * 2)


@pytest.mark.parametrize("config", [RlSftConfig(preset="sft-plus-rl"), RlSftConfig(), HptConfig(), ReliftConfig()])
def test_it_is_grpo_plus_sft(config):
    """Without the entropy bonus; over a random step with both populations, and with one of them alone."""
    for rollouts, demonstrations in ((6, 3), (6, 0), (0, 3)):
        sequences = random_sequences(rollouts, demonstrations)
        changes = {"entropy_coefficient": 0.0, "constant_length": 9}
        changes |= {"sft_entropy_coefficient": 0.0} if config.kind == "relift" else {}
        settings = resolved(type(config)(**{"preset": config.preset} if hasattr(config, "preset") else {}, **changes))
        surrogate = ("clip_low", "clip_high", "denominator", "constant_length")
        (ours, inputs), (sft, sft_inputs) = run(settings, sequences), run(SftConfig(), sequences)
        grpo, grpo_inputs = run(GrpoConfig(**{name: getattr(settings, name) for name in surrogate}), sequences)
        assert ours.loss.item() == pytest.approx(grpo.loss.item() + sft.loss.item(), rel=1e-14)
        expected = grpo_inputs.logprobs.grad + sft_inputs.logprobs.grad
        torch.testing.assert_close(inputs.logprobs.grad, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("config", [HptConfig(), ReliftConfig()])
def test_an_update_of_demonstrations_alone_has_no_penalty_to_pay(config):
    """Under HPT's gate, or ReLIFT's supervised update: nothing was measured under the reference."""
    inputs, counts = inputs_of(SEQUENCES[2:]), counts_of(SEQUENCES[2:])
    output = compute(inputs, counts, resolved(config), KlConfig(coefficient=0.1))
    assert output.loss.item() == compute(inputs, counts, resolved(config)).loss.item()
