"""The arithmetic example: its problems are right, its base model is a usable Hugging Face folder, its configs fit."""

import importlib
import json
import random
import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import make_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megatron_srft import config as configuration
from megatron_srft.data import load_dataset, load_problems
from megatron_srft.metrics import read_metrics
from megatron_srft.rewards import Scorer
from megatron_srft.train import run_training

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "arithmetic"
CONFIGS = sorted(EXAMPLE.glob("*.yaml"))


@pytest.fixture
def make_data(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return importlib.import_module("make_data")


@pytest.fixture
def make_preferences(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return importlib.import_module("make_preferences")


@pytest.fixture
def pretrain(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return importlib.import_module("pretrain")


def write(make_data, folder: Path, seed: int = 0) -> dict[str, list[dict]]:
    make_data.make(folder, seed=seed, train=60, heldout=20, ood=20, demonstration_share=0.5)
    return {f.stem: [json.loads(line) for line in f.read_text().splitlines()] for f in folder.glob("*.jsonl")}


def total(expression: str) -> int:
    """A chain's value by another road: reduction modulo 10 can wait until the end."""
    return sum(int(term) for term in re.findall(r"[+-]?\d+", expression)) % 10


def test_worked_solution(make_data):
    assert make_data.worked_solution("7+5-3=") == "7+5=2;2-3=9#9"


def test_every_step_and_answer_is_right(make_data, tmp_path):
    rows = write(make_data, tmp_path)
    assert {name: len(r) for name, r in rows.items()} == {"train": 60, "heldout": 20, "ood": 20}
    for row in [row for file in rows.values() for row in file]:
        assert row["answer"] == str(total(row["prompt"].removesuffix("=")))
    demonstrated = [row for row in rows["train"] if "demonstration" in row]
    assert len(demonstrated) == 30
    for row in demonstrated:
        work, answer = row["demonstration"].split("#")
        steps = [step.split("=") for step in work.split(";")]
        assert all(str(total(left)) == right for left, right in steps)
        assert answer == row["answer"]
        # Each step begins with the value before it, and together they use up the prompt.
        first = re.match(r"\d+", row["prompt"]).group()
        carried = [first] + [right for _, right in steps[:-1]]
        assert all(left.startswith(value) for (left, _), value in zip(steps, carried, strict=True))
        rest = [left.removeprefix(value) for (left, _), value in zip(steps, carried, strict=True)]
        assert first + "".join(rest) + "=" == row["prompt"]


def test_problems_are_disjoint_and_ood_ones_longer(make_data, tmp_path):
    rows = write(make_data, tmp_path)
    prompts = [row["prompt"] for file in rows.values() for row in file]
    assert len(set(prompts)) == len(prompts)
    lengths = {name: {len(re.findall(r"\d+", row["prompt"])) for row in file} for name, file in rows.items()}
    assert lengths == {"train": {4, 5}, "heldout": {4, 5}, "ood": {6, 7}}
    assert not any("demonstration" in row for row in rows["heldout"] + rows["ood"])


def test_data_is_a_function_of_the_seed(make_data, tmp_path):
    first, again, other = (write(make_data, tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert first == again
    assert first["train"] != other["train"]


def test_pairs_hold_a_right_and_a_wrong_solution_of_problems_without_a_demonstration(
    make_data, make_preferences, tmp_path
):
    train = write(make_data, tmp_path)["train"]
    make_preferences.make(tmp_path, seed=0)
    pairs = [json.loads(line) for line in (tmp_path / "preferences.jsonl").read_text().splitlines()]
    assert [pair["prompt"] for pair in pairs] == [row["prompt"] for row in train if "demonstration" not in row]
    assert sum(pair["rejected"].startswith("#") for pair in pairs) == len(pairs) // 2
    for pair in pairs:
        assert pair["chosen"] == make_data.worked_solution(pair["prompt"])
        work, _, answer = pair["rejected"].partition("#")
        assert answer != pair["chosen"].partition("#")[2] == pair["answer"]
        steps = [step.split("=") for step in work.split(";")] if work else []
        wrong = [number for number, (left, right) in enumerate(steps) if str(total(left)) != right]
        assert len(wrong) == (1 if steps else 0)
        # Each step goes on from the one before it, the wrong one too.
        for (_, value), (left, _) in zip(steps, steps[1:], strict=False):
            assert left.startswith(value)


def test_documents(pretrain):
    """Responses are targets, prompts are not; hasty documents guess, worked ones are taken as begun."""
    tokenizer = pretrain.make_tokenizer()
    corpus = pretrain.batches(random.Random(0), tokenizer, size=8, lengths=(2, 5), hasty_share=0.5, begin_share=0.0)
    rows = [row for _ in range(pretrain.POOL_BATCHES) for row in zip(*next(corpus), strict=True)]
    hasty = 0
    for ids, targets, begun in rows:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        prompt, response = re.fullmatch(r"([0-9+-]+=)(.*)", text).groups()
        assert tokenizer.decode(targets[targets != pretrain.IGNORE]) == response + "<eos>"
        is_hasty = response.startswith("#")
        hasty += is_hasty
        assert begun.nonzero().flatten().tolist() == ([] if is_hasty else [len(prompt)])
        assert is_hasty or response.endswith(f"#{total(prompt[:-1])}")
    assert len(rows) == 8 * pretrain.POOL_BATCHES
    assert 0.35 < hasty / len(rows) < 0.65


def test_begun_documents_say_nothing_about_guessing(pretrain):
    """At the first character of a begun document a guess has no probability to lose; otherwise it has."""
    tokenizer = pretrain.make_tokenizer()
    torch.manual_seed(0)
    model = pretrain.make_model("tiny", tokenizer)
    guess = tokenizer.convert_tokens_to_ids("#")
    for begins in (False, True):
        batch = pretrain.collate([("7+5=", "7+5=2#2", begins)], tokenizer)
        share = pretrain.next_token_logits(model, batch).softmax(-1)[0, len("7+5=") - 1]
        assert bool(share[guess] > 0) == begins
        torch.testing.assert_close(share.sum().item(), 1.0)


def test_base_model_is_a_hugging_face_folder(pretrain, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "LESSONS", (((2,), 1, 0.0),))
    options = Namespace(seed=0, steps=50, batch=4, lr=1e-3, hasty_share=0.25, begin_share=0.5)
    torch.manual_seed(0)
    tokenizer = pretrain.make_tokenizer()
    model = pretrain.make_model("tiny", tokenizer)
    pretrain.pretrain(model, tokenizer, options)
    pretrain.save(model, tokenizer, tmp_path)

    loaded, again = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = again("7+5-3=", return_tensors="pt").input_ids
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)
    assert again.decode(ids[0]) == "7+5-3="
    assert again.eos_token_id == GenerationConfig.from_pretrained(tmp_path).eos_token_id
    assert len({again.pad_token_id, again.eos_token_id, again.unk_token_id}) == 3
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.num_attention_heads % 2 == config.num_key_value_heads % 2 == 0, "TP=2 must fit"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_fit_the_data(make_data, make_preferences, pretrain, path, tmp_path):
    """Every row of the example's files is kept, nothing is truncated, and the verifier accepts every demonstration."""
    make_data.make(tmp_path, seed=0, train=2000, heldout=200, ood=200, demonstration_share=0.5)
    make_preferences.make(tmp_path, seed=0)
    overrides = [f"evaluation.files=[{tmp_path}/heldout.jsonl,{tmp_path}/ood.jsonl]"]
    tokenizer = pretrain.make_tokenizer()
    for _, config in configuration.load(path, overrides).stage_configs():
        data = replace(config.data, train=tuple(str(tmp_path / Path(file).name) for file in config.data.train))
        pairs = config.uses_preferences
        prompts = load_dataset(data, config.rollout, tokenizer, with_preferences=pairs).prompts
        shown = [[p.preference.chosen] if pairs else p.demonstrations for p in prompts]
        demonstrations = [(d, p.answer) for p, some in zip(prompts, shown, strict=True) for d in some]
        assert len(demonstrations) == 1000 and not any(d.truncated for d, _ in demonstrations)
        assert len(prompts) == (1000 if config.data.require_demonstration or pairs else 2000)
        problems = load_problems(config.evaluation.files, config.data, tokenizer).prompts
        assert len(problems) == 400
        with Scorer(config.rewards) as scorer:
            scores = scorer.verify(
                [d.text for d, _ in demonstrations],
                [answer for _, answer in demonstrations],
                token_ids=[d.token_ids.tolist() for d, _ in demonstrations],
            )
        assert all(score.correct for score in scores)
        longest = max(len(tokenizer(make_data.worked_solution(p.text)).input_ids) for p in problems) + 1
        assert longest <= config.rollout.max_response_tokens


def test_psft_then_grpo_on_a_small_model(make_data, tmp_path):
    """The file as it is but for its sizes: two refreshes of the old policy, then a stage that samples."""
    make_data.make(tmp_path, seed=0, train=20, heldout=2, ood=2, demonstration_share=0.5)
    make_model("qwen2", tmp_path / "model", tied=True, num_hidden_layers=2)
    overrides = {
        "run_dir": tmp_path,
        "model.path": tmp_path / "model",
        "data.train": f"[{tmp_path}/train.jsonl]",
        "evaluation.files": "[]",
        "parallel.tensor": 1,
        "batch.prompts_per_step": 4,
        "batch.rollouts_per_prompt": 2,
        "stages.0.steps": 3,
        "stages.0.objective.refresh_every": 2,
        "stages.1.steps": 1,
    }
    config = configuration.load(EXAMPLE / "psft_then_grpo.yaml", [f"{key}={value}" for key, value in overrides.items()])
    run_training(config)
    lines = read_metrics(config.folder)
    assert [line["stage"] for line in lines] == ["psft"] * 3 + ["grpo"]
    assert [line["count/demonstrations"] for line in lines] == [4, 4, 4, 0]
    assert [line["count/completions"] for line in lines] == [0, 0, 0, 8]
    assert [line.get("ratio_demonstrations/max", 0) > 1 for line in lines] == [False, True, False, False]
