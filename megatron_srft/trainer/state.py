"""Model and optimizer as Megatron's sharded state, where Megatron's own way would lose or refuse something."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_srft.distributed import ProcessGroups
from megatron_srft.trainer.critic import Critic
from megatron_srft.trainer.reference import Reference

CRITIC = "critic"
"""Its place in the state, and in front of its tensors' names in a checkpoint."""


def sharded_state(
    chunks: list[GPTModel],
    optimizer: MegatronOptimizer | None,
    groups: ProcessGroups,
    reference: Reference | None = None,
    critic: Critic | None = None,
    *,
    loading: bool,
) -> dict[str, Any]:
    metadata = {
        # The one optimizer format that loads under another layout and data-parallel size.
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": groups.copies,
    }
    state = {
        model_key(number, chunks): chunk.sharded_state_dict(metadata=metadata) for number, chunk in enumerate(chunks)
    }
    if optimizer is not None:
        _make_moments(optimizer)
        with _buffers_with_padding(optimizer):
            state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=loading, metadata=metadata)
    if reference is not None:
        state |= {reference_key(n): part for n, part in enumerate(reference.sharded_state(metadata))}
    if critic is not None:
        state[CRITIC] = sharded_state(critic.models, critic.optimizer, groups, loading=loading)
        add_prefix_for_sharding(state[CRITIC], f"{CRITIC}.")
    return state


def model_key(number: int, chunks: list[GPTModel]) -> str:
    return "model" if len(chunks) == 1 else f"model{number}"


def reference_key(number: int) -> str:
    return f"reference{number}"


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _distributed_parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    return [part for part in _parts(optimizer) if isinstance(part, DistributedOptimizer)]


def _torch_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    return [part.optimizer for part in _parts(optimizer) if part.optimizer is not None]


@contextmanager
def _buffers_with_padding(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Let Megatron gather its buffers with the padding at the end of each bucket.

    It takes that padding out, then cuts out the parameters at positions that count it: with more than one bucket, or a
    padded last one, parts of the moments (and of the main weights) would be saved under another parameter or lost.
    """
    holders = [
        (holder, holder.numel_unpadded, numel)
        for part in _distributed_parts(optimizer)
        for buffer in part.buffers
        for holder, numel in [(buffer, buffer.numel), *((b, b.grad_data.numel()) for b in buffer.buckets)]
    ]
    for holder, _, padded in holders:
        holder.numel_unpadded = padded
    try:
        yield
    finally:
        for holder, unpadded, _ in holders:
            holder.numel_unpadded = unpadded


def _make_moments(optimizer: MegatronOptimizer) -> None:
    """torch's AdamW makes its state in the first step; a load, and a save before that step, want it there already.

    The fused optimizers of TransformerEngine and apex keep `step` elsewhere, and Megatron makes their state itself.
    """
    for inner in _torch_optimizers(optimizer):
        if not isinstance(inner, torch.optim.AdamW | torch.optim.Adam):
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def load_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    _keep_steps(optimizer)
    optimizer.load_state_dict(state)
    _unshare_steps(optimizer)


def _keep_steps(optimizer: MegatronOptimizer) -> None:
    """Megatron's sharded loader expects a `step` per parameter in the file, where it is stored once; supply it."""
    for part in _distributed_parts(optimizer):
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


def kind(optimizer: MegatronOptimizer | None) -> str:
    """distributed (sharded over the data-parallel ranks), replicated, or none."""
    if optimizer is None:
        return "none"
    return "distributed" if _distributed_parts(optimizer) else "replicated"
