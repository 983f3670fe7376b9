"""What every section of the config is made with."""

import math
from dataclasses import dataclass
from typing import Any

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


def require_at_least(least: float, settings: Any, section_name: str, *names: str) -> None:
    """Each of these fields is null or a finite number of at least `least`; NaN is refused too."""
    for name in names:
        value = getattr(settings, name)
        require(
            value is None or least <= value < math.inf,
            f"{section_name}.{name} must be a number of at least {least:g}, not {value}",
        )
