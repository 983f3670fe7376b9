"""Reward of the form of a response: a regular expression that the whole of it must match."""

import re

from megatron_srft.config import FormatRewardConfig


def matches(responses: list[str], config: FormatRewardConfig) -> list[bool]:
    """Whether each response matches `config.pattern` from its first to its last character."""
    pattern = re.compile(config.pattern)
    return [pattern.fullmatch(response) is not None for response in responses]
