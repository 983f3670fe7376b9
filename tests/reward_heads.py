"""Bases and heads for the tests of the hidden-state reward."""

import dataclasses

import torch

from megatron_srft.hidden_reward import BaseModel, HeadConfig, RewardHead

TINY = BaseModel(name="tiny", fingerprint="f" * 64, num_layers=4, hidden_size=8, vocab_size=19, dtype="float32")


def make_head(base: BaseModel = TINY, layers: tuple[int, ...] | None = None, seed: int = 0, **settings) -> RewardHead:
    """A head of random numbers, on all layers unless told."""
    layers = tuple(range(base.num_layers + 1)) if layers is None else layers
    config = HeadConfig(base=base, layers=layers, prompt_format="p" * 64, **settings)
    generator = torch.Generator().manual_seed(seed)
    scale = (4 / config.features) ** 0.5
    weight = torch.randn(len(layers), 2, base.hidden_size, generator=generator) * scale
    bias = torch.randn(2, generator=generator)
    if not config.gate:
        weight[:, 0], bias[0] = 0, 0
    return RewardHead(config=config, weight=weight, bias=bias)


def other(base: BaseModel = TINY, **changes) -> BaseModel:
    return dataclasses.replace(base, **changes)
