"""The reference policy that a run is held near: a second set of weights in host memory, swapped in to be measured."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.models.gpt import GPTModel

PREFIX = "reference."
"""In front of its tensors' names in a checkpoint."""


Weights = list[dict[str, torch.Tensor]]
"""[model chunk] -> parameters by name, in host memory."""


def copy_of(chunks: list[GPTModel]) -> Weights:
    return [{name: p.detach().to("cpu", copy=True) for name, p in chunk.named_parameters()} for chunk in chunks]


def fill(chunks: list[GPTModel], weights: Weights) -> None:
    with torch.no_grad():
        for chunk, values in zip(chunks, weights, strict=True):
            for name, parameter in chunk.named_parameters():
                parameter.copy_(values[name])


class Reference:
    """The weights of this rank's model chunks at one moment, exactly as they were."""

    def __init__(self, chunks: list[GPTModel]):
        self.chunks = chunks
        self.take()

    def take(self) -> None:
        """Make the current policy the reference."""
        self.weights = copy_of(self.chunks)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While the context is open the model has the reference's weights; after it, its own again, bit for bit."""
        own = copy_of(self.chunks)
        fill(self.chunks, self.weights)
        try:
            yield
        finally:
            fill(self.chunks, own)

    # ------------------------------------------------------------ checkpoints

    def sharded_state(self, metadata: dict[str, Any]) -> list[dict[str, Any]]:
        """One state dict per chunk, whose tensors are the reference's own and have names of their own in the file."""
        states = []
        for chunk, weights in zip(self.chunks, self.weights, strict=True):
            owners = {parameter.data_ptr(): name for name, parameter in chunk.named_parameters()}
            state = chunk.sharded_state_dict(metadata=metadata)
            for entry in state.values():
                if isinstance(getattr(entry, "data", None), torch.Tensor):
                    entry.data = weights[owners[entry.data.data_ptr()]]
            add_prefix_for_sharding(state, PREFIX)
            states.append(state)
        return states

    def load(self, states: list[dict[str, Any]]) -> None:
        """Take what was read under `sharded_state`."""
        own = copy_of(self.chunks)
        for chunk, state in zip(self.chunks, states, strict=True):
            chunk.load_state_dict(state)
        self.take()
        fill(self.chunks, own)
