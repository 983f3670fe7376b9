"""The hidden states that a reward head is trained on, from the Megatron model itself: `hidden_reward.States`.

`Recomputed` runs the forward pass whenever states are asked for, and keeps those of the scored tokens only. `Cached`
runs it once and writes them to disk. Under both a rank has what the layout gives it: the layers of its pipeline stage,
and of them `share_of_hidden` of the columns of all tokens, or with sequence parallelism all columns of its own tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_srft.distributed import ProcessGroups, rank, size
from megatron_srft.hidden_reward import HeadConfig
from megatron_srft.hidden_reward.pooling import inverse_rms
from megatron_srft.hidden_reward.states import LocalStates, Question, end_to_end
from megatron_srft.ops.gated_pooling import share_of_hidden
from megatron_srft.sample import PackedBatch, TrainingSequence
from megatron_srft.trainer.context import Part
from megatron_srft.trainer.parallel import device
from megatron_srft.trainer.step import forward_pass
from megatron_srft.trainer.tap import tapped, taps
from megatron_srft.trainer.trainer import Trainer


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """What one rank has of the states of one response."""

    first: int
    """Place of its first token here among the response's scored tokens; the others follow it."""
    layers: tuple[Tensor, ...]
    """[local tokens, local columns] of each of the rank's layers, in the model's type."""
    scales: tuple[Tensor, ...]
    """[local tokens, 1] float32 of each of them; empty without normalisation."""


class Recomputed:
    """A `hidden_reward.States` whose `read` is a forward pass over the responses. Not with several context ranks.

    Args:
        sequences: prompt and response of each.
        config: which layers, which tokens, which normalisation.
    """

    def __init__(self, trainer: Trainer, sequences: Sequence[TrainingSequence], config: HeadConfig):
        self.trainer, self.sequences, self.config = trainer, sequences, config
        self.groups, self.device = trainer.groups, device()
        assert size(self.groups.context) == 1, "a response's hidden states must not be shared by context ranks"
        model = trainer.models[0].config
        here = {layer for chunk in trainer.models for layer in taps(chunk)}
        self.own_layers = tuple(place for place, layer in enumerate(config.layers) if layer in here)
        self.shape = (len(config.layers), model.hidden_size)
        self.token_group = self.groups.tensor if model.sequence_parallel else None
        self.columns = share_of_hidden(model.hidden_size, None if model.sequence_parallel else self.groups.tensor)
        self.lengths = scored_lengths(sequences, config)
        # One micro-batch at a time would leave the stages of a pipeline waiting for each other.
        self.portion_tokens = trainer.config.batch.tokens_per_microbatch * size(self.groups.pipeline)

    def share(self, questions: Sequence[Question]) -> list[Question]:
        """Each question, the largest first, falls to the data rank with the fewest tokens so far."""
        tokens = [sum(len(self.sequences[index].token_ids) for index in question) for question in questions]
        loads = [0] * size(self.groups.data)
        own = []
        for place in sorted(range(len(questions)), key=lambda place: (-tokens[place], place)):
            lightest = loads.index(min(loads))
            loads[lightest] += tokens[place]
            if lightest == rank(self.groups.data):
                own.append(place)
        return [questions[place] for place in sorted(own)]

    def read(self, responses: Sequence[int]) -> LocalStates:
        pieces: dict[int, Piece] = {}
        self.visit(responses, pieces.__setitem__)
        lengths = self.lengths[list(responses)]
        return assembled([pieces[index] for index in responses], lengths, self.device, cut=self.token_group is not None)

    def visit(self, responses: Sequence[int], keep: Callable[[int, Piece], None]) -> None:
        """Run the forward pass over the responses and hand over each one's piece, in no particular order."""
        chosen = [self.sequences[index] for index in responses]
        batches = self.trainer.microbatches(chosen, shared=False)
        gathering = _Gathering(self, responses, batches, keep)
        network = _Network(chunks=self.trainer.policy.chunks, groups=self.groups)
        for chunk in network.chunks:
            chunk.eval()
        with tapped(self.trainer.models, self.config.layers, gathering.add):
            forward_pass(network, batches, lambda batch, outputs: None)
        gathering.finish()


@dataclass(frozen=True, kw_only=True)
class _Network:
    """The model without its head: a `step.Network`."""

    chunks: list[DistributedDataParallel]
    groups: ProcessGroups

    def outputs(self, hidden: Tensor, model, part: Part) -> None:
        return None


class _Gathering:
    """Collects the states of the scored tokens micro-batch by micro-batch, each until all of the rank's layers ran."""

    def __init__(
        self,
        source: Recomputed,
        responses: Sequence[int],
        batches: list[PackedBatch],
        keep: Callable[[int, Piece], None],
    ):
        self.source, self.keep = source, keep
        self.places = {source.config.layers[place]: order for order, place in enumerate(source.own_layers)}
        self.spans = [_spans(source, responses, batch) for batch in batches]
        self.rows = [_rows(spans, source.device) for spans in self.spans]
        self.found: list[dict[int, tuple[Tensor, Tensor | None]]] = [{} for _ in batches]

    def add(self, microbatch: int, layer: int, hidden: Tensor) -> None:
        """The `visit` of trainer/tap.py."""
        config, found = self.source.config, self.found[microbatch]
        states = hidden.index_select(0, self.rows[microbatch])
        scale = inverse_rms(states, config.epsilon) if config.normalisation == "rms" else None
        found[self.places[layer]] = (states[:, self.source.columns].contiguous(), scale)
        if len(found) == len(self.places):
            self._hand_over(microbatch)

    def finish(self) -> None:
        """Hand over the pieces of a stage without any layer to read."""
        if not self.places:
            for microbatch in range(len(self.found)):
                self._hand_over(microbatch)

    def _hand_over(self, microbatch: int) -> None:
        spans = self.spans[microbatch]
        sizes = [end - start for _, start, end, _ in spans]
        ordered = [self.found[microbatch][order] for order in range(len(self.places))]
        self.found[microbatch] = {}
        layers = [states.split(sizes) for states, _ in ordered]
        scales = [scale.split(sizes) for _, scale in ordered if scale is not None]
        for place, (index, _, _, first) in enumerate(spans):
            piece = Piece(
                first=first,
                layers=tuple(layer[place] for layer in layers),
                scales=tuple(scale[place] for scale in scales),
            )
            self.keep(index, piece)


Span = tuple[int, int, int, int]
"""Response; this rank's rows with its scored tokens, first and end; how many of them other ranks have before these."""


def _spans(source: Recomputed, responses: Sequence[int], batch: PackedBatch) -> list[Span]:
    """Where this rank finds the scored tokens of each response of a micro-batch, reckoned without the device."""
    local = len(batch.token_ids) // size(source.token_group)
    first = local * rank(source.token_group)
    found, start = [], 0
    for place in batch.sequence_ids:
        index = responses[place]
        begin = start + source.sequences[index].prompt_length
        end = begin + int(source.lengths[index])
        own = [min(max(edge - first, 0), local) for edge in (begin, end)]
        found.append((index, *own, max(own[0] + first - begin, 0) if own[0] < own[1] else 0))
        start += len(source.sequences[index].token_ids)
    return found


def _rows(spans: list[Span], where: torch.device) -> Tensor:
    rows = [np.arange(start, end) for _, start, end, _ in spans]
    return torch.from_numpy(np.concatenate(rows) if rows else np.zeros(0, np.int64)).to(where)


def assembled(pieces: Sequence[Piece], lengths: np.ndarray, where: torch.device, *, cut: bool) -> LocalStates:
    """The pieces of responses laid end to end.

    Args:
        lengths: [responses] scored tokens of each, on all ranks together.
        cut: whether other ranks have tokens of them.
    """
    sequences = end_to_end(lengths, torch.device("cpu"))
    rows = None
    if cut:
        starts = sequences[:, 0].tolist()
        sizes = [piece.layers[0].shape[0] if piece.layers else 0 for piece in pieces]
        rows = [np.arange(n) + start + piece.first for n, start, piece in zip(sizes, starts, pieces, strict=True)]
        rows = torch.from_numpy(np.concatenate(rows)).to(where)
    layers = zip(*(piece.layers for piece in pieces), strict=True)
    scales = zip(*(piece.scales for piece in pieces), strict=True)
    return LocalStates(
        sequences=sequences.to(where),
        tokens=int(lengths.sum()),
        layers=tuple(torch.cat(layer).to(where) for layer in layers),
        scales=tuple(torch.cat(scale).to(where) for scale in scales) if pieces[0].scales else None,
        rows=rows,
    )


def scored_lengths(sequences: Sequence[TrainingSequence], config: HeadConfig) -> np.ndarray:
    """[sequences] tokens of each response that its score is made of; 0 where there is no score."""
    without = 1 if config.last_token == "excluded" else 0
    return np.array([max(one.response_length - without, 0) for one in sequences], np.int64)


def lm_head(trainer: Trainer) -> Tensor:
    """[vocabulary, hidden] of the policy, on every rank's device; collective, reads all weights."""
    found = _weights(trainer, "lm_head.weight", "model.embed_tokens.weight")  # the latter alone where the two are tied
    return found.get("lm_head.weight", found["model.embed_tokens.weight"])


def final_norm(trainer: Trainer) -> Tensor:
    """[hidden] weight of the policy's final norm, likewise."""
    return _weights(trainer, "model.norm.weight")["model.norm.weight"]


def _weights(trainer: Trainer, *names: str) -> dict[str, Tensor]:
    return {name: tensor.to(device()) for name, tensor in trainer.hf_weights() if name in names}
