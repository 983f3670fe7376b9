"""Starts and ends the parallel machinery: torch.distributed, megatron's process groups, its random state.

Ranks come from the environment that torchrun (or srun with the same variables) sets; without it this process is a
world of its own, so that a single-process run needs no launcher.
"""

import os
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_srft.config import ConfigError, ParallelConfig
from megatron_srft.distributed import ProcessGroups

TIMEOUT = timedelta(hours=2)
"""Longest wait in a collective. Ranks wait for the slowest one's rollouts and for the checkpoint writer."""


def device() -> torch.device:
    """Where this rank's tensors live."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def start(config: ParallelConfig, seed: int) -> ProcessGroups:
    """Join the world and cut it into tensor-, pipeline- and data-parallel groups.

    Raises:
        ConfigError: the layout does not fit the number of processes, or there are fewer GPUs than local processes.
    """
    check_world_size(config, int(os.environ.get("WORLD_SIZE", "1")))
    if torch.cuda.is_available():
        _choose_gpu()
    if not dist.is_initialized():
        _join_world()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline,
        context_parallel_size=config.context,
        distributed_timeout_minutes=int(TIMEOUT.total_seconds() // 60),
    )
    seed_step(seed, 0)
    return ProcessGroups(
        world=dist.group.WORLD,
        tensor=parallel_state.get_tensor_model_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        context=parallel_state.get_context_parallel_group(),
        data=parallel_state.get_data_parallel_group(),
        copies=parallel_state.get_data_parallel_group(with_context_parallel=True),
        model=_replica(config),
    )


def _replica(config: ParallelConfig) -> dist.ProcessGroup:
    """This rank's replica as a group, which megatron has only without the context ranks."""
    if config.context == 1:
        return parallel_state.get_model_parallel_group()
    own, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    numbers: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(numbers, own)
    members = [[rank for rank, number in enumerate(numbers) if number == replica] for replica in range(replicas)]
    return [dist.new_group(ranks, timeout=TIMEOUT) for ranks in members][own]


def seed_step(seed: int, step: int) -> None:
    """Make the random state of this rank a function of (seed, step), so that a resumed run draws the same numbers."""
    tensor_parallel.model_parallel_cuda_manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))


def stop() -> None:
    """Leave the groups and the world; a process may start again afterwards."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def check_world_size(config: ParallelConfig, world_size: int) -> None:
    """Raise ConfigError unless a whole number of model replicas fits."""
    if world_size % config.model_ranks:
        raise ConfigError(
            f"{_product(config)} = {config.model_ranks} ranks per model replica, which does not divide the "
            f"{world_size} process(es) of this run; "
            f"start with torchrun --nproc-per-node {config.model_ranks} (or a multiple), or make the layout smaller"
        )


def _product(config: ParallelConfig) -> str:
    sizes = {"tensor": config.tensor, "context": config.context, "pipeline": config.pipeline}
    shown = [name for name in sizes if name != "context" or config.context > 1]
    return " x ".join(f"parallel.{name}" for name in shown) + " = " + " x ".join(str(sizes[name]) for name in shown)


def _join_world() -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, timeout=TIMEOUT, store=dist.HashStore(), rank=0, world_size=1)


def _choose_gpu() -> None:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU of its own: this machine shows {torch.cuda.device_count()}; "
            "start at most one process per GPU (torchrun --nproc-per-node), or hide the GPUs with "
            "CUDA_VISIBLE_DEVICES='' to run on CPU"
        )
    torch.cuda.set_device(local_rank)
