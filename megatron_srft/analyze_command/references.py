"""Texts of reference policies, as sequences of the tokenizer of the policies that are measured."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_srft.analysis import sequences
from megatron_srft.analysis.policy import STREAM, PolicyReader
from megatron_srft.config import ConfigError, RunConfig
from megatron_srft.data.templates import tokenize
from megatron_srft.distributed import is_main
from megatron_srft.rollout import collect, load_local_engine, load_tokenizer
from megatron_srft.sample import Completion, TrainingSequence
from megatron_srft.trainer import parallel

Reference = tuple[list[TrainingSequence], Path]
"""Its texts, and where they came from."""


def read_references(
    options: argparse.Namespace, settings: RunConfig, tokenizer: Any, reader: PolicyReader
) -> dict[str, Reference]:
    """Name -> texts of each --reference NAME=PATH.

    Raises:
        ConfigError: a reference is not NAME=PATH, has a name twice, is a model and there are no --prompts, or has no
            text that the policies could be measured on.
    """
    named: dict[str, Path] = {}
    for text in options.reference:
        name, equals, path = text.partition("=")
        if not (name and equals and path) or name in named:
            raise ConfigError(f"--reference {text!r} must look like NAME=PATH, each name once")
        named[name] = Path(path)
    found = {}
    for name, path in named.items():
        if path.is_dir():
            found[name] = (_generated(path, options, settings, tokenizer, reader), path)
        else:
            prompts = sequences.read_prompts([path], settings, tokenizer, options.max_problems)
            found[name] = (sequences.demonstrations(prompts, [path]), path)
    return found


def _generated(
    folder: Path, options: argparse.Namespace, settings: RunConfig, tokenizer: Any, reader: PolicyReader
) -> list[TrainingSequence]:
    """What the model in `folder` answers to --prompts under its own templates, tokenised anew for the policies."""
    if not options.prompts:
        raise ConfigError(f"the reference {folder} is a model and needs prompts to answer; add --prompts FILE")
    model = replace(settings.model, path=str(folder))
    own = load_tokenizer(model)
    limit = options.max_problems
    asked = sequences.read_prompts(options.prompts, replace(settings, model=model), own, limit)
    prompts = {p.id: p for p in sequences.read_prompts(options.prompts, settings, tokenizer, limit)}
    engine = load_local_engine(model, own, parallel.device(), reader.sampling.max_concurrent_sequences)
    world = reader.groups.world
    nothing = [None] * len(asked)
    groups = collect(engine, asked, nothing, options.samples, reader.sampling, settings.seed, STREAM, world)
    texts = [
        sequences.sequence(prompts[group.prompt.id], response, number, is_demonstration=False)
        for number, group in enumerate(groups)
        for completion in group.completions
        if group.prompt.id in prompts and len(response := _retokenised(completion, tokenizer))
    ]
    lost = len(groups) * options.samples - len(texts)
    if lost and is_main():
        print(f"reference {folder}: {lost} texts left out: empty, or their prompt is too long for the policies")
    if not texts:
        raise ConfigError(
            f"the reference {folder} has no text left of its {lost} answers to {', '.join(map(str, options.prompts))}: "
            "they are empty, or their prompts too long for the policies; take other --prompts or data.max_prompt_tokens"
        )
    return texts


def _retokenised(completion: Completion, tokenizer: Any) -> np.ndarray:
    """[response] the text in the policies' tokens, with their end token where the reference ended by itself."""
    (ids,) = tokenize([completion.text], tokenizer)
    end = [tokenizer.eos_token_id] if completion.finish_reason == "stop" else []
    return np.array([*ids, *end], np.int32)
