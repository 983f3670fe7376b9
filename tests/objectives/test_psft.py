"""PSFT: its closed form in float64, its two bounds, and the settings under which it is SFT."""

import math

import pytest
import torch
from objective_rows import Sequence, counts_of, inputs_of, random_sequences, resolved

from megatron_srft.config import ConfigError, PsftConfig, SftConfig, from_dict
from megatron_srft.objectives import compute
from megatron_srft.objectives.terms import evaluate
from megatron_srft.ops.token_losses import Term

LOG_CLIP = math.log(1.28)
SEQUENCES = [
    Sequence([-1.0, -2.0, -3.0], demonstration=True, advantage=-7.0, old=[-1.0, -1.0, -3.0 - LOG_CLIP - 0.01]),
    Sequence([-9.0, -9.0], advantage=5.0, correct=True, old=[-1.0, -1.0]),
    Sequence([-5.0], demonstration=True, old=[-5.0 - LOG_CLIP + 0.01]),
]


def run(sequences, **settings):
    inputs = inputs_of(sequences)
    output = compute(inputs, counts_of(sequences), resolved(PsftConfig(**settings)))
    output.loss.backward()
    return output, inputs


def test_by_hand():
    """Unchanged, less likely, beyond the clip, just below it; rollouts and advantages are ignored."""
    output, inputs = run(SEQUENCES)
    ratios = [1.0, math.exp(-1.0), 1.28 * math.exp(0.01), 1.28 * math.exp(-0.01)]
    assert output.loss.item() == pytest.approx(-(ratios[0] + ratios[1] + 1.28 + ratios[3]) / 4)
    gradient = [-ratios[0] / 4, -ratios[1] / 4, 0, 0, 0, -ratios[3] / 4]
    assert inputs.logprobs.grad.tolist() == pytest.approx(gradient)
    metrics = {name: value.item() for name, value in output.metrics.items()}
    assert metrics["clip_fraction/demonstrations"] == 0.25
    assert metrics["ratio/demonstrations"] == pytest.approx(sum(ratios) / 4)
    assert metrics["max/ratio_demonstrations"] == pytest.approx(ratios[2])
    assert metrics["kl/demonstrations_k1"] == pytest.approx(-sum(map(math.log, ratios)) / 4)
    assert metrics["nll/demonstrations"] == pytest.approx(11 / 4)
    assert not any(name.endswith("rollouts") for name in metrics)


@pytest.mark.parametrize("clip", [0.05, 0.28, None])
@pytest.mark.parametrize("denominator", ["tokens", "sequence_mean"])
def test_closed_form_and_its_derivative_by_autograd(clip, denominator):
    """-min(r, clip(r, 1 - c, 1 + c)) written out and differentiated by torch, on random rows."""
    sequences = random_sequences(4, 12, seed=7)
    output, inputs = run(sequences, clip=clip, denominator=denominator, entropy_coefficient=0.03)

    logprobs = inputs.logprobs.detach().requires_grad_()
    ratio = (logprobs - inputs.old_logprobs).exp()
    bounded = ratio if clip is None else torch.minimum(ratio, ratio.clamp(1 - clip, 1 + clip))
    shown = inputs.is_demonstration.double()
    weight = shown / shown.sum()
    bonus = (weight * inputs.entropy.detach()).sum()
    if denominator == "sequence_mean":
        weight = shown / inputs.response_lengths / 12
    expected = -(weight * bounded).sum() - 0.03 * bonus
    expected.backward()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-13)
    torch.testing.assert_close(inputs.logprobs.grad, logprobs.grad, rtol=1e-13, atol=0)
    clipped = (shown * (ratio > 1 + (clip or math.inf))).sum() / shown.sum()
    assert clip != 0.05 or clipped > 0.1
    found = output.metrics.get("clip_fraction/demonstrations")
    assert (found is None) if clip is None else found.item() == pytest.approx(clipped.item())


@pytest.mark.parametrize("clip", [0.28, None])
@pytest.mark.parametrize("denominator", ["tokens", "sequence_mean", "sequence_sum", "constant"])
def test_an_unchanged_policy_has_the_gradient_of_sft(clip, denominator):
    sequences = random_sequences(3, 6)
    for sequence in sequences:
        sequence.old = None
    output, inputs = run(sequences, clip=clip, denominator=denominator)
    sft_inputs = inputs_of(sequences)
    sft = compute(sft_inputs, counts_of(sequences), resolved(SftConfig(denominator=denominator)))
    sft.loss.backward()
    torch.testing.assert_close(inputs.logprobs.grad, sft_inputs.logprobs.grad, rtol=1e-15, atol=0)
    assert output.metrics["nll/demonstrations"] == sft.metrics["nll/demonstrations"]
    assert denominator != "tokens" or output.loss.item() == pytest.approx(-1.0)


def test_a_lower_clip_would_change_nothing():
    sequences = random_sequences(0, 12)
    inputs, counts = inputs_of(sequences), counts_of(sequences)
    terms = [Term(loss="clipped", rows="demonstrations", scale=1, clip_low=low, clip_high=0.28) for low in (0.1, 0.9)]
    one, other = (evaluate(inputs, counts, {"psft": term}) for term in terms)
    assert one.loss == other.loss
    assert torch.autograd.grad(one.loss, inputs.logprobs)[0].equal(torch.autograd.grad(other.loss, inputs.logprobs)[0])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"objective": {"refresh_every": 0}}, "objective.refresh_every must be at least 1 (exactly SFT) or null"),
        ({"objective": {"refresh_every": 1.5}}, "objective.refresh_every: "),
        ({"objective": {"warmup_steps": -1}}, "objective.warmup_steps must not be negative"),
        ({"objective": {"clip": -0.1}}, "objective.clip must not be negative"),
        ({"objective": {"clip": float("nan")}}, "objective.clip must not be negative"),
        ({"objective": {"warmup_steps": 6}, "steps": 5}, "objective.warmup_steps is 6, and the stage has only 5 steps"),
        ({"batch": {"updates_per_step": 4}}, "batch.updates_per_step is 4, and objective psft needs 1, since its old"),
        (
            {"stages": [{"name": "a", "steps": 5, "objective": {"warmup_steps": 6}}]},
            "stages.0: objective.warmup_steps is 6, and the stage has only 5 steps",
        ),
    ],
)
def test_impossible_settings_are_refused_with_the_key(tree, message):
    tree = {**tree, "objective": {"kind": "psft", **tree.get("objective", {})}}
    with pytest.raises(ConfigError) as caught:
        from_dict(tree).stage_configs()
    assert str(caught.value).startswith(message)


def test_a_stage_may_be_longer_than_the_file_says_and_needs_no_verifier():
    tree = {"steps": 5, "objective": {"kind": "psft", "warmup_steps": 20}, "rewards": []}
    (_, stage), *_ = from_dict({**tree, "stages": [{"name": "a", "steps": 50}]}).stage_configs()
    assert (stage.objective.warmup_steps, stage.steps, stage.samples_rollouts) == (20, 50, False)


def test_defaults_are_the_papers_constants():
    config = resolved(PsftConfig())
    assert (config.clip, config.refresh_every, config.warmup_steps) == (0.28, 8, 0)
    assert (config.denominator, config.entropy_coefficient) == ("tokens", 0.0)
