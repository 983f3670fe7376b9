"""A reward head's gate and reward of every token that vLLM computes, read off its worker's model while it runs.

vLLM's layers return the residual stream in two parts, not yet added. By the numbers of hidden_reward/head.py, layer 0
is what the embedding gives, l < L the sum of both parts after block l, L the first part of what the final norm gives.
After each of them every tensor-parallel rank has whole states, so each rank projects all of them and has all scores.

What a token gave is kept with its request, position and id, 20 bytes, until the call of `generate` ends. A token that
is computed again (of a preempted request) replaces what it gave before. A token whose keys come out of the prefix cache
gives nothing; vLLM takes only tokens of the prompt from there, and those that this very request had computed before it
was preempted, for it always computes the last token it knows. Nothing rests on that: a response is scored only if each
of its tokens was read, at its own position.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_srft.config import require
from megatron_srft.hidden_reward import RewardHead, add_layer
from megatron_srft.ops.gated_pooling import gated_mean
from megatron_srft.rollout.engine import RolloutError


class StatesError(RolloutError):
    """A layer, or a token of a response, was not read; there is no score, and none is made up."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What one forward pass computes, row after row.

    Example: requests=["7-1f", "9-a2"], counts=[1, 12] is the next token of request 7 and 12 of the prompt of 9.
    """

    requests: list[str]
    """vLLM's own ids."""
    counts: list[int]
    """Tokens of each."""


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """What one forward pass gave."""

    rows: Rows
    positions: torch.Tensor
    """[tokens] int64, each within its request."""
    token_ids: torch.Tensor
    """[tokens] int32 or int64, what the model was fed."""
    sums: torch.Tensor
    """[tokens, 2] float32, without the head's bias."""


class StateReader:
    """Hooks on a vLLM model; `remove` takes them off."""

    def __init__(self, head: RewardHead, model: torch.nn.Module):
        """
        Args:
            model: the causal language model of vLLM's worker.

        Raises:
            ConfigError: the model is not built as those that this file knows.
        """
        self.head = head.to(next(model.parameters()).device)
        self.expected: Rows | None = None
        self.inputs: dict[str, Any] = {}
        self.sums: torch.Tensor | None = None
        self.read: list[int] = []
        self.passes: list[Pass] = []
        modules = layer_modules(model, head.config.base.num_layers)
        self.hooks = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for place, layer in enumerate(head.layers):
            self.hooks.append(modules[layer].register_forward_hook(self._reader(place, layer)))
        self.hooks.append(model.register_forward_hook(self._end))

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def expect(self, rows: Rows) -> None:
        """The next forward pass computes these; one that was not announced (vLLM's warm-up) is not read."""
        self.expected = rows

    def _begin(self, model: torch.nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
        self.inputs, self.sums, self.read = named, None, []

    def _reader(self, place: int, layer: int) -> Callable:
        weight, config = self.head.weight[place], self.head.config

        def read(module: torch.nn.Module, inputs: tuple, output: Any) -> None:
            if self.expected is not None:
                # At once: the next layer overwrites both parts.
                self.sums = add_layer(self.sums, _state(output, layer, config.base.num_layers), weight, config)
                self.read.append(layer)

        return read

    def _end(self, model: torch.nn.Module, inputs: tuple, output: Any) -> None:
        rows, self.expected = self.expected, None
        if rows is None:
            return
        if self.read != list(self.head.layers):
            raise StatesError(
                f"of the layers {list(self.head.layers)} that the reward head reads, vLLM's forward pass passed by "
                f"{sorted(set(self.head.layers) - set(self.read))}; set rollout.vllm.enforce_eager, under which hooks "
                "fire, or go without the head"
            )
        count = sum(rows.counts)
        if len(self.sums) < count:
            raise StatesError(f"vLLM computed {len(self.sums)} of {count} tokens in one pass; it has cut the batch")
        # The engine overwrites its buffers of inputs; what lies beyond the count is padding.
        positions, token_ids = (self.inputs[name][:count].clone() for name in ("positions", "input_ids"))
        self.passes.append(Pass(rows, positions, token_ids, self.sums[:count]))

    def take(self, responses: dict[str, tuple[int, Sequence[int]]]) -> dict[str, float | None]:
        """Score the responses, and forget everything that was read.

        Args:
            responses: by request (the id it was made with), the first position and the tokens that are scored.

        Returns:
            By request; None where there is no token, NaN where a token's gate or reward is not finite.

        Raises:
            StatesError: a token was not computed since the last call, or another one in its place; names the request.
        """
        passes, self.passes = self.passes, []
        scored = {name: response for name, response in responses.items() if len(response[1])}
        if not scored:
            return dict.fromkeys(responses)
        starts = np.array([start for start, _ in scored.values()])
        bounds = np.cumsum([0, *(len(tokens) for _, tokens in scored.values())])
        table, token_ids = _gather(passes, list(scored), starts, bounds)
        _check_tokens(token_ids, list(scored.values()), list(scored), bounds)
        table[~np.isfinite(table).all(axis=1)] = np.nan  # a shut gate would hide an infinite reward
        sequences = torch.from_numpy(np.stack([bounds[:-1], bounds[1:]], axis=1))
        with torch.inference_mode():
            scores, _ = gated_mean(torch.from_numpy(table), sequences, self.head.bias.cpu())
        return dict.fromkeys(responses) | dict(zip(scored, scores.tolist(), strict=True))


def _gather(
    passes: Sequence[Pass], names: Sequence[str], starts: np.ndarray, bounds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What was read last at every position of the responses.

    Args:
        names: [responses] ids of their requests.
        starts: [responses] their first positions.
        bounds: [responses + 1] where they lie in what is returned.

    Returns:
        [tokens, 2] float32 gate and reward, [tokens] token ids; -1 where nothing was read.
    """
    table, token_ids = np.zeros((bounds[-1], 2), np.float32), np.full(bounds[-1], -1)
    if not passes:
        return table, token_ids
    positions, fed, sums = (
        torch.cat([getattr(one, name) for one in passes]).cpu().numpy() for name in ("positions", "token_ids", "sums")
    )
    owners = _owners(passes, names)
    offsets = positions - starts[owners]
    own = np.flatnonzero((owners >= 0) & (offsets >= 0) & (offsets < np.diff(bounds)[owners]))[::-1]
    # Backwards, as unique gives a place's first; numpy promises no order for an assignment to repeated places.
    places, last = np.unique(bounds[owners[own]] + offsets[own], return_index=True)
    table[places], token_ids[places] = sums[own[last]], fed[own[last]]
    return table, token_ids


def layer_modules(model: torch.nn.Module, num_layers: int) -> dict[int, torch.nn.Module]:
    """The modules that give a layer's states, by layer.

    Raises:
        ConfigError: the model is not built of embed_tokens, layers and norm.
    """
    trunk = getattr(model, "model", None)
    parts = [getattr(trunk, name, None) for name in ("embed_tokens", "layers", "norm")]
    require(
        all(part is not None for part in parts) and len(parts[1]) == num_layers,
        f"a reward head cannot be read in vLLM's {type(model).__name__}: it has no model.embed_tokens, {num_layers} "
        "model.layers and model.norm; score the responses with `megatron-srft reward score`",
    )
    embedding, blocks, norm = parts
    return {0: embedding, **dict(enumerate(list(blocks)[:-1], start=1)), num_layers: norm}


def _state(output: Any, layer: int, num_layers: int) -> torch.Tensor:
    """[tokens, hidden] of a layer in what its module returned."""
    if layer in (0, num_layers):
        return output[0] if isinstance(output, tuple) else output
    if not (isinstance(output, tuple) and len(output) == 2):
        raise StatesError(f"block {layer} of vLLM's model does not return its states and a residual stream")
    return output[0] + output[1]


def _owners(passes: Sequence[Pass], names: Sequence[str]) -> np.ndarray:
    """[tokens of all passes]: index in `names` of the token's request; -1 for others."""
    numbers = {name: number for number, name in enumerate(names)}
    # vLLM appends a random suffix to the id that a request was made with.
    ids = [numbers.get(request.partition("-")[0], -1) for one in passes for request in one.rows.requests]
    return np.repeat(ids, [count for one in passes for count in one.rows.counts])


def _check_tokens(
    found: np.ndarray, responses: Sequence[tuple[int, Sequence[int]]], names: Sequence[str], bounds: np.ndarray
) -> None:
    wrong = found != np.concatenate([tokens for _, tokens in responses])
    if wrong.any():
        first = int(np.searchsorted(bounds, np.flatnonzero(wrong)[0], side="right")) - 1
        part = slice(bounds[first], bounds[first + 1])
        missing, count = int((found[part] == -1).sum()), int(wrong[part].sum())
        raise StatesError(
            f"of {len(found[part])} tokens of request {names[first]} that the reward head scores, vLLM computed "
            f"{missing} not at all and {count - missing} as other tokens; set enable_prefix_caching to false "
            "in rollout.vllm, or go without the head"
        )
