"""Group advantages, training sequences and group statistics, by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest

from megatron_srft.advantages import group_advantages, group_statistics, to_sequences
from megatron_srft.config import AdvantageConfig, GrpoConfig, LuffyConfig, RunConfig, SftConfig, SrftConfig
from megatron_srft.sample import Completion, Demonstration, Group, Prompt, Score


def config(kind="group", *, normalize_std=False, include_demonstration=False):
    return AdvantageConfig(kind=kind, normalize_std=normalize_std, include_demonstration=include_demonstration)


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
    sequences = to_sequences(GROUPS, config(include_demonstration=True))
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
    sequences = to_sequences(GROUPS, config(include_demonstration=True))
    assert sequences[5].advantages.tolist() == [0.0] * 3
    assert sequences[7].advantages.tolist() == [0.0] * 2


@pytest.mark.parametrize("status", ["timeout", "crash", "unverifiable"])
def test_a_demonstration_on_which_the_verifier_failed_is_not_pushed_down(status):
    failed = replace(GROUPS[0], demonstration_score=Score(reward=0.0, correct=None, status=status))
    sequences = to_sequences([failed], config(include_demonstration=True))
    assert [s.advantages[0] for s in sequences] == [0.5, -0.5, 0.0]


def test_a_wrong_demonstration_counts_as_wrong():
    wrong = replace(GROUPS[0], demonstration_score=Score(reward=0.0, correct=False, status="no_answer"))
    sequences = to_sequences([wrong], config(include_demonstration=True))
    assert [s.advantages[0] for s in sequences] == pytest.approx([2 / 3, -1 / 3, -1 / 3])


def test_a_demonstration_left_out_of_the_group_still_gives_a_sequence():
    sequences = to_sequences(GROUPS[:1], config(include_demonstration=False))
    assert [s.advantages[0] for s in sequences] == [0.5, -0.5, 0.0]


def test_demonstrations_alone_make_an_sft_step():
    group = Group(prompt=prompt("a"), completions=(), demonstration=EXPERT)
    (sequence,) = to_sequences([group], config())
    assert sequence.is_demonstration and sequence.advantages.tolist() == [0.0] * 4


def test_a_failed_verification_is_not_correct():
    group = Group(
        prompt=prompt("a"), completions=(completion(1),), scores=(Score(reward=0.0, correct=None, status="timeout"),)
    )
    assert [s.correct for s in to_sequences([group], config())] == [False]


def test_unscored_completions_are_a_bug():
    with pytest.raises(AssertionError, match="not scored"):
        to_sequences([Group(prompt=prompt("a"), completions=(completion(1),))], config())


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
            "count/groups": 3,
            "count/completions": 6,
            "count/demonstrations": 2,
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


def test_statistics_without_rollouts_leave_out_what_has_no_value():
    group = Group(prompt=prompt("a"), completions=(), demonstration=EXPERT)
    assert group_statistics([group]) == {
        "count/groups": 1, "count/completions": 0, "count/demonstrations": 1, "count/demonstrations_scored": 0
    }  # fmt: skip
