"""Full training state (weights, optimizer, progress) in one distributed checkpoint, written and read on Megatron.

What else a step depends on (data order, sampling, random state) is a function of (seed, step) and needs no saving.
publish.py makes it appear as a whole; manifest.py says which checkpoint is intact and may be trusted.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
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
from torch.distributed.checkpoint import FileSystemWriter

from megatron_srft.config import ConfigError
from megatron_srft.distributed import ProcessGroups, barrier, rank, size
from megatron_srft.trainer import publish
from megatron_srft.trainer.critic import Critic
from megatron_srft.trainer.manifest import CheckpointError, Progress, read_layout, read_progress
from megatron_srft.trainer.publish import attempt
from megatron_srft.trainer.reference import Reference
from megatron_srft.trainer.state import CRITIC, kind, load_optimizer, model_key, reference_key, sharded_state

SHAPE = (
    "num_layers", "hidden_size", "ffn_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "qkv_bias",
    "qk_norm", "tied",
)  # fmt: skip
"""Fields of Architecture that decide which tensors a model has."""

ARRAYS = "arrays.npz"
"""Numbers beside the sharded state, whole and independent of the layout; only where there are any."""

# ---------------------------------------------------------------- saving


def save(
    folder: Path,
    chunks: list[GPTModel],
    optimizer: MegatronOptimizer | None,
    progress: Progress,
    groups: ProcessGroups,
    keep: int,
    arrays: dict[str, np.ndarray] | None = None,
    reference: Reference | None = None,
    critic: Critic | None = None,
) -> Path:
    """Write `folder/step-NNNNNN` (collective) and delete all but the newest `keep` checkpoints.

    Args:
        arrays: further numbers, the same on every rank, for `read_arrays`.
        reference: the policy that the run is held near, where there is one.
        critic: PPO's, where there is one.

    Raises:
        CheckpointError: on every rank, when any rank could not write; earlier checkpoints are untouched.
    """
    final = publish.path_of(folder, progress.step)
    partial = publish.partial_of(final)
    layout = {
        "tensor": size(groups.tensor),
        "pipeline": size(groups.pipeline),
        "context": size(groups.context),
        "data": size(groups.data),
        "optimizer": kind(optimizer),
        "model": _shape(chunks),
        "reference": reference is not None,
        "critic": critic is not None,
    }
    arrays = arrays or {}
    needed = _bytes_needed(chunks, optimizer, reference)
    if critic is not None:
        needed += _bytes_needed(critic.models, critic.optimizer, None)
    needed *= size(groups.tensor) * size(groups.pipeline)
    needed += sum(array.nbytes for array in arrays.values())
    problem = (
        attempt(lambda: publish.prepare(partial, needed), groups, main_only=True)
        or _write(partial, sharded_state(chunks, optimizer, groups, reference, critic, loading=False), arrays, groups)
        or publish.complete(partial, final, progress, layout, groups)
    )
    if problem is not None:
        if rank(groups.world) == 0:
            publish.discard(partial)
        raise CheckpointError(f"cannot save {final}: {problem}; earlier checkpoints are intact")
    if rank(groups.world) == 0:
        publish.prune(folder, final, keep)
    barrier(groups.world)
    return final


def _bytes_needed(chunks: list[GPTModel], optimizer: MegatronOptimizer | None, reference: Reference | None) -> int:
    """Bytes of this rank's share of the weights, those of the reference, and the float32 moments and main weights."""
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    optimizer_bytes = 12 if optimizer is not None else 0
    copies = 1 if reference is None else 2
    return sum(p.numel() * (copies * p.element_size() + optimizer_bytes) for p in parameters)


def _write(partial: Path, state: dict[str, Any], arrays: dict[str, np.ndarray], groups: ProcessGroups) -> str | None:
    """Write all files but the manifest; the first problem of any rank, on every rank.

    The steps of dist_checkpointing.save one by one, since there the first rank writes common.pt by itself, and when
    that fails the others wait for it for ever. All versions of megatron-core read a checkpoint with a common.pt.
    """
    sharded, common = save_preprocess(state)
    strategy = FullyParallelSaveStrategyWrapper(InProcessSave("torch_dist", 1), groups.copies, True)

    def write_common() -> None:
        torch.save(common, partial / "common.pt")
        save_config(CheckpointingConfig("torch_dist", 1), str(partial))
        if arrays:
            np.savez(partial / ARRAYS, **arrays)

    return attempt(write_common, groups, main_only=True) or attempt(lambda: strategy.save(sharded, partial), groups)


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


# ---------------------------------------------------------------- loading


def load(
    path: Path,
    chunks: list[GPTModel],
    optimizer: MegatronOptimizer | None,
    groups: ProcessGroups,
    reference: Reference | None = None,
    critic: Critic | None = None,
) -> Progress:
    """Fill model and optimizer from a checkpoint of any layout; without an optimizer only the weights are read.

    The checkpoint must have passed `manifest.verify`.

    Raises:
        ConfigError: the model has other sizes, or the optimizer is of another kind, than the one that was saved, or
            it has no reference or no critic where one is wanted.
    """
    _check_shape(path, chunks)
    if optimizer is not None:
        _check_kind(path, optimizer)
    if reference is not None:
        _check_reference(path)
    if critic is not None and not read_layout(path).get("critic"):
        raise ConfigError(
            f"{path} holds no critic, which objective.kind ppo needs; give PPO a stage of its own, or choose another "
            "name for a new run"
        )
    strategy = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(path)), groups.copies)
    state = sharded_state(chunks, optimizer, groups, reference, critic, loading=True)
    with _weights_only():
        state = dist_checkpointing.load(state, str(path), strategy)
        for number, chunk in enumerate(chunks):
            chunk.load_state_dict(state[model_key(number, chunks)])
        if optimizer is not None:
            load_optimizer(optimizer, state["optimizer"])
        if critic is not None:
            for number, chunk in enumerate(critic.models):
                chunk.load_state_dict(state[CRITIC][model_key(number, critic.models)])
            load_optimizer(critic.optimizer, state[CRITIC]["optimizer"])
        if reference is not None:
            reference.load([state[reference_key(number)] for number in range(len(chunks))])
    return read_progress(path)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The `arrays` that were saved; the checkpoint must have passed `manifest.verify`."""
    if not (path / ARRAYS).is_file():
        return {}
    with np.load(path / ARRAYS) as arrays:
        return dict(arrays)


def _shape(chunks: list[GPTModel]) -> dict[str, int]:
    architecture = chunks[0].architecture
    return {name: getattr(architecture, name) for name in SHAPE}


def _check_shape(path: Path, chunks: list[GPTModel]) -> None:
    saved, present = read_layout(path)["model"], _shape(chunks)
    other = next((name for name in SHAPE if saved[name] != present[name]), None)
    if other is not None:
        raise ConfigError(
            f"{path} is of a model with {other} {saved[other]}, and that of model.path has {present[other]}; set "
            "model.path to the model that the run was started from, or choose another name for a new run"
        )


def _check_kind(path: Path, optimizer: MegatronOptimizer) -> None:
    saved, present = read_layout(path)["optimizer"], kind(optimizer)
    if saved == "none":
        raise ConfigError(f"{path} holds weights without an optimizer; a run cannot go on from it")
    if saved != present:
        raise ConfigError(
            f"{path} was saved by a {saved} optimizer; set parallel.distributed_optimizer to "
            f"{str(saved == 'distributed').lower()} to go on from it"
        )


def _check_reference(path: Path) -> None:
    if not read_layout(path).get("reference"):
        raise ConfigError(
            f"{path} holds no reference policy, which kl.coefficient above 0 and objective.estimator full need; set it "
            "to 0, or to k3, to go on from it, or choose another name for a new run"
        )


@contextmanager
def _weights_only() -> Iterator[None]:
    """torch's checkpoint reader asks for weights_only=False where an object is no tensor; this overrules it."""
    names = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    before = {name: os.environ.get(name) for name in names}
    os.environ |= names
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
