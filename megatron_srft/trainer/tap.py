"""Reads the hidden states of chosen layers while a forward pass runs, from any schedule of Megatron's.

Layers are numbered as in hidden_reward/head.py: 0 is the embedding's output, l < L the residual stream after block l,
L what the final norm gives. Megatron's blocks carry their number in the whole model, from 1, under every pipeline
layout; the embedding is on the first chunk, the final norm on the last. Blocks of the local and of
TransformerEngine's specification both return the sum of the residual stream, so one hook serves both.

A hook that never fires leaves a sum too small, and no error: CUDA graphs, or a megatron that calls a module's forward
by itself, pass hooks by. So every tap is counted, and a pass with a silent one fails.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch

from megatron_srft.trainer.model import PolicyModel

Visit = Callable[[int, int, torch.Tensor], None]
"""visit(microbatch, layer, hidden): index of the micro-batch in the pass, layer, and [local tokens, hidden] states,
detached; with sequence parallelism the tokens are this rank's share."""


class TapError(RuntimeError):
    """A layer of this rank was not read once for every micro-batch."""


@contextmanager
def tapped(chunks: Sequence[PolicyModel], layers: Sequence[int], visit: Visit) -> Iterator[None]:
    """While the context is open, call `visit` with the states of those `layers` that are on this rank's chunks.

    Every chunk has to see the micro-batches in their order, as in all of Megatron's schedules. States exist for the
    length of the call only: keep what is made of them, not themselves.

    Raises:
        TapError: on leaving, unless each of the rank's layers fired once for each micro-batch and there was one; at
            once when a layer fires twice for one, as a recomputation in a backward pass makes it.
    """
    counters = [_Counter(chunk) for chunk in chunks]
    with ExitStack() as hooks:
        for counter in counters:
            hooks.enter_context(_removed(counter.chunk.register_forward_pre_hook(counter.begin)))
            for layer, module in taps(counter.chunk).items():
                if layer in layers:
                    hooks.enter_context(_removed(module.register_forward_hook(counter.reader(layer, visit))))
        yield
    for counter in counters:
        counter.check()


def taps(chunk: PolicyModel) -> dict[int, torch.nn.Module]:
    """The modules of this chunk that give the states of layers, by layer."""
    last = chunk.config.num_layers
    found = {0: chunk.embedding} if chunk.pre_process else {}
    found |= {block.layer_number: block for block in chunk.decoder.layers if block.layer_number < last}
    return found | ({last: chunk.decoder.final_layernorm} if chunk.post_process else {})


@dataclass(eq=False)
class _Counter:
    """Micro-batches that a chunk has begun, and those that each of its taps has read."""

    chunk: PolicyModel
    begun: int = 0
    read: dict[int, int] = field(default_factory=dict)

    def begin(self, module, inputs) -> None:
        self.begun += 1

    def reader(self, layer: int, visit: Visit) -> Callable:
        self.read[layer] = 0

        def read(module, inputs, output) -> None:
            if self.read[layer] >= self.begun:
                raise TapError(
                    f"layer {layer} was computed twice for micro-batch {self.begun}; its states would count twice"
                )
            self.read[layer] += 1
            hidden = output[0] if isinstance(output, tuple) else output  # blocks return (states, context)
            visit(self.begun - 1, layer, hidden[:, 0].detach())

        return read

    def check(self) -> None:
        silent = [f"layer {layer} for {read}" for layer, read in self.read.items() if read != self.begun or not read]
        if silent:
            raise TapError(
                f"of {self.begun} micro-batch(es) the hidden states were read of {', '.join(silent)}; hooks do not "
                "fire under CUDA graphs: remove megatron.cuda_graph_impl and the like, or the reward head"
            )


@contextmanager
def _removed(hook: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()
