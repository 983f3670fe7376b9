"""Lay sequences end to end into micro-batches of a token budget.

The plan is a pure function of the sequence lengths, so every rank computes the same plan and takes its own share;
nothing is exchanged. The loss does not depend on the plan: each term is a sum over tokens divided by a global count
(`sample.Counts`), so any split into micro-batches and data-parallel ranks gives the same gradient.
"""

from collections.abc import Sequence

import numpy as np
import torch

from megatron_srft.sample import PackedBatch, TrainingSequence

Plan = list[list[tuple[int, ...]]]
"""[data rank][micro-batch] -> indices into the step's list of sequences."""


def pair_units(sequences: Sequence[TrainingSequence]) -> list[tuple[int, ...]]:
    """Indices of what has to stay together in one micro-batch: the two of a pair, every other sequence by itself."""
    units: list[tuple[int, ...]] = []
    for index, sequence in enumerate(sequences):
        before = sequences[units[-1][0]] if units else None
        if sequence.preferred is False and before is not None and before.preferred and before.group == sequence.group:
            units[-1] = (*units[-1], index)
        else:
            units.append((index,))
    return units


def plan_sequences(
    sequences: Sequence[TrainingSequence], tokens_per_microbatch: int, data_ranks: int, microbatches_multiple: int = 1
) -> Plan:
    """`plan_microbatches` for these sequences, pairs kept together: one longer than the budget is by itself."""
    units = pair_units(sequences)
    lengths = [sum(len(sequences[index].token_ids) for index in unit) for unit in units]
    plan = plan_microbatches(lengths, tokens_per_microbatch, data_ranks, microbatches_multiple)
    return [[tuple(index for unit in chosen for index in units[unit]) for chosen in share] for share in plan]


def plan_microbatches(
    lengths: Sequence[int], tokens_per_microbatch: int, data_ranks: int, microbatches_multiple: int = 1
) -> Plan:
    """Share sequences over data ranks by tokens, then pack each rank's share first-fit-decreasing.

    Args:
        lengths: tokens of each sequence, prompt included.
        tokens_per_microbatch: budget; a sequence longer than it gets a micro-batch of its own.
        data_ranks: data-parallel size.
        microbatches_multiple: every rank gets the same number of micro-batches, a multiple of this (the interleaved
            pipeline schedule needs the pipeline size); surplus ones are empty, which is legal everywhere.
    """
    longest_first = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    loads = [0] * data_ranks
    shares: list[list[int]] = [[] for _ in range(data_ranks)]
    for index in longest_first:
        lightest = loads.index(min(loads))
        shares[lightest].append(index)
        loads[lightest] += lengths[index]
    plan = [_first_fit(share, lengths, tokens_per_microbatch) for share in shares]
    most = max(1, *(len(bins) for bins in plan)) if plan else 1
    count = -(-most // microbatches_multiple) * microbatches_multiple
    return [bins + [()] * (count - len(bins)) for bins in plan]


def _first_fit(share: list[int], lengths: Sequence[int], budget: int) -> list[tuple[int, ...]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for index in share:
        fitting = next((b for b, left in enumerate(room) if left >= lengths[index]), None)
        if fitting is None:
            bins.append([index])
            room.append(budget - lengths[index])
        else:
            bins[fitting].append(index)
            room[fitting] -= lengths[index]
    return [tuple(sorted(indices)) for indices in bins]


def padded_length(num_tokens: int, multiple: int) -> int:
    """Tokens after padding to a multiple; never zero, so that an empty micro-batch still has a shape."""
    return max(1, -(-num_tokens // multiple)) * multiple


def pack(sequences: Sequence[TrainingSequence], indices: tuple[int, ...], length: int) -> PackedBatch:
    """Pack the chosen sequences into one micro-batch of exactly `length` tokens.

    Args:
        sequences: all sequences of the step.
        indices: which of them, in this order.
        length: padded length; at least their total length.
    """
    chosen = [sequences[i] for i in indices]
    lengths = [len(s.token_ids) for s in chosen]
    total = sum(lengths)
    assert total <= length, f"{total} tokens do not fit into {length}"
    padding = [length - total] if length > total else []
    starts = np.cumsum([0, *lengths])
    position_ids = [np.arange(n) for n in [*lengths, *padding]]
    spans = [(start, s) for start, s in zip(starts, chosen, strict=False)]
    rows = [start + np.arange(s.prompt_length - 1, len(s.token_ids) - 1) for start, s in spans]
    sizes = [s.response_length for s in chosen]

    def per_row(values: list, dtype: torch.dtype) -> torch.Tensor:
        """One value per sequence -> one value per row."""
        return torch.tensor(np.repeat(np.asarray(values), sizes) if chosen else [], dtype=dtype)

    def joined(arrays: list[np.ndarray], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(np.concatenate(arrays) if arrays else np.zeros(0), dtype=dtype)

    zeros = [np.zeros(n, np.float32) for n in sizes]

    def optional(name: str) -> torch.Tensor | None:
        """A field of every token, 0 in sequences without it; None if no sequence of the step has it."""
        if all(getattr(s, name) is None for s in sequences):
            return None
        return joined(
            [z if (v := getattr(s, name)) is None else v for s, z in zip(chosen, zeros, strict=True)], torch.float32
        )

    has_old = any(s.old_logprobs is not None for s in sequences)
    has_pooled = any(s.pooled_entropy is not None for s in sequences)
    return PackedBatch(
        token_ids=joined([s.token_ids for s in chosen] + [np.zeros(n) for n in padding], torch.int64),
        position_ids=joined(position_ids, torch.int64),
        cu_seqlens=torch.tensor(np.cumsum([0, *lengths, *padding]), dtype=torch.int32),
        rows=joined(rows, torch.int64),
        labels=joined([s.token_ids[s.prompt_length :] for s in chosen], torch.int64),
        sequence=per_row(list(range(len(chosen))), torch.int64),
        is_demonstration=per_row([s.is_demonstration for s in chosen], torch.bool),
        advantages=joined([s.advantages for s in chosen], torch.float32),
        correct=per_row([s.correct for s in chosen], torch.bool),
        response_lengths=per_row(sizes, torch.float32),
        rollout_logprobs=torch.zeros(sum(sizes)) if (engine := optional("rollout_logprobs")) is None else engine,
        old_logprobs=joined([s.old_logprobs for s in chosen], torch.float32) if has_old else None,
        reference_logprobs=optional("reference_logprobs"),
        values=optional("values"),
        returns=optional("returns"),
        group=per_row([s.group for s in chosen], torch.int64),
        pooled_entropy=per_row([s.pooled_entropy for s in chosen], torch.float32) if has_pooled else None,
        sequence_ids=indices,
    )
