"""Megatron's forward and backward schedules over packed micro-batches.

`train_pass` accumulates gradients and returns metrics; `statistics_pass` only measures log-probs and entropies. Both
give every rank the same answer. The path from here to a loss formula: train_pass -> the schedule -> `_objective_loss`
-> objectives.compute -> the objective's own file.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_srft import objectives
from megatron_srft.config import RunConfig
from megatron_srft.distributed import ProcessGroups, all_gather_objects, all_reduce, broadcast_object, size
from megatron_srft.sample import Counts, PackedBatch, TokenStats
from megatron_srft.trainer.architecture import uses_transformer_engine
from megatron_srft.trainer.attention import PackedParams, packed_params
from megatron_srft.trainer.head import token_stats


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

    @property
    def config(self):
        return self.chunks[0].module.config


@dataclass(frozen=True, kw_only=True)
class SequenceStats:
    """Statistics of one sequence's response under the current policy."""

    logprobs: np.ndarray
    """[response] float32."""
    entropy: np.ndarray
    """[response] float32."""


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
    loss = partial(_objective_loss, counts=counts, config=config)
    partials = _run_schedule(policy, microbatches, loss, forward_only=False)
    return _reduce_metrics(partials, policy.groups)


def statistics_pass(policy: Policy, microbatches: list[PackedBatch]) -> dict[int, SequenceStats]:
    """Log-probs and entropies of every sequence of the step (by index), on every rank, without gradients."""
    with torch.no_grad():
        shares = _run_schedule(policy, microbatches, _collect_statistics, forward_only=True)
    if size(policy.groups.pipeline) > 1:
        shares = broadcast_object(shares, policy.groups.pipeline, size(policy.groups.pipeline) - 1)
    found: dict[int, SequenceStats] = {}
    for share in all_gather_objects(shares, policy.groups.data):
        for part in share:
            found.update(part)
    return found


# ---------------------------------------------------------------- losses of one micro-batch


def _objective_loss(
    batch: PackedBatch, stats: TokenStats, counts: Counts, config: RunConfig
) -> tuple[torch.Tensor, torch.Tensor, objectives.Metrics]:
    inputs = objectives.gather_inputs(batch, stats)
    parity = config.parity
    if parity.on_failure != "stop":
        inputs = objectives.with_importance_weights(inputs, parity.on_failure, parity.importance_limit)
    output = objectives.compute(inputs, counts, config.objective, config.kl)
    # The schedule wants a token count; zero, because the loss is normalised already (see optimizer.py).
    return output.loss, torch.zeros((), dtype=torch.int, device=output.loss.device), output.metrics


def _collect_statistics(batch: PackedBatch, stats: TokenStats) -> dict[int, SequenceStats]:
    lengths = torch.bincount(batch.sequence, minlength=len(batch.sequence_ids)).tolist()
    logprobs = stats.logprobs.float().cpu().split(lengths)
    entropy = stats.entropy.float().cpu().split(lengths)
    return {
        index: SequenceStats(logprobs=logprobs[i].numpy(), entropy=entropy[i].numpy())
        for i, index in enumerate(batch.sequence_ids)
    }


# ---------------------------------------------------------------- the schedule


def _run_schedule(policy: Policy, microbatches: list[PackedBatch], loss: Callable, *, forward_only: bool) -> list:
    """Run Megatron's schedule; returns what `loss` reported per micro-batch (on the last stage, else [])."""
    thd = uses_transformer_engine(policy.config.params_dtype)
    described = [(batch, packed_params(batch.cu_seqlens, thd)) for batch in microbatches]
    streams = [iter(described) for _ in policy.chunks]
    return get_forward_backward_func()(
        forward_step_func=partial(_forward_step, policy=policy, loss=loss),
        data_iterator=streams if len(streams) > 1 else streams[0],
        model=policy.chunks,
        num_microbatches=len(microbatches),
        seq_length=len(microbatches[0].token_ids),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def _forward_step(data: Iterator[tuple[PackedBatch, PackedParams]], chunk, *, policy: Policy, loss: Callable):
    batch, packed = next(data)
    hidden = chunk(batch.token_ids[None], batch.position_ids[None], None, packed_seq_params=packed)

    def loss_function(hidden: torch.Tensor, non_loss_data: bool = False):
        model = chunk.module
        stats = token_stats(
            hidden,
            model.output_weight(),
            batch,
            vocab_size=policy.vocab_size,
            temperature=policy.temperature,
            saved_logits_bytes=policy.saved_logits_bytes,
            sequence_parallel=model.config.sequence_parallel,
            tensor_group=policy.groups.tensor,
        )
        return loss(batch, stats)

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
