"""`megatron-srft best-of-n`: choices against Hugging Face's own states, on one rank and on two, and its mistakes."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from advantage_cases import completion, group
from reward_heads import base_of, make_head
from spawning import spawn
from tiny_models import make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from megatron_srft import cli
from megatron_srft.best_of_n_command import stored_scores
from megatron_srft.config import DataConfig
from megatron_srft.hidden_reward import head_fingerprint, prompt_fingerprint, save_head

QUESTIONS, SAMPLES = 9, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a head that fits it, and questions whose responses are digits behind '#'; one has only an end token."""
    folder = tmp_path_factory.mktemp("best_of_n")
    make_model("qwen2", folder / "model", max_position_embeddings=64)
    save_head(head_for(folder / "model"), folder / "head")
    draw = np.random.default_rng(0)
    with (folder / "candidates.jsonl").open("w") as file:
        for number in range(QUESTIONS):
            responses = [f"{draw.integers(100)}#{draw.integers(3)}" for _ in range(SAMPLES)]
            responses[0] = "" if number == 0 else responses[0]
            row = {"id": f"q{number}", "prompt": f"{number}+1=", "answer": "1", "responses": responses}
            file.write(json.dumps(row | {"scores": {"rm": list(draw.normal(size=SAMPLES))}}) + "\n")
    return folder


def head_for(model, **changes):
    base = base_of(model)
    head = make_head(dataclasses.replace(base, **changes), seed=2)
    form = prompt_fingerprint(DataConfig(), make_tokenizer())
    return dataclasses.replace(head, config=dataclasses.replace(head.config, prompt_format=form))


def run(folder, output, *more, head="head", candidates="candidates.jsonl"):
    arguments = ["best-of-n", folder / "model", folder / head, folder / candidates, "--output", folder / output]
    arguments += ["--reward", "exact", "--answer-after", "#", "--cost-candidates", "4", *more]
    return cli.main([str(argument) for argument in arguments])


@torch.no_grad()
def choices_by_hand(folder):
    """Whether the response with the highest score is right, for each question, by stacked states in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    head, tokenizer = head_for(folder / "model"), make_tokenizer()
    right = []
    for row in map(json.loads, (folder / "candidates.jsonl").read_text().splitlines()):
        scores = []
        for text in row["responses"]:
            prompt, response = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (row["prompt"], text))
            states = model(torch.tensor([prompt + response]), output_hidden_states=True).hidden_states
            raw = sum(s[0, len(prompt) :] @ w.double().T for s, w in zip(states, head.weight, strict=True)) + head.bias
            gate = raw[:, 0].sigmoid()
            scores.append(float((gate * raw[:, 1]).sum() / gate.sum()) if response else -np.inf)
        right.append(row["responses"][int(np.argmax(scores))].endswith("#1"))
    return right


def in_two_ranks(folder, layout):
    return run(folder, "two.html", f"--{layout}", "2")


def test_choices_are_those_of_stacked_states_on_one_rank_and_on_two(folder, capsys):
    assert run(folder, "one.html") == 0
    out = capsys.readouterr().out
    assert "questions 9, candidates 45" in out and "candidates without a token to score 1" in out
    found = json.loads((folder / "one.json").read_text())
    curves = found["sweep"]["curves"]
    assert curves["swift"][-1]["accuracy"] == pytest.approx(np.mean(choices_by_hand(folder)))
    assert [point["n"] for point in curves["swift"]] == [1, 2, 4, 5]
    expected = {"random", "shortest", "longest", "majority", "swift", "swift vote", "rm", "swift + rm (ranks)",
                "swift + rm (scaled)", "oracle"}  # fmt: skip
    assert set(curves) == expected
    assert all(name in out for name in expected) and "text reward model" in out
    page = (folder / "one.html").read_text()
    assert "<svg" in page and "http" not in page and all(name in page for name in expected)
    assert found["costs"]["of"]["swift, marginal"]["flops"] < found["costs"]["of"]["text reward model"]["flops"]
    assert spawn(2, in_two_ranks, folder, "tensor") == [0, 0]
    assert json.loads((folder / "two.json").read_text())["sweep"] == found["sweep"]


def test_scores_that_candidates_bring_count_when_this_head_made_them_on_its_own_weights():
    head, another = make_head(), make_head(seed=1)
    made = [(head_fingerprint(head), 0, 0.5), (head_fingerprint(another), 0, 9.0), (head_fingerprint(head), 3, 9.0),
            (None, 0, None), (head_fingerprint(head), 0, None)]  # fmt: skip
    completions = [
        dataclasses.replace(completion(2), hidden_head=by, policy_version=version, hidden_score=score)
        for by, version, score in made
    ]
    groups = [
        dataclasses.replace(group([], []), completions=tuple(part)) for part in (completions[:2], completions[2:])
    ]
    assert stored_scores(groups, head) == {0: 0.5, 4: None}


def test_fewer_candidates_than_n(folder, capsys):
    lines = (folder / "candidates.jsonl").read_text().splitlines()
    short = json.loads(lines[3])
    short["responses"], short["scores"]["rm"] = short["responses"][:2], short["scores"]["rm"][:2]
    (folder / "short.jsonl").write_text("\n".join([*lines[:3], json.dumps(short), *lines[4:]]) + "\n")
    options = dict(candidates="short.jsonl")
    assert run(folder, "short.html", "--cost-candidates", "0", **options) == 0
    assert [p["n"] for p in json.loads((folder / "short.json").read_text())["sweep"]["curves"]["swift"]] == [1, 2]
    capsys.readouterr()
    assert run(folder, "short.html", "--cost-candidates", "0", "--max-n", "4", **options) == 0
    assert "questions with too few candidates left out 1" in capsys.readouterr().out
    assert run(folder, "short.html", "--max-n", "6", **options) == 2
    assert "no question has more than 5 candidates" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("head", "more", "message"),
    [
        (dict(fingerprint="0" * 64), [], "was trained on other weights"),
        (dict(hidden_size=16), [], "hidden_size"),
        (dict(num_layers=3), [], "num_layers"),
        ({}, ["--weights", "1"], "--weights has 1 numbers; give 2, for swift, rm"),
        ({}, ["--scores", "nowhere.jsonl"], "nowhere.jsonl"),
        ({}, ["--orders", "0"], "--orders must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(folder, head, more, message, capsys):
    save_head(head_for(folder / "model", **head), folder / "wrong")
    assert run(folder, "never.html", *more, head="wrong") == 2
    assert message in capsys.readouterr().err
    assert not (folder / "never.html").exists()


def test_candidates_that_cannot_be_graded_or_read_are_refused(folder, capsys):
    row = {"id": "q", "prompt": "1=", "responses": ["#1", "#2"]}
    for content, message in (
        (row, "none of the 2 candidates has a verdict"),
        (row | {"correct": [True, False], "responses": ["1" * 70, "2"]}, "more than the 64 positions of the model"),
        (row | {"scores": {"rm": [1.0, float("nan")]}}, "scores.rm of response 1 is NaN"),
    ):
        (folder / "bad.jsonl").write_text(json.dumps(content) + "\n")
        assert run(folder, "never.html", candidates="bad.jsonl") == 2
        assert message in capsys.readouterr().err
