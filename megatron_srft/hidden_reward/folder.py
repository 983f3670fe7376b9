"""A reward head on disk, whole or not at all.

    <folder>/reward_head.safetensors   weight [layers, 2, hidden] and bias [2], float32
    <folder>/reward_head.json          HeadConfig, and the SHA-256 of the file above; written last

Each file is put in its place by one rename, the JSON last, and reading compares the hash: whatever a kill leaves
between the two is refused, never read as a head.
"""

import hashlib
import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pydantic
from safetensors import SafetensorError
from safetensors.torch import load, save

from megatron_srft.hidden_reward.head import BaseModel, HeadConfig, RewardHead

CONFIG = "reward_head.json"
WEIGHTS = "reward_head.safetensors"
FORMAT = 1


def save_head(head: RewardHead, folder: Path | str) -> None:
    """Write the head into the folder, which is made if it is not there; other files in it stay.

    Raises:
        OSError: it cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = save({name: getattr(head, name).detach().cpu().contiguous() for name in ("weight", "bias")})
    content = {"format": FORMAT, "weights_sha256": hashlib.sha256(weights).hexdigest(), **asdict(head.config)}
    _put(folder / WEIGHTS, weights)
    _put(folder / CONFIG, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def load_head(folder: Path | str) -> RewardHead:
    """Read a head that `save_head` has written.

    Raises:
        ValueError: a file is missing, damaged or not of this form; names the file and says what to do.
    """
    file, weights = Path(folder) / CONFIG, Path(folder) / WEIGHTS
    for path in (file, weights):
        if not path.is_file():
            raise ValueError(f"{path} is missing; a reward head is a folder with {CONFIG} and {WEIGHTS}")
    content = _read(file)
    stored = weights.read_bytes()
    if hashlib.sha256(stored).hexdigest() != content.pop("weights_sha256", None):
        raise ValueError(f"{weights} is not what {CONFIG} was written for; one of the two is incomplete, save it again")
    config = _config(content, file)
    try:
        tensors = load(stored)
    except SafetensorError as error:
        raise ValueError(f"{weights} is not a safetensors file ({error})") from None
    if set(tensors) != {"weight", "bias"}:
        raise ValueError(f"{weights} must hold weight and bias, got {', '.join(sorted(tensors))}")
    return RewardHead(config=config, source=str(weights), **tensors)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ValueError(f"{file} is no reward head of format {FORMAT}; it was written by another version or program")
    return content


def _config(content: dict[str, Any], file: Path) -> HeadConfig:
    known = {HeadConfig: content, BaseModel: content.get("base")}
    for cls, given in known.items():
        if not isinstance(given, dict):
            raise ValueError(f"{file}: base must be an object with the base model's name, fingerprint and sizes")
        unknown = sorted(set(given) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"{file}: unknown key {unknown[0]}; it was written by another version or by hand")
    try:
        # JSON has no tuples; otherwise nothing is converted.
        return pydantic.TypeAdapter(HeadConfig).validate_json(json.dumps(content), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{file}: {key + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')}") from None


def _put(path: Path, content: bytes) -> None:
    """Write the file under another name, force it to disk, and rename it."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
