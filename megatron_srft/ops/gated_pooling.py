"""Gated mean of a linear reward over a response's tokens, read off a model's hidden states while its forward runs.

The hidden-state reward of SWIFT (Mining Intrinsic Rewards from LLM Hidden States, arXiv 2505.12225): with the states
h_l of the layers l, token t has a gate and a reward, both linear in all of its states, and a response scores the
gated mean of its tokens' rewards,

    [a_t, r_t] = b + sum_l W_l h_l,t        g_t = sigmoid(a_t)        score = sum_t g_t r_t / max(sum_t g_t, 1e-8)

Layers are never stacked: `gated_projection` adds one layer's share to a running [tokens, 2] sum, 8 bytes per token,
and `gated_mean` adds the bias and pools once the last layer is in. Column 0 is the gate, column 1 the reward.

With gradients G of sum g and Q of sum g r (which the floor cuts: below it, sum g counts as a constant),

    dL/dr_t = Q g_t        dL/da_t = (G + Q r_t) g_t (1 - g_t)        dL/dW_l = sum_t [dL/da_t, dL/dr_t]^T h_l,t

Everything is a sum, so every way to cut the model cuts it too:

    tensor parallel    each rank projects `share_of_hidden` of every state, `sum_projections` adds the ranks' shares
    sequence parallel  each rank projects its own tokens; `gated_mean` gets their `local_sequences` and the group
    pipeline           each stage projects its own layers, `sum_projections` adds the stages' shares

A rank's gradient of W_l then covers what it projected: sum it over the tensor-parallel or sequence-parallel ranks.
The bias is added once, at pooling: its gradient is whole on every rank, but under sequence parallelism covers the
rank's own tokens and is summed likewise.
"""

import torch
from torch import Tensor

from megatron_srft import distributed
from megatron_srft.distributed import Group
from megatron_srft.ops import implementations

GATE_SUM_FLOOR = 1e-8
"""Least divisor of a score, for responses whose gates are all shut (SWIFT's own value)."""

TRITON = "megatron_srft.ops.triton.gated_pooling"


def gated_projection(
    accumulated: Tensor | None, hidden: Tensor, weight: Tensor, *, implementation: str | None = None
) -> Tensor:
    """Add one layer's share of gate and reward: accumulated + hidden @ weight.T, summed in full precision.

    Args:
        accumulated: [tokens, 2] float32 (float64 for float64 states), what the layers before gave; None for the first.
        hidden: [tokens, width] states in float32, bfloat16, float16 or float64; rows may be apart, columns may not.
        weight: [2, width] of the layer, gate first, in the type of `accumulated` or of `hidden`.
        implementation: see `implementations.choose`.

    Returns:
        A fresh [tokens, 2] in the type of `accumulated`. Differentiable in all three; the states' gradient is
        computed only if they require one.

    Raises:
        ValueError: an argument's shape, type, device or memory layout does not fit; says which.
    """
    _check_projection(accumulated, hidden, weight)
    full = _full_type(hidden)
    if accumulated is None:
        accumulated = hidden.new_zeros(hidden.shape[0], 2, dtype=full)
    kernel = implementations.kernel("gated_projection", implementations.choose(implementation, hidden))
    return kernel(accumulated.contiguous(), hidden, weight.to(full).contiguous())


def gated_mean(
    accumulated: Tensor, sequences: Tensor, bias: Tensor, *, group: Group = None, implementation: str | None = None
) -> tuple[Tensor, Tensor]:
    """Score responses packed into one row of tokens.

    Args:
        accumulated: [tokens, 2] sum of all layers' shares.
        sequences: [responses, 2] int64 on the same device: first token and end (exclusive) of each response,
            ascending and disjoint. Tokens of no response do not count.
        bias: [2], gate first, in the type of `accumulated`.
        group: the ranks that hold the other tokens of the same responses, see `local_sequences`.
        implementation: see `implementations.choose`.

    Returns:
        (scores, gate sums), both [responses] in the type of `accumulated`, equal on every rank of `group` and
        differentiable. A gate sum below GATE_SUM_FLOOR marks a score without meaning.

    Raises:
        ValueError: an argument's shape, type or device does not fit, ranges are not ascending, disjoint and inside
            the tokens, or a response has no token. Ranges are looked at on a CPU only, where this stalls nothing, and
            not under torch.compile: elsewhere they are cut to the tokens, and a response without any scores NaN.
    """
    _check_pooling(accumulated, sequences, bias)
    kernel = implementations.kernel("gated_sums", implementations.choose(implementation, accumulated))
    sequences = sequences.contiguous()
    sums = kernel(accumulated.contiguous(), sequences, bias.contiguous())
    lengths = sequences.clamp(0, accumulated.shape[0]).diff(dim=1).to(sums.dtype)
    sums = distributed.sum_shared(torch.cat((sums, lengths), dim=1), group)
    gate_sums, weighted, lengths = sums.unbind(dim=1)
    empty = lengths <= 0
    if _values_are_at_hand(sequences) and empty.any():
        raise ValueError(f"sequences: response {int(empty.nonzero()[0])} has no token to score")
    scores = weighted / gate_sums.clamp_min(GATE_SUM_FLOOR)
    return scores.masked_fill(empty, torch.nan), gate_sums


def sum_projections(accumulated: Tensor, group: Group) -> Tensor:
    """Sum of the ranks' `accumulated`, on every rank: of hidden shares (tensor parallel) or of stages (pipeline).

    Every rank must go on to the same loss: each takes the gradient of its own copy as that of its share.
    """
    return distributed.sum_shared(accumulated, group)


def share_of_hidden(width: int, group: Group) -> slice:
    """The columns of hidden states (and of their weights) that this rank projects where every rank has them all."""
    step = 8 * -(-width // (8 * distributed.size(group)))  # whole 16-byte vectors, which the kernels read
    start = min(width, step * distributed.rank(group))
    return slice(start, min(width, start + step))


def local_sequences(sequences: Tensor, first: int, tokens: int) -> Tensor:
    """`sequences` of the whole row of tokens as ranges of the `tokens` that this rank holds from token `first` on.

    A response of which the rank holds nothing becomes an empty range, so that all ranks have the same responses.
    """
    return (sequences - first).clamp(0, tokens)


def _check_projection(accumulated: Tensor | None, hidden: Tensor, weight: Tensor) -> None:
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be floats of shape [tokens, width], got {_described(hidden)}")
    if hidden.stride(1) != 1 and hidden.shape[1] > 1:
        raise ValueError(f"hidden must have adjacent columns, got strides {hidden.stride()}; call contiguous()")
    tokens, width = hidden.shape
    full = _full_type(hidden)
    if weight.shape != (2, width) or weight.dtype not in (full, hidden.dtype):
        raise ValueError(f"weight must be [2, {width}] of {full} or {hidden.dtype}, got {_described(weight)}")
    if weight.device != hidden.device:
        raise ValueError(f"weight must be on {hidden.device} like hidden, got {weight.device}")
    if accumulated is None:
        return
    if accumulated.shape != (tokens, 2) or accumulated.dtype != full:
        raise ValueError(f"accumulated must be [{tokens}, 2] of {full}, got {_described(accumulated)}")
    if accumulated.device != hidden.device:
        raise ValueError(f"accumulated must be on {hidden.device} like hidden, got {accumulated.device}")


def _check_pooling(accumulated: Tensor, sequences: Tensor, bias: Tensor) -> None:
    if accumulated.dim() != 2 or accumulated.shape[1] != 2 or accumulated.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"accumulated must be [tokens, 2] of float32 or float64, got {_described(accumulated)}")
    if bias.shape != (2,) or bias.dtype != accumulated.dtype:
        raise ValueError(f"bias must be [2] of {accumulated.dtype}, got {_described(bias)}")
    if sequences.dim() != 2 or sequences.shape[1] != 2 or sequences.dtype != torch.int64:
        raise ValueError(f"sequences must be int64 of shape [responses, 2], got {_described(sequences)}")
    for name, tensor in (("sequences", sequences), ("bias", bias)):
        if tensor.device != accumulated.device:
            raise ValueError(f"{name} must be on {accumulated.device} like accumulated, got {tensor.device}")
    if not _values_are_at_hand(sequences):
        return
    bounds = torch.cat((sequences.new_zeros(1), sequences.flatten(), sequences.new_tensor([accumulated.shape[0]])))
    if (wrong := bounds.diff() < 0).any():
        at = max(0, int(wrong.nonzero()[0]) - 1) // 2
        raise ValueError(
            f"sequences must be ascending, disjoint ranges within [0, {accumulated.shape[0]}]; "
            f"those from response {at} on are {sequences[at : at + 2].tolist()}"
        )


def _values_are_at_hand(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and tensor.numel() > 0


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {tensor.dtype}"


def _full_type(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _projection_reference(accumulated: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    return torch.addmm(accumulated, hidden.to(accumulated.dtype), weight.t())


def _weight_gradient_reference(gradient: Tensor, hidden: Tensor) -> Tensor:
    return gradient.t() @ hidden.to(gradient.dtype)


def _hidden_gradient_reference(gradient: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    return (gradient @ weight).to(like.dtype)


def _sums_reference(accumulated: Tensor, sequences: Tensor, bias: Tensor) -> Tensor:
    tokens = accumulated.shape[0]
    gate, reward = torch.sigmoid(accumulated[:, 0] + bias[0]), accumulated[:, 1] + bias[1]
    # Every second segment is a gap between responses. cummax: a negative length would stop a GPU for good.
    bounds = torch.cat((sequences.new_zeros(1), sequences.flatten().clamp(0, tokens), sequences.new_full((1,), tokens)))
    bounds = bounds.cummax(dim=0).values
    values = torch.stack((gate, gate * reward), dim=1)
    return torch.segment_reduce(values, "sum", offsets=bounds, axis=0, unsafe=True)[1::2].contiguous()


def _sums_gradient_reference(gradient: Tensor, accumulated: Tensor, sequences: Tensor, bias: Tensor) -> Tensor:
    if gradient.shape[0] == 0:
        return torch.zeros_like(accumulated)
    rows = torch.arange(accumulated.shape[0], device=accumulated.device)
    starts, ends = (bound.contiguous() for bound in sequences.unbind(dim=1))
    owner = torch.searchsorted(starts, rows, right=True) - 1
    inside = (owner >= 0) & (rows < ends[owner])
    of_gate_sum, of_weighted = gradient[owner].unbind(dim=1)
    raw_gate, reward = (accumulated + bias).unbind(dim=1)
    gate = torch.sigmoid(raw_gate)
    slope = gate * torch.sigmoid(-raw_gate)  # 1 - gate has lost its digits where the gate is almost open
    of_rows = torch.stack(((of_gate_sum + of_weighted * reward) * slope, of_weighted * gate), dim=1)
    return of_rows.masked_fill(~inside[:, None], 0)


def _projection_context(ctx, inputs, output) -> None:
    _, hidden, weight = inputs
    _, needs_hidden, needs_weight = ctx.needs_input_grad[:3]
    like = hidden.new_empty(0)  # a view would keep the states alive
    ctx.save_for_backward(hidden if needs_weight else like, weight if needs_hidden else None, like)


def _projection_backward(ctx, gradient: Tensor) -> tuple:
    hidden, weight, like = ctx.saved_tensors
    of_accumulated, of_hidden, of_weight = ctx.needs_input_grad[:3]
    contiguous = gradient.contiguous()
    name = "gated_projection_{}_gradient".format
    return (
        gradient if of_accumulated else None,
        implementations.kernel(name("hidden"), ctx.implementation)(contiguous, weight, like) if of_hidden else None,
        implementations.kernel(name("weight"), ctx.implementation)(contiguous, hidden) if of_weight else None,
    )


def _sums_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _sums_backward(ctx, gradient: Tensor) -> tuple:
    kernel = implementations.kernel("gated_sums_gradient", ctx.implementation)
    of_rows = kernel(gradient.contiguous(), *ctx.saved_tensors)
    return of_rows, None, of_rows.sum(dim=0) if ctx.needs_input_grad[2] else None


implementations.declare(
    "gated_projection",
    "(Tensor accumulated, Tensor hidden, Tensor weight) -> Tensor",
    fake=lambda accumulated, hidden, weight: torch.empty_like(accumulated),
    reference=_projection_reference,
    triton=TRITON,
    setup_context=_projection_context,
    backward=_projection_backward,
)
implementations.declare(
    "gated_projection_weight_gradient",
    "(Tensor gradient, Tensor hidden) -> Tensor",
    fake=lambda gradient, hidden: gradient.new_empty(2, hidden.shape[1]),
    reference=_weight_gradient_reference,
    triton=TRITON,
)
implementations.declare(
    "gated_projection_hidden_gradient",
    "(Tensor gradient, Tensor weight, Tensor like) -> Tensor",
    fake=lambda gradient, weight, like: like.new_empty(gradient.shape[0], weight.shape[1]),
    reference=_hidden_gradient_reference,
    triton=TRITON,
)
implementations.declare(
    "gated_sums",
    "(Tensor accumulated, Tensor sequences, Tensor bias) -> Tensor",
    fake=lambda accumulated, sequences, bias: accumulated.new_empty(sequences.shape[0], 2),
    reference=_sums_reference,
    triton=TRITON,
    setup_context=_sums_context,
    backward=_sums_backward,
)
implementations.declare(
    "gated_sums_gradient",
    "(Tensor gradient, Tensor accumulated, Tensor sequences, Tensor bias) -> Tensor",
    fake=lambda gradient, accumulated, sequences, bias: torch.empty_like(accumulated),
    reference=_sums_gradient_reference,
    triton=TRITON,
)
