"""Process groups as values, and the few collectives the project needs. torch only.

Code that communicates takes the group it needs as an argument; a group of one rank (or None) makes every collective
here a no-op, so the same code path serves one process and a cluster.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

Group = dist.ProcessGroup | None


@dataclass(frozen=True, kw_only=True)
class ProcessGroups:
    """The groups this rank belongs to. `None` stands for a group of this rank alone."""

    world: Group = None
    tensor: Group = None
    """Ranks that hold the slices of one layer."""
    pipeline: Group = None
    """Ranks that hold the stages of one model replica."""
    context: Group = None
    """Ranks that share the tokens of a micro-batch."""
    data: Group = None
    """Ranks that hold the same slice and stage, and the same share of the tokens, of different replicas."""
    copies: Group = None
    """Ranks that hold the same parameters: context x data. Gradients are summed over them."""
    model: Group = None
    """Ranks of one replica: tensor x context x pipeline."""


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """torch.distributed runs: as it does, or as a world of this process alone, which ends with the context."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def size(group: Group) -> int:
    return 1 if group is None else group.size()


def rank(group: Group) -> int:
    return 0 if group is None else group.rank()


def all_reduce(tensor: torch.Tensor, group: Group, op: str = "sum") -> torch.Tensor:
    """Reduce in place over the group (op: sum, max, min) and return the tensor."""
    if size(group) > 1:
        dist.all_reduce(
            tensor, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[op], group
        )
    return tensor


def sum_shared(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Differentiable sum over the group, for a loss that every rank then computes alike from the sum.

    The gradient passes unchanged: the ranks hold one loss between them, not one each.
    """
    return tensor if size(group) == 1 else _SumShared.apply(tensor, group)


def gather_rows(rows: torch.Tensor, group: Group) -> torch.Tensor:
    """[n, ...] of every rank, end to end in rank order: [ranks x n, ...]. Differentiable: each rank's own rows get the
    sum of the gradients that all ranks have for them."""
    return rows if size(group) == 1 else _GatherRows.apply(rows, group)


def all_gather(tensor: torch.Tensor, group: Group) -> list[torch.Tensor]:
    """The group's tensors of this shape, in rank order."""
    if size(group) == 1:
        return [tensor]
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(size(group))]
    dist.all_gather(parts, tensor, group)
    return parts


def all_gather_objects(value: Any, group: Group) -> list[Any]:
    """The group's picklable values, in rank order."""
    if size(group) == 1:
        return [value]
    values: list[Any] = [None] * size(group)
    dist.all_gather_object(values, value, group)
    return values


def broadcast_object(value: Any, group: Group, source: int = 0) -> Any:
    """The value of the group's rank `source`, on every rank."""
    if size(group) == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, dist.get_global_rank(group, source), group)
    return box[0]


def barrier(group: Group) -> None:
    if size(group) > 1:
        dist.barrier(group)


def is_main(group: Group = None) -> bool:
    """Whether this process is the first of the world (or of `group`): the one that prints and writes."""
    if group is not None:
        return rank(group) == 0
    return not dist.is_initialized() or dist.get_rank() == 0


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, group):
        ctx.group = group
        return torch.cat(all_gather(rows, group))

    @staticmethod
    def backward(ctx, gradient):
        parts = list(gradient.contiguous().chunk(size(ctx.group)))
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts, group=ctx.group)
        return own, None


class _SumShared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group):
        return all_reduce(tensor.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None
