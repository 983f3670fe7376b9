"""Sample rollouts: which completions are kept, what a resume repeats, what is read back."""

import numpy as np
import pytest

from megatron_srft.analysis import log_samples, read_samples
from megatron_srft.sample import Completion, Demonstration, Group, Prompt, Score


def make_group(name: str, answers: list[str], demonstration: str | None = None, truncated: bool = False) -> Group:
    """A scored group in which an answer is right when it says 4."""

    def ids(text: str) -> np.ndarray:
        return np.arange(len(text), dtype=np.int32)

    def score(text: str) -> Score:
        return Score(reward=float(text == "4"), streams={"exact": float(text == "4")}, correct=text == "4")

    return Group(
        prompt=Prompt(id=name, text="2+2=", token_ids=ids("2+2="), answer="4", source="sums"),
        completions=tuple(
            Completion(
                token_ids=ids(text),
                text=text,
                rollout_logprobs=np.zeros(len(text), np.float32),
                finish_reason="length" if len(text) > 5 else "stop",
                policy_version=0,
            )
            for text in answers
        ),
        demonstration=Demonstration(token_ids=ids(demonstration), text=demonstration, truncated=truncated)
        if demonstration
        else None,
        scores=tuple(score(text) for text in answers),
        demonstration_score=score(demonstration) if demonstration and not truncated else None,
    )


def test_one_completion_of_each_group_comes_before_second_ones(tmp_path):
    log_samples(tmp_path, 0, [make_group("a", ["1", "2"]), make_group("b", ["3", "4"])], limit=3)
    assert [(s["prompt_id"], s["response"]) for s in read_samples(tmp_path)] == [("a", "1"), ("b", "3"), ("a", "2")]


def test_everything_the_report_shows_is_kept(tmp_path):
    groups = [make_group("a", ["4", "<b>long"], "4"), make_group("b", ["4"], "2 and so", truncated=True)]
    log_samples(tmp_path, 7, groups, limit=9)
    first, second, third = read_samples(tmp_path)
    assert first == {
        "step": 7,
        "prompt_id": "a",
        "source": "sums",
        "prompt": "2+2=",
        "answer": "4",
        "response": "4",
        "response_tokens": 1,
        "finish_reason": "stop",
        "reward": 1.0,
        "streams": {"exact": 1.0},
        "correct": True,
        "status": "verified",
        "group_rewards": [1.0, 0.0],
        "demonstration": {
            "text": "4",
            "truncated": False,
            "reward": 1.0,
            "streams": {"exact": 1.0},
            "correct": True,
            "status": "verified",
        },
    }
    assert second["demonstration"] == {"text": "2 and so", "truncated": True}
    assert (third["response"], third["finish_reason"], third["correct"]) == ("<b>long", "length", False)


@pytest.mark.parametrize("length", [10, 100_000])
def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path, length):
    for step in (0, 1, 2, 3):
        log_samples(tmp_path, step, [make_group("old", ["x" * length])], limit=1)
    for step in (2, 3):
        log_samples(tmp_path, step, [make_group("new", ["y" * length])], limit=1)
    assert [(s["step"], s["prompt_id"]) for s in read_samples(tmp_path)] == [
        (0, "old"), (1, "old"), (2, "new"), (3, "new"),
    ]  # fmt: skip


def test_a_half_written_last_line_is_removed_before_the_next(tmp_path):
    for step in (0, 1):
        log_samples(tmp_path, step, [make_group("a", ["1"])], limit=1)
    path = tmp_path / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    log_samples(tmp_path, 1, [make_group("again", ["1"])], limit=1)
    assert [(s["step"], s["prompt_id"]) for s in read_samples(tmp_path)] == [(0, "a"), (1, "again")]


def test_groups_without_completions_leave_nothing(tmp_path):
    log_samples(tmp_path, 0, [make_group("sft", [], "4")], limit=4)
    assert read_samples(tmp_path) == []
