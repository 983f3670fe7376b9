"""A reward head's gate and reward of every token that vLLM computes, taken over from its worker's model pass by pass.

model.py computes them in the forward pass and leaves them in buffers, with what the model was fed; the worker
announces each pass here before it runs, and what the pass gave is copied out before the next one is announced.

What a token gave is kept with its request, position and id, 20 bytes, until the call of `generate` ends. A token that
is computed again (of a preempted request) replaces what it gave before. A token whose keys come out of the prefix cache
gives nothing; vLLM takes only tokens of the prompt from there, and those that this very request had computed before it
was preempted, for it always computes the last token it knows. Nothing rests on that: a response is scored only if each
of its tokens was read, at its own position.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_srft.hidden_reward import RewardHead
from megatron_srft.ops.gated_pooling import gated_mean
from megatron_srft.rollout.engine import RolloutError
from megatron_srft.rollout.vllm.model import StateSums


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
    read: torch.Tensor
    """[] int64; how many of the head's layers."""


class StateReader:
    """Copies what passes gave out of a model's buffers; `remove` ends it."""

    def __init__(self, head: RewardHead, sums: StateSums):
        self.head, self.sums = head, sums
        self.expected: Rows | None = None
        self.passes: list[Pass] = []
        sums.take(head)

    def remove(self) -> None:
        self.sums.take(None)

    def expect(self, rows: Rows) -> None:
        """The next forward pass computes these; one that was not announced (vLLM's warm-up) is not taken over."""
        self._collect()
        self.expected = rows

    def _collect(self) -> None:
        rows, self.expected = self.expected, None
        if rows is None:
            return
        count = sum(rows.counts)
        if count > len(self.sums.sums):
            raise StatesError(f"vLLM computed {count} tokens in one pass, more than the {len(self.sums.sums)} it said")
        # Beyond the count lies padding.
        parts = (getattr(self.sums, name)[:count].clone() for name in ("positions", "token_ids", "sums"))
        self.passes.append(Pass(rows, *parts, self.sums.read.clone()))
        self.sums.read.zero_()  # a pass that leaves the buffers alone is seen by it

    def take(self, responses: dict[str, tuple[int, Sequence[int]]]) -> dict[str, float | None]:
        """Score the responses, and forget everything that was read.

        Args:
            responses: by request (the id it was made with), the first position and the tokens that are scored.

        Returns:
            By request; None where there is no token, NaN where a token's gate or reward is not finite.

        Raises:
            StatesError: a layer was not read; a token was not computed since the last call, or another one in its
                place, and which request's.
        """
        self._collect()
        passes, self.passes = self.passes, []
        self._check_layers(passes)
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

    def _check_layers(self, passes: Sequence[Pass]) -> None:
        wanted = len(self.head.layers)
        least = int(torch.stack([one.read for one in passes]).min()) if passes else wanted
        if least != wanted:
            raise StatesError(
                f"of the {wanted} layers that the reward head reads, a forward pass of vLLM's model read {least}: it "
                "did not run the code that reads them; go without the head"
            )
        if not self.sums.holds(self.head):
            raise StatesError(
                "vLLM's model no longer has the reward head's numbers; something has been loaded over them"
            )


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
