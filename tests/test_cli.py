"""The command line from outside: exit statuses, one-sentence errors, and each command on a tiny model."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_model

from megatron_srft import cli, train
from megatron_srft.config import ConfigError

ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="1")


def command(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "megatron_srft.cli", *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT | environment, timeout=300,
    )  # fmt: skip


def complaints(result: subprocess.CompletedProcess) -> list[str]:
    """Lines on stderr, but for what is said of every vocabulary of ours beside a config of Qwen2's."""
    return [line for line in result.stderr.splitlines() if not line.startswith("transformers reads ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a model, problems and a config that fit together."""
    folder = tmp_path_factory.mktemp("cli")
    make_model("qwen2", folder / "model", tied=True)
    rows = [{"id": str(i), "prompt": f"{i}+1=", "answer": str(i + 1), "demonstration": f"#{i + 1}"} for i in range(6)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(
        """
name: tiny
steps: 1
model: {path: model}
data: {train: [train.jsonl], max_prompt_tokens: 16}
batch: {prompts_per_step: 2, rollouts_per_prompt: 2, tokens_per_microbatch: 64}
rollout: {kind: local, max_response_tokens: 8}
rewards: [{kind: exact, answer_after: "#"}]
"""
    )
    return folder


def test_help_takes_less_than_a_second():
    start = time.monotonic()
    result = command("--help")
    assert result.returncode == 0
    assert all(name in result.stdout for name in cli.COMMANDS)
    assert (
        time.monotonic() - start < 5
    )  # 0.1 s on an idle machine; torch alone would take longer than this on a busy one


def test_the_command_for_torchrun_takes_options_between_overrides(folder):
    with pytest.raises(ConfigError, match="steps must not be negative"):
        train.main([str(folder / "config.yaml"), "seed=1", "--debug", "steps=-1"])


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert name in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["report", "a", "b"]])
def test_wrong_usage_is_status_2(arguments, capsys):
    try:
        status = cli.main(arguments)
    except SystemExit as ended:
        status = ended.code
    assert status == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "absent.yaml"], "error: cannot read the config file absent.yaml: No such file or directory"),
        (["train", "config.yaml", "optimizer.lrr=1"], "error: unknown key optimizer.lrr; did you mean optimizer.lr?"),
        (["train", "config.yaml", "--ranks", "2"], "error: --ranks belongs to --dry-run"),
        (["train", "config.yaml", "parallel.tensor=2"], "error: parallel.tensor x parallel.pipeline = 2 x 1 = 2 ranks"),
        (["train", "config.yaml", "--dry-run", "model.path=nowhere"], "error: model.path: nowhere is not a folder"),
        (["train", "config.yaml", "--dry-run", "parallel.pipeline=3"], "error: the model's 4 layers cannot be shared"),
        (["train", "config.yaml", "data.train=[no.jsonl]", "--dry-run"], "error: no.jsonl"),
        (["train", "config.yaml", "--dry-run", "--ranks", "3", "parallel.tensor=2"], "error: parallel.tensor x"),
        (["train", "config.yaml", "--dry-run", "megatron.num_layerz=2"], "error: unknown key megatron.num_layerz"),
        (["train", "config.yaml", "--dry-run", "model.path="], "error: model.path is not set"),
        (["train", "config.yaml", "--dry-run", "--ranks", "0"], "error: --ranks must be at least 1, not 0"),
        (["train", "config.yaml", "--dry-run", "run_dir=config.yaml"], "error: run_dir: config.yaml/tiny cannot be"),
        (["train", "config.yaml", "--dry-run", "batch.prompts_per_step=7"], "error: batch.prompts_per_step is 7, but"),
        (
            ["train", "config.yaml", "--dry-run", "data.max_demonstration_tokens=2"],
            "error: objective srft learns from demonstrations, and data.train holds none; 6 were dropped as longer",
        ),
        (["report", "nowhere"], "error: nowhere"),
        (["convert", "nowhere", "x"], "error: model.path: nowhere is not a folder"),
        (["evaluate", "nowhere", "train.jsonl"], "error: model.path 'nowhere'"),
        (["evaluate", "model"], "error: evaluation.files names no file"),
        (["evaluate", "model", "train.jsonl", "--answer-after", "#"], "error: --answer-after needs --reward"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(folder, arguments, message, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    assert cli.main(arguments) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(message)
    assert not (folder / "runs").exists()


def test_debug_shows_where_a_mistake_was_raised(folder):
    result = command("train", "absent.yaml", "--debug", cwd=folder)
    assert "Traceback" in result.stderr


def test_dry_run_prints_the_arithmetic_and_writes_nothing(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert cli.main(["train", "config.yaml", "--dry-run", "parallel.tensor=2", "--ranks", "4"]) == 0
    out = capsys.readouterr().out
    assert "layout: 4 ranks = 2 tensor x 1 context x 1 pipeline x 2 data" in out
    assert "step: 2 prompts, 4 completions, up to 2 demonstrations, 1 update(s)" in out
    assert "6 prompts from 6 rows" in out
    assert "nothing was trained; to train: torchrun --nproc-per-node 4 -m megatron_srft.train config.yaml" in out
    assert sorted(folder.rglob("*")) == before


def test_dry_run_shows_the_command_with_its_overrides(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert cli.main(["train", "config.yaml", "steps=3", "--dry-run", "name=a b"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("-m megatron_srft.train config.yaml steps=3 'name=a b'")


def test_convert_there_and_back_keeps_every_bit(folder, tmp_path):
    there = command("convert", folder / "model", tmp_path / "run")
    assert (there.returncode, complaints(there)) == (0, [])
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000000"
    assert there.stdout == f"{checkpoint}\n"
    assert command("convert", checkpoint, tmp_path / "back").returncode == 0
    weights, back = (load_file(path / "model.safetensors") for path in (folder / "model", tmp_path / "back"))
    assert weights.keys() == back.keys()
    assert all(torch.equal(weights[key], back[key]) for key in weights)


def test_evaluate_gives_a_folder_and_its_checkpoint_the_same_answers(folder, tmp_path):
    assert command("convert", folder / "model", tmp_path / "run").returncode == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000000"
    answers = []
    for number, model in enumerate((folder / "model", checkpoint)):
        out = tmp_path / f"{number}.json"
        options = ["--max-response-tokens", "8", "--reward", "exact", "--answer-after", "#", "--json", str(out)]
        result = command("evaluate", model, folder / "train.jsonl", *options)
        assert (result.returncode, complaints(result)) == (0, [])
        assert result.stdout.splitlines()[0].split()[:3] == ["file", "problems", "greedy"]
        answers.append(json.loads(out.read_text())["greedy_answers"])
    assert answers[0] == answers[1]
    assert len(answers[0]["train"]) == 6


def test_doctor_finds_nothing_wrong_here():
    result = command("doctor")
    assert (result.returncode, result.stdout.splitlines()[-1]) == (0, "everything required works")
