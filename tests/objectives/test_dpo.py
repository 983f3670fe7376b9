"""DPO: numbers by hand, float64 autograd, other implementations' numbers, and micro-batches."""

import math

import pytest
import torch
from objective_rows import Sequence, counts_of, inputs_of, random_sequences

from megatron_srft.config import ConfigError, DpoConfig, from_dict
from megatron_srft.objectives import compute

PAIRS = [
    Sequence([-1.0, -2.0], demonstration=True, old=[-1.5, -2.5]),  # s = 1
    Sequence([-3.0, -1.0, -1.0, -1.0], demonstration=True, old=[-1.0, -1.0, -1.0, -1.0]),  # s = -2
    Sequence([-2.0], demonstration=True, old=[-1.0]),  # s = -1
    Sequence([-1.0, -1.0], demonstration=True, old=[-1.5, -1.5]),  # s = 1
]


def run(sequences, config, counts=None):
    inputs = inputs_of(sequences)
    output = compute(inputs, counts or counts_of(sequences), config)
    output.loss.backward()
    return output, inputs


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


@pytest.mark.parametrize(
    ("config", "losses"),
    [
        (DpoConfig(beta=0.5), [softplus(-1.5), softplus(1.0)]),
        (DpoConfig(beta=0.5, length_normalised=True), [softplus(-0.5), softplus(0.75)]),
        (
            DpoConfig(beta=0.5, label_smoothing=0.2),
            [0.8 * softplus(-1.5) + 0.2 * softplus(1.5), 0.8 * softplus(1.0) + 0.2 * softplus(-1.0)],
        ),
        (DpoConfig(beta=0.5, loss="ipo"), [(0.5 + 0.5 - 1) ** 2, (-1 - 0.5 - 1) ** 2]),
        (DpoConfig(beta=0.5, loss="ipo", length_normalised=False), [(3 - 1) ** 2, (-2 - 1) ** 2]),
        (DpoConfig(beta=0.5, sft_coefficient=0.1), [softplus(-1.5) + 0.15, softplus(1.0) + 0.2]),
    ],
)
def test_by_hand(config, losses):
    output, _ = run(PAIRS, config)
    assert output.loss.item() == output.metrics["loss"].item() == pytest.approx(sum(losses) / 2)


def test_metrics_by_hand():
    metrics = run(PAIRS, DpoConfig(beta=0.5, sft_coefficient=0.1))[0].metrics
    expected = {
        "loss/preference": (softplus(-1.5) + softplus(1.0)) / 2,
        "loss/sft": 0.1 * (1.5 + 2.0) / 2,
        "dpo/accuracy": 0.5,
        "dpo/margin": 0.5 * (3 - 2) / 2,
        "dpo/chosen_reward": 0.5 * (1 - 1) / 2,
        "dpo/rejected_reward": 0.5 * (-2 + 1) / 2,
        "dpo/chosen_logprob": (-3.0 - 2.0) / 2,
        "dpo/rejected_logprob": (-6.0 - 2.0) / 2,
        "nll/chosen": (1.5 + 2.0) / 2,
        "nll/rejected": (1.5 + 1.0) / 2,
        "entropy/chosen": 1.0,
        "entropy/rejected": 1.0,
    }
    assert {name: value.item() for name, value in metrics.items() if name != "loss"} == pytest.approx(expected)


SCORES = [(0.7, -1.3, 3, 5), (-0.4, 0.9, 2, 1), (2.5, 2.5, 4, 4), (-3.1, -6.2, 5, 2)]
"""Chosen and rejected sum of log-ratios, and tokens of each."""

TRL = [
    (DpoConfig(beta=0.1), 0.6504140327654856),  # sigmoid
    (DpoConfig(beta=5.0, length_normalised=True), 1.5696718495977735),  # sigmoid_norm
    (DpoConfig(beta=0.1, loss="ipo"), 22.21761111111111),  # ipo
    (
        DpoConfig(beta=0.1, label_smoothing=0.1),
        0.6599140327654855,
    ),  # aot, one pair at a time, which is conservative DPO
]
"""What DPOTrainer._compute_loss of TRL 1.16.0 returned for these scores in float64, run by hand with a model and a
reference of given log-probs. Where definitions differ: docs/objectives.md."""

TRL_METRICS = {"dpo/chosen_reward": -0.0075, "dpo/rejected_reward": -0.1025, "dpo/margin": 0.095}
TRL_METRICS |= {"dpo/chosen_logprob": -4.0, "dpo/rejected_logprob": -3.425}


def scored(scores) -> list[Sequence]:
    """Pairs with these sums of log-ratios, spread evenly over their tokens."""
    return [
        Sequence([-1.0 - 0.1 * t for t in range(n)], demonstration=True, old=[-1.0 - 0.1 * t - s / n for t in range(n)])
        for chosen, rejected, chosen_length, rejected_length in scores
        for s, n in ((chosen, chosen_length), (rejected, rejected_length))
    ]


@pytest.mark.parametrize(("config", "loss"), TRL)
def test_the_loss_of_trl(config, loss):
    assert run(scored(SCORES), config)[0].loss.item() == pytest.approx(loss, rel=1e-12)


def test_the_metrics_of_trl():
    metrics = run(scored(SCORES), DpoConfig(beta=0.1))[0].metrics
    assert {name: metrics[name].item() for name in TRL_METRICS} == pytest.approx(TRL_METRICS)
    assert metrics["dpo/accuracy"].item() == pytest.approx(0.5 + 0.5 / 4)  # TRL does not count the tie


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    "config",
    [
        DpoConfig(),
        DpoConfig(beta=2.0, length_normalised=True, label_smoothing=0.1),
        DpoConfig(loss="ipo"),
        DpoConfig(loss="ipo", length_normalised=False, sft_coefficient=0.7),
    ],
)
def test_gradient_is_the_closed_form(config):
    """d loss / d log p_t of every token, derived by hand."""
    sequences = random_sequences(0, 10, seed=4)
    inputs = run(sequences, config)[1]
    expected = []
    for chosen, rejected in zip(sequences[::2], sequences[1::2], strict=True):
        score, lengths = [], [len(chosen.logprobs), len(rejected.logprobs)]
        for answer, length in zip((chosen, rejected), lengths, strict=True):
            score.append(sum(p - q for p, q in zip(answer.logprobs, answer.old, strict=True)))
            score[-1] /= length if config.per_token else 1
        margin = score[0] - score[1]
        if config.loss == "ipo":
            slope = 2 * (margin - 1 / (2 * config.beta))
        else:
            wrong = 1 / (1 + math.exp(config.beta * margin))  # the model's probability of the wrong order
            slope = -config.beta * (wrong - config.label_smoothing)
        for sign, length in zip((1, -1), lengths, strict=True):
            likelihood = config.sft_coefficient / length if sign == 1 else 0.0
            expected += [(sign * slope / (length if config.per_token else 1) - likelihood) / 5] * length
    assert inputs.logprobs.grad.tolist() == pytest.approx(expected, rel=1e-12)


def test_at_the_reference_the_loss_is_log_2_and_the_gradient_that_of_the_margin():
    sequences = [Sequence(s.logprobs, demonstration=True) for s in PAIRS]
    output, inputs = run(sequences, DpoConfig(beta=0.3))
    assert output.loss.item() == pytest.approx(math.log(2), rel=1e-15)
    assert output.metrics["dpo/accuracy"].item() == 0.5 and output.metrics["dpo/margin"].item() == 0
    assert inputs.logprobs.grad.tolist() == pytest.approx([-0.075] * 2 + [0.075] * 4 + [-0.075] + [0.075] * 2)


def test_a_far_margin_neither_overflows_nor_loses_its_gradient():
    far = [
        Sequence([-900.0], demonstration=True, old=[-1.0]),
        Sequence([-1.0], demonstration=True, old=[-900.0]),
    ]
    output, inputs = run(far, DpoConfig(beta=10.0))
    assert output.loss.item() == pytest.approx(10 * 1798)
    assert inputs.logprobs.grad.tolist() == pytest.approx([-10.0, 10.0])


@pytest.mark.parametrize("config", [DpoConfig(sft_coefficient=0.3, label_smoothing=0.1), DpoConfig(loss="ipo")])
def test_micro_batches_add_up(config):
    sequences = random_sequences(0, 12, seed=7)
    counts = counts_of(sequences)
    whole, inputs = run(sequences, config)
    parts = [run(sequences[start:end], config, counts) for start, end in ((0, 2), (2, 2), (2, 8), (8, 12))]
    assert sum(output.loss.item() for output, _ in parts) == pytest.approx(whole.loss.item(), rel=1e-12)
    torch.testing.assert_close(
        torch.cat([rows.logprobs.grad for _, rows in parts]), inputs.logprobs.grad, rtol=1e-12, atol=0
    )
    for name, value in whole.metrics.items():
        assert sum(output.metrics[name].item() for output, _ in parts) == pytest.approx(value.item(), rel=1e-12), name


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"objective": {"beta": 0}}, "objective.beta must be a number above 0, not 0"),
        ({"objective": {"beta": math.nan}}, "objective.beta must be a number above 0, not nan"),
        ({"objective": {"label_smoothing": 0.5}}, "objective.label_smoothing must be at least 0 and below 0.5"),
        ({"objective": {"loss": "ipo", "label_smoothing": 0.1}}, "label_smoothing belongs to objective.loss sigmoid"),
        ({"objective": {"sft_coefficient": -1}}, "objective.sft_coefficient must be a number of at least 0"),
        ({"batch": {"updates_per_step": 4}}, "batch.updates_per_step is 4, and objective dpo needs 1"),
        ({"kl": {"coefficient": 0.1}}, "kl.coefficient is 0.1, and objective dpo has no rollouts"),
        ({"batch": {"dynamic_sampling": True}}, "batch.dynamic_sampling drops prompts that objective dpo learns from"),
    ],
)
def test_impossible_settings_are_refused_with_the_key(tree, message):
    with pytest.raises(ConfigError, match=message):
        from_dict({**tree, "objective": {"kind": "dpo", **tree.get("objective", {})}})
