"""Weights in and out of a sharded model, a bounded amount at a time.

The model is a list of `Parameter`s (this rank's shards with their megatron names), so nothing here knows megatron.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_srft.distributed import ProcessGroups, all_gather, all_gather_objects, rank, size
from megatron_srft.weights.architecture import Architecture
from megatron_srft.weights.cuts import cut_shard, join_shards
from megatron_srft.weights.tables import EMBEDDING, HEAD, Rule, hf_shapes, rule_for

BUCKET_BYTES = 256 << 20
"""Most bytes of full tensors that are gathered together; a larger single tensor travels alone."""


@dataclass(frozen=True, slots=True, eq=False)
class Parameter:
    """Example: name="decoder.layers.0.mlp.linear_fc2.weight", layer_offset=12, tensor of shape [896, 2432]."""

    name: str
    """Within its model chunk."""
    layer_offset: int
    """Layers of the model before this chunk's first one."""
    tensor: torch.Tensor


def check_names(shapes: dict[str, tuple[int, ...]], architecture: Architecture, where: str) -> None:
    """Compare the tensors found in `where` with what the architecture needs.

    A tied model may bring its LM head along; it is the embedding and is not read. So are old files' rotary tables.

    Raises:
        ValueError: tensors are missing, unexpected or misshapen; the message names them.
    """
    expected = hf_shapes(architecture)
    missing = [name for name in expected if name not in shapes]
    extra = [name for name in shapes if name not in expected and not _is_redundant(name, architecture)]
    misshapen = [
        f"{name} is {list(shapes[name])} instead of {list(expected[name])}"
        for name in expected
        if name in shapes and tuple(shapes[name]) != expected[name]
    ]
    for problem, names in (("lacks", missing), ("has unexpected", extra), ("has misshapen", misshapen)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{where} {problem} tensor(s) for its config.json: {', '.join(names[:5])}{more}")


def _is_redundant(name: str, architecture: Architecture) -> bool:
    return name.endswith(".rotary_emb.inv_freq") or (name == HEAD and architecture.tied)


@torch.no_grad()
def load_hf(
    parameters: Iterable[Parameter],
    read: Callable[[str], torch.Tensor],
    architecture: Architecture,
    tensor_rank: int,
    tensor_size: int,
) -> None:
    """Fill the parameters from full HF tensors; every rank reads what it needs, without communication.

    Args:
        read: returns the full tensor of a Hugging Face name.

    Raises:
        ValueError: a parameter has no rule, or its shape differs from what the HF tensors give.
    """
    for parameter in parameters:
        rule = rule_for(parameter.name, parameter.layer_offset)
        names = (EMBEDDING,) if rule.hf_names == (HEAD,) and architecture.tied else rule.hf_names
        padded_vocab = parameter.tensor.shape[0] * tensor_size
        full = [read(name) for name in names]
        if not all(tensor.is_floating_point() for tensor in full):
            raise ValueError(
                f"{', '.join(names)} hold {full[0].dtype}, no floating-point weights; a quantised model has to be "
                "converted to bfloat16 or float32 first"
            )
        shard = cut_shard(rule.cut, full, architecture, tensor_rank, tensor_size, padded_vocab)
        if shard.shape != parameter.tensor.shape:
            raise ValueError(
                f"{', '.join(names)} give a shard of shape {list(shard.shape)}, "
                f"but {parameter.name} is {list(parameter.tensor.shape)}"
            )
        parameter.tensor.copy_(shard)


@torch.no_grad()
def export_hf(
    parameters: Iterable[Parameter],
    architecture: Architecture,
    groups: ProcessGroups,
    bucket_bytes: int = BUCKET_BYTES,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every HF tensor in full, on every rank (collective: all ranks must exhaust the iterator).

    Shards travel from their pipeline stage to the others bucket by bucket, then each bucket is gathered over the
    tensor-parallel ranks. A tensor may share memory with the model or with its bucket: copy what must outlive the next
    optimizer step.

    Raises:
        ValueError: on every rank, when the parameters do not give exactly the architecture's tensors.
    """
    mine = [p for p in parameters if not (architecture.tied and p.name == "output_layer.weight")]
    stages = all_gather_objects([_Slot.of(p) for p in mine], groups.pipeline)
    _check_complete(stages, architecture)
    for stage, slots in enumerate(stages):
        own = iter(mine) if stage == rank(groups.pipeline) else None
        for bucket in _buckets(slots, bucket_bytes // size(groups.tensor)):
            tensors = [next(own).tensor.detach() for _ in bucket] if own else None
            shards = _gather(_share(tensors, bucket, stage, groups, mine[0].tensor.device), bucket, groups)
            for slot, parts in zip(bucket, shards, strict=True):
                joined = join_shards(slot.rule.cut, parts, architecture)
                yield from ((n, t.contiguous()) for n, t in zip(slot.rule.hf_names, joined, strict=True))


@dataclass(frozen=True, slots=True)
class _Slot:
    """What the other ranks must know of a parameter."""

    rule: Rule
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, parameter: Parameter) -> "_Slot":
        tensor = parameter.tensor
        return cls(rule_for(parameter.name, parameter.layer_offset), tensor.shape, tensor.dtype)

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def _check_complete(stages: list[list[_Slot]], architecture: Architecture) -> None:
    found = [name for slots in stages for slot in slots for name in slot.rule.hf_names]
    wrong = set(found) ^ set(hf_shapes(architecture))
    if wrong or len(found) != len(set(found)):
        twice = {name for name in found if found.count(name) > 1}
        raise ValueError(f"the model's parameters and its architecture disagree about {sorted(wrong | twice)[:5]}")


def _buckets(slots: list[_Slot], limit: int) -> Iterator[list[_Slot]]:
    """Consecutive slots of one dtype, at most `limit` bytes together unless one alone is larger."""
    bucket: list[_Slot] = []
    for slot in slots:
        if bucket and (slot.dtype != bucket[0].dtype or sum(s.bytes for s in bucket) + slot.bytes > limit):
            yield bucket
            bucket = []
        bucket.append(slot)
    if bucket:
        yield bucket


def _share(
    tensors: list[torch.Tensor] | None, bucket: list[_Slot], stage: int, groups: ProcessGroups, device: torch.device
) -> list[torch.Tensor]:
    """This tensor-parallel rank's shards of the bucket, from the stage that holds them (tensors is None elsewhere)."""
    if size(groups.pipeline) == 1:
        return tensors
    if tensors is None:
        flat = torch.empty(sum(s.shape.numel() for s in bucket), dtype=bucket[0].dtype, device=device)
    else:
        flat = torch.cat([t.flatten() for t in tensors])
    dist.broadcast(flat, dist.get_global_rank(groups.pipeline, stage), groups.pipeline)
    return _views(flat, bucket)


def _gather(tensors: list[torch.Tensor], bucket: list[_Slot], groups: ProcessGroups) -> list[list[torch.Tensor]]:
    """For each parameter of the bucket, its shards of all tensor-parallel ranks."""
    if size(groups.tensor) == 1:
        return [[t] for t in tensors]
    flat = torch.cat([t.flatten() for t in tensors])
    ranks = [_views(part, bucket) for part in all_gather(flat, groups.tensor)]
    return [list(shards) for shards in zip(*ranks, strict=True)]


def _views(flat: torch.Tensor, bucket: list[_Slot]) -> list[torch.Tensor]:
    parts = flat.split([s.shape.numel() for s in bucket])
    return [part.view(s.shape) for part, s in zip(parts, bucket, strict=True)]
