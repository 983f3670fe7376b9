"""`megatron-srft reward` on a real model: the head's scores are those that transformers' states give."""

import contextlib
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file
from spawning import spawn
from tiny_models import make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from megatron_srft import cli
from megatron_srft.hidden_reward import load_head
from megatron_srft.rollout import dump
from megatron_srft.sample import Completion, Demonstration, Group, Prompt, Score
from megatron_srft.trainer import parallel

QUESTIONS, RESPONSES = 30, 6
TRAIN = "--lr 0.01 --epochs 8 --patience 8"


def made_up_groups() -> list[Group]:
    """A response is right if it has a 7 in it."""
    random, tokenizer = np.random.default_rng(0), make_tokenizer()

    def ids(text: str) -> np.ndarray:
        return np.array(tokenizer(text)["input_ids"], np.int32)

    groups = []
    for number in range(QUESTIONS):
        prompt = f"{number}+{number % 7}="
        texts = ["".join(random.choice(list("0123456789"), random.integers(2, 9))) for _ in range(RESPONSES)]
        completions = tuple(
            Completion(
                token_ids=np.append(ids(text), 1).astype(np.int32),
                text=text,
                rollout_logprobs=np.zeros(len(text) + 1, np.float32),
                finish_reason="stop",
                policy_version=0,
            )
            for text in texts
        )
        scores = tuple(Score(reward=float("7" in text), streams={"math": 1.0}, correct="7" in text) for text in texts)
        shown = Demonstration(token_ids=np.append(ids("777"), 1).astype(np.int32), text="777")
        groups.append(
            Group(
                prompt=Prompt(id=f"q{number}", text=prompt, token_ids=ids(prompt), answer="7", source="made up"),
                completions=completions,
                scores=scores,
                demonstration=shown,
                demonstration_score=Score(reward=1.0, correct=True),
            )
        )
    return groups


def without_verdicts(groups: list[Group]) -> list[Group]:
    """The first answer of each of the first three has none, and one response is too short to score."""
    changed = []
    for number, group in enumerate(groups):
        scores, completions = list(group.scores), list(group.completions)
        if number < 3:
            scores[0] = replace(scores[0], correct=None, status=("timeout", "unverifiable", "timeout")[number])
        if number == 5:
            completions[1] = replace(completions[1], token_ids=np.array([1], np.int32), text="",
                                     rollout_logprobs=np.zeros(1, np.float32))  # fmt: skip
        changed.append(replace(group, scores=tuple(scores), completions=tuple(completions)))
    return changed


def rows(groups: list[Group]) -> str:
    """The same as a JSONL file of texts."""
    lines = [
        {
            "id": group.prompt.id,
            "prompt": group.prompt.text,
            "responses": [completion.text for completion in group.completions],
            "correct": [score.correct for score in group.scores],
        }
        for group in groups
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, its rollouts in both forms, and a head trained on the dump."""
    folder = tmp_path_factory.mktemp("reward")
    make_model("qwen2", folder / "model", tied=True, num_hidden_layers=2)
    groups = made_up_groups()
    dump(without_verdicts(groups), folder / "step-000000.jsonl.zst")
    (folder / "rows.jsonl").write_text(rows(groups))
    with contextlib.chdir(folder):
        assert cli.main(["reward", "train", "model", "step-000000.jsonl.zst", "--output", "head", *TRAIN.split()]) == 0
    return folder


def stacked_score(model, head, prompt: np.ndarray, response: np.ndarray) -> float:
    """By transformers' hidden states, in float64."""
    with torch.no_grad():
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
        hidden = model(ids, output_hidden_states=True).hidden_states
    end = ids.shape[1] - (head.config.last_token == "excluded")
    states = torch.stack([hidden[layer][0, len(prompt) : end] for layer in head.layers]).double()
    gate, reward = (torch.einsum("lrh,lth->tr", head.weight.double(), states) + head.bias.double()).unbind(1)
    return float((gate.sigmoid() * reward).sum() / gate.sigmoid().sum())


def test_a_head_is_trained_on_a_dump_and_every_response_is_accounted_for(folder):
    tree = json.loads((folder / "head" / "training.json").read_text())
    assert tree["counts"] == {
        "responses": QUESTIONS * RESPONSES,
        "left out: no token to score": 1,
        "left out: no verdict (timeout)": 2,
        "left out: no verdict (unverifiable)": 1,
        "trained and validated on": QUESTIONS * RESPONSES - 4,
        "questions": QUESTIONS,
        "right": sum(s.correct is True for g in without_verdicts(made_up_groups()) for s in g.scores) - (
            made_up_groups()[5].scores[1].correct
        ),
    }  # fmt: skip
    best = tree["epochs"][tree["best_epoch"] - 1]
    assert best["validation_loss"] == min(epoch["validation_loss"] for epoch in tree["epochs"])
    assert best["validation"]["within_auroc"] > 0.9 > best["validation"]["within_auroc_by_length"]
    assert best["train"]["responses"] + best["validation"]["responses"] == QUESTIONS * RESPONSES - 4
    assert sum(one["responses"] for one in best["validation"]["bins"]) == best["validation"]["responses"]
    head = load_head(folder / "head")
    assert head.config.layers == (0, 1, 2) and head.config.parameter_count == 2 * 3 * 32 + 2
    assert head.config.training["validation_loss"] == best["validation_loss"]
    html = (folder / "head" / "training.html").read_text()
    assert html.count("<svg") == 4 and "http" not in html
    assert not list(folder.glob(".*states*")), "the cache is gone"


def scored(folder: Path, *arguments: str) -> dict[str, list]:
    with contextlib.chdir(folder):
        assert cli.main(["reward", "score", *arguments, "--output", "scores.jsonl"]) == 0
    lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    return {line["id"]: line["scores"]["swift"] for line in lines}


def test_scores_are_those_of_transformers_states(folder, capsys):
    found = scored(folder, "model", "head", "step-000000.jsonl.zst")
    model, head = (
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64),
        load_head(folder / "head"),
    )
    for group in without_verdicts(made_up_groups()):
        for completion, own in zip(group.completions, found[group.prompt.id], strict=True):
            if len(completion.token_ids) < 2:
                assert own is None
                continue
            expected = stacked_score(model, head, group.prompt.token_ids, completion.token_ids)
            assert own == pytest.approx(expected, abs=1e-4)
    printed = capsys.readouterr().out
    assert "180 responses of 30 questions, 1 without a token to score" in printed
    of_rows = scored(folder, "model", "head", "rows.jsonl")
    assert of_rows["q9"] == pytest.approx(found["q9"], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("recomputed", ""),
        ("logits", "--logits --last-token included --loss pairwise"),
        ("plain", "--layers 2 0 --no-gate --normalisation rms --standardise --demonstrations"),
    ],
)
def test_variants_are_trained_and_score_as_they_say(folder, name, options, capsys):
    with contextlib.chdir(folder):
        arguments = f"reward train model step-000000.jsonl.zst --output {name} --cache-gib 0 {TRAIN} {options}"
        assert cli.main(arguments.split()) == 0
    assert "recomputed every epoch" in capsys.readouterr().out
    head, cached = load_head(folder / name), load_head(folder / "head")
    if name == "recomputed":
        torch.testing.assert_close(head.weight, cached.weight, atol=1e-5, rtol=0)
        return
    tree = json.loads((folder / name / "training.json").read_text())
    assert tree["epochs"][-1]["validation"]["within_auroc"] > 0.8
    found = scored(folder, "model", name, "rows.jsonl")
    if name == "logits":
        assert (head.config.trained_on, head.layers) == ("logits", (2,))
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
        group = made_up_groups()[4]
        for completion, own in zip(group.completions, found["q4"], strict=True):
            expected = stacked_score(model, head, group.prompt.token_ids, completion.token_ids)
            assert own == pytest.approx(expected, abs=1e-4)
    else:
        assert head.layers == (0, 2) and not head.config.gate and head.weight[:, 0].eq(0).all()
        assert tree["counts"]["demonstrations"] == QUESTIONS
        assert tree["counts"]["trained and validated on"] == QUESTIONS * RESPONSES - 4 + QUESTIONS


def two_ranks(folder: str) -> list[str]:
    torch.set_num_threads(1)
    os.chdir(folder)
    parallel.stop = parallel_state.destroy_model_parallel  # a second world would want another port
    printed = []
    for name, layout, training in (
        ("tokens", "--tensor 2 --sequence-parallel", "--cache-gib 0"),
        ("pipeline", "--pipeline 2", ""),
        ("data", "", ""),
    ):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            arguments = f"reward train model step-000000.jsonl.zst --output {name} --epochs 2 --lr 0.01"
            assert cli.main(f"{arguments} {layout} {training}".split()) == 0
            dist.barrier()
            assert cli.main(f"reward score model {name} rows.jsonl --output {name}.jsonl {layout}".split()) == 0
        printed.append(out.getvalue())
    return printed


@pytest.mark.slow
def test_two_ranks_train_the_same_head_and_one_of_them_tells(folder):
    with contextlib.chdir(folder):
        arguments = "reward train model step-000000.jsonl.zst --output alone --epochs 2 --lr 0.01"
        assert cli.main(arguments.split()) == 0
        assert cli.main("reward score model alone rows.jsonl --output alone.jsonl".split()) == 0
    first, second = spawn(2, two_ranks, str(folder))
    assert all("epoch   2" in text for text in first) and set(second) == {""}
    alone, figures = load_head(folder / "alone"), json.loads((folder / "alone" / "training.json").read_text())
    scores = [json.loads(line) for line in (folder / "alone.jsonl").read_text().splitlines()]
    for name in ("tokens", "pipeline", "data"):
        torch.testing.assert_close(load_head(folder / name).weight, alone.weight, atol=1e-4, rtol=0)
        own = json.loads((folder / name / "training.json").read_text())
        for a, b in zip(figures["epochs"], own["epochs"], strict=True):
            assert a["validation_loss"] == pytest.approx(b["validation_loss"], abs=1e-4)
        for a, line in zip(scores, (folder / f"{name}.jsonl").read_text().splitlines(), strict=True):
            assert a["scores"]["swift"] == pytest.approx(json.loads(line)["scores"]["swift"], abs=1e-3)


@pytest.fixture(scope="module")
def others(folder) -> Path:
    """Files and models that do not fit."""
    groups = made_up_groups()
    right = [replace(g, scores=tuple(replace(s, correct=True) for s in g.scores)) for g in groups]
    dump(right, folder / "right.jsonl")
    halves = [replace(g, scores=tuple(replace(s, correct=n % 2 == 0) for s in g.scores)) for n, g in enumerate(groups)]
    dump(halves, folder / "halves.jsonl")
    short = [
        replace(g, completions=tuple(replace(c, token_ids=c.token_ids[:1]) for c in g.completions)) for g in groups
    ]
    dump(short, folder / "short.jsonl")
    dump(groups[:1], folder / "one.jsonl")
    blank = {"id": "a", "prompt": "1+1=", "responses": ["2", "3"]}
    (folder / "blank.jsonl").write_text(json.dumps(blank) + "\n")
    strange = {**blank, "correct": [True]}
    (folder / "strange.jsonl").write_text(json.dumps(strange) + "\n")
    make_model("qwen2", folder / "wider", tied=True, num_hidden_layers=2, hidden_size=64)
    make_model("qwen2", folder / "other", tied=True, num_hidden_layers=2, seed=9)
    make_model("qwen2", folder / "small", tied=True, num_hidden_layers=2, vocab=9)
    make_model("qwen2", folder / "short", tied=True, num_hidden_layers=2, max_position_embeddings=8)
    make_model("qwen2", folder / "broken", tied=True, num_hidden_layers=2)
    weights = load_file(folder / "broken" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(weights, folder / "broken" / "model.safetensors", metadata={"format": "pt"})
    settings = "data: {system_prompt: Be brief., max_prompt_tokens: 64}\nmodel: {path: model}\n"
    (folder / "system.yaml").write_text(settings + "rollout: {kind: local, max_response_tokens: 64}\n")
    return folder


@pytest.mark.parametrize(("arguments", "message"), [
    ("train nowhere rows.jsonl", "nowhere does not exist; name RUN/checkpoints/step-NNNNNN"),
    ("train model no.jsonl", "no.jsonl: no such file"),
    ("train model rows.jsonl --loss mse", "there is no loss 'mse'; choose bce, hinge, pairwise, infonca, nca"),
    ("train model rows.jsonl --layers 0 3", "--layers 0 3: each once, and within 0 (the embedding) and 2"),
    ("train model rows.jsonl --layers -1", "--layers -1: each once"),
    ("train model rows.jsonl --layers 1 --logits", "--layers is for hidden states; leave it away with --logits"),
    ("train model rows.jsonl --lr 0", "--lr must be above 0, not 0.0"),
    ("train model rows.jsonl --cache-gib -1", "--cache-gib must be at least 0"),
    ("train model rows.jsonl --cache-dir rows.jsonl", "cannot be cached: rows.jsonl/.never.states/rank-00000: "
     "Not a directory after 0.00 GiB"),
    ("train model rows.jsonl --tensor 2", "parallel.tensor x parallel.pipeline = 2 x 1"),
    ("train model rows.jsonl --demonstrations", "--demonstrations takes those of rollout dumps, and no file is one"),
    ("train model right.jsonl", "responses of the training part are right, and a reward is learnt from both"),
    ("train model halves.jsonl --loss dpo", "no question of the training part"),
    ("train model short.jsonl", "no response can be learnt from (180 no token to score)"),
    ("train model one.jsonl", "1 question with verified responses cannot be split"),
    ("train model blank.jsonl", "no response can be learnt from (2 no verdict (unverifiable))"),
    ("train model strange.jsonl", "strange.jsonl:1: correct has 1 verdicts for 2 responses"),
    ("train small rows.jsonl", "and the model's vocabulary ends at 8"),
    ("train short step-000000.jsonl.zst", "and the model 8 positions; name the model that sampled"),
    ("train broken rows.jsonl", "hidden states of the model are NaN or infinite there"),
    ("score broken head rows.jsonl --other-weights", "give no finite reward"),
    ("score wider head rows.jsonl", "is for a model with hidden_size 32 (model), and wider has 64"),
    ("score other head rows.jsonl", "was trained on other weights (model"),
    ("score model head rows.jsonl --config system.yaml", "was trained on prompts of another form"),
    ("score model model rows.jsonl", "model/reward_head.json is missing"),
    ("score model head rows.jsonl --answer-after x", "--answer-after needs --reward"),
])  # fmt: skip
def test_a_mistake_is_one_sentence_and_status_2(others, arguments, message, monkeypatch, capfd):
    monkeypatch.chdir(others)
    assert cli.main(["reward", *arguments.split(), "--output", "never"]) == 2
    assert message in capfd.readouterr().err.strip().splitlines()[-1]
    assert not Path("never").exists() and not list(others.glob(".never*"))


def test_an_output_that_is_there_is_refused(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    assert cli.main("reward train model rows.jsonl --output head".split()) == 2
    assert "--output head is there already" in capfd.readouterr().err
    assert cli.main("reward score model head rows.jsonl --output model".split()) == 2
    assert "--output model: name a file" in capfd.readouterr().err


def test_other_weights_score_when_told_to(folder, others):
    assert len(scored(folder, "other", "head", "rows.jsonl", "--other-weights")) == QUESTIONS


@pytest.mark.parametrize("what", ["train", "score"])
def test_there_is_help(what, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["reward", what, "--help"])
    assert ended.value.code == 0
    assert f"megatron-srft reward {what}" in capsys.readouterr().out
