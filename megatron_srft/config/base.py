"""What every section of the config is made with."""

from dataclasses import dataclass

import pydantic

STRICT = pydantic.ConfigDict(extra="forbid", str_strip_whitespace=False)


class ConfigError(ValueError):
    """A mistake in the user's configuration; the message names the key and says what to do."""


def section(cls):
    """Make `cls` a frozen keyword-only dataclass whose unknown keys pydantic refuses."""
    cls.__pydantic_config__ = STRICT
    return dataclass(frozen=True, kw_only=True)(cls)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
