"""Rollouts on disk: one zstd-compressed JSON line per group, complete enough to train on again or to read by eye.

zstd -dc runs/first/rollouts/step-000010.jsonl.zst | head -1 | python -m json.tool
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from megatron_srft.sample import Completion, Demonstration, Group, Prompt, Score


def dump_path(folder: Path, step: int) -> Path:
    """Where the rollouts of `step` are kept in a folder."""
    return folder / f"step-{step:06d}.jsonl.zst"


def dump(groups: list[Group], path: Path) -> None:
    """Write groups, with whatever scores they have; the file appears under its name only when it is complete.

    Raises:
        OSError: it cannot be written; names it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    data = to_lines(groups).encode()
    try:
        partial.write_bytes(zstandard.compress(data) if path.suffix == ".zst" else data)
        os.replace(partial, path)
    except OSError as error:  # a full disk is found while writing, when Python no longer names the file
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def load_dump(path: Path) -> list[Group]:
    """Read what `dump` wrote, log-probs bit for bit.

    Raises:
        ValueError: the file is damaged or is no dump; the message names file and line.
    """
    try:
        text = _unpack(path).decode()
    except (OSError, EOFError, zstandard.ZstdError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the rollouts in {path}: {error}") from None
    return from_lines(text, path)


def to_lines(groups: list[Group]) -> str:
    """One JSON line per group."""
    return "".join(json.dumps(_plain(group), ensure_ascii=False) + "\n" for group in groups)


def from_lines(text: str, source: Path) -> list[Group]:
    """What `to_lines` wrote.

    Args:
        source: where it stood, for the message.

    Raises:
        ValueError: a line is no group; the message names it.
    """
    groups = []
    # Not splitlines(), which also cuts at separators like U+2028 that JSON leaves inside strings.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        try:
            groups.append(_group(json.loads(line)))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{source}:{number}: not a dumped group ({error!r}); write the dump again") from None
    return groups


def _unpack(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix != ".zst":
        return data
    unpacker = zstandard.ZstdDecompressor().decompressobj()
    data = unpacker.decompress(data)
    if not unpacker.eof:
        raise EOFError("the file ends too early")
    return data


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _group(tree: dict[str, Any]) -> Group:
    demonstration, scores = tree["demonstration"], tree["scores"]
    score_of_demonstration = tree["demonstration_score"]
    demonstrations = tuple(_demonstration(d) for d in tree["prompt"]["demonstrations"])
    return Group(
        prompt=Prompt(**_with_arrays(tree["prompt"]) | {"demonstrations": demonstrations}),
        completions=tuple(Completion(**_with_arrays(c)) for c in tree["completions"]),
        demonstration=None if demonstration is None else _demonstration(demonstration),
        scores=None if scores is None else tuple(_score(s) for s in scores),
        demonstration_score=None if score_of_demonstration is None else _score(score_of_demonstration),
    )


def _score(tree: dict[str, Any]) -> Score:
    return Score(**tree | {"dense": {name: tuple(values) for name, values in tree.get("dense", {}).items()}})


def _demonstration(tree: dict[str, Any]) -> Demonstration:
    return Demonstration(**_with_arrays(tree))


def _with_arrays(tree: dict[str, Any]) -> dict[str, Any]:
    types = {"token_ids": np.int32, "rollout_logprobs": np.float32}
    return {key: np.array(value, types[key]) if key in types else value for key, value in tree.items()}
