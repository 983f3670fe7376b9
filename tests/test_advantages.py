"""Group advantages, training sequences and group statistics, by hand."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from megatron_srft.advantages import group_advantages, group_statistics, to_sequences, with_advantages
from megatron_srft.advantages.formulas import centred_returns
from megatron_srft.advantages.returns import discounted, token_returns
from megatron_srft.config import (
    AdvantageConfig,
    CosineRewardConfig,
    ExactRewardConfig,
    GrpoConfig,
    LuffyConfig,
    RepetitionRewardConfig,
    RunConfig,
    SftConfig,
    SrftConfig,
    name_streams,
)
from megatron_srft.sample import Completion, Demonstration, Group, Prompt, Score


def config(kind="group", *, normalize_std=False, include_demonstration=False):
    return AdvantageConfig(kind=kind, normalize_std=normalize_std, include_demonstration=include_demonstration)


def sequences_of(groups, settings, rewards=()):
    return with_advantages(to_sequences(groups), groups, settings, rewards)


def test_mean_only():
    advantages, demonstration = group_advantages([1.0, 0.0, 0.0, 0.0], None, config())
    assert advantages.tolist() == [0.75, -0.25, -0.25, -0.25]
    assert demonstration is None


def test_standard_deviation_is_the_unbiased_one():
    advantages, _ = group_advantages([1.0, 0.0, 0.0, 0.0], None, config(normalize_std=True))
    deviation = math.sqrt((0.75**2 + 3 * 0.25**2) / 3)  # n - 1 = 3
    assert advantages.tolist() == pytest.approx([0.75 / deviation] + [-0.25 / deviation] * 3, rel=1e-5)


def test_demonstration_as_a_member():
    """LUFFY: eight members, one of them the expert."""
    advantages, demonstration = group_advantages([0.0] * 7, 1.0, config(include_demonstration=True))
    assert advantages.tolist() == [-0.125] * 7
    assert demonstration == 0.875


@pytest.mark.parametrize("reward", [None, 1.0])
def test_demonstration_outside_the_group(reward):
    advantages, demonstration = group_advantages([1.0, 0.0], reward, config(include_demonstration=reward is None))
    assert advantages.tolist() == [0.5, -0.5]
    assert demonstration is None


def test_leave_one_out():
    advantages, demonstration = group_advantages(
        [1.0, 0.5, 0.0], 1.0, config("leave_one_out", include_demonstration=True)
    )
    assert advantages.tolist() == pytest.approx([1 - 0.5, 0.5 - 2 / 3, 0 - 2.5 / 3])
    assert demonstration == pytest.approx(1 - 0.5)


@pytest.mark.parametrize("kind", ["group", "leave_one_out"])
@pytest.mark.parametrize("normalize_std", [False, True])
@pytest.mark.parametrize("rewards", [[0.1] * 7, [1.0], [-3.3, -3.3], []])
def test_no_signal_is_exactly_zero(kind, normalize_std, rewards):
    """Also where the mean of equal floats is not that float (0.1 seven times), and for a group of one."""
    advantages, _ = group_advantages(rewards, None, config(kind, normalize_std=normalize_std))
    assert advantages.tolist() == [0.0] * len(rewards)


def test_published_settings_per_objective():
    def settings(objective):
        advantage = RunConfig(objective=objective).resolved().advantage
        return advantage.normalize_std, advantage.include_demonstration

    assert settings(GrpoConfig()) == settings(GrpoConfig(preset="dapo")) == settings(SftConfig()) == (True, False)
    assert settings(GrpoConfig(preset="dr_grpo")) == (False, False)
    assert settings(LuffyConfig()) == settings(SrftConfig(preset="srft-released")) == (False, True)
    assert settings(SrftConfig(preset="srft-paper")) == (True, True)


# ---------------------------------------------------------------- sequences and statistics


def prompt(name, length=3):
    return Prompt(id=name, text=name, token_ids=np.arange(length, dtype=np.int32), answer="1", source="test")


def completion(length, *, finish="stop"):
    return Completion(
        token_ids=np.arange(10, 10 + length, dtype=np.int32), text="x", finish_reason=finish, policy_version=0,
        rollout_logprobs=-np.arange(length, dtype=np.float32),
    )  # fmt: skip


def score(reward, correct=None, status="verified"):
    return Score(reward=reward, correct=reward == 1 if correct is None else correct, status=status)


EXPERT = Demonstration(token_ids=np.array([7, 8, 9, 1], np.int32), text="7 8 9")
TRUNCATED_EXPERT = Demonstration(token_ids=np.array([7, 8], np.int32), text="7 8", truncated=True)

GROUPS = [
    Group(
        prompt=prompt("a"),
        completions=(completion(2), completion(5, finish="length")),
        scores=(score(1.0), score(0.0)),
        demonstration=EXPERT,
        demonstration_score=score(1.0),
    ),
    Group(prompt=prompt("b", 1), completions=(completion(4), completion(1)), scores=(score(0.0), score(0.0))),
    Group(
        prompt=prompt("c", 2),
        completions=(completion(3), completion(3)),
        scores=(score(1.0), score(1.0)),
        demonstration=TRUNCATED_EXPERT,
    ),
]


def test_sequences_in_order():
    sequences = sequences_of(GROUPS, config(include_demonstration=True))
    assert [(s.group, s.is_demonstration, s.prompt_length, s.response_length) for s in sequences] == [
        (0, False, 3, 2), (0, False, 3, 5), (0, True, 3, 4),
        (1, False, 1, 4), (1, False, 1, 1),
        (2, False, 2, 3), (2, False, 2, 3), (2, True, 2, 2),
    ]  # fmt: skip
    assert sequences[2].token_ids.tolist() == [0, 1, 2, 7, 8, 9, 1]
    assert sequences[4].token_ids.tolist() == [0, 10] and sequences[4].token_ids.dtype == np.int32
    third = pytest.approx(1 / 3)
    assert [s.advantages.tolist() for s in sequences[:3]] == [[third] * 2, [pytest.approx(-2 / 3)] * 5, [third] * 4]
    assert all(s.advantages.dtype == np.float32 for s in sequences)
    assert [s.correct for s in sequences] == [True, False, True, False, False, True, True, False]
    assert sequences[1].rollout_logprobs.tolist() == [0, -1, -2, -3, -4]
    assert sequences[2].rollout_logprobs is None


def test_a_truncated_demonstration_has_no_advantage_and_does_not_move_its_group():
    sequences = sequences_of(GROUPS, config(include_demonstration=True))
    assert sequences[5].advantages.tolist() == [0.0] * 3
    assert sequences[7].advantages.tolist() == [0.0] * 2


@pytest.mark.parametrize("status", ["timeout", "crash", "unverifiable"])
def test_a_demonstration_on_which_the_verifier_failed_is_not_pushed_down(status):
    failed = replace(GROUPS[0], demonstration_score=Score(reward=0.0, correct=None, status=status))
    sequences = sequences_of([failed], config(include_demonstration=True))
    assert [s.advantages[0] for s in sequences] == [0.5, -0.5, 0.0]


def test_a_wrong_demonstration_counts_as_wrong():
    wrong = replace(GROUPS[0], demonstration_score=Score(reward=0.0, correct=False, status="no_answer"))
    sequences = sequences_of([wrong], config(include_demonstration=True))
    assert [s.advantages[0] for s in sequences] == pytest.approx([2 / 3, -1 / 3, -1 / 3])


def test_a_demonstration_left_out_of_the_group_still_gives_a_sequence():
    sequences = sequences_of(GROUPS[:1], config(include_demonstration=False))
    assert [s.advantages[0] for s in sequences] == [0.5, -0.5, 0.0]


def test_demonstrations_alone_make_an_sft_step():
    group = Group(prompt=prompt("a"), completions=(), demonstration=EXPERT)
    (sequence,) = sequences_of([group], config())
    assert sequence.is_demonstration and sequence.advantages.tolist() == [0.0] * 4


def test_a_failed_verification_is_not_correct():
    group = Group(
        prompt=prompt("a"), completions=(completion(1),), scores=(Score(reward=0.0, correct=None, status="timeout"),)
    )
    assert [s.correct for s in sequences_of([group], config())] == [False]


def test_unscored_completions_are_a_bug():
    with pytest.raises(AssertionError, match="not scored"):
        sequences_of([Group(prompt=prompt("a"), completions=(completion(1),))], config())


def test_statistics():
    assert group_statistics(GROUPS) == pytest.approx(
        {
            "reward/mean": 0.5,
            "accuracy": 0.5,
            "groups/all_correct": 1 / 3,
            "groups/none_correct": 1 / 3,
            "groups/without_signal": 2 / 3,
            "demonstration_solved": 1.0,
            "truncated_share": 1 / 6,
            "response_length/mean": 18 / 6,
            "response_length/max": 5,
            "response_length/stopped/mean": 13 / 5,
            "response_length/stopped/max": 4,
            "response_length/truncated/mean": 5,
            "response_length/truncated/max": 5,
            **{f"reflection/{word}": 0.0 for word in ("wait", "recheck", "retry", "alternatively", "however")},
            "reflection/per_1k_tokens": 0.0,
            "count/groups": 3,
            "count/completions": 6,
            "count/demonstrations": 2,
            "count/pairs": 0,
            "count/demonstrations_scored": 1,
        }
    )


def test_statistics_per_reward_stream():
    scores = (
        Score(reward=1.5, correct=True, streams={"math": 1.0, "format": 0.5}),
        Score(reward=0.0, correct=False, streams={"math": 0.0, "format": 0.0}),
    )
    group = Group(prompt=prompt("a"), completions=(completion(1), completion(1)), scores=scores)
    statistics = group_statistics([group])
    assert (statistics["reward/mean"], statistics["reward/math"], statistics["reward/format"]) == (0.75, 0.5, 0.25)
    assert (statistics["reward_std/math"], statistics["reward_std/format"]) == (0.5, 0.25)
    assert (statistics["reward_correct/format"], statistics["reward_wrong/format"]) == (0.5, 0.0)


def test_statistics_count_second_thoughts_of_the_completions():
    texts = ("Wait, no. 7", "Alternatively 7; wait, however")
    completions = tuple(replace(completion(5), text=text) for text in texts)
    group = Group(prompt=prompt("a"), completions=completions, scores=(Score(reward=0.0), Score(reward=0.0)))
    statistics = group_statistics([group])
    tokens = sum(len(c.token_ids) for c in completions)
    assert (statistics["reflection/wait"], statistics["reflection/alternatively"]) == (1.0, 0.5)
    assert statistics["reflection/per_1k_tokens"] == pytest.approx(1000 * 4 / tokens)


def test_a_stream_of_right_answers_alone_has_no_mean_over_wrong_ones():
    score = Score(reward=1.0, correct=True, streams={"math": 1.0})
    statistics = group_statistics([Group(prompt=prompt("a"), completions=(completion(1),), scores=(score,))])
    assert statistics["reward_correct/math"] == 1.0 and "reward_wrong/math" not in statistics


def test_statistics_without_rollouts_leave_out_what_has_no_value():
    group = Group(prompt=prompt("a"), completions=(), demonstration=EXPERT)
    assert group_statistics([group]) == {
        "count/groups": 1, "count/completions": 0, "count/demonstrations": 1, "count/pairs": 0,
        "count/demonstrations_scored": 0
    }  # fmt: skip


# ---------------------------------------------------------------- returns per token

REWARDS = (
    ExactRewardConfig(weight=2.0),
    CosineRewardConfig(gamma=0.9, max_tokens=8),
    RepetitionRewardConfig(gamma=0.99, weight=0.5, ngram=1),
)
STREAMS = name_streams(REWARDS)


def dense_score(length, seed, correct=True):
    draw = random.Random(seed)
    penalties = tuple(-0.25 * draw.randrange(3) for _ in range(length))
    streams = {"exact": float(correct), "cosine": draw.uniform(-10, 2), "repetition": math.fsum(penalties)}
    reward = sum(STREAMS[name].weight * value for name, value in streams.items())
    return Score(reward=reward, correct=correct, streams=streams, dense={"repetition": penalties})


def double_loop(score, length, streams):
    """Section 4.6 of the paper, written out."""
    out = []
    for t in range(length):
        terms = []
        for name, config in streams.items():
            for later in range(t, length):
                dense = score.dense.get(name)
                at_end = score.streams[name] if later == length - 1 else 0.0
                terms.append(config.weight * config.gamma ** (later - t) * (at_end if dense is None else dense[later]))
        out.append(math.fsum(terms))
    return out


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 64, 65, 100])
def test_returns_against_a_double_loop(length):
    score = dense_score(length, length)
    assert token_returns(score, length, STREAMS).tolist() == pytest.approx(
        double_loop(score, length, STREAMS), rel=1e-12
    )


def test_returns_by_hand():
    """1 at the end of four tokens at gamma 0.5, and -1 on the second at gamma 0.1."""
    streams = name_streams((ExactRewardConfig(gamma=0.5), RepetitionRewardConfig(gamma=0.1)))
    score = Score(reward=0.0, streams={"exact": 1.0, "repetition": -1.0}, dense={"repetition": (0.0, -1.0, 0.0, 0.0)})
    assert token_returns(score, 4, streams).tolist() == pytest.approx([0.125 - 0.1, 0.25 - 1, 0.5, 1.0], rel=1e-15)


def test_gamma_zero_rewards_a_token_for_itself_only():
    rewards = np.array([3.0, -1.0, 2.0])
    assert discounted(rewards, 0.0).tolist() == rewards.tolist()
    assert discounted(rewards, 1.0).tolist() == [4.0, 1.0, 2.0]


def test_a_long_discounted_penalty_is_bounded():
    """-0.05 on every token at gamma 0.99 sums to -5 (1 - 0.99^n)."""
    returns = discounted(np.full(14336, -0.05), 0.99)
    assert returns[[0, -1, -100]].tolist() == pytest.approx([-5 * (1 - 0.99**n) for n in (14336, 1, 100)], rel=1e-12)


def test_equal_gammas_are_one_gamma_on_the_sum():
    same = {name: replace(stream, gamma=0.97) for name, stream in STREAMS.items()}
    score = dense_score(30, 3)
    rewards = 0.5 * np.array(score.dense["repetition"])
    rewards[-1] += 2 * score.streams["exact"] + score.streams["cosine"]
    assert token_returns(score, 30, same).tolist() == pytest.approx(discounted(rewards, 0.97).tolist(), rel=1e-12)


@pytest.mark.parametrize("kind", ["group", "leave_one_out"])
@pytest.mark.parametrize("normalize_std", [False, True])
def test_constant_returns_are_todays_advantages(kind, normalize_std):
    rewards = [0.3, -1.7, 0.3, 2.0]
    settings = config(kind, normalize_std=normalize_std)
    expected, _ = group_advantages(rewards, None, settings)
    found = centred_returns([np.full(3 + i, reward) for i, reward in enumerate(rewards)], settings)
    assert [set(np.round(values, 12)) for values in found] == [{round(value, 12)} for value in expected]


@pytest.mark.parametrize("kind", ["group", "leave_one_out"])
@pytest.mark.parametrize("normalize_std", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_gamma_one_with_terminal_rewards_changes_no_bit(kind, normalize_std, include):
    settings = config(kind, normalize_std=normalize_std, include_demonstration=include)
    draw = random.Random(5)
    scores = [Score(reward=r, streams={"exact": r}, correct=r > 0) for r in (draw.gauss(0, 1) for _ in range(5))]
    group = Group(
        prompt=prompt("a"), completions=tuple(completion(n) for n in (3, 1, 4, 2)), scores=tuple(scores[:4]),
        demonstration=EXPERT, demonstration_score=scores[4],
    )  # fmt: skip
    values, value = group_advantages([s.reward for s in scores[:4]], scores[4].reward, settings)
    expected = [np.full(n, v, np.float32) for n, v in zip((3, 1, 4, 2, 4), [*values, value or 0.0], strict=True)]
    for rewards in ((), (ExactRewardConfig(),)):
        found = [s.advantages for s in sequences_of([group], settings, rewards)]
        assert [a.tobytes() for a in found] == [e.tobytes() for e in expected]


def test_each_member_counts_once_whatever_its_length():
    """Mean 0 and unbiased variance 1 over the group, in the measure that gives every member the same weight."""
    members = [token_returns(dense_score(n, n, n % 2 == 0), n, STREAMS) for n in (5, 90, 1, 33)]
    advantages = centred_returns(members, AdvantageConfig(kind="group", normalize_std=True, std_epsilon=0.0))
    assert np.mean([a.mean() for a in advantages]) == pytest.approx(0, abs=1e-12)
    assert sum((a**2).mean() for a in advantages) / 3 == pytest.approx(1, rel=1e-12)
    slope = (advantages[1][0] - advantages[1][50]) / (members[1][0] - members[1][50])
    for advantage, member in zip(advantages, members, strict=True):  # one shift and one scale for all tokens
        assert (advantage - advantages[2][0]).tolist() == pytest.approx(((member - members[2][0]) * slope).tolist())


def test_leave_one_out_by_hand():
    members = [np.array([1.0, 3.0]), np.array([5.0]), np.array([0.0, 0.0, 3.0])]  # means 2, 5, 1
    found = centred_returns(members, config("leave_one_out"))
    assert [a.tolist() for a in found] == [[-2.0, 0.0], [3.5], [-3.5, -3.5, -0.5]]


def dense_group(**more):
    return Group(
        prompt=prompt("a"), completions=(completion(4), completion(2)),
        scores=(dense_score(4, 1), dense_score(2, 2, False)), **more,
    )  # fmt: skip


def test_dense_rewards_reach_the_tokens():
    settings = config(normalize_std=True)
    first, second = sequences_of([dense_group()], settings, REWARDS)
    returns = [double_loop(dense_score(4, 1), 4, STREAMS), double_loop(dense_score(2, 2, False), 2, STREAMS)]
    mean = (np.mean(returns[0]) + np.mean(returns[1])) / 2
    deviation = math.sqrt(sum(np.mean((np.array(r) - mean) ** 2) for r in returns))  # n - 1 = 1
    expected = [((np.array(r) - mean) / (deviation + 1e-6)).tolist() for r in returns]
    assert [first.advantages.tolist(), second.advantages.tolist()] == [pytest.approx(e, rel=1e-6) for e in expected]
    assert first.advantages.dtype == np.float32


def test_the_demonstration_has_returns_where_it_is_a_member():
    score = dense_score(4, 9)
    group = dense_group(demonstration=EXPERT, demonstration_score=score)
    members = [(dense_score(4, 1), 4), (dense_score(2, 2, False), 2), (score, 4)]
    settings = config(include_demonstration=True)
    expected = centred_returns([np.array(double_loop(s, n, STREAMS)) for s, n in members], settings)
    found = sequences_of([group], settings, REWARDS)
    assert [s.advantages.tolist() for s in found] == [pytest.approx(e.tolist(), rel=1e-6) for e in expected]
    failed = replace(group, demonstration_score=replace(score, correct=None, status="timeout"))
    for outside, including in ((group, False), (failed, True), (replace(group, demonstration_score=None), True)):
        found = sequences_of([outside], config(include_demonstration=including), REWARDS)
        assert found[2].advantages.tolist() == [0.0] * 4
        assert [s.advantages.tolist() for s in found[:2]] == [
            s.advantages.tolist() for s in sequences_of([dense_group()], config(), REWARDS)
        ]


def test_equal_returns_and_empty_responses():
    nothing = Score(reward=0.0, streams={"repetition": 0.0}, dense={"repetition": ()})
    clean = Score(reward=0.0, streams={"repetition": 0.0}, dense={"repetition": (0.0,) * 3})
    dirty = Score(reward=-1.0, streams={"repetition": -1.0}, dense={"repetition": (0.0, 0.0, -1.0)})
    rewards = (RepetitionRewardConfig(gamma=0.5),)

    def advantages(*scores):
        completions = tuple(completion(len(score.dense["repetition"])) for score in scores)
        group = Group(prompt=prompt("a"), completions=completions, scores=scores)
        return [s.advantages.tolist() for s in sequences_of([group], config(normalize_std=True), rewards)]

    assert advantages(clean, nothing) == [[0.0] * 3, []]
    assert advantages(dirty) == [[0.0] * 3]
    first, second, third = advantages(dirty, clean, nothing)
    assert first[2] < first[1] < first[0] < 0 < second[0] == second[2] and third == []
