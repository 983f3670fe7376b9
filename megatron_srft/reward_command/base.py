"""The model that a head belongs to, for commands that read nothing else: no responses, no training."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_srft.analysis.policy import measuring, reading
from megatron_srft.config import ConfigError, ParallelConfig, as_local
from megatron_srft.hidden_reward import prompt_fingerprint
from megatron_srft.policy_sources import find_settings, find_source
from megatron_srft.rollout import load_tokenizer
from megatron_srft.trainer.trainer import Trainer


def check_output(options: argparse.Namespace) -> None:
    """Raises ConfigError when the folder to make is there."""
    if options.output.exists():
        raise ConfigError(f"--output {options.output} is there already; name a folder that is to be made")


@contextmanager
def base_of(options: argparse.Namespace) -> Iterator[tuple[Trainer, str]]:
    """A trainer with the model's weights, and the fingerprint of its prompt format. Collective."""
    source = find_source(options.model, options.hf_model)
    settings = find_settings(source, options.config)
    settings = measuring(settings, as_local(settings.rollout))
    prompts = prompt_fingerprint(settings.data, load_tokenizer(source.model))
    with reading(settings, ParallelConfig(tensor=options.tensor, pipeline=options.pipeline)) as reader:
        yield reader.trainer_with(source), prompts
