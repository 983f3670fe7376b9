"""The reference beside the policy in one update, for a divergence over the whole vocabulary.

Logits of both would be two matrices of [rows, vocabulary]. Instead a forward pass under the reference's weights keeps
its hidden states at the response rows ([own rows, hidden] per micro-batch) and a copy of its LM head's shard;
ops/linear_kl.py multiplies a chunk of the vocabulary at a time.
"""

from dataclasses import dataclass, replace

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_srft.distributed import ProcessGroups
from megatron_srft.ops.linear_kl import Direction
from megatron_srft.sample import PackedBatch
from megatron_srft.trainer.context import Part
from megatron_srft.trainer.head import ReferenceHead, response_rows
from megatron_srft.trainer.model import PolicyModel
from megatron_srft.trainer.reference import Reference
from megatron_srft.trainer.step import Policy, forward_pass


@dataclass(frozen=True, kw_only=True)
class HiddenStates:
    """A network whose outputs are the hidden states at the response rows."""

    chunks: list[DistributedDataParallel]
    groups: ProcessGroups

    def outputs(self, hidden: torch.Tensor, model: PolicyModel, part: Part) -> torch.Tensor:
        return response_rows(hidden, part, model.config.sequence_parallel, self.groups.tensor)


def beside_reference(
    policy: Policy, reference: Reference, microbatches: list[PackedBatch], direction: Direction
) -> tuple[Policy, list[PackedBatch]]:
    """The policy and its micro-batches with what `token_stats` needs for `reference_kl`.

    Only the last pipeline stage has it; the others get back what they gave.
    """
    for chunk in policy.chunks:
        chunk.eval()
    network = HiddenStates(chunks=policy.chunks, groups=policy.groups)
    with reference.in_place():
        found = dict(forward_pass(network, microbatches, lambda batch, rows: (id(batch), rows)))
        last = policy.chunks[-1].module
        weight = last.output_weight().detach().clone() if last.post_process else None
    if weight is None:
        return policy, microbatches
    head = ReferenceHead(weight=weight, direction=direction)
    return replace(policy, reference_head=head), [replace(b, reference_hidden=found[id(b)]) for b in microbatches]
