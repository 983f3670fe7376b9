"""Shaping rewards in the scorer: beside verifier and format, from engine to score, each a stream of its own."""

import logging
import math
from dataclasses import replace

import numpy as np
import pytest

from megatron_srft.config import (
    ConfigError,
    CosineRewardConfig,
    ExactRewardConfig,
    FormatRewardConfig,
    LengthRewardConfig,
    MathRewardConfig,
    OverlongRewardConfig,
    RepetitionRewardConfig,
    RunConfig,
    SftConfig,
    from_dict,
)
from megatron_srft.rewards import Scorer
from megatron_srft.rollout.dump import dump, load_dump
from megatron_srft.sample import Completion, Demonstration, Group, Prompt

COSINE = CosineRewardConfig(weight=0.5, max_tokens=8)
REPETITION = RepetitionRewardConfig(ngram=2, penalty=-0.25, weight=2.0)


def completion(text, tokens, finish_reason="stop"):
    return Completion(
        token_ids=np.array(tokens, np.int32), text=text, rollout_logprobs=np.zeros(len(tokens), np.float32),
        finish_reason=finish_reason, policy_version=0,
    )  # fmt: skip


def group(*completions, demonstration=None, prefix=""):
    prompt = Prompt(
        id="p", text="1 1 1 1", token_ids=np.ones(4, np.int32), answer="7", source="s", response_prefix=prefix
    )
    return Group(prompt=prompt, completions=completions, demonstration=demonstration)


def test_each_stream_is_kept_apart_and_the_total_is_the_weighted_sum():
    expert = Demonstration(token_ids=np.array([4, 4, 4], np.int32), text="7")
    with Scorer((ExactRewardConfig(weight=0.0), COSINE, REPETITION)) as scorer:
        (scored,) = scorer.score(
            [group(completion("7", [1, 2, 1, 2]), completion("8", [1, 2]), completion("7", [1, 2], "length"),
                   demonstration=expert)]
        )  # fmt: skip
    right, wrong, cut = scored.scores
    assert right.streams == pytest.approx({"exact": 1.0, "cosine": 1.5, "repetition": -0.5})
    assert right.dense == {"repetition": (0.0, 0.0, -0.25, -0.25)}
    assert right.reward == pytest.approx(0.5 * 1.5 + 2 * -0.5)
    assert wrong.streams == pytest.approx({"exact": 0.0, "cosine": -5 * (1 + math.sqrt(2) / 2), "repetition": 0.0})
    assert (cut.correct, cut.streams["cosine"]) == (True, -10.0)
    # The demonstration is measured by its own tokens: length 3 of 8, and two of them repeated.
    assert scored.demonstration_score.streams["cosine"] == pytest.approx(1 + 0.5 * (1 + math.cos(3 * math.pi / 8)))
    assert scored.demonstration_score.dense == {"repetition": (0.0, -0.25, -0.25)}


def test_the_prompts_tokens_and_the_prefix_are_not_counted():
    """The prompt repeats itself, and `<think>` stands in front of the text; only the response has a length."""
    with Scorer((ExactRewardConfig(answer_after=">"), COSINE, REPETITION)) as scorer:
        (scored,) = scorer.score([group(completion("7", [1, 2]), prefix="<think>")])
    assert scored.scores[0].streams == pytest.approx({"exact": 1, "cosine": 1.5 + math.sqrt(2) / 4, "repetition": 0})


def test_the_schedule_follows_the_verdict_and_its_gates():
    configs = (ExactRewardConfig(answer_after="#"), FormatRewardConfig(pattern="a.*"), COSINE)
    with Scorer(configs) as scorer:
        passed, gated = scorer.verify(["a#7", "b#7"], ["7", "7"], token_ids=[[1] * 4] * 2)
    assert (passed.streams["cosine"], gated.streams["cosine"]) == pytest.approx((1.5, -5.0))


def test_an_answer_without_a_verdict_is_on_the_wrong_schedule_and_counted_apart():
    with Scorer((MathRewardConfig(), COSINE)) as scorer:
        (score,) = scorer.verify([r"\boxed{5}"], [None], token_ids=[[1] * 4])
        counts = scorer.accounting()
    assert (score.status, score.correct, score.streams["cosine"]) == ("unverifiable", None, pytest.approx(-5.0))
    assert (counts["unverifiable"], counts["wrong"]) == (1, 0)


def test_several_of_a_kind_have_names_of_their_own():
    sequence = RepetitionRewardConfig(ngram=1, penalty=-1.0, mode="sequence")
    length, overlong = LengthRewardConfig(max_tokens=8), OverlongRewardConfig(max_tokens=8, buffer_tokens=8)
    with Scorer((ExactRewardConfig(), REPETITION, sequence, length, overlong)) as scorer:
        (score,) = scorer.verify(["7"], ["7"], token_ids=[[1, 1, 1, 2]])
    assert score.streams == dict(exact=1, repetition=-0.5, repetition_2=-0.5, length=-0.5, overlong=-0.5)
    assert list(score.dense) == ["repetition"]


def test_without_tokens_there_is_no_length():
    with Scorer((ExactRewardConfig(), COSINE)) as scorer:
        with pytest.raises(ValueError, match="rewards.cosine counts tokens.*pass its token_ids"):
            scorer.verify(["7"], ["7"])


def test_scores_survive_the_disk(tmp_path):
    with Scorer((ExactRewardConfig(), COSINE, REPETITION)) as scorer:
        groups = scorer.score([group(completion("7", [1, 2, 1, 2]), completion("8", [1, 2, 3]))])
    dump(groups, tmp_path / "step.jsonl")
    (again,) = load_dump(tmp_path / "step.jsonl")
    assert again.scores == groups[0].scores


def test_a_null_limit_is_the_engines():
    config = from_dict({
        "rollout": {"kind": "local", "max_response_tokens": 40},
        "rewards": [{"kind": "exact"}, {"kind": "cosine"}, {"kind": "length", "max_tokens": 30},
                    {"kind": "overlong", "buffer_tokens": 10}, {"kind": "repetition"}],
    })  # fmt: skip
    assert [getattr(reward, "max_tokens", None) for reward in config.resolved().rewards] == [None, 40, 30, 40, None]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"kind": "cosine", "exceed_margin": 40}, "exceed_margin of a cosine reward .* limit of 40 tokens, not 40"),
        ({"kind": "overlong"}, "buffer_tokens of an overlong reward .* limit of 40 tokens, not 4096"),
    ],
)
def test_a_limit_is_checked_against_the_engines(tree, message):
    rollout = {"kind": "local", "max_response_tokens": 40}
    config = from_dict({"rollout": rollout, "rewards": [{"kind": "exact"}, tree]})
    with pytest.raises(ConfigError, match=message):
        config.resolved()


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([{"kind": "cosin"}], "rewards.0.kind: unknown kind 'cosin'; choose from .*'cosine', 'length', 'overlong'"),
        (
            [{"kind": "cosine", "corect_at_zero": 1}],
            "rewards.0.corect_at_zero; did you mean rewards.0.correct_at_zero?",
        ),
        (
            [{"kind": "exact"}, {"kind": "repetition", "ngram": "two"}],
            "rewards.1.ngram: input should be a valid integer",
        ),
    ],
)
def test_a_mistake_in_an_item_names_it(rewards, message):
    with pytest.raises(ConfigError, match=message):
        from_dict({"rewards": rewards})


def test_a_cosine_needs_a_verdict_also_where_only_evaluation_scores():
    with pytest.raises(ConfigError, match="cosine reward asks a verifier for the verdict"):
        RunConfig(objective=SftConfig(), rewards=(CosineRewardConfig(),))


def test_rewards_that_grow_with_length_are_pointed_out(caplog):
    with Scorer((ExactRewardConfig(), replace(COSINE, correct_at_zero=0.0, correct_at_limit=10.0))) as scorer:
        with caplog.at_level(logging.WARNING):
            scorer.self_test()
    assert "rewards.cosine: right answers earn more the longer" in caplog.text
