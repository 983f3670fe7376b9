"""`megatron-srft generate`: sampled and verified answers to files of problems, as one rollout dump.

The engine, the templates and the verifiers are those of `evaluate`. What is written can be read wherever rollouts can:
by `reward train`, `best-of-n`, `analyze`, and (under the name step-NNNNNN.jsonl.zst) by a run with rollout.kind replay.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron_srft import distributed
from megatron_srft.config import ConfigError, RunConfig
from megatron_srft.data import Dataset, load_problems
from megatron_srft.evaluate import answering
from megatron_srft.hidden_reward import RewardHead, load_head
from megatron_srft.model_options import answer_settings, weights_of
from megatron_srft.rewards import Scorer
from megatron_srft.rollout import RolloutEngine, collect, dump, load_tokenizer
from megatron_srft.sample import Group, Prompt

STREAM = -3
"""Takes the place of the step in the random streams; no training step, evaluation or analysis has this number."""

ROUNDS_PER_CALL = 8
"""Answers of one call of the engine, as a multiple of those that it decodes at a time."""


def main(options: argparse.Namespace) -> int:
    """Sample, verify, write the dump, and print what came of it."""
    config = settings(options)
    head = None if options.head is None else load_head(options.head)
    with weights_of(options.model, config) as (world, weights):
        groups = generate(config, options.files, options.samples, options.max_problems, world, weights, head)
        if distributed.is_main():
            dump(groups, options.output)
            print(summary(groups))
            print(options.output)
    return 0


def settings(options: argparse.Namespace) -> RunConfig:
    """The settings of the config file (or of a checkpoint's run), with what the command line says in their place.

    Raises:
        ConfigError: an option has an impossible value.
    """
    check_output(options.output)
    if options.samples < 1:
        raise ConfigError(f"--samples must be at least 1, not {options.samples}")
    config = answer_settings(options)
    if options.head is not None and config.rollout.kind != "vllm":
        raise ConfigError(
            f"--head {options.head}: the local engine reads no hidden states; add --engine vllm, or score the answers "
            "with `megatron-srft best-of-n` or `megatron-srft reward score`"
        )
    named = {"temperature": options.temperature, "top_p": options.top_p}
    rollout = replace(config.rollout, **{key: value for key, value in named.items() if value is not None})
    if rollout.temperature == 0 and options.samples > 1:
        raise ConfigError(
            f"at temperature 0 all {options.samples} samples of a problem would be one answer; raise --temperature, or "
            "ask for --samples 1"
        )
    return replace(config, rollout=rollout, seed=config.seed if options.seed is None else options.seed)


def check_output(path: Path) -> None:
    """Raise ConfigError when a dump could not be written under this name; sampling comes first and takes long."""
    if not path.name.endswith((".jsonl", ".jsonl.zst")):
        raise ConfigError(f"--output {path}: the name of a rollout dump ends in .jsonl.zst (or .jsonl)")
    if path.is_dir():
        raise ConfigError(f"--output {path} is a folder; name a file in it")


def generate(
    config: RunConfig,
    files: Sequence[str],
    samples: int,
    max_problems: int = 0,
    world: distributed.Group = None,
    weights: Iterable[tuple[str, torch.Tensor]] | None = None,
    head: RewardHead | None = None,
) -> list[Group]:
    """`samples` verified answers to every problem of the files, the same on every rank.

    Args:
        config: its model, data, rollout, rewards and seed are used.
        max_problems: use only the first this many of each file; 0 uses all.
        weights: take the place of the model folder's own, for example those of a checkpoint.
        head: vLLM scores the answers with it.

    Raises:
        ConfigError, ValueError: the model, the head or a file is missing or wrong, or problems exceed the model's
            positions.
        VerifierError: the rewards' self-test fails.
    """
    tokenizer = load_tokenizer(config.model)
    problems = load_problems(files, config.data, tokenizer, max_problems, key="files", need_answers=False)
    if distributed.is_main():
        print(f"data: {problems.report}", flush=True)
    with answering(config, tokenizer, weights, world, head) as (engine, scorer):
        return _in_calls(engine, scorer, problems, samples, config, world)


def _in_calls(
    engine: RolloutEngine,
    scorer: Scorer,
    problems: Dataset,
    samples: int,
    config: RunConfig,
    world: distributed.Group,
) -> list[Group]:
    """A few calls of the engine one after the other, so that a long job says how far it is."""
    together = config.rollout.max_concurrent_sequences * distributed.size(world) // engine.ranks
    size = max(1, ROUNDS_PER_CALL * together // samples)
    prompts, groups = list(problems.prompts), []
    for start in range(0, len(prompts), size):
        some: list[Prompt] = prompts[start : start + size]
        nothing = [None] * len(some)
        groups += collect(
            engine, some, nothing, samples, config.rollout, config.seed, STREAM, world, score=scorer.score
        )
        if distributed.is_main() and len(prompts) > size:
            print(f"{len(groups)} of {len(prompts)} problems answered", flush=True)
    return groups


def summary(groups: Sequence[Group]) -> str:
    """One line: accuracy over the answers that were judged, and how many were truncated or have no verdict."""
    answers = [pair for group in groups for pair in zip(group.completions, group.scores, strict=True)]
    right = sum(score.correct is True for _, score in answers)
    judged = sum(score.correct is not None for _, score in answers)
    statuses = Counter(score.status for _, score in answers)
    mixed = sum({True, False} <= {score.correct for score in group.scores} for group in groups)
    accuracy = f"accuracy {right / judged:.1%}" if judged else "accuracy unknown"
    counts = {
        "problems": len(groups),
        "answers": len(answers),
        "problems with right and wrong answers": mixed,
        "truncated": sum(completion.finish_reason == "length" for completion, _ in answers),
        "without a final answer": statuses["no_answer"],
        "unverifiable": statuses["unverifiable"],
        "verifier failures": statuses["timeout"] + statuses["crash"],
    }
    without = len(answers) - judged
    note = f"  ({without} answers without a verdict left out)" if without else ""
    return "  ".join([accuracy + note, *(f"{name} {number}" for name, number in counts.items())])
