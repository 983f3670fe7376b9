"""A small slice of the study: real runs of two methods on a tiny setting, and every method's config."""

import importlib
import json
import math
import random
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tiny_models import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_srft.config import from_dict
from megatron_srft.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples" / "arithmetic"))
        patch.syspath_prepend(str(ROOT / "examples" / "study"))
        names = ("make_data", "task", "base_model", "methods", "measure", "tables", "study")
        yield {name: importlib.import_module(name) for name in names}


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def value(expression: str) -> int:
    """A step's value by another road than the task's."""
    return sum(int(term) for term in re.findall(r"[+-]?\d+", expression)) % 10


def test_the_task(modules, tmp_path):
    """Lengths by file, no problem twice; right demonstrations are right in either style, wrong ones have one slip."""
    setting = modules["task"].Setting(prompts=240, demonstrations=100, wrong_share=0.3, brief_share=0.4)
    modules["task"].make(tmp_path, setting)
    files = {name: read(tmp_path / f"{name}.jsonl") for name in ("train", "heldout", "harder", "ood")}
    prompts = [row["prompt"] for rows in files.values() for row in rows]
    assert len(prompts) == len(set(prompts)) == 240 + 3 * 100
    operands = {name: {sum(map(str.isdigit, row["prompt"])) for row in rows} for name, rows in files.items()}
    assert operands == {"train": {3, 4, 5, 6, 7, 8}, "heldout": {3, 4, 5}, "harder": {6, 7, 8}, "ood": {9, 10}}
    shown = [row for row in files["train"] if "demonstration" in row]
    assert len(shown) == 100
    kinds = []
    for row in shown:
        assert sum(map(str.isdigit, row["prompt"])) <= 5
        work, answer = row["demonstration"].split("#")
        steps, is_brief = work.split(";"), "=" not in work
        totals = [step.rpartition("=")[2] for step in steps]
        assert answer == totals[-2] + totals[-1] and len(totals) == sum(map(str.isdigit, row["prompt"])) - 1
        if not is_brief:
            slips = [step for step in steps if value(step.partition("=")[0]) != int(step.rpartition("=")[2])]
            assert len(slips) == (answer != row["answer"])
        kinds.append((is_brief, answer == row["answer"]))
    assert 0.25 < sum(brief for brief, _ in kinds) / 100 < 0.55
    assert 0.55 < sum(right for _, right in kinds) / 100 < 0.85


@pytest.mark.parametrize("full", [True, False], ids=["full", "quick"])
def test_every_method_is_a_valid_config_with_the_same_budget(modules, full):
    study = modules["study"]
    budget = study.FULL if full else study.SHORT
    setting = modules["task"].Setting()
    assert setting.demonstrations / setting.prompts == budget.demonstrated_share
    place = study.Study(folder=Path("runs"), base=Path("base"), data=Path("data"), budget=budget)
    for name in modules["methods"].METHODS:
        stages = [config for _, config in from_dict(place.settings(name, seed=3)).stage_configs()]
        sampled = [config for config in stages if config.samples_rollouts]
        imitated = [config for config in stages if not config.samples_rollouts]
        assert all(config.seed == 3 and config.name == f"{name}-s3" for config in stages)
        completions = [c.steps * c.batch.prompts_per_step * c.batch.rollouts_per_prompt for c in sampled]
        assert completions == [budget.steps * budget.prompts * 8] * len(sampled)
        shown = [config.steps * config.batch.prompts_per_step for config in imitated]
        assert shown == [budget.steps * budget.prompts / 4] * len(imitated)
        assert len(sampled) <= 1 and len(imitated) <= 1 and stages


def test_presets_and_baseline_are_methods(modules):
    methods = modules["methods"]
    assert {*methods.QUICK, methods.BASELINE} <= set(methods.METHODS)
    assert {"sft", "sft-kl", "psft", "grpo", "luffy", "srft-paper", "srft-released"} <= set(methods.METHODS)


def test_the_base_model(modules, tmp_path, monkeypatch):
    """A shortened course gives a Hugging Face folder; documents guess or go on, none teaches to begin."""
    base_model = modules["base_model"]
    generator, kinds = random.Random(0), []
    for _ in range(200):
        prompt, response, begins = base_model.document(generator, base_model.LENGTHS, hasty_share=0.25)
        assert response == modules["task"].worked(prompt) or re.fullmatch(r"#[0-9]{2}", response)
        assert begins == response.startswith("#")
        kinds.append(begins)
    assert 0.15 < sum(kinds) / 200 < 0.35
    monkeypatch.setattr(base_model, "LESSONS", (({2: 1.0}, 4),))
    monkeypatch.setattr(base_model, "GOAL", 0.0)
    monkeypatch.setattr(base_model, "QUIET_STEPS", 2)
    monkeypatch.setattr(base_model.pretrain, "CHECK_EVERY", 2)
    monkeypatch.setattr(base_model.pretrain, "COOL_DOWN", 2)
    base_model.make(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == len(base_model.pretrain.VOCABULARY)


def test_when_time_is_up_nothing_is_started(modules, tmp_path):
    study = modules["study"]
    place = study.Study(folder=tmp_path, base=tmp_path, data=tmp_path, budget=study.SHORT)
    assert "time is up" in study.run_one(place, "sft", 0, time.monotonic(), threading.Event())
    stop = threading.Event()
    stop.set()
    assert "interrupted" in study.run_one(place, "sft", 0, math.inf, stop)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_is_not_a_failed_one(modules, tmp_path):
    """Ctrl-C in a terminal reaches the runs too, here before they can save: 130, or the signal itself."""
    log = tmp_path / "log"
    log.write_text("some steps\nerror: no room\n\n")
    for status in (0, 130, -signal.SIGINT, -signal.SIGTERM):
        assert "interrupted" in modules["study"].unfinished(status, log)
    for status in (1, 2, -signal.SIGKILL):
        assert f"failed with status {status}; error: no room" in modules["study"].unfinished(status, log)


class Interrupted(Exception):
    """Ctrl-C at a moment of our choice."""


def interrupt(*arguments, **named):
    raise Interrupted


def test_what_an_interruption_leaves_does_not_look_whole(modules, tmp_path, monkeypatch):
    """train.jsonl and config.json, which `prepare` and `make demo` look for, come last."""
    task, make_data, pretrain = modules["task"], modules["make_data"], modules["base_model"].pretrain
    tokenizer = pretrain.make_tokenizer()
    monkeypatch.setattr(type(tokenizer), "save_pretrained", interrupt)
    with pytest.raises(Interrupted):
        pretrain.save(pretrain.make_model("tiny", tokenizer), tokenizer, tmp_path / "base")
    assert list((tmp_path / "base").iterdir()) == []
    makers = {
        task: lambda folder: task.make(folder, task.Setting()),
        make_data: lambda folder: make_data.make(folder, 0, 60, 20, 20, 0.5),
    }
    for module, make in makers.items():
        folder, whole = tmp_path / module.__name__, module.write_rows
        some = lambda path, *rest, whole=whole: interrupt() if path.stem == "ood" else whole(path, *rest)  # noqa: E731
        monkeypatch.setattr(module, "write_rows", some)
        with pytest.raises(Interrupted):
            make(folder)
        assert (folder / "heldout.jsonl").exists() and not (folder / "train.jsonl").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    ("--methods grpo,nope", "unknown method nope; there are sft,"),
    ("--jobs 0", "--jobs: must be a whole number of at least 1, not 0"),
    ("--seeds 0", "--seeds: must be a whole number of at least 1, not 0"),
    ("--hours -1", "--hours: must be a number of at least 0, not -1"),
    ("--target 75", "--target: must be a number above 0 and at most 1, not 75"),
])  # fmt: skip
def test_wrong_options(modules, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["study.py", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        modules["study"].main()
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_folder_is_where_the_command_was_given(modules, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["study.py", "--folder", "mine", "--methods", "grpo,sft,grpo"])
    monkeypatch.setattr(modules["study"], "conduct", lambda study, methods, *rest: (study.folder.resolve(), methods))
    assert modules["study"].main() == (tmp_path / "mine", ["grpo", "sft"])


def test_entropy_and_nll_are_those_of_each_sequence_alone(modules, tmp_path):
    """Padding, batching and the prompt have no part in the means."""
    make_model("qwen2", tmp_path, tied=True, num_hidden_layers=2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompts, responses = ["7+5-3=", "1+2="], [tokenizer("7+5=2#2").input_ids, tokenizer("3#3;4").input_ids]
    entropies, nlls = [], []
    for prompt, response in zip(prompts, responses, strict=True):
        start = tokenizer(prompt).input_ids
        logits = model(torch.tensor([start + response])).logits[0, len(start) - 1 : -1].double()
        distribution = torch.distributions.Categorical(logits=logits)
        entropies.append(distribution.entropy())
        nlls.append(-distribution.log_prob(torch.tensor(response)))
    found = modules["measure"].entropy_and_nll(model, tokenizer, prompts, responses)
    expected = torch.cat(entropies).mean().item(), torch.cat(nlls).mean().item()
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_small_study(modules, tmp_path, capsys):
    """SFT beats GRPO alone where the base earns no reward; a failing method does not stop the others."""
    study, task = modules["study"], modules["task"]
    setting = dict(demonstrated=(2, 3), harder=(4,), ood=(5,), prompts=60, problems=20, demonstrations=30)
    task.make(tmp_path / "data", task.Setting(**setting, brief_share=0.1, wrong_share=0.1))
    pretrain = modules["base_model"].pretrain
    torch.manual_seed(0)
    tokenizer = pretrain.make_tokenizer()
    pretrain.save(pretrain.make_model("tiny", tokenizer), tokenizer, tmp_path / "base")  # knows nothing at all
    budget = modules["methods"].Budget(steps=10, prompts=8, demonstrated_share=0.5)
    place = study.Study(folder=tmp_path / "runs", base=tmp_path / "base", data=tmp_path / "data", budget=budget)
    with pytest.MonkeyPatch.context() as patch:
        broken = modules["methods"].imitating("psft", clip=0.28, warmup_steps=10_000)
        patch.setitem(modules["methods"].METHODS, "broken", broken)
        assert study.conduct(place, ["broken", "sft", "grpo"], seeds=1, jobs=1, hours=0.1, target=0.1) == 1
    out = capsys.readouterr()
    assert "broken-s0: failed with status 2" in out.err and "warmup_steps" in out.err
    results = json.loads((place.folder / "results.json").read_text())
    assert set(results["spent"]) == {"sft", "grpo"}
    assert [results["spent"][m][0]["completions"] for m in ("sft", "grpo")] == [0, 10 * 8 * 8]
    assert [results["spent"][m][0]["demonstrations"] for m in ("sft", "grpo")] == [40, 0]
    assert all(results["spent"][m][0]["CPU seconds"] > 0 for m in ("sft", "grpo"))
    tokens = sum(line["count/completions"] * line["response_length/mean"] for line in metrics(place, "grpo"))
    assert results["spent"]["grpo"][0]["rollout tokens"] == pytest.approx(tokens)

    models = {name: figures[0] for name, figures in results["final_models"].items()}
    nll = {name: figures["nll/demonstrations"] for name, figures in models.items()}
    assert nll["sft"] < nll["base model"] - 0.1
    assert nll["grpo"] == pytest.approx(nll["base model"], rel=0.05), "no reward, nothing to learn from"
    assert max(line["accuracy"] for line in metrics(place, "grpo")) < 0.1
    table = (place.folder / "results.md").read_text()
    assert all(f"| {name} |" in table for name in ("sft", "grpo", "base model"))
    assert (place.folder / "comparison.html").exists()

    place.cost_file("sft", 0).unlink()  # as when the study was killed and the run went on to its end
    before = (place.folder / "sft-s0" / "metrics.jsonl").stat().st_mtime_ns
    assert study.conduct(place, ["sft", "grpo"], seeds=1, jobs=1, hours=0.1, target=0.1) == 0
    assert (place.folder / "sft-s0" / "metrics.jsonl").stat().st_mtime_ns == before, "a finished run was run again"
    again = json.loads((place.folder / "results.json").read_text())["spent"]
    assert again["grpo"] == results["spent"]["grpo"] and "CPU seconds" not in again["sft"][0]


def metrics(place, method: str) -> list[dict]:
    return [line for line in read_metrics(place.run_folder(method, 0)) if "loss" in line]
