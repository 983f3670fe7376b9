"""Forward passes of the policy's blocks without its LM head: a text reward model, or a reward head alone.

A text reward model (as Best-of-N usually has one) is a decoder with one linear output, read at the last token of prompt
and response. `Trunk` is such a model on the policy's own weights, layout and kernels, to measure what one costs; its
values mean something only with a trained `weight`.
"""

from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_srft.distributed import ProcessGroups
from megatron_srft.sample import PackedBatch
from megatron_srft.trainer.context import Part
from megatron_srft.trainer.model import PolicyModel
from megatron_srft.trainer.step import Policy, forward_pass, measure


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """A `step.Network` whose output is one number per sequence, or nothing."""

    chunks: list[DistributedDataParallel]
    groups: ProcessGroups
    weight: torch.Tensor | None
    """[hidden] of the scalar head; None: the forward pass is made for what its layers are read for."""

    def outputs(self, hidden: torch.Tensor, model: PolicyModel, part: Part) -> torch.Tensor | None:
        """[sequences] float32, at the last token of each; after the final norm."""
        if self.weight is None:
            return None
        if model.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.groups.tensor
            )
        batch = part.batch
        last = batch.cu_seqlens[1 : len(batch.sequence_ids) + 1].long() - 1
        return part.at(last, hidden[:, 0]).float() @ self.weight.float()


def text_rewards(policy: Policy, microbatches: list[PackedBatch], weight: torch.Tensor) -> dict[int, float]:
    """One number for each sequence (by index), on every rank."""
    trunk = Trunk(chunks=policy.chunks, groups=policy.groups, weight=weight)
    return measure(trunk, microbatches, _by_sequence)


def run_trunk(policy: Policy, microbatches: list[PackedBatch]) -> None:
    """The blocks alone, for the hooks of a tap."""
    trunk = Trunk(chunks=policy.chunks, groups=policy.groups, weight=None)
    forward_pass(trunk, microbatches, lambda batch, outputs: None)


def _by_sequence(batch: PackedBatch, values: torch.Tensor) -> dict[int, float]:
    return dict(zip(batch.sequence_ids, values.tolist(), strict=True))
