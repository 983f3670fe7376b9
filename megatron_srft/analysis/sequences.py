"""Texts to be measured: demonstrations of data files, dumped rollouts, and samples, as training sequences."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_srft.advantages import to_sequences, with_advantages
from megatron_srft.config import ConfigError, RunConfig
from megatron_srft.data import RowCounts, check_vocabulary, load_dataset
from megatron_srft.data.readers import read_rows
from megatron_srft.distributed import is_main
from megatron_srft.rollout import load_dump
from megatron_srft.sample import Group, Prompt, TrainingSequence
from megatron_srft.trainer.conversion import read_hf_config


def read_prompts(files: Sequence[str | Path], settings: RunConfig, tokenizer: Any, most: int = 0) -> list[Prompt]:
    """The prompts of data files, with their demonstrations, under the templates and limits of `settings`.

    Args:
        most: use only the first this many prompts; 0 uses all.

    Raises:
        ValueError: as `load_dataset`; or the tokenizer makes tokens that the model does not have.
    """
    data = replace(settings.data, train=tuple(map(str, files)), demonstrations=())
    dataset = load_dataset(data, settings.rollout, tokenizer)
    if is_main():
        print(f"data: {dataset.report}", flush=True)
    prompts = list(dataset.prompts[: most or None])
    check_vocabulary(prompts, read_hf_config(settings.model.path)["vocab_size"])
    return prompts


def demonstrations(prompts: Sequence[Prompt], files: Sequence[str | Path]) -> list[TrainingSequence]:
    """Every demonstration of every prompt, with the advantage 1 of PSFT.

    Raises:
        ConfigError: there is none.
    """
    found = [
        sequence(prompt, shown.token_ids, group, is_demonstration=True)
        for group, prompt in enumerate(prompts)
        for shown in prompt.demonstrations
    ]
    if not found:
        names = ", ".join(map(str, files))
        raise ConfigError(
            f"{names}: no prompt has a demonstration; name their field with data.demonstration_key (--config), or let "
            "a policy write the texts"
        )
    return found


def completions(groups: Sequence[Group]) -> list[TrainingSequence]:
    """Every completion of every group, with advantage 0."""
    return [
        sequence(group.prompt, completion.token_ids, number, is_demonstration=False)
        for number, group in enumerate(groups)
        for completion in group.completions
    ]


def dumped(files: Sequence[Path], settings: RunConfig, most: int = 0) -> list[TrainingSequence]:
    """The completions of dumped rollouts with the advantages that `settings` give them; demonstrations are left out.

    Args:
        settings: a resolved config.
        most: use only the first this many groups of each file; 0 uses all.

    Raises:
        ValueError: a file is damaged, or holds groups that were not scored.
    """
    found = []
    for path in files:
        groups = load_dump(path)[: most or None]
        if any(group.scores is None for group in groups):
            raise ValueError(f"{path}: its rollouts have no scores, so their advantages are not known")
        found += with_advantages(to_sequences(groups), groups, settings.advantage, settings.rewards)
    return [one for one in found if not one.is_demonstration]


def is_dump(path: Path) -> bool:
    """Whether a file is a rollout dump (RUN/rollouts/step-NNNNNN.jsonl.zst) and no data file.

    Raises:
        ValueError: the file is missing, empty or damaged.
    """
    if not path.name.endswith((".jsonl", ".jsonl.zst")):
        return False
    first = next(read_rows(path, (), RowCounts()))
    return "completions" in first.fields and isinstance(first.fields.get("prompt"), dict)


def sequence(prompt: Prompt, response: np.ndarray, group: int, *, is_demonstration: bool) -> TrainingSequence:
    """Prompt and response, ready to be measured; a demonstration has advantage 1, a completion 0."""
    return TrainingSequence(
        token_ids=np.concatenate([prompt.token_ids, response]).astype(np.int32),
        prompt_length=len(prompt.token_ids),
        is_demonstration=is_demonstration,
        advantages=np.full(len(response), float(is_demonstration), np.float32),
        correct=False,
        group=group,
    )


def response(one: TrainingSequence) -> np.ndarray:
    """[response] its tokens."""
    return one.token_ids[one.prompt_length :]
