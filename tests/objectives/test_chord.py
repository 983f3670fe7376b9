"""CHORD by hand, against float64 autograd, its schedule, and what it is at the ends of mu."""

import math

import pytest
import torch
from objective_rows import Sequence, random_sequences, resolved, run

from megatron_srft.config import ChordConfig, ConfigError, GrpoConfig, SftConfig, from_dict
from megatron_srft.objectives import scheduled

SEQUENCES = [
    Sequence([-1.0, -1.0], advantage=1.0, old=[-1.0 - math.log(1.25), -1.0 - math.log(0.5)]),  # ratios 1.25, 0.5
    Sequence([math.log(0.4), math.log(0.1)], demonstration=True, advantage=7.0),
]


@pytest.mark.parametrize(
    ("token_weight", "weights"), [("none", [1, 1]), ("phi", [0.4 * 0.6, 0.1 * 0.9]), ("probability", [0.4, 0.1])]
)
def test_by_hand(token_weight, weights):
    output, inputs = run(ChordConfig(mu=0.25, token_weight=token_weight), SEQUENCES)
    likelihood = -(weights[0] * math.log(0.4) + weights[1] * math.log(0.1)) / 2
    assert output.metrics["loss/rollouts"].item() == pytest.approx(0.75 * (-1.2 - 0.5) / 2)
    assert output.metrics["loss/sft"].item() == pytest.approx(0.25 * likelihood)
    # The weights have no gradient of their own.
    expected = [0, -0.75 * 0.5 / 2, -0.25 * weights[0] / 2, -0.25 * weights[1] / 2]
    assert inputs.logprobs.grad.tolist() == pytest.approx(expected)
    if token_weight != "none":
        assert output.metrics["weight/sft"].item() == pytest.approx(sum(weights) / 2)
        assert output.metrics["max/weight_sft"].item() == pytest.approx(max(weights))


@pytest.mark.parametrize("preset", ["chord-mu", "chord-phi"])
def test_closed_form_and_its_derivative_by_autograd(preset):
    sequences = random_sequences(8, 5, seed=4)
    output, inputs = run(ChordConfig(preset=preset, mu=0.3), sequences)
    logprobs = inputs.logprobs.detach().requires_grad_()
    shown, ratio = inputs.is_demonstration, (logprobs - inputs.old_logprobs).exp()
    gains = torch.minimum(ratio * inputs.advantages, ratio.clamp(0.8, 1.2) * inputs.advantages)
    p = logprobs.detach().exp()
    weights = p * (1 - p) if preset == "chord-phi" else torch.ones_like(p)
    expected = -0.7 * gains[~shown].mean() - 0.3 * (weights * logprobs)[shown].mean()
    expected.backward()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(inputs.logprobs.grad, logprobs.grad, rtol=1e-12, atol=1e-15)


def test_at_the_ends_of_mu_it_is_grpo_or_sft():
    sequences = random_sequences(6, 3)
    for mu, other in ((0.0, GrpoConfig(denominator="tokens")), (1.0, SftConfig())):
        (ours, inputs), (theirs, their_inputs) = run(ChordConfig(mu=mu), sequences), run(other, sequences)
        assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-14)
        torch.testing.assert_close(inputs.logprobs.grad, their_inputs.logprobs.grad, rtol=1e-14, atol=0)


def test_mu_falls_along_half_a_cosine():
    paper = resolved(ChordConfig())
    found = [scheduled(paper, step).mu for step in (0, 50, 100, 200, 5000)]
    quarter = 0.05 + 0.85 * (1 + math.sqrt(0.5)) / 2
    assert found == pytest.approx([0.9, quarter, 0.475, 0.05, 0.05], rel=1e-12)
    warmed = resolved(ChordConfig(mu=0.5, mu_end=0.02, mu_warmup_steps=4, mu_decay_steps=2))
    assert [scheduled(warmed, step).mu for step in range(8)] == pytest.approx(
        [0, 0.125, 0.25, 0.375, 0.5, 0.26, 0.02, 0.02]
    )


def test_phi_holds_mu_and_other_objectives_have_no_schedule():
    phi = resolved(ChordConfig(preset="chord-phi"))
    assert {scheduled(phi, step).mu for step in (0, 1, 300)} == {0.1}
    assert scheduled(SftConfig(), 7) == SftConfig()


@pytest.mark.parametrize(("key", "value"), [("mu", 1.5), ("mu_end", -0.1), ("mu_decay_steps", -1), ("mu", math.nan)])
def test_impossible_settings_are_refused_with_the_key(key, value):
    with pytest.raises(ConfigError, match=f"objective.{key} must"):
        from_dict({"objective": {"kind": "chord", key: value}})
