"""Core attention of the local layer spec: rotary positions and causal attention of packed sequences by torch's SDPA.

Sequences lie end to end in one row of tokens and never see each other. They are cut out into a few batches of similar
length, padded on the right, and each batch goes through one SDPA call. A causal pass needs no mask for right padding:
a padded key comes after every real query of its sequence.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch.nn.attention.bias import causal_lower_right

from megatron_srft.distributed import Group, gather_rows

QUERY_BLOCK = 1024
"""Queries of a continued piece at a time: on a CPU their mask is a matrix of so many rows."""

MIN_FILL = 0.7
"""Sequences shorter than this share of the longest in a batch go into the next batch, so that padding stays small."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Segments:
    """How a row of packed tokens is cut into padded batches.

    Example of lengths 3 and 2: batches=[(2, 3)], token=[0, 1, 2, 3, 4, 4], slot=[0, 1, 2, 3, 4].
    """

    batches: tuple[tuple[int, int], ...]
    """(sequences, padded length) of each batch."""

    token: torch.Tensor
    """[slots] int64; the packed token in each slot of the batches laid end to end. A padding slot repeats the last
    token of its own sequence, so that nothing (not even a NaN) crosses from one sequence to another."""

    slot: torch.Tensor
    """[tokens] int64; the slot of each packed token."""


class Continued(NamedTuple):
    """A piece of a sequence that begins on another context rank, or in this rank's other chunk."""

    queries: slice
    """Of the local tokens."""
    keys: slice
    """Of the whole row: from the sequence's first token to the piece's last."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ContextCut:
    """How a row of packed tokens is shared by context ranks, for one of them; see trainer/context.py."""

    group: Group

    place: torch.Tensor
    """[tokens] int64; where each token of the row is, when all ranks' tokens lie end to end."""

    fresh: torch.Tensor
    """[fresh tokens] int64; local tokens of sequences that begin in the same chunk: they need no other keys."""

    segments: Segments
    """Of the fresh tokens, end to end."""

    continued: tuple[Continued, ...]
    """The rest, at most one piece in each of the rank's two chunks."""

    answered: torch.Tensor
    """[local tokens] int64; where each is among the fresh ones and the continued ones, end to end."""


@dataclass
class PackedParams(PackedSeqParams):
    """megatron's description of packed sequences, with the cut that this module's attention uses."""

    segments: Segments | None = None
    """Of all tokens, where this rank has them all."""

    cut: ContextCut | None = None
    """Where context ranks share them."""

    rotation: tuple[torch.Tensor, torch.Tensor] | None = None
    """What `rotate` takes; the model sets it once for all its layers, which turn queries and keys themselves."""


def packed_params(cu_seqlens: torch.Tensor, thd: bool = False, cut: ContextCut | None = None) -> PackedParams:
    """Describe packed sequences to the model; made once per micro-batch, for all layers.

    Args:
        cu_seqlens: [sequences + 1] int32, from 0 to the number of tokens, padding included as a sequence.
        thd: for TransformerEngine's layers. Otherwise the format is called 'sbhd': megatron's attention layer then
            takes the tokens as one plain row, and leaves the rotary positions to PackedAttention.
        cut: how context ranks share the tokens; not with thd.
    """
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    return PackedParams(
        qkv_format="thd" if thd else "sbhd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        segments=None if thd or cut is not None else plan_segments(lengths, cu_seqlens.device),
        cut=cut,
    )


def plan_segments(lengths: list[int], device: torch.device) -> Segments:
    """Cut sequences of these lengths, which lie end to end, into batches of similar length."""
    order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i])
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    batches: list[list[int]] = []
    for i in order:
        if not batches or lengths[i] < MIN_FILL * lengths[batches[-1][0]]:
            batches.append([])
        batches[-1].append(i)
    token = [_slots(batch, lengths, starts) for batch in batches]
    token = torch.cat(token) if token else torch.zeros(0, dtype=torch.int64)
    slot = torch.empty(starts[-1], dtype=torch.int64)
    # Written from the back, so that a token's first slot wins over the padding that repeats it.
    slot[token.flip(0)] = torch.arange(len(token)).flip(0)
    shapes = tuple((len(batch), lengths[batch[0]]) for batch in batches)
    return Segments(batches=shapes, token=token.to(device), slot=slot.to(device))


def _slots(batch: list[int], lengths: list[int], starts: list[int]) -> torch.Tensor:
    """[sequences * padded length] tokens of one batch."""
    first = torch.tensor([starts[i] for i in batch])[:, None]
    last = torch.tensor([starts[i] + lengths[i] - 1 for i in batch])[:, None]
    return torch.minimum(first + torch.arange(lengths[batch[0]]), last).flatten()


def rotation(positions: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Cosine and signed sine of every token's angles, both [tokens, 1, head_dim], for `rotate`.

    Args:
        positions: [tokens].
        frequencies: [head_dim / 2] float32, in radians per token.
    """
    angles = torch.outer(positions.float(), frequencies)[:, None, :]
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat((cosine, cosine), -1).to(dtype), torch.cat((-sine, sine), -1).to(dtype)


def rotate(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (arXiv 2104.09864, eq. 34) of [tokens, heads, head_dim].

    The pairs are (i, i + head_dim / 2), as in Hugging Face's models: x cos + swap(x) (-sin, sin), where swap exchanges
    the halves. What is recorded for the gradient is the rotation alone, which all layers share.
    """
    return _Rotate.apply(heads, cosine, sine)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, heads, cosine, sine):
        ctx.save_for_backward(cosine, sine)
        return (heads * cosine).addcmul_(_swap(heads), sine)

    @staticmethod
    def backward(ctx, grad):
        cosine, sine = ctx.saved_tensors
        return (grad * cosine).addcmul_(_swap(grad), sine, value=-1), None, None


def _swap(heads: torch.Tensor) -> torch.Tensor:
    return heads.roll(heads.shape[-1] // 2, -1)


class _Pad(torch.autograd.Function):
    """[tokens, ...] -> [slots, ...]. Padding slots receive no gradient, so its backward is a plain gather."""

    @staticmethod
    def forward(ctx, packed, segments):
        ctx.segments = segments
        return packed.index_select(0, segments.token)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.segments.slot), None


class _Unpad(torch.autograd.Function):
    """[slots, ...] -> [tokens, ...]; the gradient of padding slots is zero."""

    @staticmethod
    def forward(ctx, padded, segments):
        ctx.segments = segments
        return padded.index_select(0, segments.slot)

    @staticmethod
    def backward(ctx, grad):
        padded = grad.new_zeros(len(ctx.segments.token), *grad.shape[1:])
        return padded.index_copy_(0, ctx.segments.slot, grad), None


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scale: float
) -> torch.Tensor:
    """Causal attention within each sequence.

    Args:
        query: [tokens, heads, dim].
        key, value: [tokens, key heads, dim]; heads is a multiple of key heads, query heads of one key head adjacent.

    Returns:
        [tokens, heads, dim].
    """
    query, key, value = (_Pad.apply(t, segments) for t in (query, key, value))
    outputs, begin = [], 0
    for sequences, length in segments.batches:
        end = begin + sequences * length
        batch = (t[begin:end].unflatten(0, (sequences, length)) for t in (query, key, value))
        outputs.append(causal_attention(*batch, scale).flatten(0, 1))
        begin = end
    return _Unpad.apply(torch.cat(outputs), segments)


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of equally long sequences: [sequences, length, heads, dim] each, and the result too."""
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def context_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cut: ContextCut, scale: float
) -> torch.Tensor:
    """`packed_attention` of a row that context ranks share: local tokens in, local tokens out. Collective."""
    keys, values = gather_rows(torch.cat((key, value), dim=1), cut.group).index_select(0, cut.place).chunk(2, dim=1)
    answers = [_continued_attention(query[c.queries], keys[c.keys], values[c.keys], scale) for c in cut.continued]
    if len(cut.fresh):
        fresh = (t.index_select(0, cut.fresh) for t in (query, key, value))
        answers.insert(0, packed_attention(*fresh, cut.segments, scale))
    # Of no token, but it makes every rank's result depend on the gathered keys: in the backward pass all ranks of the
    # group have to meet, those that needed none of the keys too.
    answers.append(values[:0].repeat_interleave(query.shape[1] // key.shape[1], dim=1))
    return torch.cat(answers).index_select(0, cut.answered)


def _continued_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention where the last query belongs to the last key: [queries, heads, dim], [keys, key heads, dim]."""
    missing, answers = len(key) - len(query), []
    for begin in range(0, len(query), QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, len(query))
        block = (t.transpose(0, 1)[None] for t in (query[begin:end], key[: missing + end], value[: missing + end]))
        mask = causal_lower_right(end - begin, missing + end)
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(*block, attn_mask=mask, scale=scale, enable_gqa=grouped)
        answers.append(out[0].transpose(0, 1))
    return torch.cat(answers)


class PackedAttention(MegatronModule):
    """Drop-in for megatron's DotProductAttention in the local layer spec. No dropout, no masks but the causal one."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, **unused):
        super().__init__(config=config)
        self.scale = softmax_scale or config.softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None, packed_seq_params=None
    ):
        """[tokens, 1, heads, dim] -> [tokens, 1, heads * dim]"""
        query, key, value = (t.squeeze(1) for t in (query, key, value))
        query, key = (rotate(t, *packed_seq_params.rotation) for t in (query, key))
        segments, cut = packed_seq_params.segments, packed_seq_params.cut
        if cut is None:
            out = packed_attention(query, key, value, segments, self.scale)
        else:
            out = context_attention(query, key, value, cut, self.scale)
        return out.flatten(1).unsqueeze(1)
