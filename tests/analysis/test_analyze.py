"""`megatron-srft analyze` on real runs: its figures are those that the runs logged, or that transformers gives."""

import contextlib
import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import write_inputs
from safetensors.torch import load_file, save_file
from spawning import spawn
from tiny_models import make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from megatron_srft import cli
from megatron_srft import config as configuration
from megatron_srft.metrics import is_training, read_metrics
from megatron_srft.rollout import dump, load_dump
from megatron_srft.train import run_training

WHOLE = {"prompts_per_step": 12, "tokens_per_microbatch": 64}
"""Every step sees all twelve demonstrations."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A PSFT run of three steps in one window, and a GRPO run of one step."""
    folder = tmp_path_factory.mktemp("analyze")
    path = write_inputs(
        folder,
        name="psft",
        steps=3,
        batch=WHOLE,
        objective={"kind": "psft", "clip": 0.1, "refresh_every": 4},
        optimizer={"lr": 0.02},
        checkpoint={"every": 1, "keep": 10, "export_every": 2},
    )
    run_training(configuration.load(path))
    path = write_inputs(folder, name="grpo", steps=1, objective={"kind": "grpo"})
    run_training(configuration.load(path))
    return folder


def run(folder: Path, monkeypatch, *arguments: str) -> dict:
    """The JSON figures of one analysis."""
    monkeypatch.chdir(folder)
    assert cli.main(["analyze", *arguments, "--output", "out.html"]) == 0
    assert "<svg" in Path("out.html").read_text() or arguments[0] == "clipped"
    return json.loads(Path("out.json").read_text())


def logged(folder: Path, key: str) -> list[float]:
    return [line[key] for line in read_metrics(folder / "runs" / "psft") if is_training(line)]


def test_clipped_tokens_are_those_that_the_run_clipped(folder, monkeypatch):
    shares = logged(folder, "clip_fraction/demonstrations")
    assert shares[0] == 0 and shares[2] > 0
    for step in (1, 2):
        new = f"runs/psft/checkpoints/step-{step:06d}"
        found = run(
            folder, monkeypatch, "clipped", "model", new, "train.jsonl", "--clip-high", "0.1", "--config", "config.yaml"
        )
        assert found["above"] == pytest.approx(shares[step], abs=1e-6)
        assert found["mean_ratio"] == pytest.approx(logged(folder, "ratio/demonstrations")[step], abs=1e-5)
        assert found["below"] == 0
        assert sum(row["above"] for row in found["by_token"]) == round(found["above"] * found["tokens"])


def test_clipped_tokens_of_rollouts_take_the_advantages_of_their_scores(folder, monkeypatch):
    dump = "runs/grpo/rollouts/step-000000.jsonl.zst"
    found = run(folder, monkeypatch, "clipped", "model", "runs/grpo/checkpoints/step-000001", dump, "--clip-high", "0")
    groups = load_dump(folder / dump)
    rewards = [[s.reward for s in g.scores] for g in groups]
    with_advantage = sum(
        len(c.token_ids)
        for group, own in zip(groups, rewards, strict=True)
        for c, reward in zip(group.completions, own, strict=True)
        if abs(reward - np.mean(own)) > 1e-9
    )
    assert found["tokens"] == with_advantage > 0
    assert found["tokens"] + found["without_advantage"] == sum(len(c.token_ids) for g in groups for c in g.completions)
    assert found["above"] > 0


def test_entropy_and_distance_are_those_that_the_run_logged(folder, monkeypatch):
    entropy = run(folder, monkeypatch, "entropy", "runs/psft", "train.jsonl", "--on", "demonstrations")
    assert [point["step"] for point in entropy["points"]] == [0, 1, 2, 3]
    measured = [point["entropy"]["demonstrations"] for point in entropy["points"]]
    assert measured[:3] == pytest.approx(logged(folder, "entropy/demonstrations"), abs=1e-5)
    trajectory = run(folder, monkeypatch, "trajectory", "runs/psft", "--reference", "expert=train.jsonl",
                     "--reference", "start=model", "--prompts", "train.jsonl")  # fmt: skip
    distances = [point["distances"]["expert"] for point in trajectory["points"]]
    assert distances[:3] == pytest.approx(logged(folder, "nll/demonstrations"), abs=1e-5)
    assert trajectory["references"]["start"]["texts"] == 12


def test_own_samples_are_those_of_each_policy(folder, monkeypatch):
    found = run(folder, monkeypatch, "entropy", "model", "runs/psft/hf/step-000002", "train.jsonl", "--on", "samples",
                "--samples", "3", "--max-problems", "4", "--config", "config.yaml")  # fmt: skip
    first, second = found["points"]
    assert (first["run"], second["run"], second["step"]) == ("model", "psft", 2)
    assert first["entropy"] != second["entropy"] and "demonstrations" not in first["entropy"]


def test_probability_change_is_the_difference_of_transformers_probabilities(folder, monkeypatch):
    found = run(folder, monkeypatch, "probabilities", "model", "runs/psft/hf/final", "train.jsonl",
                "--texts", "after", "--max-problems", "3", "--samples", "2")  # fmt: skip
    assert len(found["texts"]) == 6
    tokenizer = make_tokenizer()
    for name, key in (("model", "before"), ("runs/psft/hf/final", "after")):
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64)
        for text in found["texts"]:
            prompt = tokenizer(text["prompt"])["input_ids"]
            ids = torch.tensor([[*prompt, *text["token_ids"]]])
            with torch.no_grad():
                probabilities = model(ids).logits[0].softmax(-1)[len(prompt) - 1 : -1]
            taken = probabilities.gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()
            np.testing.assert_allclose(text[key], taken, atol=2e-5)


CHANGE = ("probabilities", "model", "runs/psft/checkpoints/step-000003", "train.jsonl", "--texts", "after")


def two_ranks(folder: str) -> str:
    torch.set_num_threads(1)
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(["analyze", *CHANGE, "--tensor", "2", "--output", "two.html"]) == 0
    return printed.getvalue()


def test_two_tensor_parallel_ranks_find_the_same_and_one_of_them_tells(folder, monkeypatch):
    first, second = spawn(2, two_ranks, str(folder))
    assert "two.html" in first and second == ""
    one, two = run(folder, monkeypatch, *CHANGE), json.loads((folder / "two.json").read_text())
    assert [t["token_ids"] for t in one["texts"]] == [t["token_ids"] for t in two["texts"]]
    for a, b in zip(one["texts"], two["texts"], strict=True):
        np.testing.assert_allclose(a["before"], b["before"], atol=1e-5)
        np.testing.assert_allclose(a["after"], b["after"], atol=1e-5)


@pytest.mark.parametrize("texts", ["before", "demonstrations"])
def test_a_policy_and_itself_have_no_difference_at_all(folder, monkeypatch, texts):
    shutil.copytree(folder / "model", folder / "copy", dirs_exist_ok=True)
    found = run(folder, monkeypatch, "probabilities", "model", "copy", "train.jsonl", "--texts", texts,
                "--lower", "0", "--higher", "0", "--config", "config.yaml", "--max-problems", "3")  # fmt: skip
    assert found["shares"]["changed"] == 0 and found["mean_absolute"] == 0 and found["tokens"] > 0


def test_runs_are_compared_from_the_command_line(folder, monkeypatch, capsys):
    found = run(folder, monkeypatch, "compare", "runs/psft", "runs/grpo", "--group", "ps", "--target", "0.5")
    assert list(found["methods"]) == ["ps", "grpo"]
    assert "| ps | 1 | 3 | 0 |" in capsys.readouterr().out


@pytest.fixture(scope="module")
def others(folder) -> Path:
    """Files that do not fit."""
    make_model("qwen2", folder / "words", tied=True, num_hidden_layers=2, tokenizer=False)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["wait"])
    tokenizer.save_pretrained(folder / "words")
    mute = make_model("qwen2", folder / "mute", num_hidden_layers=2, tokenizer=True)
    weights = load_file(mute / "model.safetensors")
    save_file(weights | {"lm_head.weight": 0 * weights["lm_head.weight"]}, mute / "model.safetensors", {"format": "pt"})
    rollouts = load_dump(folder / "runs" / "grpo" / "rollouts" / "step-000000.jsonl.zst")
    shown = [replace(group, completions=(), scores=()) for group in rollouts]
    dump(shown, folder / "shown.jsonl.zst")
    (folder / "empty.jsonl").write_text("")
    ppo = (folder / "config.yaml").read_text().replace("kind: grpo", "kind: ppo")
    (folder / "ppo.yaml").write_text(ppo)
    (folder / "bare.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    return folder


@pytest.mark.parametrize(("arguments", "message"), [
    ("probabilities model nowhere train.jsonl", "nowhere does not exist; name RUN/checkpoints/step-NNNNNN"),
    ("probabilities model runs/psft train.jsonl", "runs/psft is neither a checkpoint nor a Hugging Face folder"),
    ("probabilities model words train.jsonl", "model and words have different tokenizers"),
    ("probabilities model runs/psft/hf/final empty.jsonl", "empty.jsonl: the file is empty"),
    ("probabilities model runs/psft/hf/final no.jsonl", "no.jsonl: no such file"),
    ("probabilities model runs/psft/hf/final train.jsonl --lower 0.5", "--lower 0.5 must lie in [-1, 0]"),
    ("probabilities model runs/psft/hf/final train.jsonl --samples 0", "--samples must be at least 1"),
    ("clipped model runs/psft/hf/final bare.jsonl", "bare.jsonl: no prompt has a demonstration"),
    ("clipped model runs/psft/hf/final train.jsonl runs/grpo/rollouts/step-000000.jsonl.zst",
     "train.jsonl is a data file beside rollout dumps"),
    ("clipped model runs/psft/hf/final runs/grpo/rollouts/step-000000.jsonl.zst --config ppo.yaml",
     "the run's advantages hold a critic's values or a divergence"),
    ("clipped model runs/psft/hf/final train.jsonl --tensor 2", "parallel.tensor x parallel.pipeline = 2 x 1"),
    ("clipped model runs/psft/hf/final train.jsonl --clip-high inf", "--clip-high must be a number of at least 0, not"),
    ("clipped nowhere nowhere train.jsonl --clip-low 2", "--clip-low must lie in [0, 1], not 2"),
    ("probabilities model runs/psft/hf/final shown.jsonl.zst", "shown.jsonl.zst: no completion in these dumps"),
    ("trajectory runs/psft --reference mute=mute --prompts bare.jsonl --temperature 0",
     "the reference mute has no text left of its 1 answers to bare.jsonl"),
    ("trajectory runs/psft --reference model", "--reference 'model' must look like NAME=PATH"),
    ("trajectory runs/psft --reference base=model", "the reference model is a model and needs prompts to answer"),
    ("trajectory runs/psft runs/psft --reference a=train.jsonl", "is named twice"),
    ("entropy runs train.jsonl", "runs is neither a checkpoint nor a Hugging Face folder"),
    ("compare runs/psft nowhere", "nowhere is not a run folder"),
    ("compare runs/psft --target 90", "the target accuracy must be a share"),
])  # fmt: skip
def test_a_mistake_is_one_sentence_and_status_2(others, arguments, message, monkeypatch, capfd):
    monkeypatch.chdir(others)
    assert cli.main(["analyze", *arguments.split(), "--output", "never.html"]) == 2
    assert message in capfd.readouterr().err.strip().splitlines()[-1]
    assert not Path("never.html").exists()


def test_the_figures_do_not_take_the_place_of_the_page(others, monkeypatch, capfd):
    monkeypatch.chdir(others)
    for command in (["compare", "runs/psft"], ["entropy", "model", "train.jsonl"]):
        assert cli.main(["analyze", *command, "--output", "never.json"]) == 2
        assert "--output never.json is a page, with its figures beside it" in capfd.readouterr().err
    assert not Path("never.json").exists()


@pytest.mark.parametrize("what", ["probabilities", "trajectory", "clipped", "entropy", "compare"])
def test_every_analysis_has_help(what, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["analyze", what, "--help"])
    assert ended.value.code == 0
    assert f"megatron-srft analyze {what}" in capsys.readouterr().out
