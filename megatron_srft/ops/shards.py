"""What the two log-prob ops share: their arguments' checks, and putting the shards' statistics together.

`rows` are tokens that are scored, `vocab_shard` this rank's columns of the vocabulary (they may differ per rank).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_srft import distributed
from megatron_srft.distributed import Group, all_gather_objects
from megatron_srft.ops.softmax_statistics import Statistics, finish, merge

_agreed: set[tuple[Group, int, int, int]] = set()
"""(group, vocab_start, columns, vocab_size) that fit together, so that ranks need not ask each other again."""


def combine(statistics: Statistics, labels: Tensor, vocab_size: int, group: Group) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy), both [rows] and equal on every rank, from this rank's statistics; one all-gather."""
    if distributed.size(group) > 1 and labels.numel() > 0:
        statistics = merge(_Gather.apply(statistics, group))
    logprobs, entropy = finish(statistics)
    if labels.is_cuda:
        logprobs = logprobs.masked_fill((labels < 0) | (labels >= vocab_size), torch.nan)
    return logprobs, entropy


class _Gather(torch.autograd.Function):
    """[4, rows] of every rank -> [ranks, 4, rows]. What follows is the same on all ranks, so each takes back only the
    gradient of its own part."""

    @staticmethod
    def forward(ctx, statistics, group):
        ctx.rank = distributed.rank(group)
        return torch.stack(distributed.all_gather(statistics, group))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient[ctx.rank], None


def valid_columns(width: int, vocab_start: int, vocab_size: int) -> int:
    """How many of a shard's columns are tokens; the rest is padding."""
    return max(0, min(width, vocab_size - vocab_start))


def check_matrix(name: str, matrix: Tensor) -> None:
    if matrix.dim() != 2 or not matrix.is_floating_point():
        raise ValueError(f"{name} must be a matrix of floats, got {matrix.dtype} of shape {tuple(matrix.shape)}")
    if matrix.numel() > 0 and matrix.stride(1) != 1:
        raise ValueError(f"{name} must have its columns side by side, got strides {matrix.stride()}; call contiguous()")


def check_labels(labels: Tensor, rows: int, like: Tensor, vocab_size: int) -> None:
    """Whether there is a token of the vocabulary for each row."""
    if labels.dtype != torch.int64 or labels.shape != (rows,):
        raise ValueError(
            f"labels must be int64 of shape ({rows},), one per row, got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if not labels.is_contiguous():
        raise ValueError(f"labels must lie side by side, got strides {labels.stride()}; call contiguous()")
    if labels.device != like.device:
        raise ValueError(f"labels must be on the device of the rows, {like.device}, got {labels.device}")
    if labels.is_cuda or labels.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = labels.aminmax()
    if low < 0 or high >= vocab_size:
        raise ValueError(f"labels must lie in [0, {vocab_size}), got {int(low)} to {int(high)}; check the tokenizer")


def check_shard(width: int, vocab_start: int, vocab_size: int, temperature: float, group: Group) -> None:
    """Whether the shards of all ranks make up the vocabulary; ranks ask each other the first time."""
    if not temperature > 0:
        raise ValueError(f"the temperature of log-probs must be positive, got {temperature}")
    if vocab_size < 1 or vocab_start < 0:
        raise ValueError(f"vocab_size must be positive and vocab_start not negative, got {vocab_size}, {vocab_start}")
    columns = valid_columns(width, vocab_start, vocab_size)
    if distributed.size(group) == 1:
        shards = [(vocab_start, columns)]
    elif (group, vocab_start, columns, vocab_size) in _agreed:
        return
    else:
        shards = all_gather_objects((vocab_start, columns), group)
    end = 0
    for start, count in sorted(shards, key=lambda shard: (shard[1] == 0, shard)):
        if count > 0 and start != end:
            break
        end += count
    if end != vocab_size:
        ranges = ", ".join(f"[{start}, {start + count})" for start, count in shards)
        raise ValueError(
            f"the ranks' columns must make up the vocabulary of {vocab_size}, each once; by vocab_start and width they "
            f"hold {ranges}"
        )
    if distributed.size(group) > 1:
        _agreed.add((group, vocab_start, columns, vocab_size))
