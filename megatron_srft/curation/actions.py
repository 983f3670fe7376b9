"""The actions of `data act`, their order and their wording, out of actions.yaml and a user's file over it."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

BUILT_IN = Path(__file__).with_name("actions.yaml")
FINAL = "answer"
"""The action that ends a trace."""

KEYS = {"system": str, "choose": str, "start": list, "actions": dict}
ACTION_KEYS = {"means": str, "prompt": str, "next": list, "limit": (int, type(None))}


@dataclass(frozen=True, kw_only=True)
class Action:
    means: str
    prompt: str
    next: tuple[str, ...]
    limit: int | None


@dataclass(frozen=True, kw_only=True)
class Machine:
    system: str
    choose: str
    start: tuple[str, ...]
    actions: dict[str, Action]

    def allowed(self, taken: Sequence[str], max_steps: int) -> list[str]:
        """The actions that may follow, the default first: only the answer on the last of `max_steps`, or when limits
        leave nothing else."""
        following = self.actions[taken[-1]].next if taken else self.start
        counts = Counter(taken)
        free = [a for a in following if self.actions[a].limit is None or counts[a] < self.actions[a].limit]
        return free if free and len(taken) < max_steps - 1 else [FINAL]

    def choice_request(self, problem: str, trace: str, choices: Sequence[str]) -> list[dict[str, str]]:
        """The messages that ask for the next action."""
        lines = "\n".join(f"{name}: {self.actions[name].means}" for name in choices)
        return self._messages(self.choose, {"problem": problem, "trace": trace, "choices": lines})

    def step_request(self, action: str, problem: str, trace: str) -> list[dict[str, str]]:
        """The messages that ask for the text of an action."""
        return self._messages(self.actions[action].prompt, {"problem": problem, "trace": trace})

    def _messages(self, template: str, values: dict[str, str]) -> list[dict[str, str]]:
        values = values | {"trace": values["trace"] or "(nothing yet)"}
        pattern = rf"\{{({'|'.join(values)})\}}"
        content = re.sub(pattern, lambda match: values[match[1]], template)
        return [{"role": "system", "content": self.system.strip()}, {"role": "user", "content": content.strip()}]

    def read_choice(self, reply: str) -> str | None:
        """The first action named in the last line that names one; None without."""
        names = {name.lower(): name for name in self.actions}
        pattern = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
        found = [match[1] for line in reply.lower().splitlines() if (match := pattern.search(line))]
        return names[found[-1]] if found else None


def load_machine(path: Path | None = None) -> Machine:
    """The built-in actions, with what the user's file says in their place.

    Raises:
        ValueError: the file is not YAML, or a key in it is unknown, missing or of the wrong type.
    """
    tree = _read(BUILT_IN)
    if path is not None:
        own = _read(path)
        _check_types(own, KEYS, path, "")
        actions = dict(tree["actions"])
        for name, values in own.get("actions", {}).items():
            _check_types(values, ACTION_KEYS, path, f"actions.{name}.")
            actions[name] = actions.get(name, {}) | values
        tree = tree | own | {"actions": actions}
    return _machine(tree, path or BUILT_IN)


def _read(path: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not a YAML file: {error}") from None


def _check_types(tree: Any, keys: dict[str, Any], path: Path, prefix: str) -> None:
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: {prefix.removesuffix('.') or 'the file'} must hold a mapping of keys to values")
    for key, value in tree.items():
        if key not in keys:
            raise ValueError(f"{path}: unknown key {prefix}{key}; choose from {', '.join(keys)}")
        if not isinstance(value, keys[key]) or isinstance(value, bool):
            raise ValueError(f"{path}: {prefix}{key} has the wrong type ({type(value).__name__})")


def _machine(tree: dict[str, Any], path: Path) -> Machine:
    names = tree["actions"]
    for name, values in names.items():
        is_word = isinstance(name, str) and bool(name.strip())
        _require(is_word, path, f"actions: the name {name!r} is no word; put it into quotes")
        missing = sorted(set(ACTION_KEYS) - set(values))
        _require(not missing, path, f"actions.{name} lacks {', '.join(missing)}")
        _require("{problem}" in values["prompt"], path, f"actions.{name}.prompt has no {{problem}}")
        _require(values["limit"] is None or values["limit"] >= 1, path, f"actions.{name}.limit must be at least 1")
    for key, following in {
        "start": tree["start"],
        **{f"actions.{n}.next": v["next"] for n, v in names.items()},
    }.items():
        strange = [name for name in following if name not in list(names)]
        _require(not strange, path, f"{key} names {strange}; the actions are {', '.join(names)}")
    _require(FINAL not in tree["start"] and bool(tree["start"]), path, f"start needs actions other than {FINAL}")
    _require("{problem}" in tree["choose"] and "{choices}" in tree["choose"], path, "choose needs {problem}, {choices}")
    actions = {name: Action(**values | {"next": tuple(values["next"])}) for name, values in names.items()}
    return Machine(system=tree["system"], choose=tree["choose"], start=tuple(tree["start"]), actions=actions)


def _require(condition: bool, path: Path, message: str) -> None:
    if not condition:
        raise ValueError(f"{path}: {message}")
