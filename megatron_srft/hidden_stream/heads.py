"""The reward heads that a run's stages name, read and checked before anything is trained."""

from collections.abc import Sequence
from typing import Any

from megatron_srft.config import VERIFIERS, ConfigError, RunConfig, SwiftRewardConfig, require, swift_reward
from megatron_srft.hidden_reward import BaseModel, RewardHead, check_fits, load_head, prompt_fingerprint
from megatron_srft.weights.architecture import Architecture


def stream_of(config: RunConfig) -> SwiftRewardConfig | None:
    """The hidden-state reward of a stage; a stage without completions has none, whatever its rewards say."""
    return swift_reward(config.rewards) if config.samples_rollouts else None


def base_of(config: RunConfig, architecture: Architecture, fingerprint: str = "") -> BaseModel:
    """The policy as a head's base: of these sizes, and with weights of this fingerprint."""
    return BaseModel(
        name=config.model.path,
        fingerprint=fingerprint,
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        vocab_size=architecture.vocab_size,
        dtype=config.model.dtype,
    )


def read_heads(stages: Sequence[RunConfig], architecture: Architecture, tokenizer: Any) -> dict[str, RewardHead]:
    """Every head that a stage names, by its folder. Whether it was trained for the policy's weights is asked later.

    Raises:
        ConfigError: it is missing, damaged, or for a model of other sizes or prompts of another form.
    """
    heads: dict[str, RewardHead] = {}
    for config in stages:
        swift = stream_of(config)
        if swift is None:
            continue
        try:
            heads.setdefault(swift.head, load_head(swift.head))
            prompts = prompt_fingerprint(config.data, tokenizer)
            check_fits(heads[swift.head], base_of(config, architecture), prompts, weights=False)
        except ValueError as error:
            raise ConfigError(f"rewards: swift.head: {error}") from None
        require(
            swift.scored_by == "trainer" or heads[swift.head].config.last_token == "excluded",
            f"rewards: swift.head {swift.head} scores a response's last token too, which an engine never feeds to the "
            "model; set swift.scored_by to trainer, or train a head with last_token excluded",
        )
    return heads


def remarks(config: RunConfig) -> list[str]:
    """What a stage's settings leave unwatched."""
    if stream_of(config) is None or any(reward.kind in VERIFIERS for reward in config.rewards):
        return []
    return [
        "rewards has a hidden-state reward and no verifier: nothing watches whether the policy learns to please its "
        "head; add an item of kind math, exact or judge (weight 0 keeps it out of the reward)"
    ]
