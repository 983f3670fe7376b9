"""`generate`, `evaluate` and `best-of-n` with vLLM, beside the local engine and the trainer."""

import json
from dataclasses import replace

import pytest
import yaml
from reward_heads import base_of, make_head
from spawning import spawn
from tiny_models import make_model, make_tokenizer
from vllm_command_runs import commands
from vllm_runs import ENGINE, SIZES

from megatron_srft import config as configuration
from megatron_srft.hidden_reward import (
    head_fingerprint,
    load_head,
    prompt_fingerprint,
    save_head,
)
from megatron_srft.rollout import load_dump

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tied model, a head for it, one with other numbers, one for other weights, problems and a config."""
    folder = tmp_path_factory.mktemp("vllm-commands")
    make_model("qwen2", folder / "model", tied=True, num_hidden_layers=2, **SIZES)
    config = {
        "data": {"chat_template": "never", "max_prompt_tokens": 16},
        "rollout": {"kind": "vllm", "max_response_tokens": 12, "vllm": ENGINE},
        "rewards": [{"kind": "exact"}],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [{"id": f"q{i}", "prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(4)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = prompt_fingerprint(configuration.load(folder / "config.yaml").data, make_tokenizer())
    base = base_of(folder / "model")
    alien = replace(base, fingerprint="e" * 64)
    heads = {"head": make_head(base), "other": make_head(base, seed=1), "alien": make_head(alien)}
    heads["last"] = make_head(base, (2,), last_token="included")
    for name, head in heads.items():
        save_head(replace(head, config=replace(head.config, prompt_format=prompts)), folder / name)
    return folder


@pytest.fixture(scope="module")
def said(folder):
    return spawn(1, commands, folder)[0]


def read_scores(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["id"]: row["scores"]["swift"] for row in rows}


def test_answers_come_with_the_trainers_scores(folder, said):
    assert said["generate"][0] == 0 and said["score"][0] == 0, said
    groups = load_dump(folder / "dump.jsonl")
    own = head_fingerprint(load_head(folder / "head"))
    scores = read_scores(folder / "scores.jsonl")
    assert list(scores) == [group.prompt.id for group in groups]
    for group in groups:
        assert {completion.hidden_head for completion in group.completions} == {own}
        assert [c.hidden_score for c in group.completions] == pytest.approx(scores[group.prompt.id], abs=1e-5)


def test_best_of_n_takes_the_scores_of_its_own_head_alone(said):
    status, out = said["best-of-n"]
    assert status == 0 and "candidates by the head: 16 scored while they were sampled\n" in out, out
    status, out = said["other head"]
    assert status == 0 and "candidates by the head: 16 scored here\n" in out, out


def test_greedy_answers_are_those_of_the_local_engine_also_from_a_checkpoint(folder, said):
    assert said["checkpoint"][0] == 0, said["checkpoint"]
    names = ("local", "vllm", "checkpoint", "library")
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    assert found["vllm"] == found["checkpoint"] == found["local"] == found["library"]
    assert len({answer["response"] for answer in found["vllm"]["greedy_answers"]["problems"]}) > 1


def test_a_head_of_other_weights_is_refused(said):
    status, out = said["other weights"]
    assert status == 2 and "was trained on other weights (tiny, eeeeeeeeeeee)" in out, out


def test_token_classification_gives_the_trainers_scores(folder, said):
    """A head on the last layer that scores the last token too, which no engine can while it samples."""
    assert said["last"][0] == 0 and said["classified"][0] == 0, said
    found, expected = (read_scores(folder / f"{name}.jsonl") for name in ("classified", "last"))
    assert list(found) == list(expected)
    for question, scores in expected.items():
        assert found[question] == pytest.approx(scores, abs=1e-5)
    assert len({round(score, 4) for scores in expected.values() for score in scores}) > 12
    assert said["classified best"][0] == 0, said["classified best"]
    assert not list(folder.glob(".classifier-*")), "what was written for vLLM is gone"
