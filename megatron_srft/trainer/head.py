"""The LM head: from the last stage's hidden states to log-prob and entropy of the response tokens.

Only the response rows are multiplied with the vocabulary; the logits live inside `ops.token_logprob`. The gradient of
the hidden states is a partial sum over this rank's vocabulary shard, so the region functions below complete it: an
all-reduce over the tensor-parallel ranks, or a reduce-scatter when the sequence is cut over them.
"""

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megatron_srft.distributed import Group, rank
from megatron_srft.ops.token_logprob import linear_token_logprob
from megatron_srft.sample import PackedBatch, TokenStats


def token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    batch: PackedBatch,
    *,
    vocab_size: int,
    temperature: float,
    sequence_parallel: bool,
    tensor_group: Group,
) -> TokenStats:
    """Log-prob and entropy at the batch's rows.

    Args:
        hidden: [tokens (/ tensor ranks with sequence parallelism), 1, hidden], after the final norm.
        weight: [vocabulary shard, hidden], this rank's rows of the output embedding.
        vocab_size: valid vocabulary; the padding columns behind it take no probability.
        temperature: the logits are divided by it.
    """
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=tensor_group)
        rows = hidden[:, 0].index_select(0, batch.rows)
    else:
        rows = copy_to_tensor_model_parallel_region(hidden[:, 0].index_select(0, batch.rows), group=tensor_group)
    logprobs, entropy = linear_token_logprob(
        rows,
        weight,
        batch.labels,
        vocab_start=rank(tensor_group) * weight.shape[0],
        vocab_size=vocab_size,
        temperature=temperature,
        group=tensor_group,
    )
    return TokenStats(logprobs=logprobs, entropy=entropy)
