"""The reward head's scores of a step's responses, made in the forward pass that measures their log-probs.

A layer's states are there while the layer runs. Each rank adds its share of gate and reward to 8 bytes per token:

    tensor parallel     its columns of every state         sequence parallel   its tokens, all columns
    pipeline            its layers                          data parallel       its sequences
    context parallel    its tokens

and one sum over the ranks of the model replica, when the pass is done, completes all of them. No state outlives its
layer, none is sent, and the pass's own communication does not change.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from megatron_srft.distributed import ProcessGroups, all_gather_objects, all_reduce, broadcast_object, rank, size
from megatron_srft.hidden_reward import BaseModel, RewardHead, add_layer, scored_sequences, weights_fingerprint
from megatron_srft.ops.gated_pooling import gated_mean, share_of_hidden
from megatron_srft.sample import PackedBatch
from megatron_srft.trainer.context import local_tokens
from megatron_srft.trainer.step import Policy, SequenceStats, statistics_pass
from megatron_srft.trainer.tap import TapError, tapped
from megatron_srft.trainer.trunk import run_trunk


class StatesNotFinite(ValueError):
    """Hidden states of scored tokens are NaN or infinite: there is no score, and none is made up."""


def scored_statistics_pass(
    policy: Policy, microbatches: list[PackedBatch], head: RewardHead
) -> dict[int, SequenceStats]:
    """`statistics_pass` whose figures have the head's score, by the same forward pass.

    Args:
        head: on this rank's device; its sizes are the model's.

    Raises:
        StatesNotFinite: on every rank; says of which sequences.
        trainer.tap.TapError: a layer was not read.
    """
    found, scores = _scored(statistics_pass, policy, microbatches, head)
    return {index: replace(stats, hidden_score=scores[index]) for index, stats in found.items()}


def score_pass(policy: Policy, microbatches: list[PackedBatch], head: RewardHead) -> dict[int, float | None]:
    """The scores alone, of every sequence (by index) on every rank: no LM head, no log-probs.

    Args and errors as of `scored_statistics_pass`.
    """
    return _scored(run_trunk, policy, microbatches, head)[1]


Forward = Callable[[Policy, list[PackedBatch]], Any]


def _scored(
    forward: Forward, policy: Policy, microbatches: list[PackedBatch], head: RewardHead
) -> tuple[Any, dict[int, float | None]]:
    """What the forward pass returns, and the scores that were read off its layers."""
    models = [chunk.module for chunk in policy.chunks]
    projection = Projection(head, microbatches, policy.groups, models[0].config.sequence_parallel)
    with tapped(models, head.layers, projection.add):
        found = forward(policy, microbatches)
    scores = _scores(projection.total(), microbatches, head)
    scores = {index: score for part in all_gather_objects(scores, policy.groups.data) for index, score in part.items()}
    _refuse_not_finite(scores)
    return found, {index: score for index, (score, _, _) in scores.items()}


class Projection:
    """Running sums of gate and reward over the layers, for every token of every micro-batch of a pass."""

    def __init__(
        self, head: RewardHead, microbatches: list[PackedBatch], groups: ProcessGroups, sequence_parallel: bool
    ):
        self.head, self.groups = head, groups
        self.lengths = [len(batch.token_ids) for batch in microbatches]
        self.sums: list[torch.Tensor | None] = [None] * len(microbatches)
        self.places = {layer: place for place, layer in enumerate(head.layers)}
        self.reads = [0] * len(head.layers)
        shared = None if sequence_parallel else groups.tensor
        self.columns = share_of_hidden(head.config.base.hidden_size, shared)
        self.token_group = groups.tensor if sequence_parallel else None

    def add(self, microbatch: int, layer: int, hidden: torch.Tensor) -> None:
        """Add this rank's share of a layer; the `visit` of trainer/tap.py."""
        place = self.places[layer]
        before, weight = self.sums[microbatch], self.head.weight[place]
        self.sums[microbatch] = add_layer(before, hidden, weight, self.head.config, self.columns)
        self.reads[place] += 1

    def total(self) -> torch.Tensor:
        """[tokens of all micro-batches, 2] complete sums without the bias, on every rank of the replica.

        Raises:
            TapError: a layer was read by no rank, or not for every micro-batch; on every rank alike.
        """
        tokens = sum(self.lengths)
        flat = self.head.weight.new_zeros(tokens * 2 + len(self.reads))
        rows = flat[: tokens * 2].view(tokens, 2)
        for own, length, part in zip(self.sums, self.lengths, rows.split(self.lengths), strict=True):
            if own is not None:
                local = local_tokens(length, self.groups.context).chunk(size(self.token_group))
                part.index_copy_(0, local[rank(self.token_group)].to(part.device), own)
        flat[tokens * 2 :] = flat.new_tensor(self.reads)
        all_reduce(flat, self.groups.model)
        self._check(flat[tokens * 2 :].tolist())
        return rows

    def _check(self, reads: list[float]) -> None:
        expected = len(self.lengths) * size(self.groups.tensor) * size(self.groups.context)
        missing = [layer for layer, found in zip(self.head.layers, reads, strict=True) if found != expected]
        if missing:
            raise TapError(f"layers {missing} were not read by every rank that holds them for every micro-batch")


Scored = tuple[float | None, int, int]
"""Score, tokens scored, and how many of them have a sum that is not finite."""


def _scores(total: torch.Tensor, microbatches: list[PackedBatch], head: RewardHead) -> dict[int, Scored]:
    """This data rank's sequences, by their index in the step."""
    indices = [index for batch in microbatches for index in batch.sequence_ids]
    starts = torch.tensor([0, *(len(batch.token_ids) for batch in microbatches)]).cumsum(0).tolist()
    spans = [
        scored_sequences(b, head.config.last_token) + start for b, start in zip(microbatches, starts, strict=False)
    ]
    sequences = torch.cat(spans)
    lengths = sequences.diff(dim=1)[:, 0]
    kept = (lengths > 0).nonzero()[:, 0]
    scores, _ = gated_mean(total, sequences[kept], head.bias)
    broken = torch.cat((lengths.new_zeros(1), (~total.isfinite().all(dim=1)).cumsum(0)))[sequences].diff(dim=1)[:, 0]
    scored = dict(zip(kept.tolist(), scores.tolist(), strict=True))
    figures = zip(lengths.tolist(), broken.tolist(), strict=True)
    return {indices[place]: (scored.get(place), *figure) for place, figure in enumerate(figures)}


def _refuse_not_finite(scores: dict[int, Scored]) -> None:
    # A gate can hide an infinite sum, and finite sums can overflow in the mean.
    broken = {i: s for i, s in scores.items() if s[2] or (s[0] is not None and not abs(s[0]) < float("inf"))}
    if broken:
        index, (_, tokens, count) = min(broken.items())
        raise StatesNotFinite(
            f"the hidden states of {len(broken)} of {len(scores)} sequences give no finite reward: the first is "
            f"sequence {index} of the step, with {count} of its {tokens} scored tokens; the policy's weights have "
            "overflowed (go back to a checkpoint, lower optimizer.lr), or the head's numbers are too large for them"
        )


def describe_base(policy: Policy, name: str, fingerprint: str = "") -> BaseModel:
    """The model of this run as heads know it."""
    config = policy.chunks[0].module.config
    return BaseModel(
        name=name,
        fingerprint=fingerprint,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        vocab_size=policy.vocab_size,
        dtype=str(config.params_dtype).removeprefix("torch."),
    )


def shared_fingerprint(tensors, groups: ProcessGroups) -> str:
    """`weights_fingerprint` of a collective iterator, on every rank; the world's first computes it."""
    if rank(groups.world) == 0:
        found = weights_fingerprint(tensors)
    else:
        found = ""
        for _ in tensors:
            pass
    return broadcast_object(found, groups.world)
