"""What the tests of the hidden-state reward scored by vLLM do inside their process."""

import json
from dataclasses import replace
from pathlib import Path

from reward_heads import make_head
from tiny_models import make_tokenizer
from vllm_runs import prepare_process

from megatron_srft import config as configuration
from megatron_srft.hidden_reward import prompt_fingerprint, save_head
from megatron_srft.rollout import dump_path, load_dump
from megatron_srft.train import run_training
from megatron_srft.trainer import parallel
from megatron_srft.trainer.trainer import Trainer

UNMOVED = ["name=probe", "rewards=[{kind: exact}]", "optimizer.lr=1e-9", "checkpoint.every=0"]


def write_head(folder: Path, path: Path) -> None:
    """A head for the weights that the run begins with."""
    config = configuration.load(path)
    groups = parallel.start(config.parallel, config.seed)
    head = make_head(Trainer(config, groups).base_model())
    parallel.stop()
    prompts = prompt_fingerprint(config.data, make_tokenizer())
    save_head(replace(head, config=replace(head.config, prompt_format=prompts)), folder)


def write_answers(folder: Path, path: Path) -> None:
    """Make the first thing that the model says to a prompt the right answer, as long as it has hardly moved."""
    config = configuration.load(path, UNMOVED)
    run_training(config)
    groups = [group for step in range(4) for group in load_dump(dump_path(config.folder / "rollouts", step))]
    said = {group.prompt.text: group.completions[0].text for group in groups}
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    rows = [row | {"answer": said[row["prompt"]]} for row in rows]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def trained(folder: Path, path: Path) -> None:
    """A run that is ended before its last step, and goes on in the same process."""
    prepare_process()
    write_head(folder / "head", path)
    write_answers(folder, path)
    run_training(configuration.load(path, ["steps=3"]))
    run_training(configuration.load(path))
