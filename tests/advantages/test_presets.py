"""RLOO and REINFORCE++ as their papers have them: advantages and losses by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from advantage_cases import advantages_of, group, score, settings
from objective_rows import Sequence, counts_of, inputs_of

from megatron_srft import objectives


def test_rloo_takes_the_mean_of_the_others():
    """arXiv 2402.14740, equation 8: rewards 1, 0, 0.5."""
    run = settings({"kind": "grpo", "preset": "rloo"})
    found = advantages_of([group([2, 1, 1], [score(1.0), score(0.0), score(0.5)])], run)
    assert [s.advantages.tolist() for s in found] == [[0.75, 0.75], [-0.75], [0.0]]


def test_rloo_pays_for_the_divergence_of_the_whole_sequence():
    """Its reward is R - beta log policy / reference of the sequence; the tokens' payments add up to that at gamma 1.

    The baseline is the mean return of the other sequence, over its tokens: with one token each, its reward.
    """
    kl = {"coefficient": 0.5, "estimator": "k1", "place": "reward"}
    run = settings({"kind": "grpo", "preset": "rloo"}, kl=kl)
    found = advantages_of(
        [group([1, 1], [score(1.0), score(0.0)])],
        run,
        policy_logprobs=[[-1.0], [-2.0]],
        reference_logprobs=[[-1.5], [-1.0]],
    )
    first, second = 1.0 - 0.5 * 0.5, 0.0 + 0.5 * 1.0
    assert [s.advantages.tolist() for s in found] == [[first - second], [second - first]]


def loss_of(run, sequences: list[Sequence]) -> tuple[float, list[float]]:
    inputs = inputs_of(sequences)
    loss = objectives.compute(inputs, counts_of(sequences), run.objective).loss
    loss.backward()
    return loss.item(), inputs.logprobs.grad.tolist()


def test_the_loss_of_rloo_is_reinforce_on_whole_sequences():
    """- mean over sequences of A sum_t r_t; its gradient by a log-prob is -A r_t / n, however large the ratio."""
    run = settings({"kind": "grpo", "preset": "rloo"})
    sequences = [
        Sequence([-1.0, -1.0], advantage=0.75, old=[-1.0, -3.0]),
        Sequence([-2.0], advantage=-0.75, old=[-1.0]),
    ]
    ratios = [1.0, math.exp(2.0), math.exp(-1.0)]
    loss, gradient = loss_of(run, sequences)
    assert loss == pytest.approx(-(0.75 * (ratios[0] + ratios[1]) - 0.75 * ratios[2]) / 2)
    assert gradient == pytest.approx([-0.75 * ratios[0] / 2, -0.75 * ratios[1] / 2, 0.75 * ratios[2] / 2])


def test_reinforce_pp_has_no_group_and_is_whitened_over_all_tokens():
    """arXiv 2501.03262: rewards 1, 0 and 0 in two groups, on 1, 2 and 1 tokens."""
    run = settings({"kind": "grpo", "preset": "reinforce_pp"})
    groups = [group([1, 2], [score(1.0), score(0.0)]), group([1], [score(0.0)])]
    tokens = np.concatenate([s.advantages for s in advantages_of(groups, run)])
    np.testing.assert_allclose(tokens, (np.array([1.0, 0, 0, 0]) - 0.25) / math.sqrt(0.1875), rtol=1e-5)


def test_reinforce_pp_with_its_divergence_by_hand():
    """Returns 1 - 0.1 (d_0 + d_1), 1 - 0.1 d_1 and 0 - 0.1 d; then their mean and (population) deviation."""
    kl = {"coefficient": 0.1, "estimator": "k1", "place": "reward"}
    run = settings({"kind": "grpo", "preset": "reinforce_pp"}, kl=kl)
    found = advantages_of(
        [group([2], [score(1.0)]), group([1], [score(0.0)])],
        run,
        policy_logprobs=[[-1.0, -1.0], [-1.0]],
        reference_logprobs=[[-1.5, -3.0], [-0.5]],
    )
    returns = np.array([1 - 0.1 * (0.5 + 2.0), 1 - 0.1 * 2.0, 0.05])
    expected = (returns - returns.mean()) / returns.std()
    np.testing.assert_allclose(np.concatenate([s.advantages for s in found]), expected, rtol=1e-5)


def test_the_loss_of_reinforce_pp_is_clipped_and_a_mean_over_tokens():
    run = settings({"kind": "grpo", "preset": "reinforce_pp"})
    sequences = [Sequence([-1.0, -1.0], advantage=1.0, old=[-1.0, -3.0]), Sequence([-2.0], advantage=-1.0)]
    loss, gradient = loss_of(run, [sequences[0], replace(sequences[1], old=[-2.0])])
    assert loss == pytest.approx(-(1.0 + 1.2 - 1.0) / 3)
    assert gradient == pytest.approx([-1 / 3, 0.0, 1 / 3])


def test_whitening_equal_returns_gives_zero():
    for preset in ("reinforce_pp", "rloo"):
        run = settings({"kind": "grpo", "preset": preset})
        found = advantages_of([group([2, 3], [score(1.0), score(1.0)])], run)
        assert all((s.advantages == 0).all() for s in found)
        assert torch.isfinite(torch.tensor(np.concatenate([s.advantages for s in found]))).all()
