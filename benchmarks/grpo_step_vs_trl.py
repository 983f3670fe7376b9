"""One GRPO step of the arithmetic example's model on the CPU, ours against TRL's GRPOTrainer, side by side.

    python benchmarks/grpo_step_vs_trl.py --model runs/arithmetic/hf/final

Needs an environment with both packages (README.md of this folder). Both sides get the same weights, prompts, group
size, sampling, length limit, reward, number of micro-batches, optimizer and threads. The learning rate is 0, so that
the policy and with it the lengths stay the same over the steps; nothing else is left out. Each side runs in a process
of its own, for its own peak memory, and the two take turns.

    generate   weights to the engine, sampling, rewards, advantages
    train      forward, backward, clipping, optimizer
    CPU        seconds of processor time; on a busy machine the fairer figure
"""

import argparse
import importlib.util
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from memory import peak_bytes

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "arithmetic"
PHASES = ("generate", "train")
SEQUENCE_TOKENS = 36
"""Longest prompt (10) and worked solution (26): our micro-batches get the tokens that TRL's have with padding."""


@dataclass
class Measurement:
    """One side's steps, in order; seconds of wall clock and of processor time for each phase."""

    generate: list[float]
    train: list[float]
    generate_cpu: list[float]
    train_cpu: list[float]
    tokens: list[float]
    """Mean response tokens of each step."""
    rewards: list[float]
    memory_before: float
    """MiB resident before the first step: imports, model, optimizer."""
    memory_peak: float = 0.0
    """MiB."""


class Clock:
    """Wall and processor seconds since it was last read."""

    def __init__(self):
        self.last = (time.perf_counter(), time.process_time())

    def read(self) -> tuple[float, float]:
        wall, cpu = self.last
        self.last = (time.perf_counter(), time.process_time())
        return self.last[0] - wall, self.last[1] - cpu

    def record(self, measurement: Measurement, phase: str) -> None:
        wall, cpu = self.read()
        getattr(measurement, phase).append(wall)
        getattr(measurement, f"{phase}_cpu").append(cpu)


def empty() -> Measurement:
    """Nothing measured yet but the memory in use now."""
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Measurement([], [], [], [], [], [], resident_pages * resource.getpagesize() / 2**20)


# ---------------------------------------------------------------- ours


def our_config(options: argparse.Namespace, data: Path, folder: Path):
    from megatron_srft import config as configuration

    values = {
        "name": "benchmark", "run_dir": str(folder), "steps": options.steps, "model.path": options.model,
        "parallel.tensor": 1, "data.train": [str(data)], "data.shuffle": False, "evaluation.files": [],
        "batch.prompts_per_step": options.prompts, "batch.rollouts_per_prompt": options.samples,
        "batch.tokens_per_microbatch": options.prompts * options.samples // options.microbatches * SEQUENCE_TOKENS,
        "rollout.max_response_tokens": options.tokens, "objective": {"kind": "grpo"}, "parity.every": 0,
        "optimizer.lr": 0.0, "optimizer.warmup_steps": 0, "optimizer.adam_beta2": 0.999,
    }  # fmt: skip
    return configuration.load(EXAMPLE / "config.yaml", [f"{key}={json.dumps(value)}" for key, value in values.items()])


def run_ours(options: argparse.Namespace, data: Path, folder: Path) -> Measurement:
    """The stages of train.train, timed; the first step's parity check, logging and saving are left out."""
    from megatron_srft.advantages import to_sequences, with_advantages
    from megatron_srft.session import Session
    from megatron_srft.trainer import parallel

    config = our_config(options, data, folder)
    groups = parallel.start(config.parallel, config.seed)
    with Session(config, groups) as run:
        (stage,) = run.remaining_stages()
        run.begin_stage(stage)
        measurement = empty()
        for stage_step in run.remaining_steps(stage):
            clock = Clock()
            rollouts = run.score(run.roll_out(run.next_prompts()))
            sequences = with_advantages(to_sequences(rollouts), rollouts, run.config.advantage)
            clock.record(measurement, "generate")
            metrics = run.update(sequences, stage_step)
            clock.record(measurement, "train")
            measurement.tokens.append(statistics.fmean(len(c.token_ids) for g in rollouts for c in g.completions))
            measurement.rewards.append(statistics.fmean(score.reward for g in rollouts for score in g.scores))
            run.finish_step(rollouts, metrics)
    parallel.stop()
    return measurement


# ---------------------------------------------------------------- TRL


def trl_config(options: argparse.Namespace, folder: Path):
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, max_steps=options.steps, learning_rate=0.0,
        lr_scheduler_type="constant", weight_decay=0.01, max_grad_norm=1.0, beta=0.0, loss_type="grpo",
        num_generations=options.samples, max_completion_length=options.tokens, temperature=1.0,
        per_device_train_batch_size=options.prompts * options.samples // options.microbatches,
        gradient_accumulation_steps=options.microbatches, gradient_checkpointing=False, shuffle_dataset=False,
        report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip


def exact_reward(completions: list[str], answer: list[str], **unused) -> list[float]:
    pairs = zip(completions, answer, strict=True)
    return [float("#" in text and text.rpartition("#")[2] == right) for text, right in pairs]


def run_trl(options: argparse.Namespace, data: Path, folder: Path) -> Measurement:
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer

    clock = Clock()

    class Timed(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            clock.read()
            batch = super()._generate_and_score_completions(inputs)
            clock.record(measurement, "generate")
            measurement.tokens.append(batch["completion_mask"].sum().item() / len(batch["completion_mask"]))
            return batch

    class StepEnd(TrainerCallback):
        def on_step_end(self, *unused, **also_unused):
            clock.record(measurement, "train")

    def reward(**columns) -> list[float]:
        rewards = exact_reward(**columns)
        measurement.rewards.append(statistics.fmean(rewards))
        return rewards

    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(options.model, padding_side="left"),
        reward_funcs=reward,
        args=trl_config(options, folder),
        train_dataset=load_dataset("json", data_files=str(data), split="train", cache_dir=str(folder)),
        callbacks=[StepEnd()],
    )
    measurement = empty()
    trainer.train()
    return measurement


# ---------------------------------------------------------------- side by side


def write_prompts(path: Path, count: int) -> None:
    """Prompts with answers of the example's training lengths; no demonstrations, which TRL has no place for."""
    sys.path.insert(0, str(EXAMPLE))
    import make_data

    generator = random.Random(7)
    prompts = make_data.distinct_problems(generator, make_data.TRAIN_OPERANDS, count, set())
    make_data.write_rows(path, prompts, set())


def run_side(side: str, options: argparse.Namespace) -> Measurement:
    """Run one side in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--side", side], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="runs/arithmetic/hf/final", help="Hugging Face folder; `make demo` writes it"
    )
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--samples", type=int, default=8, help="completions per prompt")
    parser.add_argument("--tokens", type=int, default=40, help="longest completion")
    parser.add_argument("--microbatches", type=int, default=4, help="micro-batches per step")
    parser.add_argument("--steps", type=int, default=8, help="steps of each process")
    parser.add_argument("--warmup", type=int, default=2, help="first steps that do not count")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side, taking turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", choices=("ours", "trl"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run_child(options)
        return
    missing = [name for name in ("trl", "megatron.core") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"{missing[0]} is not installed here; benchmarks/README.md says how to get both into one environment")
    rounds = [(run_side("ours", options), run_side("trl", options)) for _ in range(options.rounds)]
    ours, theirs = zip(*rounds, strict=True)
    report(ours, theirs, options)


def run_child(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "prompts.jsonl"
        write_prompts(data, options.prompts * options.steps)
        run = run_ours if options.side == "ours" else run_trl
        measurement = run(options, data, Path(folder))
    measurement.memory_peak = peak_bytes() / 2**20
    print(json.dumps(asdict(measurement)))


def report(ours: tuple[Measurement, ...], theirs: tuple[Measurement, ...], options: argparse.Namespace) -> None:
    """Medians over the counted steps of all rounds; the ratio is TRL / ours."""

    def steps(side: tuple[Measurement, ...], name: str) -> list[float]:
        return [value for m in side for value in getattr(m, name)[options.warmup :]]

    def show(name: str, unit: str, digits: int, pick: Callable[[tuple[Measurement, ...]], float]) -> None:
        a, b = pick(ours), pick(theirs)
        print(f"{name:<26}{a:>10.{digits}f}{b:>10.{digits}f} {unit:<5}{b / a:>8.2f}")

    print(f"{options.prompts} prompts x {options.samples}, {options.microbatches} micro-batches,", end=" ")
    print(f"{options.threads} thread(s), medians of {len(steps(ours, 'train'))} steps\n")
    print(f"{'':<26}{'ours':>10}{'TRL':>10} {'':<5}{'TRL/ours':>8}")
    for suffix, kind in (("", "wall"), ("_cpu", "CPU")):
        for phase in PHASES:
            show(f"{phase}, {kind}", "s", 3, lambda side, n=phase + suffix: statistics.median(steps(side, n)))
        show(f"step, {kind}", "s", 3, lambda side, x=suffix: statistics.median(whole_steps(side, x, options.warmup)))
    show("peak memory", "MiB", 0, lambda side: max(m.memory_peak for m in side))
    show("  before the first step", "MiB", 0, lambda side: max(m.memory_before for m in side))
    show("response tokens", "", 1, lambda side: statistics.fmean(steps(side, "tokens")))
    show("mean reward", "", 3, lambda side: statistics.fmean(steps(side, "rewards")))


def whole_steps(side: tuple[Measurement, ...], suffix: str, warmup: int) -> list[float]:
    pairs = [zip(getattr(m, "generate" + suffix), getattr(m, "train" + suffix), strict=True) for m in side]
    return [a + b for steps in pairs for a, b in list(steps)[warmup:]]


if __name__ == "__main__":
    main()
