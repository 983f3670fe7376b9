"""Hugging Face folders: safetensors read by name, and written whole or not at all."""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
COMPANIONS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")
"""Endings of the files that go along with the weights: tokenizer, generation config, chat template, model code."""

MAX_SHARD_BYTES = 5 * 10**9


class HfFolder:
    """A model folder, opened for reading; tensors are read when asked for.

    Raises:
        ValueError: the folder, its config.json or a weight file is missing or damaged; the message says which.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"model.path: {self.path} is not a folder")
        self.config = read_config(self.path)
        """config.json as it stands; transformers fills in what it leaves out."""
        self._readers: dict[Path, Any] = {}
        self._files = self._find_weights()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, without reading any."""
        return {name: tuple(self._slice(name).get_shape()) for name in self._files}

    def dtype(self) -> str:
        """The type of the first tensor, as safetensors calls it, for example 'F32' or 'BF16'."""
        return self._slice(next(iter(self._files))).get_dtype()

    def tensor(self, name: str) -> torch.Tensor:
        """Read one full tensor."""
        if name not in self._files:
            raise ValueError(f"{self.path} has no tensor {name}")
        return self._reader(self._files[name]).get_tensor(name)

    def companions(self) -> list[Path]:
        """Files other than config.json and weights that a copy of the model needs."""
        return sorted(
            p for p in self.path.iterdir() if p.is_file() and p.suffix in COMPANIONS and p.name not in (CONFIG, INDEX)
        )

    def _find_weights(self) -> dict[str, Path]:
        """File of each tensor."""
        if (self.path / INDEX).exists():
            files = {n: self.path / f for n, f in _read_json(self.path / INDEX).get("weight_map", {}).items()}
            absent = sorted({file.name for file in files.values() if not file.exists()})
            if absent:
                raise ValueError(f"{self.path / INDEX} names files that are not there: {', '.join(absent)}")
            lost = sorted(name for name, file in files.items() if name not in self._reader(file).keys())
            if lost:
                raise ValueError(f"{files[lost[0]]} lacks {lost[0]}, which {INDEX} says it holds")
            return files
        if (self.path / WEIGHTS).exists():
            return dict.fromkeys(self._reader(self.path / WEIGHTS).keys(), self.path / WEIGHTS)
        others = sorted(p.name for p in self.path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
        raise ValueError(
            f"{self.path} has neither {WEIGHTS} nor {INDEX}; "
            + (
                f"{others[0]} is not read: convert it with AutoModelForCausalLM.from_pretrained(folder)"
                ".save_pretrained(new_folder), which writes safetensors"
                if others
                else "were the weights downloaded?"
            )
        )

    def _reader(self, file: Path) -> Any:
        if file not in self._readers:
            try:
                self._readers[file] = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{file} is not a complete safetensors file ({error}); fetch it again") from None
        return self._readers[file]

    def _slice(self, name: str) -> Any:
        return self._reader(self._files[name]).get_slice(name)


def read_config(path: Path | str) -> dict[str, Any]:
    """config.json of a model folder as it stands. Raises ValueError when it is missing or not JSON."""
    return _read_json(Path(path) / CONFIG)


def check_target(target: Path | str) -> None:
    """Raise ValueError unless `target` is absent, empty, or a model folder that may be replaced."""
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; choose another place for the model folder")
    if target.is_dir() and any(target.iterdir()) and not (target / CONFIG).exists():
        raise ValueError(f"{target} holds other files and no {CONFIG}, so it is not overwritten; choose another folder")


def write_hf_folder(
    target: Path | str,
    tensors: Iterable[tuple[str, torch.Tensor]],
    source: HfFolder,
    write: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    config: dict[str, Any] | None = None,
) -> None:
    """Write a model folder: the tensors, and source's config (with the tensors' dtype), tokenizer and companions.

    Everything is written next to `target` first and put in its place when complete, so a failure (a full disk, a kill)
    leaves an older folder as it was.

    Args:
        tensors: may be a collective iterator; it is exhausted in every case.
        write: False on the ranks that only take part in the iteration.
        config: entries of config.json that differ from source's.

    Raises:
        ValueError: `target` exists and is not a model folder.
        OSError: it cannot be written.
    """
    target, stream = Path(target), iter(tensors)
    partial = target.with_name(f".{target.name}.partial")
    try:
        if write:
            _undo_interrupted_swap(target)
            check_target(target)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            dtype = _write_weights(partial, stream, max_shard_bytes)
            _write_rest(partial, source, dtype, config or {})
            _swap(partial, target)
    finally:
        # Other ranks wait in the collectives behind the iterator, whatever happened to the writing here.
        for _ in stream:
            pass
        if write:
            shutil.rmtree(partial, ignore_errors=True)


def _write_weights(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int) -> torch.dtype:
    """Write one or several shards (and the index); return the dtype of the tensors."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = total_bytes = 0
    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > max_shard_bytes:
            shards.append(_write_shard(folder, len(shards), pending))
            pending, pending_bytes = {}, 0
        # A copy of its own: the tensor may be a view of a bucket or of the model.
        pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
        dtype = tensor.dtype
    shards.append(_write_shard(folder, len(shards), pending))
    if len(shards) == 1:
        (folder / _shard_name(0)).rename(folder / WEIGHTS)
        return dtype
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, file in enumerate(files):
        (folder / _shard_name(i)).rename(folder / file)
    weight_map = {name: file for names, file in zip(shards, files, strict=True) for name in names}
    _write_json(
        folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    )
    return dtype


def _shard_name(number: int) -> str:
    return f"shard-{number}.safetensors"


def _write_shard(folder: Path, number: int, tensors: dict[str, torch.Tensor]) -> list[str]:
    try:
        save_file(tensors, folder / _shard_name(number), metadata={"format": "pt"})
    except SafetensorError as error:
        # Its text ends with the system's error number, which tells a full disk from other troubles.
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from None
    return list(tensors)


def _write_rest(folder: Path, source: HfFolder, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    key = "torch_dtype" if "torch_dtype" in source.config else "dtype"
    _write_json(folder / CONFIG, source.config | {key: str(dtype).removeprefix("torch.")} | changes)
    for file in source.companions():
        shutil.copyfile(file, folder / file.name)


def _swap(partial: Path, target: Path) -> None:
    """Put the finished folder in place of the old one."""
    for file in partial.iterdir():
        _flush(file)
    old = _replaced(target)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _replaced(target: Path) -> Path:
    """Where the old folder stands for the moment between two renames."""
    return target.with_name(f".{target.name}.old")


def _undo_interrupted_swap(target: Path) -> None:
    """A process killed within `_swap` may have left the old folder aside; put it back, or delete it if done with."""
    old = _replaced(target)
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _flush(file: Path) -> None:
    """Wait until the file's bytes are on the disk."""
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file.parent} has no {file.name}; model.path must be a Hugging Face model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return content


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
