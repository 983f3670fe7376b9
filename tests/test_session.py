"""Whole runs in this process: what a change of stage must change, and what a run says about its data."""

import json
from dataclasses import replace

import pytest
from runs import saved, write_inputs
from tiny_models import make_model

from megatron_srft import config as configuration
from megatron_srft.config import ConfigError
from megatron_srft.guards import RunStopped
from megatron_srft.metrics import read_metrics
from megatron_srft.rewards.workers import VerifierError
from megatron_srft.rollout import dump, dump_path, load_dump
from megatron_srft.train import run_training


def write_problems(path, count):
    path.write_text("".join(json.dumps({"prompt": f"{i}+0=", "answer": str(i)}) + "\n" for i in range(count)))


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory):
    """SRFT with one held-out file, then GRPO with another; the folder and what was printed."""
    folder = tmp_path_factory.mktemp("run")
    for name, count in (("easy", 2), ("hard", 3)):
        write_problems(folder / f"{name}.jsonl", count)
    path = write_inputs(
        folder,
        name="two",
        evaluation={"files": [str(folder / "easy.jsonl")]},
        stages=[
            {"name": "first", "steps": 1},
            {
                "name": "second",
                "steps": 1,
                "objective": {"kind": "grpo"},
                "evaluation": {"files": [str(folder / "hard.jsonl")]},
            },
        ],
    )
    run_training(configuration.load(path))
    return folder


def test_each_stage_answers_its_own_problems(two_stages):
    lines = read_metrics(two_stages / "runs" / "two")
    held_out = [(line["step"], key) for line in lines for key in line if key.endswith("/greedy")]
    assert held_out == [(0, "eval/easy/greedy"), (2, "eval/hard/greedy")]


def test_grpo_has_no_demonstrations_to_process(two_stages):
    first, second = [line for line in read_metrics(two_stages / "runs" / "two") if "loss" in line]
    assert first["count/demonstrations"] == 3
    assert second["count/demonstrations"] == 0
    groups = load_dump(dump_path(two_stages / "runs" / "two" / "rollouts", 1))
    tokens = sum(len(g.prompt.token_ids) + len(c.token_ids) for g in groups for c in g.completions)
    assert second["count/tokens"] == tokens


def test_speed_leaves_out_evaluation(two_stages):
    first = next(line for line in read_metrics(two_stages / "runs" / "two") if "loss" in line)
    seconds = first["time/step"] - first["time/evaluate"]
    assert first["tokens/s"] == pytest.approx(first["count/tokens"] / seconds)


def test_a_stage_can_bring_another_engine_and_the_data_are_accounted_for(two_stages, tmp_path, capsys):
    groups = load_dump(dump_path(two_stages / "runs" / "two" / "rollouts", 1))
    marked = [replace(g, completions=tuple(replace(c, text="replayed") for c in g.completions)) for g in groups]
    dump(marked, dump_path(tmp_path / "dump", 1))
    path = write_inputs(
        tmp_path,
        name="replay",
        stages=[
            {"name": "first", "steps": 1},
            {"name": "second", "steps": 1, "rollout": {"kind": "replay", "folder": str(tmp_path / "dump")}},
        ],
    )
    config = configuration.load(path)
    run_training(config)
    samples = [json.loads(line) for line in (config.folder / "samples.jsonl").read_text().splitlines()]
    assert {s["response"] for s in samples if s["step"] == 1} == {"replayed"}
    assert "replayed" not in {s["response"] for s in samples if s["step"] == 0}
    assert "12 prompts from 12 rows" in capsys.readouterr().out


def test_a_finished_run_says_so_and_one_with_fewer_steps_is_refused(tmp_path, capsys):
    config = configuration.load(write_inputs(tmp_path, steps=1))
    run_training(config)
    weights = (config.folder / "hf" / "final" / "model.safetensors").read_bytes()
    capsys.readouterr()
    run_training(config)
    assert f"{config.folder} is finished: all 1 steps are done" in capsys.readouterr().out
    assert (config.folder / "hf" / "final" / "model.safetensors").read_bytes() == weights
    with pytest.raises(ConfigError, match="stands at step 1 of stage srft, and the config has steps 0; raise it"):
        run_training(replace(config, steps=0))


def test_stages_that_are_done_cannot_change_their_length(tmp_path):
    stages = ({"name": "first", "steps": 1}, {"name": "second", "steps": 1})
    config = configuration.load(write_inputs(tmp_path, stages=list(stages)))
    run_training(config)
    with pytest.raises(ConfigError, match="has 1 steps before stage second, and the config has 2; keep the stages"):
        run_training(replace(config, stages=({"name": "first", "steps": 2}, stages[1])))


def test_a_mistake_in_a_later_stage_is_told_before_the_first_is_trained(tmp_path):
    later = {"name": "later", "steps": 1, "data": {"train": [str(tmp_path / "absent.jsonl")]}}
    config = configuration.load(write_inputs(tmp_path, stages=[{"name": "first", "steps": 1}, later]))
    with pytest.raises(ValueError, match="absent.jsonl: no such file"):
        run_training(config)
    assert not (config.folder / "metrics.jsonl").exists()


def test_updates_skipped_in_a_row_are_counted_over_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_srft.trainer.trainer.clip_and_step", lambda *unused: (False, 1.0))
    config = configuration.load(write_inputs(tmp_path, steps=2, accounting={"max_skipped_updates": 2}))
    run_training(config)
    with pytest.raises(RunStopped, match="3 updates in a row"):
        run_training(replace(config, steps=3))


def test_a_broken_verifier_of_a_later_stage_is_told_before_the_first_is_trained(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no antlr here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # for the verifier's own process
    later = {"name": "later", "steps": 1, "rewards": [{"kind": "math"}]}
    config = configuration.load(write_inputs(tmp_path, stages=[{"name": "first", "steps": 1}, later]))
    with pytest.raises(VerifierError, match="no antlr here"):
        run_training(config)
    assert not (config.folder / "metrics.jsonl").exists()


def test_a_run_stopped_by_a_guard_has_made_the_evaluation_that_was_due(tmp_path):
    write_problems(tmp_path / "easy.jsonl", 2)
    evaluation = {"files": [str(tmp_path / "easy.jsonl")], "every": 1}
    path = write_inputs(tmp_path, steps=2, evaluation=evaluation, accounting={"max_truncated_share": 0.0})
    config = configuration.load(path)
    with pytest.raises(RunStopped, match="max_truncated_share"):
        run_training(config)
    assert saved(config.folder) == ["step-000001"]
    assert [line["step"] for line in read_metrics(config.folder) if "eval/easy/greedy" in line] == [0, 1]


def test_a_run_does_not_go_on_with_another_model(tmp_path):
    config = configuration.load(write_inputs(tmp_path, steps=1))
    run_training(config)
    other = make_model("qwen2", tmp_path / "other", tied=True, num_hidden_layers=4)
    with pytest.raises(ConfigError, match="is of a model with num_layers 2, and that of model.path has 4; set model"):
        run_training(replace(config, steps=2, model=replace(config.model, path=str(other))))
