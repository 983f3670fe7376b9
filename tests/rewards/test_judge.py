"""The judge against a real HTTP server on this machine: verdicts, and every way in which an endpoint can fail."""

import json
import os
import signal
import threading
import time
from collections import Counter

import numpy as np
import pytest
from chat_endpoint import Endpoint, dripping, dripping_header, reset, says, sends, silent, status

from megatron_srft.config import ConfigError, JudgeRewardConfig
from megatron_srft.rewards import Scorer
from megatron_srft.rewards.endpoint import ChatEndpoint
from megatron_srft.rewards.workers import VerifierError
from megatron_srft.sample import Completion, Group, Prompt

RIGHT = says("They agree.\nJudgement: correct")


@pytest.fixture
def endpoint():
    server = Endpoint()
    yield server
    server.shutdown()
    server.server_close()


def judge(endpoint, **settings):
    settings = dict(timeout_seconds=0.4, retries=2, backoff_seconds=0.01, concurrency=4) | settings
    return Scorer((JudgeRewardConfig(url=endpoint.url, model="m", **settings),))


def verdict(endpoint, action, **settings):
    """The score of one answer, and the accounting, under a script of actions."""
    endpoint.script = list(action) if isinstance(action, (list, tuple)) else [action]
    with judge(endpoint, **settings) as scorer:
        (score,) = scorer.verify(["so 7"], ["7"])
        return score, {name: count for name, count in scorer.accounting().items() if count}


@pytest.mark.parametrize(
    ("content", "correct", "state"),
    [
        ("Judgement: correct", True, "verified"),
        ("fine\nJudgement: Correct", True, "verified"),  # the released code's regex takes it and then scores 0
        ("**Judgment:** CORRECT.", True, "verified"),
        ("Judgement: wrong", False, "verified"),
        ("judgement: incorrect", False, "verified"),
        ("Judgement: `not_found`", False, "no_answer"),
        ("Judgement: not found", False, "no_answer"),
        ("First I thought Judgement: correct, but no.\nJudgement: wrong", False, "verified"),
    ],
)
def test_the_last_judgement_counts(endpoint, content, correct, state):
    score, counts = verdict(endpoint, says(content))
    assert (score.correct, score.status, score.reward) == (correct, state, float(correct))
    assert counts == {"scored": 1, {True: "correct", False: "wrong"}[correct] if state == "verified" else state: 1}


@pytest.mark.parametrize(
    ("actions", "state", "expected"),
    [
        (says("I cannot tell"), "crash", {"judge/unparsed": 1}),
        (says("Judgement: correctly stated"), "crash", {"judge/unparsed": 1}),
        (says(None), "crash", {"judge/unparsed": 1}),
        (says(""), "crash", {"judge/unparsed": 1}),
        (status(500), "crash", {"judge/http_errors": 1, "judge/retries": 2}),
        (status(429), "crash", {"judge/http_errors": 1, "judge/retries": 2}),
        (status(404), "crash", {"judge/http_errors": 1}),
        (status(400), "crash", {"judge/http_errors": 1}),
        (status(302), "crash", {"judge/http_errors": 1}),
        (reset, "crash", {"judge/http_errors": 1, "judge/retries": 2}),
        (sends(b"<html>gateway</html>"), "crash", {"judge/http_errors": 1, "judge/retries": 2}),
        (sends(b"{}"), "crash", {"judge/http_errors": 1, "judge/retries": 2}),
        (sends(b'{"choices": []}'), "crash", {"judge/http_errors": 1, "judge/retries": 2}),
        (sends(b"[1, 2]"), "crash", {"judge/http_errors": 1, "judge/retries": 2}),
        (sends(b"\xff\xfe\x00"), "crash", {"judge/http_errors": 1, "judge/retries": 2}),
        (sends(b"", length=0), "crash", {"judge/http_errors": 1, "judge/retries": 2}),
        (sends(b"x" * (3 << 20)), "crash", {"judge/http_errors": 1, "judge/retries": 2}),
        (silent, "timeout", {"judge/timeouts": 1, "judge/retries": 2}),
        (dripping, "timeout", {"judge/timeouts": 1, "judge/retries": 2}),
        (dripping_header, "timeout", {"judge/timeouts": 1, "judge/retries": 2}),
    ],
)
def test_a_failure_is_no_verdict_and_counted(endpoint, actions, state, expected):
    start = time.monotonic()
    score, counts = verdict(endpoint, actions, wrong=-3.0)
    assert (score.correct, score.status, score.reward) == (None, state, -3.0)
    assert counts == {"scored": 1, state: 1, **expected}
    assert len(endpoint.asked) == 1 + expected.get("judge/retries", 0)
    assert time.monotonic() - start < 4.4  # 1.2 s on an idle machine; waiting out the shortest of them takes 4.5 s


def test_a_body_cut_short_is_not_believed(endpoint):
    whole = json.dumps({"choices": [{"message": {"content": "Judgement: correct"}}]}).encode()
    score, counts = verdict(endpoint, sends(whole, length=len(whole) + 10), retries=0)
    assert (score.status, counts["scored"]) in (("crash", 1), ("timeout", 1))


@pytest.mark.parametrize("trouble", [status(503), reset, silent, sends(b"oops")])
def test_another_attempt_mends_it(endpoint, trouble):
    score, counts = verdict(endpoint, [trouble, trouble, RIGHT])
    assert score.correct is True
    assert counts == {"scored": 1, "correct": 1, "judge/retries": 2}


def test_the_pause_doubles(endpoint):
    verdict(endpoint, status(500), retries=3, backoff_seconds=0.1)
    pauses = np.diff(endpoint.times)
    assert all(0.1 * 2**i <= pause < 0.1 * 2**i + 0.5 for i, pause in enumerate(pauses)) and len(pauses) == 3


def test_nobody_listens(endpoint):
    endpoint.shutdown()
    endpoint.server_close()
    with judge(endpoint, retries=1) as scorer:
        assert scorer.verify(["7"], ["7"])[0].status == "crash"
        assert scorer.accounting()["judge/http_errors"] == scorer.accounting()["judge/retries"] == 1
        with pytest.raises(VerifierError, match="rewards.judge: http://127.0.0.1:.*ConnectionRefusedError"):
            scorer.self_test()


def test_an_endpoint_that_is_down_is_not_asked_about_every_answer(endpoint):
    endpoint.script = [status(500)]
    with judge(endpoint, retries=0, concurrency=2) as scorer:
        scores = scorer.verify([f"so {i}" for i in range(50)], ["7"] * 50)
        counts = scorer.accounting()
        assert {score.status for score in scores} == {"crash"}
        assert counts["judge/http_errors"] + counts["judge/not_asked"] == counts["crash"] == 50
        assert len(endpoint.asked) == counts["judge/http_errors"] <= 4
        endpoint.script = [RIGHT]  # the next step tries again
        assert all(score.correct for score in scorer.verify(["a", "b"], ["7", "7"]))


def test_the_question_holds_prompt_reference_and_the_end_of_the_response(endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    (tmp_path / "template.txt").write_text("Q {prompt} R {answer} S {response} {other}")
    prompt = Prompt(id="p", text="What is {answer}?", token_ids=np.zeros(1, np.int32), answer="{response}", source="s")
    long = Completion(
        token_ids=np.zeros(1, np.int32), text="x" * 100 + "the end {prompt}", finish_reason="stop", policy_version=0,
        rollout_logprobs=np.zeros(1, np.float32),
    )  # fmt: skip
    endpoint.script = [RIGHT]
    settings = dict(prompt_file=str(tmp_path / "template.txt"), response_characters=16, api_key_variable="JUDGE_KEY")
    with judge(endpoint, max_judge_tokens=77, **settings) as scorer:
        (group,) = scorer.score([Group(prompt=prompt, completions=(long, long))])
    assert [score.correct for score in group.scores] == [True, True]
    (asked,) = endpoint.asked  # equal answers are asked about once
    assert asked == {
        "path": "/v1/chat/completions", "key": "Bearer secret", "model": "m", "temperature": 0, "max_tokens": 77,
        "messages": [
            {"role": "user", "content": "Q What is {answer}? R {response} S the end {prompt} {other}"}
        ],
    }  # fmt: skip


def test_without_a_reference_there_is_nothing_to_compare(endpoint):
    endpoint.script = [RIGHT]
    with judge(endpoint) as scorer:
        assert scorer.verify(["7"], [None])[0].status == "unverifiable"
    assert endpoint.asked == []
    with judge(endpoint, prompt="Is this polite? {response}") as scorer:
        assert scorer.verify(["7"], [None])[0].correct is True


def test_answers_come_back_in_order_and_no_more_at_a_time_than_allowed(endpoint):
    def parity(handler):
        number = int(handler.server.asked[-1]["messages"][0]["content"])
        time.sleep(0.002 * (number % 5))
        says(f"Judgement: {'correct' if number % 2 else 'wrong'}")(handler)

    endpoint.script = [parity]
    with judge(endpoint, prompt="{response}", concurrency=1) as scorer:
        scores = scorer.verify([str(i) for i in range(20)], ["7"] * 20)
    assert [score.correct for score in scores] == [i % 2 == 1 for i in range(20)]
    assert endpoint.most_busy == 1
    endpoint.script = [lambda handler: (time.sleep(0.1), RIGHT(handler))]
    with judge(endpoint, prompt="{response}", concurrency=3, timeout_seconds=5) as scorer:
        scorer.verify([str(i) for i in range(12)], ["7"] * 12)
    assert 1 < endpoint.most_busy <= 3


def test_an_interruption_does_not_wait_for_a_slow_endpoint(endpoint):
    """Nor for further attempts, of which ten at a minute each are allowed here."""
    endpoint.script = [lambda handler: time.sleep(60)]
    slow = ChatEndpoint("test", endpoint.url, timeout_seconds=60, retries=9, backoff_seconds=1, concurrency=2)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has none
    start = time.monotonic()
    try:
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            slow.ask([{"model": "m"}] * 5)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 40
    assert len(endpoint.asked) == 2, "what had not been asked is not asked any more"


def test_the_self_test_tells_a_judge_that_always_agrees(endpoint):
    endpoint.script = [RIGHT]
    with judge(endpoint) as scorer:
        with pytest.raises(VerifierError, match="it judges 205 against 204 to be right"):
            scorer.self_test()
        endpoint.script = [RIGHT, says("Judgement: wrong")]
        scorer.self_test()
        assert Counter(scorer.accounting()) == Counter(scorer.accounting().fromkeys(scorer.accounting(), 0))
        endpoint.script = [status(401)]
        with pytest.raises(VerifierError, match='HTTP status 401: {"error": "no"}'):
            scorer.self_test()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(url="localhost:8000"), "url of a judge must look like http://localhost:8000/v1, not 'localhost:8000'"),
        (dict(url="http://host:port/v1"), "url of a judge must look like"),
        (dict(model=""), "model of a judge is not set"),
        (dict(prompt="{response}", prompt_file="x"), "prompt or prompt_file, not both"),
        (dict(prompt="{answer}"), "prompt of a judge must hold {response}"),
        (dict(timeout_seconds=0), "timeout_seconds of a judge must be positive"),
        (dict(retries=-1), "retries of a judge must not be negative"),
        (dict(backoff_seconds=-1), "backoff_seconds of a judge must not be negative"),
        (dict(concurrency=0), "concurrency of a judge must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        JudgeRewardConfig(**dict(url="http://localhost/v1", model="m") | settings)


def test_a_missing_template_or_key_is_refused_at_the_start(endpoint, tmp_path):
    with pytest.raises(ValueError, match="rewards.judge: cannot read prompt_file .*nowhere"):
        judge(endpoint, prompt_file=str(tmp_path / "nowhere"))
    (tmp_path / "empty").write_text("{answer}")
    with pytest.raises(ValueError, match="has no {response}"):
        judge(endpoint, prompt_file=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="the environment has no NO_SUCH_KEY; set it"):
        judge(endpoint, api_key_variable="NO_SUCH_KEY")
