"""Evaluation figures against the engine's own answers and against hand counts."""

import json

import numpy as np
import pytest
from tiny_models import make_model

from megatron_srft import config as configuration
from megatron_srft.config import ConfigError, ExactRewardConfig, SamplingConfig
from megatron_srft.data import load_problems
from megatron_srft.evaluate import ballot_sizes, evaluate, evaluate_folder, summarise
from megatron_srft.rewards import Scorer
from megatron_srft.rollout import Request, load_local_engine, load_tokenizer
from megatron_srft.sample import Completion, Group, Prompt, Score


def completion(length: int, reason: str = "stop") -> Completion:
    tokens = np.zeros(length, np.int32)
    logprobs = np.zeros(length, np.float32)
    return Completion(token_ids=tokens, text="", rollout_logprobs=logprobs, finish_reason=reason, policy_version=0)


def group(answers: str, lengths: list[int], reasons: str) -> Group:
    """One letter per completion: R and r are two ways of being right, w wrong, ? without a verdict."""
    scores = tuple(
        Score(reward=0.0, correct=None if a == "?" else a in "Rr", answer=None if a == "?" else a,
              status="timeout" if a == "?" else "verified") for a in answers
    )  # fmt: skip
    prompt = Prompt(id="p", text="", token_ids=np.zeros(1, np.int32), answer="R", source="s")
    completions = tuple(completion(n, "length" if r == "l" else "stop") for n, r in zip(lengths, reasons, strict=True))
    return Group(prompt=prompt, completions=completions, scores=scores)


def test_figures_of_two_problems():
    greedy = [group("R", [3], "s"), group("?", [9], "l")]
    sampled = [group("RRwr", [1, 2, 3, 4], "ssss"), group("wwR?", [2, 2, 2, 16], "sssl")]
    result = summarise(greedy, sampled)
    assert result.problems == 2
    assert result.greedy == 0.5
    assert result.average == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert result.pass_at == pytest.approx({1: 0.5, 2: (1 + 1 / 2) / 2, 4: 1.0})
    assert result.majority_at == pytest.approx({2: ((1 + 1 / 2) / 2 + (0 + 1) / 2) / 2, 4: 0.5})
    assert result.mean_length == pytest.approx(32 / 8)
    assert result.truncated_share == pytest.approx(1 / 8)
    assert result.unverified_share == pytest.approx(2 / 10)
    names = list(result.columns())
    assert names == [
        "greedy",
        "avg@4",
        "pass@2",
        "pass@4",
        "majority@2",
        "majority@4",
        "length",
        "truncated",
        "unverified",
    ]


def test_without_samples_only_greedy_figures_stand():
    result = summarise([group("R", [3], "s"), group("w", [5], "s")])
    assert list(result.columns()) == ["greedy", "length", "truncated", "unverified"]
    assert result.mean_length == 4


@pytest.mark.parametrize(("samples", "sizes"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (8, [1, 2, 4, 8])])
def test_ballot_sizes(samples, sizes):
    assert ballot_sizes(samples) == sizes


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_model("qwen2", tmp_path_factory.mktemp("model"), max_position_embeddings=64)


def write_problems(path, answers):
    rows = [{"id": f"q{i}", "prompt": f"{i}+{i}=", "answer": answer} for i, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_config(model_folder, **evaluation):
    return configuration.from_dict(
        {
            "model": {"path": str(model_folder)},
            "rollout": {"kind": "local", "max_response_tokens": 8, "max_concurrent_sequences": 5},
            "rewards": [{"kind": "exact"}],
            "evaluation": evaluation,
        }
    )


def own_answers(model_folder, count, files):
    """The model's greedy answers to the first problems."""
    config = make_config(model_folder)
    tokenizer = load_tokenizer(config.model)
    engine = load_local_engine(config.model, tokenizer, "cpu", 8)
    prompts = load_problems(files, config.data, tokenizer).prompts[:count]
    requests = [Request(prompt=p, sample=0, seed=0) for p in prompts]
    return [c.text for c in engine.generate(requests, SamplingConfig(temperature=0.0, max_response_tokens=8))]


def test_a_folder_is_evaluated_per_file(model_folder, tmp_path):
    right, wrong = tmp_path / "right.jsonl", tmp_path / "half.jsonl"
    write_problems(right, ["?"] * 6)
    answers = own_answers(model_folder, 6, (str(right),))
    write_problems(right, answers)
    write_problems(wrong, [*answers[:3], "no", "no", "no"])
    config = make_config(model_folder, files=[str(right), str(wrong)], samples=4, temperature=0.001)
    result = evaluate_folder(model_folder, config)
    assert result.files["right"].greedy == 1.0
    assert result.files["half"].greedy == 0.5
    # Hardly any temperature: the samples are the greedy answers, but for near ties of a random model.
    assert result.files["right"].average > 0.9
    assert result.files["half"].pass_at[4] <= 0.5
    assert result.metrics()["eval/half/greedy"] == 0.5
    lines = result.table().splitlines()
    assert lines[0].split()[:3] == ["file", "problems", "greedy"]
    assert "50.0 %" in lines[2]
    result.write_json(tmp_path / "out" / "evaluation.json")
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["files"]["half"]["pass_at"]["1"] == result.files["half"].pass_at[1]
    assert written["settings"]["temperature"] == 0.001


def test_only_the_first_problems_are_used(model_folder, tmp_path):
    file = tmp_path / "problems.jsonl"
    write_problems(file, ["?"] * 5)
    assert (
        evaluate_folder(model_folder, make_config(model_folder, files=[str(file)], max_problems=3))
        .files["problems"]
        .problems
        == 3
    )


def test_what_is_missing_is_named(model_folder, tmp_path):
    file = tmp_path / "problems.jsonl"
    write_problems(file, ["?"] * 2)
    with pytest.raises(ConfigError, match="evaluation.files names no file"):
        evaluate_folder(model_folder, make_config(model_folder))
    with pytest.raises(ConfigError, match="no config.json"):
        evaluate_folder(tmp_path, make_config(model_folder, files=[str(file)]))
    with pytest.raises(ValueError, match="nowhere.jsonl"):
        evaluate_folder(model_folder, make_config(model_folder, files=[str(tmp_path / "nowhere.jsonl")]))


def test_two_files_of_one_name_are_refused(model_folder, tmp_path):
    (tmp_path / "more").mkdir()
    files = [tmp_path / "problems.jsonl", tmp_path / "more" / "problems.jsonl"]
    for file in files:
        write_problems(file, ["?"] * 2)
    with pytest.raises(ConfigError, match="two files are called"):
        evaluate_folder(model_folder, make_config(model_folder, files=[str(file) for file in files]))


def test_sampled_answers_share_no_random_numbers_with_the_first_step(model_folder, tmp_path):
    """Training on the evaluation's file must not repeat its answers."""
    file = tmp_path / "problems.jsonl"
    write_problems(file, ["?"] * 2)
    asked = []

    class Recorder:
        ranks = 1

        def generate(self, requests, sampling):
            asked.extend(requests)
            return [completion(1) for _ in requests]

    config = make_config(model_folder, files=[str(file)], samples=2, temperature=1.0)
    datasets = [("problems", load_problems((str(file),), config.data, load_tokenizer(config.model)))]
    with Scorer((ExactRewardConfig(),)) as scorer:
        evaluate(Recorder(), scorer, datasets, config.evaluation, SamplingConfig(), 0, None)
    assert len(asked) == 2 + 4
    assert all(request.step < 0 for request in asked)
