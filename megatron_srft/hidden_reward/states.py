"""Where training finds the hidden states of responses: a protocol, and states that lie stacked in memory.

A rank holds what the model's layout gives it: its pipeline stage's layers, and of each state its own columns (tensor
parallel) or of each response its own tokens (sequence parallel). What it makes of them are shares of sums, so nothing
but two numbers per token and the gradient of the head ever crosses ranks. trainer/hidden_features.py has the states of
a Megatron model, recomputed or cached on disk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_srft.distributed import ProcessGroups
from megatron_srft.hidden_reward.pooling import inverse_rms
from megatron_srft.ops.gated_pooling import gated_mean, gated_projection, sum_projections

Question = tuple[int, ...]
"""Indices of all responses to one question."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalStates:
    """What one rank holds of the states at the scored tokens of some responses, laid end to end."""

    sequences: Tensor
    """[responses, 2] int64; each one's first token and end in the row of all their tokens."""

    tokens: int
    """Length of that row."""

    layers: tuple[Tensor, ...]
    """[local tokens, local columns] of each of this rank's layers, in the model's type."""

    scales: tuple[Tensor, ...] | None = None
    """[local tokens, 1] float32 of each of them: what its states are multiplied with; None without normalisation."""

    rows: Tensor | None = None
    """[local tokens] int64; places of this rank's tokens in the row; None: it has all of them, in order."""


class States(Protocol):
    """The states of responses 0 ... n - 1 at their scored tokens, as one rank sees them."""

    groups: ProcessGroups

    shape: tuple[int, int]
    """(layers, hidden) of a whole state."""

    own_layers: tuple[int, ...]
    """Which of the layers this rank holds, counted among those of `shape`."""

    columns: slice
    """Which columns of them."""

    lengths: np.ndarray
    """[responses] scored tokens of each."""

    portion_tokens: int
    """Scored tokens whose states may be asked for at once; a question with more of them comes by itself."""

    device: torch.device

    def share(self, questions: Sequence[Question]) -> list[Question]:
        """Those that fall to this data rank; the same on all ranks of a replica. Each falls to one data rank."""

    def read(self, responses: Sequence[int]) -> LocalStates:
        """Of these responses in this order; collective over the ranks of a replica."""


class StackedStates:
    """Everything in the memory of one rank, for example what transformers returns.

    Args:
        responses: [layers, tokens, hidden] states of each response at its scored tokens.
    """

    def __init__(
        self,
        responses: Sequence[Tensor],
        normalisation: Literal["none", "rms"] = "none",
        epsilon: float = 1e-6,
        portion_tokens: int = 65536,
    ):
        layers, _, hidden = responses[0].shape
        self.groups, self.device = ProcessGroups(), responses[0].device
        self.shape, self.own_layers, self.columns = (layers, hidden), tuple(range(layers)), slice(0, hidden)
        self.lengths = np.array([one.shape[1] for one in responses])
        self.portion_tokens = portion_tokens
        self._responses, self._normalises, self._epsilon = responses, normalisation == "rms", epsilon

    def share(self, questions: Sequence[Question]) -> list[Question]:
        return list(questions)

    def read(self, responses: Sequence[int]) -> LocalStates:
        layers = tuple(torch.cat([self._responses[i] for i in responses], dim=1).unbind(0))
        scales = tuple(inverse_rms(hidden, self._epsilon) for hidden in layers) if self._normalises else None
        sequences = end_to_end(self.lengths[list(responses)], self.device)
        return LocalStates(sequences=sequences, tokens=layers[0].shape[0], layers=layers, scales=scales)


def end_to_end(lengths: np.ndarray, device: torch.device) -> Tensor:
    """[responses, 2] ranges of responses of these lengths laid end to end."""
    ends = np.cumsum(lengths)
    return torch.from_numpy(np.stack((ends - lengths, ends), axis=1)).to(device)


def scores(states: LocalStates, source: States, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """([responses] scores, [responses] sums of gates) under a head, equal on all ranks of a replica.

    Differentiable: a rank's gradient of the weight covers its own states, that of the bias is whole on every rank.

    Args:
        weight: [layers, 2, hidden]; bias: [2].
    """
    total = None
    for place, hidden in enumerate(states.layers):
        own = weight[source.own_layers[place]][:, source.columns]
        if states.scales is None:
            total = gated_projection(total, hidden, own)
        else:
            share = gated_projection(None, hidden, own) * states.scales[place]
            total = share if total is None else total + share
    if total is None:
        total = bias.new_zeros(states.tokens, 2)
    elif states.rows is not None:
        total = total.new_zeros(states.tokens, 2).index_copy(0, states.rows, total)
    return gated_mean(sum_projections(total, source.groups.model), states.sequences, bias)
