"""The LM head: from the last stage's hidden states to log-prob and entropy of the response tokens, and a divergence.

Only the response rows are multiplied with the vocabulary; the logits live inside `ops.linear_token_logprob`. The
gradient of the hidden states is a partial sum over this rank's vocabulary shard, so the region functions below complete
it: an all-reduce over the tensor-parallel ranks, or a reduce-scatter when the sequence is cut over them.
"""

from typing import NamedTuple

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megatron_srft.distributed import Group, rank
from megatron_srft.ops.linear_kl import Direction, linear_kl
from megatron_srft.ops.linear_token_logprob import linear_token_logprob
from megatron_srft.sample import TokenStats
from megatron_srft.trainer.context import Part


class ReferenceHead(NamedTuple):
    """What a divergence over the whole vocabulary needs besides hidden states (trainer/beside_reference.py)."""

    weight: torch.Tensor
    """[vocabulary shard, hidden], the reference's."""

    direction: Direction


def token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    part: Part,
    *,
    vocab_size: int,
    temperature: float,
    saved_logits_bytes: int,
    sequence_parallel: bool,
    tensor_group: Group,
    reference_head: ReferenceHead | None = None,
) -> TokenStats:
    """Log-prob and entropy at the micro-batch's rows; with a reference head also the divergence from the reference.

    Args:
        hidden: [local tokens (/ tensor ranks with sequence parallelism), 1, hidden], after the final norm.
        weight: [vocabulary shard, hidden], this rank's rows of the output embedding.
        vocab_size: valid vocabulary; the padding columns behind it take no probability.
        temperature: the logits are divided by it.
        saved_logits_bytes: budget for keeping logits from the forward to the backward pass.
    """
    rows = response_rows(hidden, part, sequence_parallel, tensor_group)
    accumulates = torch.is_grad_enabled() and hasattr(weight, "main_grad")
    head = _GradientInMainGrad.apply(weight) if accumulates else weight
    columns = dict(
        vocab_start=rank(tensor_group) * weight.shape[0],
        vocab_size=vocab_size,
        temperature=temperature,
        group=tensor_group,
        weight_gradient=weight.main_grad if accumulates else None,
    )
    logprobs, entropy = linear_token_logprob(rows, head, part.labels, saved_logits_bytes=saved_logits_bytes, **columns)
    divergence = None
    if reference_head is not None:
        reference = (part.batch.reference_hidden, reference_head.weight)
        divergence = part.whole(linear_kl(rows, head, *reference, direction=reference_head.direction, **columns))
    return TokenStats(logprobs=part.whole(logprobs), entropy=part.whole(entropy), reference_kl=divergence)


def response_rows(hidden: torch.Tensor, part: Part, sequence_parallel: bool, tensor_group: Group) -> torch.Tensor:
    """[own rows, hidden] hidden states at this part's rows, on every tensor-parallel rank; see the module for
    gradients."""
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=tensor_group)
        return hidden[:, 0].index_select(0, part.rows)
    return copy_to_tensor_model_parallel_region(hidden[:, 0].index_select(0, part.rows), group=tensor_group)


class _GradientInMainGrad(torch.autograd.Function):
    """The weight, for an op that adds its gradient to Megatron's `main_grad` itself.

    Megatron's DDP is told as its own linear layers tell it: a mark on the parameter, and a gradient without meaning,
    because its hook may insist on one. With tied embeddings on one stage the embedding brings a gradient of its own,
    which DDP must add.
    """

    @staticmethod
    def forward(ctx, weight):
        ctx.set_materialize_grads(False)
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient):
        assert gradient is None, "the op was to add the gradient to main_grad"
        if getattr(ctx.weight, "zero_out_wgrad", False):
            return None
        ctx.weight.grad_added_to_main_grad = True
        return torch.empty_like(ctx.weight)
