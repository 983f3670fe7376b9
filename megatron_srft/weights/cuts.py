"""Full Hugging Face tensors to the shard of one tensor-parallel rank, and all shards back to full tensors.

Both directions only move numbers, so a round trip is exact to the bit.
"""

import torch

from megatron_srft.weights.architecture import Architecture
from megatron_srft.weights.tables import Cut


def cut_shard(
    cut: Cut, tensors: list[torch.Tensor], architecture: Architecture, rank: int, size: int, padded_vocab: int
) -> torch.Tensor:
    """The part of a megatron parameter that rank `rank` of `size` holds, from its full HF tensors."""
    match cut:
        case "whole":
            return tensors[0]
        case "columns":
            return tensors[0].chunk(size, dim=1)[rank]
        case "vocabulary":
            padding = tensors[0].new_zeros(padded_vocab - len(tensors[0]), *tensors[0].shape[1:])
            return torch.cat((tensors[0], padding)).chunk(size)[rank]
        case "gate_up":
            return torch.cat([t.chunk(size)[rank] for t in tensors])
        case "qkv":
            by_head = [t.unflatten(0, (architecture.num_kv_heads, -1)).chunk(size)[rank] for t in tensors]
            return torch.cat(by_head, dim=1).flatten(0, 1)


def join_shards(cut: Cut, shards: list[torch.Tensor], architecture: Architecture) -> list[torch.Tensor]:
    """The full HF tensors of a megatron parameter, from the shards of all ranks in order."""
    match cut:
        case "whole":
            return [shards[0]]
        case "columns":
            return [torch.cat(shards, dim=1)]
        case "vocabulary":
            return [torch.cat(shards)[: architecture.vocab_size]]
        case "gate_up":
            halves = [shard.chunk(2) for shard in shards]
            return [torch.cat([half[i] for half in halves]) for i in range(2)]
        case "qkv":
            dim = architecture.head_dim
            queries = architecture.num_heads // architecture.num_kv_heads * dim
            by_head = torch.cat(shards).unflatten(0, (architecture.num_kv_heads, queries + 2 * dim))
            return [t.flatten(0, 1) for t in by_head.split((queries, dim, dim), dim=1)]
