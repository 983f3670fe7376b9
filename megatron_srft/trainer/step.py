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
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_srft import objectives
from megatron_srft.config import ObjectiveConfig, ParityConfig
from megatron_srft.distributed import ProcessGroups, all_gather_objects, all_reduce, broadcast_object, size
from megatron_srft.objectives.correction import correct_advantages
from megatron_srft.sample import Counts, PackedBatch, TokenStats
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
    objective: ObjectiveConfig,
    parity: ParityConfig,
) -> dict[str, float]:
    """Accumulate the gradient of the update's loss; return its metrics, equal on all ranks.

    Args:
        microbatches: this data rank's share.
        counts: populations of the whole update, over all data ranks.
    """
    loss = partial(_objective_loss, counts=counts, objective=objective, parity=parity)
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
    batch: PackedBatch, stats: TokenStats, counts: Counts, objective: ObjectiveConfig, parity: ParityConfig
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    old_logprobs = stats.logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    advantages, mismatch = correct_advantages(batch, old_logprobs, counts, parity)
    output = objectives.compute(
        objectives.ObjectiveInputs(
            logprobs=stats.logprobs,
            entropy=stats.entropy,
            old_logprobs=old_logprobs,
            rollout_logprobs=batch.rollout_logprobs,
            advantages=advantages,
            is_demonstration=batch.is_demonstration,
            correct=batch.correct,
            sequence=batch.sequence,
            num_sequences=len(batch.sequence_ids),
            response_lengths=batch.response_lengths,
            pooled_entropy=batch.pooled_entropy,
        ),
        counts,
        objective,
    )
    # The schedule wants a token count; zero, because the loss is normalised already (see optimizer.py).
    return output.loss, torch.zeros((), dtype=torch.int, device=output.loss.device), {**output.metrics, **mismatch}


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
    chunks = policy.chunks
    streams: list[Iterator] = [iter(microbatches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=partial(_forward_step, policy=policy, loss=loss, forward_only=forward_only),
        data_iterator=streams if len(chunks) > 1 else streams[0],
        model=chunks,
        num_microbatches=len(microbatches),
        seq_length=len(microbatches[0].token_ids),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def _forward_step(data: Iterator[PackedBatch], chunk, *, policy: Policy, loss: Callable, forward_only: bool):
    batch = next(data)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.longest,
        max_seqlen_kv=batch.longest,
    )
    hidden = chunk(batch.token_ids[None], batch.position_ids[None], None, packed_seq_params=packed)

    def loss_function(hidden: torch.Tensor, non_loss_data: bool = False):
        model = chunk.module
        stats = token_stats(
            hidden,
            model.output_weight(),
            batch,
            vocab_size=policy.vocab_size,
            temperature=policy.temperature,
            sequence_parallel=model.config.sequence_parallel,
            tensor_group=policy.groups.tensor,
        )
        return loss(batch, stats)

    return hidden, loss_function


def _reduce_metrics(partials: list[dict[str, torch.Tensor]], groups: ProcessGroups) -> dict[str, float]:
    """Add the micro-batches' partial sums over data ranks ('max/...' keys take the maximum); same on all ranks."""
    values: dict[str, float] = {}
    if partials:
        for prefix_is_max, op in ((False, "sum"), (True, "max")):
            keys = sorted(k for k in partials[0] if k.startswith("max/") == prefix_is_max)
            if not keys:
                continue
            table = torch.stack([torch.stack([p[k].detach().float() for k in keys]) for p in partials])
            reduced = table.sum(0) if op == "sum" else table.amax(0)
            values.update(zip(keys, all_reduce(reduced, groups.data, op).tolist(), strict=True))
    if size(groups.pipeline) > 1:
        values = broadcast_object(values, groups.pipeline, size(groups.pipeline) - 1)
    return values
