"""The hidden-state reward in a group's scores and advantages, worked out by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
from advantage_cases import advantages_of, completion, group, score, settings

from megatron_srft.advantages import group_statistics, to_sequences, with_advantages
from megatron_srft.config import ExactRewardConfig, SwiftRewardConfig
from megatron_srft.hidden_stream.merge import (
    HiddenScores,
    engine_difference,
    merge,
    of_engine,
    scores_by_group,
    unscored,
    values,
)
from megatron_srft.rewards import Scorer
from megatron_srft.rollout.engine import RolloutError
from megatron_srft.sample import Demonstration, Score


def swift(**options) -> SwiftRewardConfig:
    return SwiftRewardConfig(head="head", **options)


def found(*completions: float | None, demonstration: float | None = None) -> HiddenScores:
    return HiddenScores(completions=completions, demonstration=demonstration)


def demonstrated(of):
    demonstration = Demonstration(token_ids=np.array([5, 1], np.int32), text="d")
    return replace(of, demonstration=demonstration, demonstration_score=score(1.0))


# ---------------------------------------------------------------- values


def test_a_score_as_it_is_its_sigmoid_and_its_place_in_the_group():
    scores = found(1.0, -2.0, 4.0, demonstration=-1.0)
    assert values(scores, "none") == ([1.0, -2.0, 4.0], -1.0)
    logistic = [1 / (1 + math.exp(-x)) for x in (1.0, -2.0, 4.0, -1.0)]
    completions, of_demonstration = values(scores, "sigmoid")
    assert [*completions, of_demonstration] == pytest.approx(logistic, abs=1e-15)
    # mean 1, deviations 0, -3, 3: population deviation sqrt(18 / 3)
    completions, of_demonstration = values(scores, "group")
    assert completions == pytest.approx([0.0, -3 / math.sqrt(6), 3 / math.sqrt(6)], abs=1e-15)
    assert of_demonstration == pytest.approx(-2 / math.sqrt(6), abs=1e-15)


@pytest.mark.parametrize("extreme", [-900.0, 900.0])
def test_a_sigmoid_of_any_logit_is_a_share(extreme):
    assert values(found(extreme), "sigmoid")[0] == [float(extreme > 0)]


@pytest.mark.parametrize("scores", [(0.7, 0.7, 0.7), (0.7, 0.7 + 2e-6, 0.7 - 1e-6), (3.5,)])
def test_a_group_of_equal_scores_has_the_value_0(scores):
    """Rounding apart: the same answer twice, packed differently, differs in its last digits."""
    assert values(found(*scores, demonstration=9.0), "group") == ([0.0] * len(scores), 0.0)


def test_a_demonstration_is_no_further_off_than_a_member_could_be():
    """Two members can be at most 1 deviation from their mean, three sqrt(2)."""
    assert values(found(0.0, 1.0, demonstration=-50.0), "group") == ([-1.0, 1.0], -math.sqrt(2))
    member = np.array([0.0, 0.0, -50.0])
    assert ((member - member.mean()) / member.std()).min() == pytest.approx(-math.sqrt(2))


@pytest.mark.parametrize(
    ("normalise", "expected"),
    [("none", [-2.0, -2.0, 1.0]), ("group", [-1.0, -1.0, 1.0])],
)
def test_a_response_without_a_token_to_score_has_the_lowest_value(normalise, expected):
    scores = found(None, -2.0, 1.0)
    completions, of_demonstration = values(scores, normalise)
    assert completions == expected and of_demonstration == expected[0]


def test_a_group_in_which_nothing_can_be_scored():
    assert values(found(None, None), "none")[0] == [0.0, 0.0]
    assert values(found(None, None), "sigmoid")[0] == [0.5, 0.5]
    assert values(found(None, None), "group")[0] == [0.0, 0.0]


def test_what_has_a_reward_and_no_score_is_counted():
    one = group([1, 3], [score(0.0), score(1.0)])
    assert unscored([one, demonstrated(one)], [found(None, 2.0), found(None, 1.0)]) == 3
    assert unscored([one, demonstrated(one)], [found(1.0, 2.0), found(1.0, 1.0, demonstration=0.0)]) == 0


# ---------------------------------------------------------------- rewards and advantages


def test_rewards_and_advantages_with_two_streams():
    """Rewards 1 + 0.5 * 2, 0 + 0.5 * -1, 0 + 0.5 * 3; their mean is 1."""
    run = settings({"kind": "grpo"}, [{"kind": "exact"}, {"kind": "swift", "head": "h", "weight": 0.5}])
    groups = merge([group([2, 1, 3], [score(1.0), score(0.0), score(0.0)])], [found(2.0, -1.0, 3.0)], run.rewards[1])
    assert [s.reward for s in groups[0].scores] == [2.0, -0.5, 1.5]
    assert [s.streams for s in groups[0].scores] == [
        {"exact": 1.0, "swift": 2.0}, {"exact": 0.0, "swift": -1.0}, {"exact": 0.0, "swift": 3.0},
    ]  # fmt: skip
    assert [s.correct for s in groups[0].scores] == [True, False, False]
    deviation = np.std([2.0, -0.5, 1.5], ddof=1)
    for sequence, centred in zip(advantages_of(groups, run), (1.0, -1.5, 0.5), strict=True):
        np.testing.assert_allclose(sequence.advantages, centred / deviation, rtol=1e-6)
    figures = group_statistics(groups)
    assert figures["reward/swift"] == pytest.approx(4 / 3) and figures["reward/mean"] == pytest.approx(1.0)
    assert (figures["reward_correct/swift"], figures["reward_wrong/swift"]) == (2.0, 1.0)


def test_a_demonstration_is_a_member_with_its_own_score():
    """SRFT counts it: rewards 1 + 0.2 * 3 (demonstration), 0 + 0.2 * 1 and 1 - 0.2 * 1, mean 2.6 / 3."""
    run = settings({"kind": "srft"}, [{"kind": "exact"}, {"kind": "swift", "head": "h", "weight": 0.2}])
    groups = [demonstrated(group([1, 2], [score(0.0), score(1.0)]))]
    groups = merge(groups, [found(1.0, -1.0, demonstration=3.0)], run.rewards[1])
    found_advantages = [s.advantages[0] for s in advantages_of(groups, run)]
    np.testing.assert_allclose(found_advantages, [0.2 - 2.6 / 3, 0.8 - 2.6 / 3, 1.6 - 2.6 / 3], rtol=1e-6)


def test_with_a_discount_the_score_stands_at_the_last_token():
    rewards = [{"kind": "exact"}, {"kind": "swift", "head": "h", "weight": 2.0, "gamma": 0.5}]
    run = settings({"kind": "grpo", "preset": "reinforce_pp"}, rewards, advantage={"normalize_batch": False})
    groups = merge([group([3], [score(1.0)])], [found(4.0)], run.rewards[1])
    (sequence,) = advantages_of(groups, run)
    np.testing.assert_allclose(sequence.advantages, [1 + 8 / 4, 1 + 8 / 2, 1 + 8], rtol=1e-6)


def test_scores_go_from_the_sequences_to_their_groups():
    groups = [group([1, 2], [score(0.0), score(1.0)]), demonstrated(group([1], [score(0.0)]))]
    sequences = [
        replace(s, hidden_score=value) for s, value in zip(to_sequences(groups), (0.5, None, 2.0, -3.0), strict=True)
    ]
    assert scores_by_group(sequences, 2) == [found(0.5, None), found(2.0, demonstration=-3.0)]


def scored(one, *scores: float | None):
    """The group with the engine's scores."""
    completions = [replace(c, hidden_score=value) for c, value in zip(one.completions, scores, strict=True)]
    return replace(one, completions=tuple(completions))


def test_the_engines_scores_stand_for_the_trainers_of_completions_only():
    groups = [scored(group([2, 1], [score(0.0), score(1.0)]), 0.5, None)]
    groups.append(scored(demonstrated(group([2], [score(0.0)])), 3.0))
    measured = [found(0.25, None), found(3.5, demonstration=-3.0)]
    assert of_engine(groups, measured) == [found(0.5, None), found(3.0, demonstration=-3.0)]
    assert engine_difference(groups, measured) == {"swift/engine_difference": 0.5}
    assert engine_difference(groups, [found(None, None), found(None)]) == {}


def test_an_engine_that_leaves_a_completion_without_a_score_is_refused():
    with pytest.raises(RolloutError, match="no score, and rewards: swift.scored_by is engine"):
        of_engine([scored(group([2, 2], [score(0.0), score(1.0)]), 0.5, None)], [found(None, None)])


def test_a_truncated_demonstration_stays_without_a_score():
    truncated = replace(demonstrated(group([1, 1], [score(0.0), score(1.0)])), demonstration_score=None)
    (merged,) = merge([truncated], [found(1.0, 2.0, demonstration=7.0)], swift())
    assert merged.demonstration_score is None
    run = settings({"kind": "srft"})
    *_, of_demonstration = with_advantages(to_sequences([merged]), [merged], run.advantage, (swift(),))
    assert not of_demonstration.advantages.any()


def test_nothing_but_the_reward_and_the_stream_changes():
    before = Score(reward=1.0, streams={"math": 1.0}, correct=None, status="timeout", answer="7")
    (merged,) = merge([group([2], [before])], [found(5.0)], swift(weight=0.0))
    assert merged.scores == (replace(before, streams={"math": 1.0, "swift": 5.0}),)
    assert completion(2).text == merged.completions[0].text


def test_the_scorer_of_texts_leaves_the_stream_to_the_model():
    """Of the evaluation, of the data tools, and of a step before it has been measured."""
    with Scorer((swift(weight=7.0), ExactRewardConfig())) as scorer:
        scorer.self_test()
        (found,) = scorer.verify(["3"], ["3"])
    assert (found.reward, found.streams, found.correct) == (1.0, {"exact": 1.0}, True)
