"""The options of a command that lets one model answer: its settings and its weights."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from megatron_srft import config as configuration
from megatron_srft import distributed
from megatron_srft.config import (
    ExactRewardConfig,
    MathRewardConfig,
    ParallelConfig,
    RewardConfig,
    RunConfig,
    as_local,
    as_servers,
    as_vllm,
)
from megatron_srft.convert import checkpoint_model, run_config
from megatron_srft.trainer import parallel
from megatron_srft.trainer.conversion import export_policy
from megatron_srft.trainer.manifest import is_checkpoint

ALONE = ParallelConfig()
"""Every rank holds the whole model; under torchrun the ranks share the problems."""


def answer_settings(options: argparse.Namespace) -> RunConfig:
    """The settings of the config file (or of a checkpoint's run) with --engine, --max-response-tokens and --reward in
    their place.

    Raises:
        ConfigError: an option has an impossible value.
    """
    config = _file_settings(options)
    # Servers only when they are named: a run may be using them, and would end when they get other weights.
    kind = options.engine or ("vllm" if config.rollout.kind == "vllm" else "local")
    rollout = {"local": as_local, "vllm": as_vllm, "vllm_server": as_servers}[kind](config.rollout)
    if options.max_response_tokens is not None:
        rollout = replace(rollout, max_response_tokens=options.max_response_tokens)
    rewards = config.rewards if options.reward is None else (reward(options),)
    return replace(config, rollout=rollout, rewards=rewards)


def _file_settings(options: argparse.Namespace) -> RunConfig:
    if options.config is not None:
        config = configuration.load(options.config)
    elif is_checkpoint(options.model):
        config = run_config(options.model, ALONE, options.hf_model)
    else:
        config = RunConfig()
    if not is_checkpoint(options.model):
        return replace(config, model=replace(config.model, path=str(options.model)), parallel=ALONE)
    if options.hf_model is not None:
        config = replace(config, model=replace(config.model, path=str(options.hf_model)))
    return replace(config, parallel=ALONE)


def reward(options: argparse.Namespace) -> RewardConfig:
    """The verifier named on the command line."""
    kind = {"math": MathRewardConfig, "exact": ExactRewardConfig}[options.reward]
    return kind(answer_after=options.answer_after)


@contextmanager
def weights_of(
    model: Path, config: RunConfig
) -> Iterator[tuple[distributed.Group, Iterator[tuple[str, torch.Tensor]] | None]]:
    """The world, and a checkpoint's weights (None for a Hugging Face folder, which is read where it is used)."""
    if is_checkpoint(model):
        with checkpoint_model(model, config) as (chunks, groups):
            yield groups.world, export_policy(chunks, groups)
        return
    groups = parallel.start(config.parallel, config.seed)
    try:
        yield groups.world, None
    finally:
        parallel.stop()
