"""Bases and heads for the tests of the hidden-state reward."""

import dataclasses
from pathlib import Path

import torch

from megatron_srft.hidden_reward import BaseModel, HeadConfig, RewardHead, weights_fingerprint
from megatron_srft.weights.folder import HfFolder

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


def base_of(model: Path | str) -> BaseModel:
    """What a head for this folder of tiny_models.py says of its base."""
    folder = HfFolder(model)
    return BaseModel(
        name="tiny",
        fingerprint=weights_fingerprint((name, folder.tensor(name)) for name in folder.shapes()),
        num_layers=folder.config["num_hidden_layers"],
        hidden_size=folder.config["hidden_size"],
        vocab_size=folder.config["vocab_size"],
        dtype="float32",
    )
