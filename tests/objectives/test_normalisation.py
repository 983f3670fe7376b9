"""The loss, its gradients and its metrics do not depend on how an update is cut into micro-batches."""

import pytest
import torch
from objective_rows import counts_of, inputs_of, random_sequences, resolved

from megatron_srft.config import (
    ChordConfig,
    GrpoConfig,
    HptConfig,
    LuffyConfig,
    PsftConfig,
    ReliftConfig,
    RlSftConfig,
    SftConfig,
    SftKlConfig,
    SrftConfig,
)
from megatron_srft.objectives import compute

OBJECTIVES = [
    SftConfig(),
    SftConfig(denominator="sequence_mean"),
    SftKlConfig(),
    SftKlConfig(denominator="sequence_mean"),
    PsftConfig(entropy_coefficient=0.01),
    PsftConfig(clip=None, denominator="sequence_mean"),
    GrpoConfig(entropy_coefficient=0.01),
    GrpoConfig(preset="dapo", dual_clip=3.0),
    GrpoConfig(preset="dr_grpo"),
    LuffyConfig(),
    LuffyConfig(denominator="tokens", clip=0.2),
    SrftConfig(preset="srft-paper"),
    SrftConfig(preset="srft-paper", denominator="sequence_mean", entropy_level="batch"),
    SrftConfig(preset="srft-released"),
    SrftConfig(rollout_surrogate="clipped_ratio", denominator="sequence_sum"),
    RlSftConfig(),
    ChordConfig(),
    ChordConfig(preset="chord-phi", entropy_coefficient=0.1),
    HptConfig(),
    ReliftConfig(),
]


def run(sequences, counts, config):
    inputs = inputs_of(sequences)
    output = compute(inputs, counts, config)
    output.loss.backward()
    entropy_gradient = torch.zeros_like(inputs.entropy) if inputs.entropy.grad is None else inputs.entropy.grad
    return output, torch.stack([inputs.logprobs.grad, entropy_gradient])


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.kind}-{getattr(o, 'preset', '')}")
def test_any_cut_into_microbatches_adds_up(objective):
    sequences, config = random_sequences(9, 4), resolved(objective)
    counts = counts_of(sequences)
    whole, gradients = run(sequences, counts, config)
    by_population = sorted(range(13), key=lambda i: sequences[i].demonstration)  # micro-batches of one population
    for order, cuts in [(range(13), [4, 9]), (range(13), range(1, 13)), (by_population, [9]), (range(13), [0, 13])]:
        order, cuts = list(order), [0, *cuts, 13]
        parts = [order[a:b] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        outputs, part_gradients = zip(
            *[run([sequences[i] for i in part], counts, config) for part in parts], strict=True
        )

        assert sum(o.loss for o in outputs).item() == pytest.approx(whole.loss.item(), rel=1e-12, abs=1e-15)
        rows = torch.cat([rows_of_sequence(sequences, i) for i in order])
        torch.testing.assert_close(torch.cat(part_gradients, dim=1), gradients[:, rows], rtol=1e-13, atol=1e-16)
        for name, value in whole.metrics.items():
            shares = torch.stack([o.metrics[name] for o in outputs])
            total = shares.amax() if name.startswith("max/") else shares.sum()
            assert total.item() == pytest.approx(value.item(), rel=1e-12, abs=1e-15), name
        assert all(o.metrics.keys() == whole.metrics.keys() for o in outputs)


def rows_of_sequence(sequences, index):
    start = sum(len(s.logprobs) for s in sequences[:index])
    return torch.arange(start, start + len(sequences[index].logprobs))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.kind}-{getattr(o, 'preset', '')}")
@pytest.mark.parametrize(("rollouts", "demonstrations"), [(0, 0), (3, 0), (0, 3)])
def test_missing_populations_are_ordinary(objective, rollouts, demonstrations):
    sequences = random_sequences(rollouts, demonstrations)
    output, gradients = run(sequences, counts_of(sequences), resolved(objective))
    assert torch.isfinite(output.loss) and torch.isfinite(gradients).all()
    assert all(torch.isfinite(value) for value in output.metrics.values())
    if not sequences:
        assert output.loss.item() == 0.0
    missing = "rollouts" if rollouts == 0 else "demonstrations"
    assert not any(name in output.metrics for name in (f"nll/{missing}", f"entropy/{missing}"))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.kind}-{getattr(o, 'preset', '')}")
def test_metrics_carry_no_gradient(objective):
    sequences = random_sequences(3, 2)
    output, _ = run(sequences, counts_of(sequences), resolved(objective))
    assert not any(value.requires_grad for value in output.metrics.values())
