"""DAPO's dynamic sampling on groups written out by hand."""

import pytest
from advantage_cases import group, score

from megatron_srft.config import ConfigError, from_dict
from megatron_srft.dynamic_sampling import refill
from megatron_srft.sample import Group, Score


def verdicts(*rows: str) -> list[Group]:
    """A group per row, with a completion of two tokens per letter: r(ight), w(rong), x (verification failed)."""
    scored = {"r": score(1.0), "w": score(0.0), "x": Score(reward=0.0, correct=None, status="timeout")}
    return [group([2] * len(row), [scored[letter] for letter in row]) for row in rows]


def draws(*batches: list[Group]):
    waiting = iter(batches)
    return lambda: next(waiting)


def test_more_is_drawn_until_there_are_enough_and_the_surplus_is_dropped():
    first, second = verdicts("rr", "rw", "ww"), verdicts("wr", "rw", "wr")
    groups, metrics = refill(first, draws(second), wanted=3, max_draws=10)
    assert groups == [first[1], second[0], second[1]]
    assert metrics == {
        "dynamic/draws": 2,
        "dynamic/groups": 6,
        "dynamic/response_tokens": 24,
        "dynamic/all_correct": 1,
        "dynamic/none_correct": 1,
        "dynamic/surplus": 1,
        "dynamic/accuracy": pytest.approx(6 / 12),
    }


def test_a_full_first_draw_is_enough():
    first = verdicts("rw", "wr")
    groups, metrics = refill(first, draws(), wanted=2, max_draws=10)
    assert groups == first
    assert (metrics["dynamic/draws"], metrics["dynamic/surplus"]) == (1, 0)


def test_after_max_draws_the_step_goes_on_with_what_it_has():
    first, second = verdicts("rr", "rw"), verdicts("ww", "ww")
    groups, metrics = refill(first, draws(second), wanted=2, max_draws=2)
    assert groups == [first[1]]
    assert (metrics["dynamic/draws"], metrics["dynamic/none_correct"]) == (2, 2)


def test_with_nothing_mixed_it_keeps_the_last_draw():
    first, second = verdicts("rr", "rr"), verdicts("ww", "rr")
    groups, metrics = refill(first, draws(second), wanted=2, max_draws=2)
    assert groups == second
    assert metrics["dynamic/accuracy"] == pytest.approx(6 / 8)


def test_one_draw_is_no_draw_more():
    first = verdicts("ww")
    assert refill(first, draws(), wanted=1, max_draws=1)[0] == first


def test_a_failed_verification_is_not_right():
    mixed, failed = verdicts("rx", "xw")
    groups, metrics = refill([mixed, failed], draws(), wanted=2, max_draws=1)
    assert groups == [mixed]
    assert metrics["dynamic/none_correct"] == 1


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"objective": {"kind": "srft"}}, "batch.dynamic_sampling drops prompts that objective srft learns from"),
        ({"objective": {"kind": "sft"}}, "batch.dynamic_sampling drops prompts that objective sft learns from"),
        ({"objective": {"kind": "grpo"}, "batch": {"rollouts_per_prompt": 1}}, "needs batch.rollouts_per_prompt above"),
        ({"objective": {"kind": "grpo"}, "batch": {"max_draws": 0}}, "batch.max_draws must be at least 1"),
    ],
)
def test_impossible_settings_are_refused_by_name(tree, message):
    with pytest.raises(ConfigError, match=message):
        from_dict({**tree, "batch": {"dynamic_sampling": True, **tree.get("batch", {})}})
