"""Full training state in one distributed checkpoint, complete or absent.

    checkpoints/step-000100/            megatron's torch_dist files (weights, optimizer), readable under any layout
    checkpoints/step-000100/manifest.json   progress, and size and CRC-32 of every file; written last

A checkpoint is made in `step-000100.partial` and renamed when every rank has finished and every byte is on disk, so
a kill at any moment leaves the older checkpoints as they were. What else a step depends on (data order, sampling,
random state) is a function of (seed, step) and needs no saving.
"""

import json
import logging
import os
import pickle
import shutil
import zlib
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint import FileSystemWriter

from megatron_srft.distributed import ProcessGroups, all_gather_objects, barrier, broadcast_object, rank, size

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or is damaged; the message says what is intact."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands.

    Example: step=120, stage="grpo", stage_step=20, policy_version=120.
    """

    step: int
    """Steps finished, over all stages."""
    stage: str
    stage_step: int
    """Steps of that stage finished."""
    policy_version: int
    """Optimizer updates made."""


# ---------------------------------------------------------------- saving


def save(
    folder: Path,
    chunks: list[GPTModel],
    optimizer: MegatronOptimizer,
    progress: Progress,
    groups: ProcessGroups,
    keep: int,
) -> Path:
    """Write `folder/step-NNNNNN` (collective) and delete all but the newest `keep` checkpoints.

    Raises:
        CheckpointError: on every rank, when any rank could not write; earlier checkpoints are untouched.
    """
    final = folder / f"step-{progress.step:06d}"
    partial = final.with_suffix(".partial")
    problem = None
    if rank(groups.world) == 0:
        problem = _prepare(folder, partial, _bytes_needed(chunks, optimizer) * size(groups.model))
    problem = broadcast_object(problem, groups.world)
    if problem is None:
        problem = _write(partial, chunks, optimizer, groups)
    if problem is None:
        problem = _complete(partial, final, progress, groups)
    if problem is not None:
        if rank(groups.world) == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"cannot save {final}: {problem}; earlier checkpoints are intact")
    if rank(groups.world) == 0:
        _prune(folder, keep)
    barrier(groups.world)
    return final


def _prepare(folder: Path, partial: Path, needed: int) -> str | None:
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return str(error)
    if free < needed:
        return f"about {needed / 2**20:.0f} MiB are needed and {free / 2**20:.0f} MiB are free on the disk"
    return None


def _bytes_needed(chunks: list[GPTModel], optimizer: MegatronOptimizer) -> int:
    """Bytes of this rank's share of the weights and of the two float32 moments and main weights."""
    numbers = sum(p.numel() for chunk in chunks for p in chunk.parameters())
    return sum(p.numel() * p.element_size() for chunk in chunks for p in chunk.parameters()) + 12 * numbers


def _write(partial: Path, chunks: list[GPTModel], optimizer: MegatronOptimizer, groups: ProcessGroups) -> str | None:
    """Write the shards; the first problem of any rank, on every rank."""
    strategy = FullyParallelSaveStrategyWrapper(InProcessSave("torch_dist", 1), groups.data, True)
    problem = None
    try:
        dist_checkpointing.save(_sharded_state(chunks, optimizer, groups, loading=False), str(partial), strategy)
    except Exception as error:  # megatron wraps a rank's OSError in its own types; every rank must hear of it
        problem = f"{type(error).__name__}: {error}"
        log.debug("saving %s failed", partial, exc_info=True)
    return _first(all_gather_objects(problem, groups.world))


class InProcessSave(TorchDistSaveShardedStrategy):
    """Megatron's torch_dist format, written by this process.

    Megatron's own writer forks helpers and waits for them for ever: a helper that dies (out of memory, a missing
    package) hangs the run. Here a failure is an exception on every rank.
    """

    def save(self, sharded_state_dict, checkpoint_dir) -> None:
        state, *_ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        torch.distributed.checkpoint.save(
            mcore_to_pyt_state_dict(state, False),
            storage_writer=FileSystemWriter(checkpoint_dir),
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
            ),
        )


def _complete(partial: Path, final: Path, progress: Progress, groups: ProcessGroups) -> str | None:
    """Checksum every file (shared over the ranks), write the manifest, rename."""
    files, problem = {}, None
    try:
        files = {name: _fingerprint(partial / name) for name in _share(_data_files(partial), groups)}
    except OSError as error:
        problem = str(error)
    shares = all_gather_objects((files, problem), groups.world)
    problem = _first([p for _, p in shares])
    if problem is None and rank(groups.world) == 0:
        content = {
            "format": FORMAT,
            "progress": asdict(progress),
            "layout": {"tensor": size(groups.tensor), "pipeline": size(groups.pipeline), "data": size(groups.data)},
            "files": {name: entry for found, _ in shares for name, entry in found.items()},
        }
        try:
            _write_durably(partial / MANIFEST, json.dumps(content, indent=1, sort_keys=True))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _sync_folder(final.parent)
        except OSError as error:
            problem = str(error)
    return broadcast_object(problem, groups.world)


def _prune(folder: Path, keep: int) -> None:
    for old in checkpoints(folder)[keep:]:
        doomed = old.with_suffix(".deleting")
        old.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    for leftover in [*folder.glob("step-*.partial"), *folder.glob("step-*.deleting")]:
        shutil.rmtree(leftover, ignore_errors=True)


# ---------------------------------------------------------------- loading


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints in the folder, newest first; they may still be damaged."""
    return sorted((p for p in folder.glob("step-[0-9]*") if p.is_dir() and not p.suffix), reverse=True)


def newest_intact(folder: Path, groups: ProcessGroups) -> tuple[Path, Progress] | None:
    """The newest checkpoint whose every file matches its manifest; damaged ones are logged and passed over.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    found = broadcast_object(checkpoints(folder), groups.world)
    for path in found:
        problem = verify(path, groups)
        if problem is None:
            return path, read_progress(path)
        if rank(groups.world) == 0:
            log.warning("checkpoint %s is damaged (%s); trying the one before it", path, problem)
    if found:
        raise CheckpointError(f"every checkpoint in {folder} is damaged; move the folder away to start afresh")
    return None


def verify(path: Path, groups: ProcessGroups) -> str | None:
    """What is wrong with the checkpoint, or None; files are shared over the ranks."""
    problem = None
    try:
        manifest = _read_manifest(path)
        missing = sorted(set(manifest["files"]) - set(_data_files(path)))
        if missing:
            problem = f"{missing[0]} is missing"
        else:
            problem = _first(
                [
                    f"{name} has changed since it was written"
                    for name in _share(sorted(manifest["files"]), groups)
                    if _fingerprint(path / name) != manifest["files"][name]
                ]
            )
        if problem is None and rank(groups.world) == 0:
            problem = _foreign_code(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{MANIFEST} cannot be read: {error}"
    return _first(all_gather_objects(problem, groups.world))


def read_progress(path: Path) -> Progress:
    return Progress(**_read_manifest(path)["progress"])


def load(path: Path, chunks: list[GPTModel], optimizer: MegatronOptimizer | None, groups: ProcessGroups) -> Progress:
    """Fill model and optimizer from a checkpoint of any layout; without an optimizer only the weights are read."""
    strategy = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(path)), groups.data)
    state = dist_checkpointing.load(_sharded_state(chunks, optimizer, groups, loading=True), str(path), strategy)
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(state[_model_key(number, chunks)])
    if optimizer is not None:
        _keep_steps(optimizer)
        optimizer.load_state_dict(state["optimizer"])
        _unshare_steps(optimizer)
    return read_progress(path)


# ---------------------------------------------------------------- megatron's state


def _sharded_state(
    chunks: list[GPTModel], optimizer: MegatronOptimizer | None, groups: ProcessGroups, *, loading: bool
) -> dict[str, Any]:
    metadata = {
        # The one optimizer format that loads under another layout and data-parallel size.
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": groups.data,
    }
    state = {
        _model_key(number, chunks): chunk.sharded_state_dict(metadata=metadata) for number, chunk in enumerate(chunks)
    }
    if optimizer is not None:
        _make_moments(optimizer)
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=loading, metadata=metadata)
    return state


def _model_key(number: int, chunks: list[GPTModel]) -> str:
    return "model" if len(chunks) == 1 else f"model{number}"


def _torch_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part.optimizer for part in parts if part.optimizer is not None]


def _make_moments(optimizer: MegatronOptimizer) -> None:
    """torch's AdamW makes its state in the first step; a load, and a save before that step, want it there already."""
    for inner in _torch_optimizers(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def _keep_steps(optimizer: MegatronOptimizer) -> None:
    """Megatron's sharded loader expects a `step` per parameter in the file, where it is stored once; supply it."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer):
            part._set_main_param_and_optimizer_states = partial(_set_states, part)


def _set_states(part: DistributedOptimizer, parameter: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
    group, order = part.model_param_group_index_map[parameter]
    state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
    known = {"step": state["step"]} if "step" in state else {}
    DistributedOptimizer._set_main_param_and_optimizer_states(part, parameter, {**known, **tensors})


def _unshare_steps(optimizer: MegatronOptimizer) -> None:
    """After a load all parameters hold one `step` tensor, which AdamW would raise once per parameter."""
    for inner in _torch_optimizers(optimizer):
        for state in inner.state.values():
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"]).clone()


# ---------------------------------------------------------------- files


def _data_files(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_file() and p.name != MANIFEST)


def _share(names: list[str], groups: ProcessGroups) -> list[str]:
    return names[rank(groups.world) :: size(groups.world)]


def _fingerprint(path: Path) -> list[int]:
    """[size in bytes, CRC-32], with the file's bytes forced to disk first where that is allowed."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
        return [file.tell(), crc]


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    if manifest["format"] != FORMAT:
        raise ValueError(f"format {manifest['format']} was written by another version of megatron_srft")
    return manifest


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first(problems: list[str | None]) -> str | None:
    return next((p for p in problems if p), None)


TRUSTED_MODULES = {"torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"}
TRUSTED_NAMES = {
    ("torch", "Size"), ("torch", "float32"), ("torch", "bfloat16"), ("torch", "float16"), ("torch", "int64"),
    ("torch", "uint8"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"),
}  # fmt: skip
"""All that the index of a torch_dist checkpoint is made of."""


class _IndexReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        mcore = module == "megatron.core.dist_checkpointing.strategies.torch"
        if module in TRUSTED_MODULES or (module, name) in TRUSTED_NAMES or mcore:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is no part of a checkpoint")


def _foreign_code(path: Path) -> str | None:
    """torch unpickles the index `.metadata` without a check; refuse one that could run code. (`common.pt` is read with
    weights_only, which has a check of its own.)"""
    try:
        with (path / ".metadata").open("rb") as file:
            _IndexReader(file).load()
    except pickle.UnpicklingError as error:
        return f".metadata cannot be trusted: {error}"
    return None
