"""Log-prob of the taken token and entropy of its distribution, with gradients, from logits cut across ranks."""

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from megatron_srft.distributed import Group
from megatron_srft.ops import shards
from megatron_srft.ops.implementations import choose, kernel
from megatron_srft.ops.softmax_statistics import gradient_coefficients


def token_logprob(
    logits: Tensor,
    labels: Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    temperature: float = 1.0,
    group: Group = None,
    overwrite_logits: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Score `labels` under softmax(logits / temperature).

    Args:
        logits: [rows, vocab_shard], any float type, columns side by side.
        labels: [rows] int64 ids of the whole vocabulary, the same on every rank of `group`.
        vocab_start: id of this rank's first column.
        vocab_size: real size of the whole vocabulary; later columns are padding.
        group: the ranks that hold the other shards.
        overwrite_logits: the backward pass may write the gradient over the logits, for callers that own them; no
            second matrix is needed then. A second backward pass raises instead of giving wrong numbers.
        implementation: see `implementations.choose`.

    Returns:
        (logprobs, entropy), both [rows] float32 in nats (float64 for float64 logits), equal on every rank.

    Raises:
        ValueError: an argument has the wrong shape, type or device, the ranks' shards do not make up the vocabulary,
            the temperature is not positive, the implementation is not there, or (on CPU) a label is no token of the
            vocabulary. On CUDA, where that check would stall the device, such a label's log-prob is NaN.
    """
    shards.check_matrix("logits", logits)
    shards.check_shard(logits.shape[1], vocab_start, vocab_size, temperature, group)
    shards.check_labels(labels, len(logits), logits, vocab_size)
    chosen = choose(implementation, logits)
    columns = shards.valid_columns(logits.shape[1], vocab_start, vocab_size)
    if overwrite_logits:
        statistics = _Overwriting.apply(logits, labels, vocab_start, columns, 1 / temperature, chosen)
    else:
        statistics = kernel("softmax_statistics", chosen)(logits, labels, vocab_start, columns, 1 / temperature)
    return shards.combine(statistics, labels, vocab_size, group)


class _Overwriting(torch.autograd.Function):
    """softmax_statistics whose backward pass leaves the gradient where the logits were."""

    @staticmethod
    def forward(ctx, logits, labels, vocab_start, columns, inverse_temperature, implementation):
        statistics = kernel("softmax_statistics", implementation)(
            logits, labels, vocab_start, columns, inverse_temperature
        )
        ctx.save_for_backward(logits, labels, statistics)
        ctx.numbers, ctx.implementation = (vocab_start, columns, inverse_temperature), implementation
        return statistics

    @staticmethod
    def backward(ctx, gradient):
        logits, labels, statistics = ctx.saved_tensors
        vocab_start, columns, inverse_temperature = ctx.numbers
        coefficients = gradient_coefficients(statistics, gradient, inverse_temperature)
        kernel("softmax_gradient_", ctx.implementation)(
            logits, labels, coefficients, vocab_start, columns, inverse_temperature
        )
        increment_version(logits)  # a second backward pass then finds that the logits are gone
        return logits.detach(), None, None, None, None, None
