"""The divergence penalty in the loss and in the reward: by hand, against autograd and exact divergences in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from advantage_cases import advantages_of, group, score, settings
from objective_rows import Sequence, counts_of, inputs_of, random_sequences, resolved

from megatron_srft import objectives
from megatron_srft.config import ConfigError, GrpoConfig, KlConfig, from_dict
from megatron_srft.ops.divergence import divergence

FORMULAS = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: math.exp(-d) - 1 + d}
DENOMINATORS = ("tokens", "sequence_mean", "sequence_sum", "constant")


def measured(sequences: list[Sequence], seed: int = 1):
    """Inputs with the reference's log-probs, which differ from the policy's by up to 0.5."""
    inputs = inputs_of(sequences)
    generator = torch.Generator().manual_seed(seed)
    shift = torch.rand(len(inputs.logprobs), generator=generator, dtype=torch.float64) - 0.5
    return replace(inputs, reference_logprobs=inputs.logprobs.detach() + shift)


def penalty_of(inputs, counts, objective, kl) -> torch.Tensor:
    return objectives.compute(inputs, counts, objective, kl).loss - objectives.compute(inputs, counts, objective).loss


@pytest.mark.parametrize("estimator", FORMULAS)
def test_estimators_by_hand(estimator):
    logprobs, other = torch.tensor([-1.0, -0.5, -2.0]), torch.tensor([-1.5, -0.25, -2.0])
    expected = [FORMULAS[estimator](d) for d in (0.5, -0.25, 0.0)]
    assert divergence(logprobs, other, estimator).tolist() == pytest.approx(expected, rel=1e-6)


def test_trls_value_for_grpo():
    """exp(ref - p) - (ref - p) - 1 per token, a mean per sequence, times beta, mean over sequences (loss_type grpo)."""
    sequences = [Sequence([-1.0, -0.5]), Sequence([-2.0])]
    inputs = replace(inputs_of(sequences), reference_logprobs=torch.tensor([-1.5, -0.25, -1.0], dtype=torch.float64))
    terms = [math.exp(r - p) - (r - p) - 1 for p, r in ((-1.0, -1.5), (-0.5, -0.25), (-2.0, -1.0))]
    expected = 0.04 * ((terms[0] + terms[1]) / 2 + terms[2]) / 2
    found = penalty_of(inputs, counts_of(sequences), resolved(GrpoConfig()), KlConfig(coefficient=0.04))
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_loss_and_gradient_for_every_mean(estimator, denominator):
    sequences = random_sequences(4, 2)
    inputs, counts = measured(sequences), counts_of(sequences)
    objective = resolved(GrpoConfig(denominator=denominator, constant_length=5))
    found = penalty_of(inputs, counts, objective, KlConfig(coefficient=0.3, estimator=estimator))
    (gradient,) = torch.autograd.grad(found, inputs.logprobs)
    d = inputs.logprobs - inputs.reference_logprobs
    rows = d**2 / 2 if estimator == "k2" else torch.exp(-d) - 1 + d
    members = [rows[inputs.sequence == i] for i, s in enumerate(sequences) if not s.demonstration]
    expected = (
        0.3
        * {
            "tokens": lambda: torch.cat(members).mean(),
            "sequence_mean": lambda: torch.stack([m.mean() for m in members]).mean(),
            "sequence_sum": lambda: torch.stack([m.sum() for m in members]).mean(),
            "constant": lambda: torch.cat(members).sum() / (5 * len(members)),
        }[denominator]()
    )
    (wanted,) = torch.autograd.grad(expected, inputs.logprobs)
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(gradient, wanted)
    assert (gradient[inputs.is_demonstration] == 0).all()


def test_metrics_are_the_loss_the_penalty_and_two_divergences():
    sequences = random_sequences(4, 2)
    inputs, counts = measured(sequences), counts_of(sequences)
    objective, kl = resolved(GrpoConfig(preset="dapo")), KlConfig(coefficient=0.3)
    output = objectives.compute(inputs, counts, objective, kl)
    d = (inputs.logprobs - inputs.reference_logprobs).detach()[~inputs.is_demonstration]
    assert output.metrics["kl/reference_k1"].item() == pytest.approx(d.mean().item())
    assert output.metrics["kl/reference_k3"].item() == pytest.approx((torch.exp(-d) - 1 + d).mean().item())
    assert output.metrics["loss/kl"].item() == pytest.approx(0.3 * (torch.exp(-d) - 1 + d).mean().item())
    assert output.metrics["loss"].item() == pytest.approx(output.loss.item())


# ---------------------------------------------------------------- against the policy before the step


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_against_the_old_policy_value_and_gradient_are_those_of_the_exact_divergence(estimator):
    """Each token of a vocabulary of 6 as often as the old policy samples it: the mean is KL(old || policy) itself."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    shares = torch.tensor([1, 2, 3, 4, 5, 5], dtype=torch.float64)
    tokens = torch.arange(6).repeat_interleave(shares.long())
    old = torch.log(shares / shares.sum())
    logprobs = torch.log_softmax(logits, -1)
    sequences = [Sequence([0.0] * len(tokens), old=[0.0] * len(tokens))]
    inputs = replace(inputs_of(sequences), logprobs=logprobs[tokens], old_logprobs=old[tokens])
    kl = KlConfig(coefficient=1.0, estimator=estimator, against="old")
    found = penalty_of(inputs, counts_of(sequences), resolved(GrpoConfig(preset="dapo")), kl)
    exact = (old.exp() * (old - logprobs)).sum()
    assert found.item() == pytest.approx(exact.item())
    (gradient,) = torch.autograd.grad(found, logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(exact, logits)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize(
    ("estimator", "against"), [(k, "old") for k in FORMULAS] + [("k2", "reference"), ("k3", "reference")]
)
def test_at_the_other_policy_the_penalty_is_zero(estimator, against):
    sequences = [replace(s, old=None) for s in random_sequences(3, 1)]
    inputs = inputs_of(sequences)
    inputs = replace(inputs, reference_logprobs=inputs.logprobs.detach().clone())
    kl = KlConfig(coefficient=2.0, estimator=estimator, against=against)
    found = penalty_of(inputs, counts_of(sequences), resolved(GrpoConfig()), kl)
    assert found.item() == 0.0
    if estimator != "k1":  # the gradient of k1 is 0 in the mean over samples, not on each of them
        (gradient,) = torch.autograd.grad(found, inputs.logprobs)
        assert gradient.abs().max() < 1e-15


# ---------------------------------------------------------------- in the reward


@pytest.mark.parametrize("estimator", FORMULAS)
@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_every_token_pays_and_the_payments_have_a_discount(estimator, gamma):
    kl = {"coefficient": 0.1, "estimator": estimator, "place": "reward", "gamma": gamma}
    run = settings({"kind": "grpo", "preset": "reinforce_pp"}, kl=kl, advantage={"normalize_batch": False})
    differences = [0.5, -0.25, 1.0]
    policy = [-1.0, -2.0, -0.5]
    (found,) = advantages_of(
        [group([3], [score(1.0)])],
        run,
        policy_logprobs=[policy],
        reference_logprobs=[[p - d for p, d in zip(policy, differences, strict=True)]],
    )
    paid = [-0.1 * FORMULAS[estimator](d) for d in differences]
    expected = [1 + sum(gamma ** (later - t) * paid[later] for later in range(t, 3)) for t in range(3)]
    assert found.advantages.tolist() == pytest.approx(expected, rel=1e-6)


def test_a_penalty_in_the_reward_is_none_in_the_loss():
    sequences = random_sequences(3, 0)
    kl = KlConfig(coefficient=0.5, estimator="k1", place="reward")
    inputs, counts = measured(sequences), counts_of(sequences)
    assert penalty_of(inputs, counts, resolved(GrpoConfig()), kl).item() == 0.0
    metrics = objectives.compute(inputs, counts, resolved(GrpoConfig()), kl).metrics
    mean = (inputs.logprobs - inputs.reference_logprobs).mean().item()
    assert metrics["kl/reference_k1"].item() == pytest.approx(mean)
    assert "loss/kl" not in metrics


def test_within_a_group_the_same_divergence_for_all_cancels():
    """A group's baseline takes the mean return, so a cost that all members bear alike changes nothing."""
    kl = {"coefficient": 0.1, "estimator": "k1", "place": "reward"}
    groups = [group([1, 1], [score(1.0), score(0.0)])]
    logprobs = {"policy_logprobs": [[-1.0]] * 2, "reference_logprobs": [[-2.0]] * 2}
    found = advantages_of(groups, settings({"kind": "grpo"}, kl=kl), **logprobs)
    plain = advantages_of(groups, settings({"kind": "grpo"}))
    for mine, theirs in zip(found, plain, strict=True):
        np.testing.assert_allclose(mine.advantages, theirs.advantages, rtol=1e-5)


@pytest.mark.parametrize(
    ("kl", "message"),
    [
        ({"coefficient": -0.1}, "kl.coefficient must be a number of at least 0"),
        ({"coefficient": 0.1, "estimator": "k1"}, "kl.estimator k1 in the loss pulls the policy nowhere"),
        ({"coefficient": 0.1, "against": "old", "place": "reward"}, "kl.against old needs kl.place loss"),
        ({"coefficient": 0.1, "against": "old"}, "kl.against old has no effect with one update per step"),
        ({"gamma": 0.0}, "kl.gamma must lie above 0 and at most at 1"),
        ({"refresh_every": 0}, "kl.refresh_every must be at least 1"),
    ],
)
def test_impossible_settings_are_refused_by_name(kl, message):
    with pytest.raises(ConfigError, match=message):
        from_dict({"objective": {"kind": "grpo"}, "kl": kl})


def test_a_penalty_without_rollouts_is_refused():
    with pytest.raises(ConfigError, match="objective sft has no rollouts to take the divergence on"):
        from_dict({"objective": {"kind": "sft"}, "kl": {"coefficient": 0.1}})
