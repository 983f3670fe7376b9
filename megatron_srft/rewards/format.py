"""Reward of the form of a response: a regular expression that the whole of it must match."""

import re

from megatron_srft.config import ConfigError, FormatRewardConfig


def compile_pattern(config: FormatRewardConfig) -> re.Pattern[str]:
    """The pattern, ready to match. Raises ConfigError when it is not a regular expression."""
    try:
        return re.compile(config.pattern)
    except re.error as error:
        raise ConfigError(
            f"rewards: the format pattern {config.pattern!r} is not a regular expression: {error}"
        ) from None


def matches(response: str, pattern: re.Pattern[str]) -> bool:
    return pattern.fullmatch(response) is not None
