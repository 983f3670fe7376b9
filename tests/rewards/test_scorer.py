"""Rewards put together: streams, gates, demonstrations, accounting, self-test, with the real math verifier."""

import os

import numpy as np
import pytest

from megatron_srft.config import ConfigError, ExactRewardConfig, FormatRewardConfig, MathRewardConfig
from megatron_srft.rewards import Scorer
from megatron_srft.rewards.workers import VerifierError
from megatron_srft.sample import Completion, Demonstration, Group, Prompt

ENDLESS = r"\boxed{\sum_{k=1}^{10^{12}} \frac{1}{k^2 + k \sin k}}"


def completion(text, finish_reason="stop"):
    return Completion(
        token_ids=np.zeros(1, np.int32),
        text=text,
        rollout_logprobs=np.zeros(1, np.float32),
        finish_reason=finish_reason,
        policy_version=0,
    )


def prompt(answer, prefix=""):
    return Prompt(
        id="p", text="7+15=", token_ids=np.zeros(1, np.int32), answer=answer, source="s", response_prefix=prefix
    )


def demonstration(text, truncated=False):
    return Demonstration(token_ids=np.zeros(1, np.int32), text=text, truncated=truncated)


@pytest.fixture(scope="module")
def scorer():
    # A second is not enough for an honest verdict where other tests run beside this one.
    with Scorer((MathRewardConfig(timeout_seconds=5.0),)) as scorer:
        yield scorer


def test_every_kind_of_verdict_is_counted_apart(scorer):
    before = scorer.accounting()
    texts = [r"\boxed{18}", r"\boxed{17}", "no idea", r"\boxed{a_b^c}", ENDLESS, r"\boxed{5}", "so 18 in all"]
    references = ["18", "18", "18", "t(0,4]", "2", None, "18"]
    scores = scorer.verify(texts, references)
    assert [s.correct for s in scores] == [True, False, False, None, None, None, True]
    assert [s.status for s in scores] == [
        "verified", "verified", "no_answer", "unverifiable", "timeout", "unverifiable", "verified",
    ]  # fmt: skip
    assert [s.reward for s in scores] == [1.0, 0, 0, 0, 0, 0, 1.0]
    assert [s.answer for s in scores] == ["18", "17", None, "a_b^c", None, None, "18"]
    grown = {name: count - before[name] for name, count in scorer.accounting().items()}
    assert grown == dict(
        scored=7, correct=2, wrong=1, gated=0, no_answer=1, unverifiable=2, timeout=1, crash=0, worker_restarts=1
    )


def test_groups_come_back_scored_and_in_order(scorer):
    groups = [
        Group(
            prompt=prompt("22"),
            completions=(completion("the answer is 22"), completion("the answer is 23")),
            demonstration=demonstration(r"7+15=22, so \boxed{22}"),
        ),
        Group(prompt=prompt("3"), completions=(), demonstration=demonstration("I guess 4")),
        Group(prompt=prompt("3"), completions=(completion(r"\boxed{3}"),), demonstration=demonstration("3", True)),
        Group(prompt=prompt("3"), completions=(completion(r"\boxed{2}"),)),
    ]
    scored = scorer.score(groups)
    assert [[s.correct for s in g.scores] for g in scored] == [[True, False], [], [True], [False]]
    # A wrong demonstration is wrong, a truncated one has no verdict.
    assert [g.demonstration_score and g.demonstration_score.correct for g in scored] == [True, False, None, None]
    assert [g.prompt for g in scored] == [g.prompt for g in groups]
    assert groups[0].scores is None


def test_a_response_cut_at_the_limit_must_have_stated_its_answer(scorer):
    cut = [completion("first we add 9 and 18", "length"), completion(r"\boxed{18} let me check", "length")]
    whole = [completion("first we add 9 and 18")]
    (group,) = scorer.score([Group(prompt=prompt("18"), completions=(*cut, *whole))])
    assert [(s.correct, s.status) for s in group.scores] == [
        (False, "no_answer"), (True, "verified"), (True, "verified"),
    ]  # fmt: skip


def test_the_prompt_is_never_searched_for_the_answer(scorer):
    question = Prompt(id="p", text=r"Write \boxed{22}. 7+15=", token_ids=np.zeros(1, np.int32), answer="22", source="s")
    (group,) = scorer.score([Group(prompt=question, completions=(completion("I will not"),))])
    assert group.scores[0].status == "no_answer"


def test_answer_after_a_marker_ignores_what_stands_before():
    with Scorer((MathRewardConfig(answer_after="</think>"),)) as scorer:
        scores = scorer.verify(
            [r"\boxed{1}</think>\boxed{2}", r"<think>\boxed{2}", r"</think>\boxed{2}</think> the answer is 3"],
            ["2", "2", "2"],
        )
    assert [(s.correct, s.status) for s in scores] == [
        (True, "verified"), (False, "no_answer"), (False, "verified"),
    ]  # fmt: skip


def test_streams_are_weighted_and_named():
    configs = (
        ExactRewardConfig(answer_after="#", weight=2.0, correct=1.0, wrong=-1.0),
        FormatRewardConfig(pattern=r"\d.*", weight=0.5, matched=0.2, unmatched=-0.2, gate=False),
        ExactRewardConfig(weight=1.0),
    )
    with Scorer(configs) as scorer:
        right, wrong, missing = scorer.verify(["1#7", "x#8", "7"], ["7", "7", "7"])
    assert right.streams == {"exact": 1.0, "format": 0.2, "exact_2": 0.0}
    assert right.reward == pytest.approx(2.1) and right.correct is True
    assert wrong.reward == pytest.approx(-2.1) and wrong.correct is False
    # The first verifier gives the verdict, and it found no marker.
    assert (missing.correct, missing.status) == (False, "no_answer")
    assert missing.reward == pytest.approx(-2 + 0.1 + 1)


def test_the_format_gate_takes_the_reward_and_sees_the_prefix():
    configs = (ExactRewardConfig(answer_after="</think>"), FormatRewardConfig(pattern=r"(?s)<think>.*</think>.+"))
    answers = (completion("easy</think>7"), completion("7"))
    with Scorer(configs) as scorer:
        (with_prefix,) = scorer.score([Group(prompt=prompt("7", "<think>\n"), completions=answers)])
        (without,) = scorer.score([Group(prompt=prompt("7"), completions=answers)])
        counts = scorer.accounting()
    assert [s.correct for s in with_prefix.scores] == [True, False]
    assert [s.correct for s in without.scores] == [False, False]
    assert [s.reward for s in (*with_prefix.scores, *without.scores)] == [1.0, 0.0, 0.0, 0.0]
    assert (counts["gated"], counts["wrong"], counts["no_answer"], counts["correct"]) == (1, 1, 2, 1)


def test_exact_answers_keep_case_unless_told_otherwise():
    with Scorer((ExactRewardConfig(),)) as strict, Scorer((ExactRewardConfig(ignore_case=True),)) as lenient:
        for text, expected in ((" East\n", [True, True]), ("east", [False, True]), ("west", [False, False])):
            assert [s.verify([text], ["East"])[0].correct for s in (strict, lenient)] == expected
        assert strict.verify([" "], ["East"])[0].status == "no_answer"


def test_without_a_verifier_there_is_no_verdict():
    with Scorer((FormatRewardConfig(pattern="a+", matched=1.0, unmatched=-1.0),)) as scorer:
        scores = scorer.verify(["aa", "b"], ["aa", "b"])
    assert [(s.correct, s.reward) for s in scores] == [(None, 1.0), (None, -1.0)]


def test_the_self_test_passes_for_every_verifier_and_is_not_counted(scorer):
    before = scorer.accounting()
    scorer.self_test()
    assert scorer.accounting() == before
    with Scorer((ExactRewardConfig(answer_after="#"), MathRewardConfig(answer_after="</think>"))) as other:
        other.self_test()


BROKEN = """
import sympy
ExprExtractionConfig = LatexExtractionConfig = dict
parse = lambda text, *arguments, **options: [sympy.Integer(1)]
verify = lambda wanted, found, **options: True
"""


def test_the_self_test_names_what_a_broken_verifier_gets_wrong(monkeypatch, tmp_path):
    # A math_verify earlier on the path that accepts everything; the worker processes are the real ones.
    (tmp_path / "math_verify.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Scorer((MathRewardConfig(),)) as scorer:
        with pytest.raises(VerifierError, match=r"rewards.math: the verifier .*x\+1 against 1-x"):
            scorer.self_test()


def test_closing_leaves_no_process():
    with Scorer((MathRewardConfig(workers=2),)) as scorer:
        process_ids = scorer._verifiers["math"].pool.process_ids
    for process_id in process_ids:
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)


def test_a_bad_pattern_is_refused_with_the_config():
    with pytest.raises(ConfigError, match="regular expression"):
        FormatRewardConfig(pattern="(")
