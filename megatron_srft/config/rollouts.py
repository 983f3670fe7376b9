"""Where completions come from and what they earn: sampling, rollout engines, rewards."""

import re
from typing import Annotated, Literal

import pydantic

from megatron_srft.config.base import ConfigError, require, require_at_least, section


@section
class SamplingConfig:
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy (evaluation only)."""

    top_p: float = 1.0
    """Nucleus sampling: keep the smallest set of tokens with this much probability."""

    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""

    max_response_tokens: int = 1024
    """Longest completion, in tokens, with its end token."""

    stop: tuple[str, ...] = ()
    """Strings that end a completion; the stop string stays in the text."""

    def __post_init__(self):
        require_at_least(0, self, "rollout", "temperature", "top_k")
        require(0 < self.top_p <= 1, f"rollout.top_p must lie in (0, 1], not {self.top_p}")
        require_at_least(1, self, "rollout", "max_response_tokens")
        require("" not in self.stop, "rollout.stop holds an empty string, which would end every completion; remove it")


@section
class LocalRolloutConfig(SamplingConfig):
    kind: Literal["local"] = "local"

    max_concurrent_sequences: int = 256
    """Sequences decoded together on each rank."""

    dump_every: int = 0
    """Write every Nth step's rollouts to runs/<name>/rollouts/; 0 never."""

    def __post_init__(self):
        SamplingConfig.__post_init__(self)
        require_at_least(1, self, "rollout", "max_concurrent_sequences")
        require_at_least(0, self, "rollout", "dump_every")


@section
class ReplayRolloutConfig(SamplingConfig):
    kind: Literal["replay"] = "replay"

    folder: str = ""
    """Folder with the dumped rollouts of an earlier run (step-*.jsonl or .jsonl.zst)."""

    dump_every: int = 0
    """Write every Nth step's rollouts to runs/<name>/rollouts/; 0 never."""

    def __post_init__(self):
        SamplingConfig.__post_init__(self)
        require(bool(self.folder), "rollout.folder must name a folder with dumped rollouts")
        require_at_least(0, self, "rollout", "dump_every")


@section
class VerifierConfig:
    weight: float = 1.0
    """Multiplies the reward in the total."""

    correct: float = 1.0
    """Reward of a right answer."""

    wrong: float = 0.0
    """Reward of a wrong, missing or unverifiable answer (the last two are counted apart)."""


@section
class MathRewardConfig(VerifierConfig):
    kind: Literal["math"] = "math"

    answer_after: str = ""
    """Only look behind the last occurrence of this text, e.g. '</think>'; without it the answer counts as missing."""

    timeout_seconds: float = 5.0
    """Deadline of one verification; the worker process is killed when it passes."""

    workers: int = 1
    """Verifier processes per rank."""

    def __post_init__(self):
        require(self.timeout_seconds > 0, "rewards: timeout_seconds of a math reward must be positive")
        require(self.workers >= 1, "rewards: workers of a math reward must be at least 1")


@section
class ExactRewardConfig(VerifierConfig):
    kind: Literal["exact"] = "exact"

    answer_after: str = ""
    """Compare what follows the last occurrence of this text, e.g. '#'; empty compares the whole response."""

    ignore_case: bool = False
    """Compare without regard to case."""


@section
class FormatRewardConfig:
    kind: Literal["format"] = "format"

    weight: float = 1.0
    """Multiplies the reward in the total."""

    pattern: str = r"(?s).*</think>.+"
    """Regular expression that the whole response must match."""

    matched: float = 0.0
    """Reward of a response that matches."""

    unmatched: float = 0.0
    """Reward of a response that does not match."""

    gate: bool = True
    """A response that does not match is not correct: every verifier's reward becomes its `wrong` value."""

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"rewards: pattern {self.pattern!r} is not a regular expression: {error}") from None


RewardConfig = Annotated[
    MathRewardConfig | ExactRewardConfig | FormatRewardConfig, pydantic.Field(discriminator="kind")
]
RolloutConfig = Annotated[LocalRolloutConfig | ReplayRolloutConfig, pydantic.Field(discriminator="kind")]
