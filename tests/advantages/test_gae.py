"""Generalised advantages against numbers by hand, a plain loop in float64, and the identities of arXiv 2502.03373."""

import numpy as np
import pytest
from advantage_cases import advantages_of, group, score, settings

from megatron_srft.advantages.returns import discounted, generalised_advantages
from megatron_srft.config import ConfigError, from_dict

RAW = {"normalize_batch": False}
"""Advantages as they are, for a comparison with numbers."""


def loop(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """arXiv 1506.02438, equation 16, backwards; the value behind the last token is 0."""
    advantages, after, value_after = np.zeros(len(rewards)), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * value_after - values[t]
        after = advantages[t] = delta + gamma * lam * after
        value_after = values[t]
    return advantages


@pytest.mark.parametrize("gamma", [1.0, 0.99, 0.5, 0.0])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.3, 0.0])
@pytest.mark.parametrize("length", [0, 1, 2, 37, 1000])
def test_as_the_loop(gamma, lam, length):
    random = np.random.default_rng(length)
    rewards, values = random.normal(size=(2, length))
    got = generalised_advantages(discounted(rewards, gamma), values, gamma, lam)
    np.testing.assert_allclose(got, loop(rewards, values, gamma, lam), rtol=1e-10, atol=1e-10)


def test_three_tokens_by_hand():
    """delta = 0.25 - 0.5, 0.75 - 0.25, 1 - 0.75 (gamma 1); then A_1 = 0.5 + 0.5 x 0.25, A_0 = -0.25 + 0.5 x 0.625."""
    run = settings({"kind": "ppo"}, advantage={"lam": 0.5, **RAW})
    (found,) = advantages_of([group([3], [score(1.0)])], run, values=[[0.5, 0.25, 0.75]])
    assert found.advantages.tolist() == pytest.approx([0.0625, 0.625, 0.25])
    assert found.returns.tolist() == pytest.approx([0.5625, 0.875, 1.0])


def test_with_lam_1_and_gamma_1_it_is_the_reward_less_the_value():
    run = settings({"kind": "ppo"}, advantage=RAW)
    groups = [group([2, 3], [score(1.0), score(0.0)])]
    first, second = advantages_of(groups, run, values=[[0.5, -0.25], [1.0, 2.0, 0.125]])
    assert first.advantages.tolist() == [0.5, 1.25]
    assert second.advantages.tolist() == [-1.0, -2.0, -0.125]
    assert (first.returns.tolist(), second.returns.tolist()) == ([1.0, 1.0], [0.0, 0.0, 0.0])


DENSE = {"repetition": [0.0, -0.5, -0.25]}


def test_rewards_with_a_gamma_each():
    """G_t = 1 (gamma 1), plus 0 + 0.5 (-0.5) + 0.25 (-0.25), -0.5 + 0.5 (-0.25), -0.25 (gamma 0.5)."""
    rewards = [{"kind": "exact"}, {"kind": "repetition", "gamma": 0.5}]
    run = settings({"kind": "ppo"}, rewards, advantage=RAW)
    (found,) = advantages_of([group([3], [score(1.0, DENSE)])], run, values=[[0.5, 0.5, 0.5]])
    assert found.returns.tolist() == pytest.approx([1 - 0.3125, 1 - 0.625, 1 - 0.25])
    assert found.advantages.tolist() == pytest.approx([0.1875, -0.125, 0.25])


@pytest.mark.parametrize("lam", [1.0, 0.9])
def test_equal_gammas_are_one_gamma_on_the_sum(lam):
    rewards = [{"kind": "exact", "gamma": 0.9}, {"kind": "repetition", "gamma": 0.9}]
    run = settings({"kind": "ppo"}, rewards, advantage={"lam": lam, **RAW})
    values = np.array([0.25, -0.5, 0.75])
    (found,) = advantages_of([group([3], [score(1.0, DENSE)])], run, values=[values.tolist()])
    expected = loop(np.array([0.0, -0.5, 1 - 0.25]), values, 0.9, lam)
    np.testing.assert_allclose(found.advantages, expected, rtol=1e-6)


def test_a_divergence_in_the_reward_is_paid_token_by_token():
    """k1 of policy -1, -2 against -1.5, -1 is 0.5, -1: rewards -0.05 and 1 + 0.1 at coefficient 0.1."""
    kl = {"coefficient": 0.1, "estimator": "k1", "place": "reward"}
    run = settings({"kind": "ppo"}, advantage={"lam": 0.5, **RAW}, kl=kl)
    (found,) = advantages_of(
        [group([2], [score(1.0)])],
        run,
        values=[[0.25, 0.5]],
        policy_logprobs=[[-1.0, -2.0]],
        reference_logprobs=[[-1.5, -1.0]],
    )
    expected = loop(np.array([-0.05, 1.1]), np.array([0.25, 0.5]), 1.0, 0.5)
    assert found.advantages.tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_a_cut_response_has_no_value_behind_it():
    """Two responses alike but for their finish_reason have the same advantages."""
    from dataclasses import replace

    run = settings({"kind": "ppo"}, advantage={"lam": 0.5, **RAW})
    whole = group([2], [score(0.5)])
    cut = replace(whole, completions=(replace(whole.completions[0], finish_reason="length"),))
    first, second = (advantages_of([g], run, values=[[3.0, 4.0]])[0] for g in (whole, cut))
    assert first.advantages.tolist() == second.advantages.tolist() == [1 + 0.5 * -3.5, -3.5]


def test_whitening_is_over_the_tokens_and_leaves_the_returns_alone():
    run = settings({"kind": "ppo"})
    assert run.advantage.normalize_batch is True
    groups = [group([1, 3], [score(1.0), score(0.0)])]
    sequences = advantages_of(groups, run, values=[[0.0], [0.0, 0.0, 0.0]])
    tokens = np.concatenate([s.advantages for s in sequences])
    raw = np.array([1.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(tokens, (raw - 0.25) / np.sqrt(0.1875), rtol=1e-5)
    assert np.concatenate([s.returns for s in sequences]).tolist() == raw.tolist()


def test_with_values_of_zero_it_is_reinforce_on_returns():
    rewards = [{"kind": "exact"}, {"kind": "repetition", "gamma": 0.5}]
    groups = [group([3, 3], [score(1.0, DENSE), score(0.0, {"repetition": [0.0] * 3})])]
    ppo = settings({"kind": "ppo"}, rewards)
    reinforce = settings({"kind": "grpo", "preset": "reinforce_pp"}, rewards)
    with_values = advantages_of(groups, ppo, values=[[0.0] * 3] * 2)
    for mine, theirs in zip(with_values, advantages_of(groups, reinforce), strict=True):
        np.testing.assert_allclose(mine.advantages, theirs.advantages, rtol=1e-6)
        assert theirs.returns is None


# ---------------------------------------------------------------- settings

TWO_GAMMAS = [{"kind": "exact"}, {"kind": "repetition", "gamma": 0.99}]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"rewards": TWO_GAMMAS, "advantage": {"lam": 0.95}}, "advantage.lam is 0.95, and the rewards .* 0.99, 1.0; "),
        (
            {
                "rewards": [{"kind": "exact"}],
                "kl": {"coefficient": 0.1, "place": "reward", "gamma": 0.9},
                "advantage": {"lam": 0.95},
            },
            "advantage.lam is 0.95, and the rewards",
        ),
        ({"advantage": {"lam": 1.5}}, "advantage.lam must lie between 0 and 1, not 1.5"),
        ({"advantage": {"lam": float("nan")}}, "advantage.lam must lie between 0 and 1, not nan"),
        ({"advantage": {"kind": "group"}}, "objective.kind ppo needs advantage.kind gae, not group"),
        ({"advantage": {"include_demonstration": True}}, "advantage.include_demonstration is about a group"),
        ({"advantage": {"normalize_std": True}}, "advantage.normalize_std is about a group"),
        ({"objective": {"kind": "grpo"}, "advantage": {"kind": "gae"}}, "advantage.kind gae needs a critic"),
        ({"objective": {"kind": "ppo", "dual_clip": 0.5}}, "objective.dual_clip must be above 1"),
        ({"critic": {"warmup_steps": 101}}, "critic.warmup_steps is 101, and the stage has only 100 steps"),
        ({"critic": {"updates_per_step": 3}}, "batch.prompts_per_step must be a multiple of critic.updates_per_step"),
        ({"critic": {"updates_per_step": 0}}, "critic.updates_per_step must be a number of at least 1"),
        ({"critic": {"value_clip": -1.0}}, "critic.value_clip must be a number of at least 0"),
        ({"critic": {"optimizer": {"adam_beta1": 1.0}}}, "critic.optimizer.adam_beta1 must lie in"),
        ({"critic": {"path": ""}}, "critic.path is empty"),
    ],
)
def test_impossible_settings_are_refused_by_name(tree, message):
    with pytest.raises(ConfigError, match=message):
        from_dict({"objective": {"kind": "ppo"}, **tree})


def test_a_critic_has_its_own_learning_rate_unless_told_otherwise():
    run = settings({"kind": "ppo"}, critic={"optimizer": {"adam_beta2": 0.95}})
    assert (run.critic.optimizer.lr, run.critic.optimizer.adam_beta2, run.optimizer.lr) == (9e-6, 0.95, 1e-6)
    assert (run.objective.clip_low, run.objective.clip_high, run.objective.denominator) == (0.2, 0.2, "sequence_mean")
    assert (run.advantage.kind, run.advantage.lam, run.critic.value_clip) == ("gae", 1.0, 0.2)


def test_several_gammas_go_with_lam_1():
    assert from_dict({"objective": {"kind": "ppo"}, "rewards": TWO_GAMMAS}).advantage.lam == 1.0
