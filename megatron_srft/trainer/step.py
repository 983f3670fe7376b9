"""Megatron's forward and backward schedules over packed micro-batches.

`train_pass` accumulates gradients and returns metrics; `statistics_pass` only measures log-probs and entropies. Both
give every rank the same answer. The path from here to a loss formula: train_pass -> the schedule -> `_objective_loss`
-> objectives.compute -> the objective's own file. `accumulate` and `measure` are what the two are made of; the critic
(trainer/critic.py) uses them too.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_srft import objectives
from megatron_srft.config import RunConfig
from megatron_srft.distributed import ProcessGroups, all_gather_objects, all_reduce, broadcast_object, size
from megatron_srft.sample import Counts, PackedBatch, TokenStats
from megatron_srft.trainer.architecture import uses_transformer_engine
from megatron_srft.trainer.context import Part, local_part
from megatron_srft.trainer.head import ReferenceHead, token_stats
from megatron_srft.trainer.model import PolicyModel


class Network(Protocol):
    """A model as one rank holds it, and what it makes of hidden states: a `Policy`, or a `critic.Critic`."""

    chunks: list[DistributedDataParallel]
    """Model chunks of this pipeline stage, one unless the schedule is interleaved."""

    groups: ProcessGroups

    def outputs(self, hidden: torch.Tensor, model: PolicyModel, part: Part) -> Any:
        """What the loss takes, from the last stage's hidden states of this context rank's part of a micro-batch."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The model as one rank holds it."""

    chunks: list[DistributedDataParallel]
    """Model chunks of this pipeline stage, one unless the schedule is interleaved."""

    groups: ProcessGroups
    vocab_size: int
    """Valid vocabulary, without the padding that tensor parallelism needs."""

    temperature: float
    """Log-probs are of softmax(logits / temperature), the distribution that rollouts are sampled from."""

    saved_logits_bytes: int
    """A micro-batch's logits are kept for the backward pass if they fit."""

    reference_head: ReferenceHead | None = None
    """For the divergence from a reference over the whole vocabulary, where that is asked for."""

    def outputs(self, hidden: torch.Tensor, model: PolicyModel, part: Part) -> TokenStats:
        return token_stats(
            hidden,
            model.output_weight(),
            part,
            vocab_size=self.vocab_size,
            temperature=self.temperature,
            saved_logits_bytes=self.saved_logits_bytes,
            sequence_parallel=model.config.sequence_parallel,
            tensor_group=self.groups.tensor,
            reference_head=self.reference_head,
        )


@dataclass(frozen=True, kw_only=True)
class SequenceStats:
    """Statistics of one sequence's response under the current policy."""

    logprobs: np.ndarray
    """[response] float32."""
    entropy: np.ndarray
    """[response] float32."""
    hidden_score: float | None = None
    """The reward head's score, a logit; None without a head, and for a response without a token to score."""


def train_pass(
    policy: Policy,
    microbatches: list[PackedBatch],
    counts: Counts,
    config: RunConfig,
) -> dict[str, float]:
    """Accumulate the gradient of the update's loss; return its metrics, equal on all ranks.

    Args:
        microbatches: this data rank's share.
        counts: populations of the whole update, over all data ranks.
        config: resolved; its sections objective, kl and parity are the loss.
    """
    return accumulate(policy, microbatches, partial(_objective_loss, counts=counts, config=config))


def statistics_pass(policy: Policy, microbatches: list[PackedBatch]) -> dict[int, SequenceStats]:
    """Log-probs and entropies of every sequence of the step (by index), on every rank, without gradients."""
    return measure(policy, microbatches, _collect_statistics)


def accumulate(
    network: Network, microbatches: list[PackedBatch], loss: Callable[[PackedBatch, Any], objectives.ObjectiveOutput]
) -> dict[str, float]:
    """Add the gradient of every micro-batch's loss to the network's; the metrics, equal on all ranks."""

    def share(batch: PackedBatch, outputs: Any) -> tuple[torch.Tensor, torch.Tensor, objectives.Metrics]:
        output = loss(batch, outputs)
        # The schedule wants a token count; zero, because the loss is normalised already (see optimizer.py).
        return output.loss, torch.zeros((), dtype=torch.int, device=output.loss.device), output.metrics

    return _reduce_metrics(_run_schedule(network, microbatches, share, forward_only=False), network.groups)


def measure(
    network: Network, microbatches: list[PackedBatch], collect: Callable[[PackedBatch, Any], dict[int, Any]]
) -> dict[int, Any]:
    """What `collect` finds in each micro-batch for its sequences (by index), on every rank, without gradients."""
    shares = forward_pass(network, microbatches, collect)
    if size(network.groups.pipeline) > 1:
        shares = broadcast_object(shares, network.groups.pipeline, size(network.groups.pipeline) - 1)
    found: dict[int, Any] = {}
    for share in all_gather_objects(shares, network.groups.data):
        for part in share:
            found.update(part)
    return found


def forward_pass(network: Network, microbatches: list[PackedBatch], collect: Callable[[PackedBatch, Any], Any]) -> list:
    """What `collect` makes of each micro-batch's outputs, without gradients; on the last stage, elsewhere []."""
    with torch.no_grad():
        return _run_schedule(network, microbatches, collect, forward_only=True)


# ---------------------------------------------------------------- losses of one micro-batch


def _objective_loss(
    batch: PackedBatch, stats: TokenStats, counts: Counts, config: RunConfig
) -> objectives.ObjectiveOutput:
    inputs = objectives.gather_inputs(batch, stats)
    parity = config.parity
    if parity.correction != "none":
        inputs = objectives.with_importance_weights(inputs, parity.correction, parity.importance_limit)
    return objectives.compute(inputs, counts, config.objective, config.kl)


def _collect_statistics(batch: PackedBatch, stats: TokenStats) -> dict[int, SequenceStats]:
    logprobs, entropy = per_sequence(batch, stats.logprobs), per_sequence(batch, stats.entropy)
    return {index: SequenceStats(logprobs=logprobs[index], entropy=entropy[index]) for index in logprobs}


def per_sequence(batch: PackedBatch, rows: torch.Tensor) -> dict[int, np.ndarray]:
    """[rows] -> [response] float32 of each sequence, by its index in the step."""
    lengths = torch.bincount(batch.sequence, minlength=len(batch.sequence_ids)).tolist()
    parts = rows.float().cpu().split(lengths)
    return {index: parts[i].numpy() for i, index in enumerate(batch.sequence_ids)}


# ---------------------------------------------------------------- the schedule


def _run_schedule(network: Network, microbatches: list[PackedBatch], loss: Callable, *, forward_only: bool) -> list:
    """Run Megatron's schedule; returns what `loss` reported per micro-batch (on the last stage, else [])."""
    thd = uses_transformer_engine(network.chunks[0].module.config)
    parts = [local_part(batch, network.groups.context, thd) for batch in microbatches]
    streams = [iter(parts) for _ in network.chunks]
    return get_forward_backward_func()(
        forward_step_func=partial(_forward_step, network=network, loss=loss),
        data_iterator=streams if len(streams) > 1 else streams[0],
        model=network.chunks,
        num_microbatches=len(microbatches),
        seq_length=len(microbatches[0].token_ids),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def _forward_step(data: Iterator[Part], chunk, *, network: Network, loss: Callable):
    part = next(data)
    hidden = chunk(part.token_ids[None], part.position_ids[None], None, packed_seq_params=part.params)

    def loss_function(hidden: torch.Tensor, non_loss_data: bool = False):
        return loss(part.batch, network.outputs(hidden, chunk.module, part))

    return hidden, loss_function


def _reduce_metrics(partials: list[objectives.Metrics], groups: ProcessGroups) -> dict[str, float]:
    """Add the micro-batches' shares over micro-batches and data ranks; the same on every rank.

    Of keys `max/<name>` the largest counts; they are reported as `<name>/max`.
    """
    values: dict[str, float] = {}
    if partials:  # only the last stage has any
        figures = torch.stack([partial.figures for partial in partials]).float()
        sums = all_reduce(figures.sum(dim=0), groups.data, "sum").cpu()
        largest = all_reduce(figures.amax(dim=0), groups.data, "max").cpu()
        for key, place in partials[0].places.items():
            table = largest if key.startswith("max/") else sums
            values[_public_name(key)] = table[place].sum().item()
    if size(groups.pipeline) > 1:
        values = broadcast_object(values, groups.pipeline, size(groups.pipeline) - 1)
    return values


def _public_name(key: str) -> str:
    return f"{key.removeprefix('max/')}/max" if key.startswith("max/") else key
