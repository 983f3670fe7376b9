"""Context parallelism: the ranks of a context group share the tokens of every micro-batch.

    row of packed tokens, cut into 2 x ranks chunks     0 1 2 3 4 5 6 7
    of 4 ranks, rank 1 has                                1         6

A rank has a chunk from either end, because under a causal mask late tokens cost more than early ones. Everything but
attention works on single tokens. For attention each rank gathers the keys and values of the whole row (Llama 3, arXiv
2407.21783, section 3.3.2) and answers its own queries. At the end the figures of all response tokens are put together
on every rank, which then computes the micro-batch's whole loss from them, so that objectives know nothing of the cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_srft.distributed import Group, rank, size, sum_shared
from megatron_srft.sample import PackedBatch
from megatron_srft.trainer.attention import ContextCut, Continued, PackedParams, packed_params, plan_segments


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """What one context rank has of a micro-batch: all of it, when there is one."""

    batch: PackedBatch
    """The whole micro-batch."""

    token_ids: torch.Tensor
    """[local tokens] int64."""

    position_ids: torch.Tensor
    """[local tokens] int64."""

    rows: torch.Tensor
    """[own rows] int64; which of the local tokens predict a response token."""

    labels: torch.Tensor
    """[own rows] int64; that response token."""

    params: PackedParams
    """What the model is told of the sequences."""

    group: Group = None
    own: torch.Tensor | None = None
    """[own rows] int64; places of `rows` among the micro-batch's rows. None: they are all."""

    place: torch.Tensor | None = None
    """[tokens] int64; where each token of the micro-batch is among the local ones, -1 elsewhere. None: they are all."""

    def whole(self, figures: torch.Tensor) -> torch.Tensor:
        """[own rows, ...] -> [rows, ...] of the micro-batch, on every context rank; a gradient goes to its own rank."""
        if self.own is None:
            return figures
        empty = figures.new_zeros(len(self.batch.rows), *figures.shape[1:])
        return sum_shared(empty.index_copy(0, self.own, figures), self.group)

    def at(self, tokens: torch.Tensor, figures: torch.Tensor) -> torch.Tensor:
        """[local tokens, n] -> those of these tokens of the micro-batch, on every context rank."""
        if self.place is None:
            return figures.index_select(0, tokens)
        places = self.place[tokens]
        own = figures.index_select(0, places.clamp(min=0)).masked_fill((places < 0)[:, None], 0)  # even where it is NaN
        return sum_shared(own, self.group)


def local_part(batch: PackedBatch, group: Group, thd: bool) -> Part:
    """This rank's part of a micro-batch; `grain` divides its number of tokens.

    Args:
        thd: see `attention.packed_params`; not with several context ranks.
    """
    if size(group) == 1:
        return Part(
            batch=batch,
            token_ids=batch.token_ids,
            position_ids=batch.position_ids,
            rows=batch.rows,
            labels=batch.labels,
            params=packed_params(batch.cu_seqlens, thd),
        )
    device, tokens = batch.token_ids.device, len(batch.token_ids)
    local = local_tokens(tokens, group).to(device)
    place = torch.full((tokens,), -1, device=device).index_copy_(0, local, torch.arange(len(local), device=device))
    places = place[batch.rows]
    own = (places >= 0).nonzero()[:, 0]
    return Part(
        batch=batch,
        token_ids=batch.token_ids[local],
        position_ids=batch.position_ids[local],
        rows=places[own],
        labels=batch.labels[own],
        params=packed_params(batch.cu_seqlens, thd, _cut(batch.cu_seqlens, group)),
        group=group,
        own=own,
        place=place,
    )


def grain(ranks: int) -> int:
    """What the tokens of a micro-batch must be a multiple of."""
    return 2 * ranks if ranks > 1 else 1


def chunks(tokens: int, ranks: int, number: int) -> tuple[range, range]:
    """The two stretches of a row of tokens that context rank `number` has."""
    length = tokens // (2 * ranks)
    first, second = number * length, (2 * ranks - 1 - number) * length
    return range(first, first + length), range(second, second + length)


def local_tokens(tokens: int, group: Group) -> torch.Tensor:
    """[local tokens] int64; which of the row's tokens this rank has, in its order."""
    return torch.arange(tokens) if size(group) == 1 else _tokens_of(tokens, size(group), rank(group))


def _tokens_of(tokens: int, ranks: int, number: int) -> torch.Tensor:
    return torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in chunks(tokens, ranks, number)])


def _cut(cu_seqlens: torch.Tensor, group: Group) -> ContextCut:
    device, bounds = cu_seqlens.device, cu_seqlens.tolist()
    tokens, ranks = bounds[-1], size(group)
    fresh, lengths, continued, before = [torch.zeros(0, dtype=torch.int64)], [], [], 0
    for chunk in chunks(tokens, ranks, rank(group)):
        for begin, piece in _pieces(bounds, chunk):
            here = before + piece.start - chunk.start
            if piece.start == begin:
                fresh.append(torch.arange(here, here + len(piece)))
                lengths.append(len(piece))
            else:
                continued.append(Continued(slice(here, here + len(piece)), slice(begin, piece.stop)))
        before += len(chunk)
    order = torch.cat([_tokens_of(tokens, ranks, number) for number in range(ranks)])
    answered = torch.cat([*fresh, *(torch.arange(c.queries.start, c.queries.stop) for c in continued)])
    return ContextCut(
        group=group,
        place=order.argsort().to(device),
        fresh=torch.cat(fresh).to(device),
        segments=plan_segments(lengths, device),
        continued=tuple(continued),
        answered=answered.argsort().to(device),
    )


def _pieces(bounds: Sequence[int], chunk: range) -> list[tuple[int, range]]:
    """(where the sequence begins, its tokens in the chunk) for each sequence that has some there."""
    pieces = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        piece = range(max(start, chunk.start), min(stop, chunk.stop))
        if len(piece):
            pieces.append((start, piece))
    return pieces
