"""A user's own reward: a plain function, named in the config by `module:function` and imported, never evaluated.

    def reward(response: Response) -> float                      one number for the response
    def reward(response: Response) -> Sequence[float]            dense: true, one number for each of its tokens

`response` is a `megatron_srft.rewards.responses.Response` with the verdict filled in. A function that raises, or
returns anything but finite numbers of the right count, ends the run with a ValueError that names function and line;
where the config sets `failure`, that reward is given instead and the answer is counted as failed.
"""

import importlib
import inspect
import logging
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np

from megatron_srft.config import FunctionRewardConfig
from megatron_srft.rewards.responses import Response

log = logging.getLogger(__name__)

EXAMPLE = Response(
    prompt="7+15=", text="7+15=22#22", token_ids=(5, 3, 9, 2), answer="22", truncated=False, correct=True
)
"""What the self-test asks a function to reward."""


class RewardFunction:
    """The function of one reward stream. Raises ValueError when there is no such function, or not one of one argument.

    name: of the stream, as in `rewards.<name>`.
    """

    def __init__(self, name: str, config: FunctionRewardConfig):
        self.name, self.config = name, config
        self.failed = 0
        """Responses on which the function failed."""
        self._function = _find(name, config.call)

    def __call__(self, response: Response) -> float | tuple[float, ...]:
        """The reward of one response, before its weight."""
        try:
            return self._checked(response)
        except FunctionFailed as error:
            self.failed += 1
            if self.config.failure is None:
                raise
            if self.failed == 1:
                log.warning("%s; it and all later ones are counted and earn %g", error, self.config.failure)
            return self.config.failure

    def self_test(self) -> None:
        """Reward an example. Raises ValueError when that fails, also where `failure` is set; not counted."""
        self._checked(EXAMPLE)
        self._checked(replace(EXAMPLE, text="7+15=23#23", correct=False))

    def _checked(self, response: Response) -> float | tuple[float, ...]:
        try:
            value = self._function(response)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"raised {type(error).__name__}: {error} ({place.filename}:{place.lineno})"
            raise FunctionFailed(self._message(reason)) from error
        if not self.config.dense:
            return self._number(value, "")
        if not isinstance(value, (Sequence, np.ndarray)) or isinstance(value, str):
            raise FunctionFailed(self._message(f"returned {_shown(value)}, and dense needs a list of numbers"))
        length = len(response.token_ids or ())
        if len(value) != length:
            raise FunctionFailed(self._message(f"returned {len(value)} numbers for {length} tokens"))
        return tuple(self._number(item, f" for token {index}") for index, item in enumerate(value))

    def _number(self, value: Any, where: str) -> float:
        if not isinstance(value, Real):
            hint = "; set dense: true for one number per token" if isinstance(value, (list, tuple, np.ndarray)) else ""
            raise FunctionFailed(self._message(f"returned {_shown(value)}{where} and no number{hint}"))
        if not math.isfinite(value):
            raise FunctionFailed(self._message(f"returned {value}{where}, which is not finite"))
        return float(value)

    def _message(self, reason: str) -> str:
        return f"rewards.{self.name}: {self.config.call} {reason}"


class FunctionFailed(ValueError):
    """A user's function did not give a reward; the message says how, and where."""


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {repr(value)[:60]}"


def _find(name: str, call: str) -> Callable[[Response], Any]:
    module_name, _, function_name = call.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise ValueError(f"rewards.{name}: {module_name} needs the module {error.name}; install it") from error
        hint = "put its folder on PYTHONPATH"
        raise ValueError(f"rewards.{name}: there is no module {error.name} to import for {call}; {hint}") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"rewards.{name}: importing {module_name} for {call} failed: {reason}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        what = "no" if function is None else "no function"
        raise ValueError(f"rewards.{name}: {module.__file__} has {what} {function_name}, as {call} wants")
    try:
        inspect.signature(function).bind(EXAMPLE)
    except TypeError as error:
        form = f"def {function_name}(response: Response) -> float"
        raise ValueError(f"rewards.{name}: {call} cannot be called with one response ({error}); use {form}") from None
    return function
