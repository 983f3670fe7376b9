"""SRFT by hand under both presets, and the special cases that must equal other objectives."""

import math

import pytest
import torch
from objective_rows import Sequence, random_sequences, run

from megatron_srft.config import GrpoConfig, LuffyConfig, SftConfig, SrftConfig

SEQUENCES = [
    Sequence([-1.0, -3.0], entropy=[0.2, 0.6], correct=True, advantage=0.7, old=[-1.0 - math.log(2), -3.0]),
    Sequence([-2.0, -1.5, -0.5], entropy=[1.0, 1.0, 4.0], correct=False, advantage=-0.3),
    Sequence([math.log(0.5), math.log(0.2)], entropy=[0.5, 1.5], demonstration=True, correct=True, advantage=0.4),
]


def test_paper_preset_by_hand():
    output, inputs = run(SrftConfig(preset="srft-paper"), SEQUENCES)
    w_sft, w_rl = 0.5 * math.exp(-1.0), 0.1 * math.exp(0.4)  # sequence entropies 1.0 and 0.4
    expected = {
        "loss/sft": w_sft * (math.log(2) + math.log(5)) / 2,
        "loss/rl_demonstrations": -0.4 * (0.5 + 0.2) / 2,
        "loss/rl_positive": w_rl * (1 + 3) / 5,
        "loss/rl_negative": (-2 - 1.5 - 0.5) / 5,
        "loss/entropy_bonus": 0.0,
    }
    for name, value in expected.items():
        assert output.metrics[name].item() == pytest.approx(value), name
    assert output.loss.item() == pytest.approx(sum(expected.values()))
    gradient = [-w_rl / 5] * 2 + [1 / 5] * 3 + [(-w_sft - 0.4 * 0.5) / 2, (-w_sft - 0.4 * 0.2) / 2]
    assert inputs.logprobs.grad.tolist() == pytest.approx(gradient)
    assert inputs.entropy.grad is None


def test_released_preset_by_hand():
    output, inputs = run(SrftConfig(preset="srft-released", constant_length=8), SEQUENCES)
    expected = {
        "loss/sft": 0.5 * (math.exp(0.5) * math.log(2) + math.exp(1.5) * math.log(5)) / 2,
        "loss/rl_demonstrations": -0.4 * (0.5 / 0.6 + 0.2 / 0.3) / (3 * 8),
        "loss/rl_positive": -0.7 * 0.1 * (math.exp(0.2) * 2 + math.exp(0.6)) / (3 * 8),
        "loss/rl_negative": 0.3 * 3 / (3 * 8),
        "loss/entropy_bonus": -0.001 * (0.2 + 0.6 + 1 + 1 + 4 + 0.5 + 1.5) / 7,
    }
    for name, value in expected.items():
        assert output.metrics[name].item() == pytest.approx(value), name
    assert output.loss.item() == pytest.approx(sum(expected.values()))
    gradient = [
        *[-0.7 * 0.1 * math.exp(0.2) * 2 / 24, -0.7 * 0.1 * math.exp(0.6) / 24],
        *[0.3 / 24] * 3,
        -0.5 * math.exp(0.5) / 2 - 0.4 * 0.1 * 0.5 / 0.6**2 / 24,
        -0.5 * math.exp(1.5) / 2 - 0.4 * 0.1 * 0.2 / 0.3**2 / 24,
    ]
    assert inputs.logprobs.grad.tolist() == pytest.approx(gradient)
    assert inputs.entropy.grad.tolist() == pytest.approx([-0.001 / 7] * 7)


def test_the_two_presets_weigh_an_uncertain_demonstration_oppositely():
    confident = Sequence([-1.0], demonstration=True, entropy=[0.1])
    uncertain = Sequence([-1.0], demonstration=True, entropy=[2.0])
    for preset, sign in (("srft-paper", -1), ("srft-released", 1)):
        terms = [run(SrftConfig(preset=preset), [s])[0].metrics["loss/sft"].item() for s in (confident, uncertain)]
        assert terms[1] / terms[0] == pytest.approx(math.exp(sign * 1.9))


def test_weight_metrics():
    output, _ = run(SrftConfig(preset="srft-released"), SEQUENCES)
    on_demonstration = [0.5 * math.exp(h) for h in (0.5, 1.5)]
    on_rollouts = [0.1 * math.exp(h) for h in (0.2, 0.6, 1, 1, 4)]
    assert output.metrics["weight/sft"].item() == pytest.approx(sum(on_demonstration) / 2)
    assert output.metrics["max/weight_sft"].item() == pytest.approx(on_demonstration[1])
    assert output.metrics["weight/rl"].item() == pytest.approx(sum(on_rollouts) / 5)
    assert output.metrics["max/weight_rl"].item() == pytest.approx(on_rollouts[-1])
    assert output.metrics["entropy/demonstrations"].item() == pytest.approx(1.0)
    assert output.metrics["entropy/rollouts"].item() == pytest.approx(6.8 / 5)


def test_token_weights_are_clamped():
    sequences = [Sequence([-1.0], demonstration=True, entropy=[30.0])]
    output, _ = run(SrftConfig(entropy_coefficient=0.0, exponent_limit=2.0), sequences)
    assert output.loss.item() == pytest.approx(0.5 * math.exp(2.0))


@pytest.mark.parametrize("level", ["group", "batch"])
def test_pooled_entropy_weights(level):
    sequences = [Sequence([-1.0], demonstration=True, entropy=[9.0], pooled_entropy=0.25)]
    output, _ = run(SrftConfig(preset="srft-paper", entropy_level=level), sequences)
    assert output.metrics["loss/sft"].item() == pytest.approx(0.5 * math.exp(-0.25))


def test_without_rl_terms_it_is_weighted_sft():
    """Demonstrations alone, no advantage, no bonus: w_sft times the SFT loss (constant entropy), or weighted tokens."""
    sequences = [s for s in random_sequences(0, 6)]
    config = SrftConfig(preset="srft-paper", demonstration_rl_weight=0.0, entropy_level="token")
    output, _ = run(config, sequences)
    tokens = [(lp, h) for s in sequences for lp, h in zip(s.logprobs, s.entropy, strict=True)]
    assert output.loss.item() == pytest.approx(sum(-lp * 0.5 * math.exp(-h) for lp, h in tokens) / len(tokens))

    constant = SrftConfig(preset="srft-paper", demonstration_rl_weight=0.0, sft_weight=1.0, sft_entropy_sign=0)
    ours, our_inputs = run(constant, sequences)
    sft, sft_inputs = run(SftConfig(), sequences)
    assert ours.loss.item() == pytest.approx(sft.loss.item(), rel=1e-15)
    torch.testing.assert_close(our_inputs.logprobs.grad, sft_inputs.logprobs.grad, rtol=1e-15, atol=0)


@pytest.mark.parametrize("denominator", ["tokens", "sequence_mean", "sequence_sum", "constant"])
@pytest.mark.parametrize("joint", [False, True])
def test_without_weights_and_demonstrations_it_is_grpo(denominator, joint):
    sequences = random_sequences(8, 0)
    srft, srft_inputs = run(
        SrftConfig(
            rollout_advantage="group", rollout_surrogate="clipped_ratio", rl_weight=1.0, rl_entropy_sign=0,
            clip_high=0.28, entropy_coefficient=0.01, denominator=denominator, constant_length=16,
            joint_rl_count=joint,
        ),
        sequences,
    )  # fmt: skip
    grpo, grpo_inputs = run(
        GrpoConfig(clip_high=0.28, entropy_coefficient=0.01, denominator=denominator, constant_length=16), sequences
    )
    assert srft.loss.item() == pytest.approx(grpo.loss.item(), rel=1e-14)
    torch.testing.assert_close(srft_inputs.logprobs.grad, grpo_inputs.logprobs.grad, rtol=1e-14, atol=1e-18)
    for name in ("clip_fraction/low", "clip_fraction/high", "kl/k3", "ratio/mean"):
        assert srft.metrics[name].item() == pytest.approx(grpo.metrics[name].item())


def test_without_sft_and_entropy_weights_it_is_luffy():
    sequences = random_sequences(7, 3)
    srft, srft_inputs = run(SrftConfig(sft_weight=0.0, rl_weight=1.0, rl_entropy_sign=0, constant_length=16), sequences)
    luffy, luffy_inputs = run(LuffyConfig(constant_length=16), sequences)
    assert srft.loss.item() == pytest.approx(luffy.loss.item(), rel=1e-14)
    torch.testing.assert_close(srft_inputs.logprobs.grad, luffy_inputs.logprobs.grad, rtol=1e-13, atol=1e-18)
    torch.testing.assert_close(srft_inputs.entropy.grad, luffy_inputs.entropy.grad)


def test_on_policy_logprob_and_ratio_surrogates_have_the_same_gradient():
    """At the sampling policy grad r = grad log p, so paper and released surrogates differ only off-policy."""
    sequences = random_sequences(6, 2)
    for sequence in sequences:
        sequence.old = None
    gradients = [
        run(SrftConfig(preset="srft-paper", rollout_surrogate=surrogate), sequences)[1].logprobs.grad
        for surrogate in ("logprob", "ratio", "clipped_ratio")
    ]
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])


def test_negative_rollouts_are_pushed_down_without_entropy_weight():
    sequences = [Sequence([-1.0, -2.0], correct=False, entropy=[3.0, 3.0])]
    output, inputs = run(SrftConfig(preset="srft-paper"), sequences)
    assert output.loss.item() == pytest.approx(-1.5)  # + log p, the mean of -1 and -2
    assert inputs.logprobs.grad.tolist() == [0.5, 0.5]
