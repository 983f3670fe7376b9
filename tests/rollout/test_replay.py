"""What was dumped comes back: as groups, and as completions of the same step."""

import json
from dataclasses import replace

import numpy as np
import pytest
import zstandard

from megatron_srft.config import SamplingConfig
from megatron_srft.rollout import Request, collect, dump, dump_path, load_dump
from megatron_srft.rollout.replay import ReplayEngine
from megatron_srft.sample import Completion, Demonstration, Group, Prompt, Score

SAMPLING = SamplingConfig()


def make_group(number: int, samples: int = 3) -> Group:
    numbers = np.random.default_rng(number)
    demonstration = Demonstration(token_ids=np.array([4, 5, 1], np.int32), text='say "é"\n', truncated=True)
    prompt = Prompt(
        id=f"train/{number}", text=f"prompt {number}\u2028é", token_ids=np.arange(number + 1, dtype=np.int32),
        answer="7" if number else None, source="a.jsonl", response_prefix="<think>", demonstrations=(demonstration,),
    )  # fmt: skip
    completions = tuple(
        Completion(
            token_ids=numbers.integers(0, 99, size=4).astype(np.int32), text=f"answer {sample}",
            rollout_logprobs=numbers.normal(size=4).astype(np.float32), finish_reason="stop", policy_version=number,
        )
        for sample in range(samples)
    )  # fmt: skip
    scores = tuple(Score(reward=0.5, streams={"math": 0.5}, correct=None, status="timeout") for _ in completions)
    return Group(
        prompt=prompt, completions=completions, demonstration=demonstration if number else None,
        scores=scores if number else None, demonstration_score=Score(reward=1.0, correct=True, answer="7"),
    )  # fmt: skip


def assert_same(a, b) -> None:
    """Equal field by field, arrays with their types."""
    if isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    elif isinstance(a, tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif hasattr(a, "__slots__"):
        assert type(a) is type(b)
        for name in a.__slots__:
            assert_same(getattr(a, name), getattr(b, name))
    else:
        assert a == b


@pytest.mark.parametrize("name", ["step-000010.jsonl.zst", "step-000010.jsonl"])
def test_a_dump_reads_back_to_the_bit(tmp_path, name):
    groups = [make_group(i) for i in range(3)]
    dump(groups, tmp_path / "rollouts" / name)
    for before, after in zip(groups, load_dump(tmp_path / "rollouts" / name), strict=True):
        assert_same(before, after)
    assert [p.name for p in (tmp_path / "rollouts").iterdir()] == [name]


def test_the_dump_is_json_anyone_can_read(tmp_path):
    dump([make_group(1)], dump_path(tmp_path, 10))
    line = zstandard.decompress((tmp_path / "step-000010.jsonl.zst").read_bytes())
    tree = json.loads(line)
    assert tree["prompt"]["id"] == "train/1"
    assert tree["completions"][0]["text"] == "answer 0"
    assert tree["scores"][0]["status"] == "timeout"


@pytest.mark.parametrize("content", [b"{}\n", b"not json\n", b'{"prompt": 3}\n', b"\xff\xfe"])
def test_damaged_dumps_are_named(tmp_path, content):
    path = tmp_path / "step-000001.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="step-000001.jsonl"):
        load_dump(path)


def test_a_dump_cut_short_is_refused(tmp_path):
    packed = dump_path(tmp_path, 1)
    dump([make_group(i) for i in range(20)], packed)
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ValueError, match="step-000001.jsonl.zst: the file ends too early"):
        load_dump(packed)


def test_replay_returns_the_dumped_completions(tmp_path):
    groups = [make_group(i) for i in range(4)]
    dump(groups[:2], dump_path(tmp_path, 0))
    dump(groups[2:], tmp_path / "step-000001.jsonl")
    engine = ReplayEngine(tmp_path)
    for step, wanted in ((1, groups[2:]), (0, groups[:2])):
        prompts = [g.prompt for g in reversed(wanted)]
        replayed = collect(engine, prompts, [None] * 2, 3, SAMPLING, 99, step, None)
        for before, after in zip(reversed(wanted), replayed, strict=True):
            assert_same(before.completions, after.completions)


def test_a_replay_that_does_not_fit_says_why(tmp_path):
    dump([make_group(1)], dump_path(tmp_path, 0))
    engine, prompt = ReplayEngine(tmp_path), make_group(1).prompt

    def ask(prompt: Prompt, n: int, step: int = 0) -> None:
        engine.generate([Request(prompt=prompt, sample=s, seed=0, step=step) for s in range(n)], SAMPLING)

    ask(prompt, 3)
    with pytest.raises(ValueError, match=r"no rollouts of step 5 .*step-000005.*step-000000.jsonl.zst"):
        ask(prompt, 3, step=5)
    with pytest.raises(ValueError, match="prompt train/8 is not in step 0"):
        ask(replace(prompt, id="train/8"), 3)
    with pytest.raises(ValueError, match="3 completions .* asks for 2; set batch.rollouts_per_prompt to 3"):
        ask(prompt, 2)
    with pytest.raises(ValueError, match="other tokens"):
        ask(replace(prompt, token_ids=prompt.token_ids + 1), 3)
    with pytest.raises(ValueError, match="rollout.folder .* does not exist"):
        ReplayEngine(tmp_path / "nowhere")


def test_a_prompt_that_stood_twice_in_a_step_comes_back_in_order(tmp_path):
    one, other = make_group(1), make_group(2)
    again = replace(one, completions=tuple(replace(c, text="second") for c in one.completions))
    dump([one, other, again], dump_path(tmp_path, 0))
    prompts = [g.prompt for g in (one, other, again)]
    replayed = collect(ReplayEngine(tmp_path), prompts, [None] * 3, 3, SAMPLING, 99, 0, None)
    for before, after in zip((one, other, again), replayed, strict=True):
        assert_same(before.completions, after.completions)
    with pytest.raises(ValueError, match="3 completions .* asks for 2"):
        collect(ReplayEngine(tmp_path), prompts[:2], [None] * 2, 2, SAMPLING, 99, 0, None)
