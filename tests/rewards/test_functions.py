"""Users' reward functions: real modules on disk, imported by name, and everything that can be wrong with them."""

import sys

import numpy as np
import pytest

from megatron_srft.config import ConfigError, ExactRewardConfig, FunctionRewardConfig
from megatron_srft.rewards import Scorer

MODULE = """
import math
import numpy as np
import torch

def length(response): return float(len(response.token_ids))
def seen(r): return f"{r.prompt}|{r.text}|{r.answer}|{r.truncated}|{r.correct}"
def known(response): return float(response.correct is True and response.answer == "7" and not response.truncated)
def integer(response): return np.int64(3)
def none(response): pass
def text(response): return "1.0"
def tensor(response): return torch.ones(())
def numbers(response): return [1.0]
def nan(response): return math.nan
def raises(response): return 1 / (len(response.token_ids) - 2)
def short(response): return [0.5] * (len(response.token_ids) - 1)
def per_token(response): return np.array(response.token_ids) / 2
def infinite_token(response): return [0.0, -math.inf, 0.0, 0.0][:len(response.token_ids)]
def two_arguments(response, answer): return 0.0
def keyword_only(*, response): return 0.0
def optional(response, scale=2): return scale
not_a_function = 5
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("x = undefined\n")
    (tmp_path / "needy_rewards.py").write_text("import a_module_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("my_rewards", "broken_rewards", "needy_rewards"):
        sys.modules.pop(name, None)


def scorer(function, **settings):
    return Scorer((ExactRewardConfig(), FunctionRewardConfig(call=f"my_rewards:{function}", **settings)))


def scores(function, **settings):
    with scorer(function, **settings) as tested:
        return tested.verify(["7", "8"], ["7", "7"], token_ids=[[1, 2, 3], [4, 5]]), tested.accounting()


@pytest.mark.parametrize(
    ("function", "expected"), [("length", [3, 2]), ("known", [1, 0]), ("integer", [3, 3]), ("optional", [2, 2])]
)
def test_the_function_rewards_each_response(function, expected):
    found, counts = scores(function, weight=0.5)
    assert [score.streams["function"] for score in found] == expected
    assert [score.reward for score in found] == [1 + 0.5 * expected[0], 0.5 * expected[1]]
    assert all(type(score.streams["function"]) is float for score in found)
    assert counts["function/failed"] == 0


def test_a_number_per_token():
    found, _ = scores("per_token", dense=True)
    assert [score.dense["function"] for score in found] == [(0.5, 1.0, 1.5), (2.0, 2.5)]
    assert [score.streams["function"] for score in found] == [3.0, 4.5]


FAILURES = [
    ("none", {}, "returned NoneType None and no number"),
    ("text", {}, "returned str '1.0' and no number"),
    ("tensor", {}, r"returned Tensor tensor\(1.\) and no number"),
    ("numbers", {}, r"returned list \[1.0\] and no number; set dense: true"),
    ("nan", {}, "returned nan, which is not finite"),
    ("seen", {}, r"returned str '\|8\|7\|False\|False'"),
    ("raises", {}, r"raised ZeroDivisionError: division by zero \(.*my_rewards.py:15\)"),
    ("length", {"dense": True}, "returned float 2.0, and dense needs a list of numbers"),
    ("text", {"dense": True}, "returned str '1.0', and dense needs"),
    ("short", {"dense": True}, "returned 1 numbers for 2 tokens"),
    ("infinite_token", {"dense": True}, "returned -inf for token 1, which is not finite"),
]


@pytest.mark.parametrize(("function", "settings", "message"), FAILURES)
def test_a_failure_ends_the_run_with_the_reason(function, settings, message):
    with scorer(function, **settings) as tested:
        with pytest.raises(ValueError, match=f"rewards.function: my_rewards:{function} {message}"):
            tested.verify(["8"], ["7"], token_ids=[[4, 5]])
        assert tested.accounting()["function/failed"] == 1


@pytest.mark.parametrize(("function", "settings", "message"), FAILURES)
def test_where_failure_is_set_it_is_counted_and_rewarded_with_that(function, settings, message, caplog):
    with scorer(function, failure=-2.0, **settings) as tested:
        (score, again) = tested.verify(["8", "8"], ["7", "7"], token_ids=[[4, 5], [4, 5]])
        assert tested.accounting()["function/failed"] == 2
    assert score.streams["function"] == again.streams["function"] == -2.0 and score.reward == -2.0
    assert caplog.text.count("my_rewards:") == 1


def test_a_dense_failure_is_the_rewards_of_the_whole_response():
    """One of two responses fails: the other keeps its tokens, and the advantages take both kinds."""
    found, counts = scores("infinite_token", dense=True, failure=-1.0)
    assert [score.dense for score in found] == [{}, {}] and counts["function/failed"] == 2
    found, counts = scores("raises", failure=-1.0)
    assert [score.streams["function"] for score in found] == [1.0, -1.0] and counts["function/failed"] == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("no_such_module:reward", "there is no module no_such_module to import .* PYTHONPATH"),
        ("my_rewards.inner:reward", "there is no module my_rewards.inner to import"),
        ("my_rewards:missing", "my_rewards.py has no missing, as my_rewards:missing wants"),
        ("my_rewards:not_a_function", "my_rewards.py has no function not_a_function"),
        ("my_rewards:two_arguments", "cannot be called with one response .*'answer'.*def two_arguments"),
        ("my_rewards:keyword_only", "cannot be called with one response"),
        ("broken_rewards:reward", "importing broken_rewards .* failed: NameError: name 'undefined'"),
        ("needy_rewards:reward", "needy_rewards needs the module a_module_that_is_missing"),
    ],
)
def test_a_function_that_is_not_there_is_refused_at_the_start(call, message):
    with pytest.raises(ValueError, match=f"rewards.function: .*{message}"):
        Scorer((ExactRewardConfig(), FunctionRewardConfig(call=call)))


@pytest.mark.parametrize("call", ["", "my_rewards", "my_rewards:", ":length", "a b:c", "m:f()", "m:__import__('os')"])
def test_only_a_name_is_taken(call):
    with pytest.raises(ConfigError, match="must look like package.module:function"):
        FunctionRewardConfig(call=call)


@pytest.mark.parametrize("failure", [None, -1.0])
def test_the_self_test_calls_the_function_and_counts_nothing(failure):
    with scorer("length", failure=failure) as tested:
        tested.self_test()
        assert tested.accounting()["function/failed"] == tested.accounting()["scored"] == 0
    with scorer("nan", failure=failure) as tested:
        with pytest.raises(ValueError, match="returned nan"):
            tested.self_test()


def test_a_numpy_array_of_integers_is_a_list_of_numbers(module):
    (module / "my_rewards.py").write_text("import numpy as np\ndef f(r): return np.arange(len(r.token_ids))\n")
    with Scorer((ExactRewardConfig(), FunctionRewardConfig(call="my_rewards:f", dense=True))) as tested:
        (score,) = tested.verify(["7"], ["7"], token_ids=np.zeros((1, 3), np.int32))
    assert score.dense["function"] == (0.0, 1.0, 2.0)
