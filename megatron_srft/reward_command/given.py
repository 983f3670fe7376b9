"""What training and scoring start from: a model with its weights, and rollouts with verdicts where there are any."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from megatron_srft.analysis.policy import measuring, reading
from megatron_srft.best_of_n.candidates import read_candidates
from megatron_srft.config import ConfigError, ParallelConfig, RunConfig, as_local
from megatron_srft.hidden_reward import prompt_fingerprint
from megatron_srft.model_options import reward
from megatron_srft.policy_sources import find_settings, find_source
from megatron_srft.rewards import Scorer
from megatron_srft.rewards.over_ranks import score_over_ranks
from megatron_srft.rollout import load_tokenizer
from megatron_srft.sample import Group
from megatron_srft.trainer.conversion import read_hf_config
from megatron_srft.trainer.trainer import Trainer
from megatron_srft.weights.architecture import Architecture, read_architecture


@dataclass(frozen=True, kw_only=True, eq=False)
class Given:
    """The questions with their responses, and the model, which is loaded when all that can be wrong has been seen."""

    load: Callable[[], Trainer]
    """Collective."""
    architecture: Architecture
    groups: tuple[Group, ...]
    """Every completion has a score; its verdict may be missing."""
    prompt_format: str
    counts: dict[str, int]
    """What of the files is not among the groups."""


@contextmanager
def given(options: argparse.Namespace) -> Iterator[Given]:
    """Read the rollouts and verify what has no verdict, with the parallel machinery running around it.

    Raises:
        ValueError: an option, the model or a file is wrong.
    """
    if options.max_questions < 0:
        raise ConfigError(f"--max-questions must be at least 0, not {options.max_questions}")
    if options.answer_after and options.reward is None:
        raise ConfigError("--answer-after needs --reward math or --reward exact")
    source = find_source(options.model, options.hf_model)
    settings = _settings(options, find_settings(source, options.config))
    tokenizer = load_tokenizer(source.model)
    hf_config = read_hf_config(source.model.path, source.model.trust_remote_code)
    layout = ParallelConfig(
        tensor=options.tensor, pipeline=options.pipeline, sequence_parallel=options.sequence_parallel
    )
    with reading(settings, layout) as reader:

        def verify(groups: list[Group]) -> list[Group]:
            with Scorer(settings.resolved().rewards) as scorer:
                scorer.self_test()
                return score_over_ranks(scorer, groups, reader.groups.world)[0]

        found = read_candidates(options.rollouts, settings.data, tokenizer, verify)
        groups = found.groups[: options.max_questions or None]
        counts = {"rows whose prompt is too long": found.dropped} if found.dropped else {}
        yield Given(
            load=lambda: reader.trainer_with(source),
            architecture=read_architecture(hf_config),
            groups=groups,
            prompt_format=prompt_fingerprint(settings.data, tokenizer),
            counts=counts,
        )


def _settings(options: argparse.Namespace, settings: RunConfig) -> RunConfig:
    measured = measuring(settings, as_local(settings.rollout))
    return measured if options.reward is None else replace(measured, rewards=(reward(options),))
