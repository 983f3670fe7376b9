"""SFT by hand: the demonstrations' negative log-likelihood, and nothing of the rollouts."""

import pytest
from objective_rows import Sequence, counts_of, inputs_of, resolved

from megatron_srft.config import SftConfig
from megatron_srft.objectives import compute

SEQUENCES = [
    Sequence([-1.0, -2.0, -6.0], demonstration=True),
    Sequence([-9.0, -9.0], advantage=5.0, correct=True),
    Sequence([-5.0], demonstration=True),
]


def test_token_mean_over_demonstrations_only():
    inputs = inputs_of(SEQUENCES)
    output = compute(inputs, counts_of(SEQUENCES), resolved(SftConfig()))
    output.loss.backward()
    assert output.loss.item() == pytest.approx((1 + 2 + 6 + 5) / 4)
    assert inputs.logprobs.grad.tolist() == [-0.25, -0.25, -0.25, 0, 0, -0.25]
    assert inputs.entropy.grad is None
    assert output.metrics["nll/demonstrations"].item() == pytest.approx(3.5)
    assert not any(name.endswith("rollouts") for name in output.metrics)


def test_sequence_mean():
    output = compute(inputs_of(SEQUENCES), counts_of(SEQUENCES), resolved(SftConfig(denominator="sequence_mean")))
    assert output.loss.item() == pytest.approx((3 + 5) / 2)


def test_no_demonstrations_at_all():
    sequences = [Sequence([-1.0, -2.0])]
    inputs = inputs_of(sequences)
    output = compute(inputs, counts_of(sequences), resolved(SftConfig()))
    output.loss.backward()
    assert output.loss.item() == 0 and inputs.logprobs.grad.tolist() == [0, 0]
    assert set(output.metrics) == {"loss"}
