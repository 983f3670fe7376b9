"""What an answer earns: a list of reward streams, each with a weight and a discount of its own."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pydantic

from megatron_srft.config.base import require, section
from megatron_srft.config.hidden_reward import SwiftRewardConfig
from megatron_srft.config.verifiers import (
    ExactRewardConfig,
    FormatRewardConfig,
    JudgeRewardConfig,
    MathRewardConfig,
    StreamConfig,
    require_finite,
)


@section
class CosineRewardConfig(StreamConfig):
    kind: Literal["cosine"] = "cosine"

    correct_at_zero: float = 2.0
    """Reward of a right answer of length 0 (the paper's r0c)."""

    correct_at_limit: float = 1.0
    """Reward of a right answer of max_tokens (rLc)."""

    wrong_at_zero: float = -10.0
    """Reward of a wrong answer of length 0 (r0w); not above 0."""

    wrong_at_limit: float = 0.0
    """Reward of a wrong answer of max_tokens (rLw); not above 0."""

    exceeded: float = -10.0
    """Reward of a response that was cut or reached the limit, right or wrong (r_e)."""

    max_tokens: int | None = None
    """The limit (L_max), in tokens of the response. null: rollout.max_response_tokens."""

    exceed_margin: int = 0
    """A response this close to the limit has exceeded it: 0 as in the paper, 16 in its released code."""

    def __post_init__(self):
        StreamConfig.__post_init__(self)
        require_finite(self, "correct_at_zero", "correct_at_limit", "wrong_at_zero", "wrong_at_limit", "exceeded")
        for name in ("wrong_at_zero", "wrong_at_limit"):
            value = getattr(self, name)
            require(value <= 0, f"rewards: {name} of a cosine reward must not be above 0, got {value}")
        _require_limit(self)
        require(
            0 <= self.exceed_margin < (self.max_tokens or math.inf),
            f"rewards: exceed_margin of a cosine reward must be at least 0 and below its limit of "
            f"{self.max_tokens or 'max'} tokens, not {self.exceed_margin}; else every response exceeds it",
        )


@section
class LengthRewardConfig(StreamConfig):
    kind: Literal["length"] = "length"

    at_zero: float = 0.0
    """Reward of a response of length 0."""

    at_limit: float = -1.0
    """Reward of a response of max_tokens or more, or one that was cut; a straight line lies between."""

    max_tokens: int | None = None
    """The limit, in tokens of the response. null: rollout.max_response_tokens."""

    def __post_init__(self):
        StreamConfig.__post_init__(self)
        require_finite(self, "at_zero", "at_limit")
        _require_limit(self)


@section
class OverlongRewardConfig(StreamConfig):
    kind: Literal["overlong"] = "overlong"

    buffer_tokens: int = 4096
    """Tokens before the limit over which the penalty falls from 0 to -1 (DAPO's L_cache; its L_max is 20480)."""

    max_tokens: int | None = None
    """The limit (L_max), in tokens of the response. null: rollout.max_response_tokens."""

    def __post_init__(self):
        StreamConfig.__post_init__(self)
        _require_limit(self)
        require(
            1 <= self.buffer_tokens <= (self.max_tokens or math.inf),
            f"rewards: buffer_tokens of an overlong reward must be at least 1 and at most its limit of "
            f"{self.max_tokens or 'max'} tokens, not {self.buffer_tokens}",
        )


@section
class RepetitionRewardConfig(StreamConfig):
    kind: Literal["repetition"] = "repetition"

    ngram: int = 40
    """Tokens of the run that must not stand in the response twice."""

    penalty: float = -0.05
    """dense: reward of each token of a repeated n-gram. sequence: reward of a response that only repeats."""

    mode: Literal["dense", "sequence"] = "dense"
    """dense: a reward per token (the paper's Algorithm 1). sequence: penalty times the share of n-grams that stand
    in the response already."""

    def __post_init__(self):
        StreamConfig.__post_init__(self)
        require_finite(self, "penalty")
        require(self.ngram >= 1, f"rewards: ngram of a repetition reward must be at least 1, not {self.ngram}")
        require(self.penalty <= 0, f"rewards: penalty of a repetition reward must not be above 0, got {self.penalty}")


@section
class FunctionRewardConfig(StreamConfig):
    kind: Literal["function"] = "function"

    call: str = ""
    """The function, as module:function; docs/rewards.md has its signature."""

    dense: bool = False
    """The function returns a number for each token of the response instead of one for all."""

    failure: float | None = None
    """Reward of a response on which the function fails, which is counted. null: a failure ends the run."""

    def __post_init__(self):
        StreamConfig.__post_init__(self)
        module, colon, function = self.call.partition(":")
        require(
            bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split(".")),
            f"rewards: call of a function reward must look like package.module:function, not {self.call!r}",
        )
        if self.failure is not None:
            require_finite(self, "failure")


def _require_limit(reward: Any) -> None:
    require(
        reward.max_tokens is None or reward.max_tokens >= 1,
        f"rewards: max_tokens of a {reward.kind} reward must be at least 1, not {reward.max_tokens}",
    )


RewardConfig = Annotated[
    MathRewardConfig
    | ExactRewardConfig
    | JudgeRewardConfig
    | FormatRewardConfig
    | CosineRewardConfig
    | LengthRewardConfig
    | OverlongRewardConfig
    | RepetitionRewardConfig
    | FunctionRewardConfig
    | SwiftRewardConfig,
    pydantic.Field(discriminator="kind"),
]

REWARDS: dict[str, type[StreamConfig]] = {
    reward.kind: reward
    for reward in (
        MathRewardConfig,
        ExactRewardConfig,
        JudgeRewardConfig,
        FormatRewardConfig,
        CosineRewardConfig,
        LengthRewardConfig,
        OverlongRewardConfig,
        RepetitionRewardConfig,
        FunctionRewardConfig,
        SwiftRewardConfig,
    )
}
"""Every class of reward by its kind."""

VERIFIERS = ("math", "exact", "judge")
"""Kinds of rewards that judge an answer."""


def with_limit(reward: RewardConfig, max_response_tokens: int) -> RewardConfig:
    """The reward with `max_response_tokens` as its limit where it has one that is null. Raises ConfigError."""
    if getattr(reward, "max_tokens", max_response_tokens) is None:
        return dataclasses.replace(reward, max_tokens=max_response_tokens)
    return reward


def name_streams(configs: Sequence[RewardConfig]) -> dict[str, RewardConfig]:
    """A name per reward: its kind, with _2, _3, ... from the second of a kind on."""
    streams: dict[str, RewardConfig] = {}
    for config in configs:
        seen = sum(other.kind == config.kind for other in streams.values())
        streams[config.kind if seen == 0 else f"{config.kind}_{seen + 1}"] = config
    return streams
