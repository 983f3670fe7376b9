"""From the options of `megatron-srft data` to what its tools work with."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_srft import config as configuration
from megatron_srft.config import (
    VERIFIERS,
    DataConfig,
    ExactRewardConfig,
    MathRewardConfig,
    RewardConfig,
    RunConfig,
    SamplingConfig,
)
from megatron_srft.config.verifiers import is_address
from megatron_srft.curation.harvest import verifiers
from megatron_srft.curation.selection import Selection
from megatron_srft.curation.sources import EndpointSource, LocalSource, Source
from megatron_srft.rewards import Scorer
from megatron_srft.rewards.endpoint import ChatEndpoint

BACKOFF_SECONDS = 1.0


def read_config(options: argparse.Namespace) -> RunConfig:
    """The sections data and rewards: of --config, else the defaults; --reward takes the place of the verifier.

    Raises:
        ConfigError, ValueError: the file is wrong, or options do not go together.
    """
    if options.answer_after and options.reward is None:
        raise ValueError("--answer-after needs --reward math or --reward exact")
    config = configuration.load(options.config) if options.config is not None else RunConfig()
    if options.reward is not None:
        kind = {"math": MathRewardConfig, "exact": ExactRewardConfig}[options.reward]
        config = replace(config, rewards=(kind(answer_after=options.answer_after),))
    if not any(reward.kind in VERIFIERS for reward in config.rewards):
        raise ValueError(f"{options.config}: rewards has no verifier; add an item of kind {', '.join(VERIFIERS)}")
    return config


@contextmanager
def open_scorer(rewards: tuple[RewardConfig, ...]) -> Iterator[Scorer]:
    """A tested scorer of the verifiers among the rewards. Raises VerifierError when it does not work."""
    with Scorer(verifiers(rewards)) as scorer:
        scorer.self_test()
        yield scorer


@contextmanager
def open_source(options: argparse.Namespace, data: DataConfig) -> Iterator[Source]:
    """The model of --model, behind --url or in this process.

    Raises:
        ConfigError, ValueError: the folder or the address is wrong, or the key is missing.
    """
    if options.url is None:
        yield LocalSource(Path(options.model), data)
        return
    if not is_address(options.url):
        raise ValueError(f"--url must look like http://localhost:8000/v1, not {options.url!r}")
    endpoint = ChatEndpoint(
        "--api-key-variable",
        options.url,
        api_key_variable=options.api_key_variable,
        timeout_seconds=options.timeout,
        retries=options.retries,
        backoff_seconds=BACKOFF_SECONDS,
        concurrency=options.concurrency,
    )
    try:
        yield EndpointSource(endpoint, options.model, data.system_prompt)
    finally:
        endpoint.close()


def sampling(options: argparse.Namespace) -> SamplingConfig:
    return SamplingConfig(temperature=options.temperature, top_p=options.top_p, max_response_tokens=options.max_tokens)


def selection(options: argparse.Namespace) -> Selection:
    """Raises ValueError when no length or no second answer could be kept."""
    if options.max_kept_tokens is not None and options.max_kept_tokens < options.min_tokens:
        raise ValueError(f"--max-kept-tokens {options.max_kept_tokens} is below --min-tokens {options.min_tokens}")
    if options.temperature == 0 and options.samples > 1:
        raise ValueError("--samples above 1 needs --temperature above 0 (greedy answers are all the same)")
    return Selection(
        keep=options.keep, count=options.keep_count, min_tokens=options.min_tokens, max_tokens=options.max_kept_tokens
    )


def mode(options: argparse.Namespace) -> str:
    """Of the output: new, resume or overwrite."""
    return "overwrite" if options.overwrite else "resume" if options.resume else "new"


NOT_OF_AN_OUTPUT = {
    "output", "overwrite", "resume", "debug", "dropped", "max_problems", "config", "reward", "answer_after",
    "actions", "url", "api_key_variable", "concurrency", "timeout", "retries",
}  # fmt: skip
"""Options that change no row, or stand in the record in another form."""

NOT_OF_A_ROW = ("train", "demonstrations", "shuffle")
"""Keys of data that the data tools do not use."""


def recorded(options: argparse.Namespace, config: RunConfig) -> dict[str, Any]:
    """Everything on which an output's rows depend, to compare on --resume."""
    values = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k not in NOT_OF_AN_OUTPUT}
    data, rewards = configuration.to_dict(config.data), configuration.to_dict(verifiers(config.rewards))
    return values | {f"data.{k}": v for k, v in data.items() if k not in NOT_OF_A_ROW} | {"rewards": rewards}
