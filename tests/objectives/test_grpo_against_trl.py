"""The GRPO family against TRL 1.16.0: what its GRPOTrainer._compute_loss returned for these numbers in float64.

TRL is no dependency of the tests, so its figures stand here. It was called by hand with a namespace in place of the
trainer (one process, no accumulation, max_completion_length 7), each time on the three sequences below.

Where the definitions differ: TRL's `dapo` divides by the tokens of the batch it has generated, which are those of the
update only when every generation batch is one update; its `delta` bounds the ratio for either sign, which for A >= 0
comes to the same while delta is above 1 + epsilon_high; it has no k1, k2, and no penalty in the reward.
"""

import dataclasses

import pytest
import torch
from objective_rows import Sequence, counts_of, inputs_of, resolved

from megatron_srft import objectives
from megatron_srft.config import GrpoConfig, KlConfig

SEQUENCES = [
    Sequence([-0.5, -2.0, -0.1, -1.2], advantage=1.2, old=[-0.9, -1.2, -0.1, -1.9]),
    Sequence([-0.3, -0.9], advantage=-0.8, old=[-0.2, -1.6]),
    Sequence([-1.5, -0.2, -0.7], advantage=-0.4, old=[-0.4, -0.25, -1.1]),
]
REFERENCE = [-0.6, -1.0, -0.4, -1.5, -0.3, -0.7, -1.1, -0.6, -0.2]

CASES = [
    (
        dict(preset="grpo"), 0.0, 0.15279448894546027,
        [0.0, -0.044932896412, -0.1, 0.0, 0.120644989071, 0.268500360996, 0.0, 0.046723159839, 0.066303319895],
    ),
    (
        dict(preset="grpo"), 0.04, 0.15700131968995415,
        [0.000317208607, -0.050660502507, -0.099136060736, 0.000863939264, 0.120644989071, 0.267024342608,
         -0.002185887545, 0.048188404079, 0.063420114248],
    ),
    (
        dict(preset="dapo"), 0.0, -0.1265649265476221,
        [0.0, -0.059910528549, -0.133333333333, 0.0, 0.080429992714, 0.179000240664, 0.0, 0.046723159839,
         0.066303319895],
    ),
    (
        dict(preset="dr_grpo", constant_length=7), 0.0, -0.04509925423469517,
        [0.0, -0.025675940807, -0.057142857143, 0.0, 0.034469996878, 0.076714388856, 0.0, 0.02002421136,
         0.028415708527],
    ),
    (
        dict(preset="dapo", dual_clip=2.0), 0.1, -0.11515378431837948,
        [0.001057362022, -0.079002548865, -0.130453535785, 0.002879797548, 0.080429992714, -0.002460030646,
         -0.005464718863, 0.050386270439, 0.059095305776],
    ),
]  # fmt: skip
"""Settings, TRL's beta, its loss, and the loss's derivative by every token's log-prob."""


@pytest.mark.parametrize(("settings", "beta", "loss", "slopes"), CASES)
def test_loss_and_gradient_are_those_of_trl(settings, beta, loss, slopes):
    reference = torch.tensor(REFERENCE, dtype=torch.float64)
    inputs = dataclasses.replace(inputs_of(SEQUENCES), reference_logprobs=reference)
    output = objectives.compute(
        inputs, counts_of(SEQUENCES), resolved(GrpoConfig(**settings)), KlConfig(coefficient=beta)
    )
    output.loss.backward()
    assert output.loss.item() == pytest.approx(loss, rel=1e-12)
    assert inputs.logprobs.grad.tolist() == pytest.approx(slopes, abs=1e-11)
