"""Rewards of an answer and its form: the verifiers, and the format that can gate them."""

import math
import re
from typing import Any, Literal
from urllib.parse import urlsplit

from megatron_srft.config.base import ConfigError, require, section


def require_finite(reward: Any, *names: str) -> None:
    for name in names:
        value = getattr(reward, name)
        require(math.isfinite(value), f"rewards: {name} of a {reward.kind} reward must be a finite number, not {value}")


@section
class StreamConfig:
    weight: float = 1.0
    """Multiplies the reward in the total."""

    gamma: float = 1.0
    """Discount per token of this reward's returns, from 0 to 1; 1 credits every token before it alike."""

    def __post_init__(self):
        require_finite(self, "weight")
        require(0 <= self.gamma <= 1, f"rewards: gamma of a {self.kind} reward must lie in [0, 1], not {self.gamma}")


@section
class VerifierConfig(StreamConfig):
    correct: float = 1.0
    """Reward of a right answer."""

    wrong: float = 0.0
    """Reward of a wrong, missing or unverifiable answer (the last two are counted apart)."""

    def __post_init__(self):
        StreamConfig.__post_init__(self)
        require_finite(self, "correct", "wrong")


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
        VerifierConfig.__post_init__(self)
        require(self.timeout_seconds > 0, "rewards: timeout_seconds of a math reward must be positive")
        require(self.workers >= 1, "rewards: workers of a math reward must be at least 1")


@section
class ExactRewardConfig(VerifierConfig):
    kind: Literal["exact"] = "exact"

    answer_after: str = ""
    """Compare what follows the last occurrence of this text, e.g. '#'; empty compares the whole response."""

    ignore_case: bool = False
    """Compare without regard to case."""


def is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        return False


@section
class JudgeRewardConfig(VerifierConfig):
    kind: Literal["judge"] = "judge"

    url: str = ""
    """Base of an OpenAI-compatible endpoint, e.g. http://localhost:8000/v1."""

    model: str = ""
    """Name of the judge's model there."""

    prompt: str = ""
    """Template of the question with {prompt}, {response} and {answer}. Empty: a built-in one."""

    prompt_file: str = ""
    """File with the template instead."""

    api_key_variable: str = ""
    """Environment variable that holds the endpoint's key; empty sends none."""

    timeout_seconds: float = 60.0
    """Deadline of one attempt, from the connection to the last byte."""

    retries: int = 3
    """Further attempts after a timeout, a lost connection, a busy or failing server."""

    backoff_seconds: float = 1.0
    """Pause before the first further attempt; it doubles with each, up to 30 seconds."""

    concurrency: int = 16
    """Requests under way at a time, per rank."""

    max_judge_tokens: int = 1024
    """Longest reply of the judge, in tokens."""

    response_characters: int = 4000
    """End of the response that the judge sees."""

    def __post_init__(self):
        VerifierConfig.__post_init__(self)
        require(
            is_address(self.url), f"rewards: url of a judge must look like http://localhost:8000/v1, not {self.url!r}"
        )
        require(bool(self.model), "rewards: model of a judge is not set")
        require(not (self.prompt and self.prompt_file), "rewards: a judge has prompt or prompt_file, not both")
        require(not self.prompt or "{response}" in self.prompt, "rewards: prompt of a judge must hold {response}")
        require(0 < self.timeout_seconds < math.inf, "rewards: timeout_seconds of a judge must be positive")
        require(0 <= self.backoff_seconds < math.inf, "rewards: backoff_seconds of a judge must not be negative")
        require(self.retries >= 0, "rewards: retries of a judge must not be negative")
        for name in ("concurrency", "max_judge_tokens", "response_characters"):
            require(getattr(self, name) >= 1, f"rewards: {name} of a judge must be at least 1")


@section
class FormatRewardConfig(StreamConfig):
    kind: Literal["format"] = "format"

    pattern: str = r"(?s).*</think>.+"
    """Regular expression that the whole response must match."""

    matched: float = 0.0
    """Reward of a response that matches."""

    unmatched: float = 0.0
    """Reward of a response that does not match."""

    gate: bool = True
    """A response that does not match is not correct: every verifier's reward becomes its `wrong` value."""

    def __post_init__(self):
        StreamConfig.__post_init__(self)
        require_finite(self, "matched", "unmatched")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"rewards: pattern {self.pattern!r} is not a regular expression: {error}") from None
