"""SFT-KL: its closed form in float64, and where it is SFT."""

import dataclasses
import math

import pytest
import torch
from objective_rows import Sequence, counts_of, inputs_of, random_sequences, resolved

from megatron_srft.config import ConfigError, SftConfig, SftKlConfig, from_dict
from megatron_srft.objectives import compute


def run(sequences, config):
    inputs = inputs_of(sequences)
    output = compute(inputs, counts_of(sequences), resolved(config))
    output.loss.backward()
    return output, inputs


def test_by_hand():
    sequences = [
        Sequence([-1.0, -2.0], demonstration=True, old=[-1.5, -1.0]),
        Sequence([-9.0], advantage=3.0, old=[-1.0]),
        Sequence([-60.0], demonstration=True, old=[-1.0]),
    ]
    output, inputs = run(sequences, SftKlConfig(kl_coefficient=0.2))
    k3 = [math.exp(-0.5) - 0.5, math.exp(1.0) - 2.0, math.exp(20.0) - 21.0]
    assert output.metrics["loss/sft"].item() == pytest.approx(63 / 3)
    assert output.metrics["loss/kl"].item() == pytest.approx(0.2 * sum(k3) / 3)
    assert output.loss.item() == output.metrics["loss"].item() == pytest.approx(21 + 0.2 * sum(k3) / 3)
    slopes = [1 - math.exp(-0.5), 1 - math.exp(1.0), 0.0, 0.0]
    likelihood = [-1, -1, 0, -1]
    expected = [(one + 0.2 * other) / 3 for one, other in zip(likelihood, slopes, strict=True)]
    assert inputs.logprobs.grad.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("denominator", "weights"), [("tokens", [1 / 3] * 3), ("sequence_mean", [1 / 4, 1 / 4, 1 / 2])]
)
def test_a_divergence_that_is_given_is_averaged_over_the_demonstrations(denominator, weights):
    sequences = [
        Sequence([-1.0, -2.0], demonstration=True),
        Sequence([-9.0], advantage=3.0),
        Sequence([-4.0], demonstration=True),
    ]
    given = torch.tensor([0.5, 0.1, 7.0, 2.0], dtype=torch.float64, requires_grad=True)
    inputs = dataclasses.replace(inputs_of(sequences), reference_kl=given)
    config = SftKlConfig(kl_coefficient=0.2, estimator="full", denominator=denominator)
    output = compute(inputs, counts_of(sequences), resolved(config))
    output.loss.backward()
    penalty = 0.2 * (weights[0] * 0.5 + weights[1] * 0.1 + weights[2] * 2.0)
    assert output.metrics["loss/kl"].item() == pytest.approx(penalty)
    assert output.loss.item() == pytest.approx(weights[0] + weights[1] * 2 + weights[2] * 4 + penalty)
    assert given.grad.tolist() == pytest.approx([0.2 * weights[0], 0.2 * weights[1], 0, 0.2 * weights[2]])
    assert output.metrics["kl/demonstrations_full"].item() == pytest.approx(2.6 / 3)


@pytest.mark.parametrize("denominator", ["tokens", "sequence_mean"])
def test_closed_form_and_its_derivative_by_autograd(denominator):
    sequences = random_sequences(4, 12, seed=9)
    output, inputs = run(sequences, SftKlConfig(denominator=denominator))
    logprobs = inputs.logprobs.detach().requires_grad_()
    shown = inputs.is_demonstration.double()
    weight = shown / shown.sum() if denominator == "tokens" else shown / inputs.response_lengths / 12
    inverse = inputs.old_logprobs.exp() / logprobs.exp()
    expected = (weight * (-logprobs + 0.5 * (inverse - inverse.log() - 1))).sum()
    expected.backward()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(inputs.logprobs.grad, logprobs.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("coefficient", "changed"), [(0.0, True), (0.5, False)])
def test_without_a_coefficient_or_at_the_reference_it_is_sft(coefficient, changed):
    sequences = random_sequences(3, 6)
    for sequence in sequences:
        sequence.old = sequence.old if changed else None
    output, inputs = run(sequences, SftKlConfig(kl_coefficient=coefficient))
    sft, sft_inputs = run(sequences, SftConfig())
    assert output.loss.item() == sft.loss.item()
    torch.testing.assert_close(inputs.logprobs.grad, sft_inputs.logprobs.grad, rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"objective": {"kl_coefficient": -1}}, "objective.kl_coefficient must not be negative"),
        ({"batch": {"updates_per_step": 4}}, "batch.updates_per_step is 4, and objective sft_kl needs 1"),
    ],
)
def test_impossible_settings_are_refused_with_the_key(tree, message):
    with pytest.raises(ConfigError, match=message):
        from_dict({**tree, "objective": {"kind": "sft_kl", **tree.get("objective", {})}})
