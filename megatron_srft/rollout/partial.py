"""Partial rollouts: completions that go on over several steps, so that no step waits for its longest ones.

    round   every unfinished completion in flight gets at most tokens_per_round new tokens
    step    rounds until enough groups are finished, and those that were begun max_age steps ago; the finished groups
            are handed out, the oldest first, and what is left goes on in the next step, with its weights

A response is then of several policies. Its log-probs are those of the policy that sampled each token, and its policy
version is the oldest of them. Random numbers go on where the round before stopped: with unchanged weights a response is
the one that would have been sampled at once. Partial rollouts are those of Kimi k1.5 (arXiv 2501.12599); which groups a
step takes is ours.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_srft import distributed
from megatron_srft.config import PartialConfig, SamplingConfig
from megatron_srft.rollout.collect import first_samples, share
from megatron_srft.rollout.dump import from_lines, to_lines
from megatron_srft.rollout.engine import Request, RolloutEngine
from megatron_srft.sample import Completion, Demonstration, Group, Prompt


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Flight:
    """A group that is being sampled.

    Example: group of prompt "train/3" with 4 completions, two of them unfinished, begun=12, first_sample=0.
    """

    group: Group
    """Its completions are those so far; empty ones before its first round."""
    begun: int
    """The step that it was begun in, which keys its random numbers."""
    first_sample: int
    """Number of its first completion; above 0 where its prompt was drawn twice in that step."""
    earlier: int = 0
    """Tokens that it had when the current step began."""


class InFlight:
    """The groups of one stage that are begun and not handed out, the oldest first; the same on every rank."""

    def __init__(self, config: PartialConfig | None, decode: Callable[[np.ndarray], str], world: distributed.Group):
        """
        Args:
            config: None where nothing ever is in flight.
            decode: gives the text of a whole response.
        """
        self.config, self.decode, self.world = config, decode, world
        self.flights: list[Flight] = []
        self.figures: dict[str, float] = {}

    def begin(self, prompts: list[Prompt], demonstrations: list[Demonstration | None], n: int, step: int) -> None:
        """Take up prompts, each with n completions to sample."""
        empty = Completion(
            token_ids=np.zeros(0, np.int32),
            text="",
            rollout_logprobs=np.zeros(0, np.float32),
            finish_reason="length",
            policy_version=-1,
        )
        for prompt, demonstration, first in zip(prompts, demonstrations, first_samples(prompts, n), strict=True):
            group = Group(prompt=prompt, completions=(empty,) * n, demonstration=demonstration)
            self.flights.append(Flight(group=group, begun=step, first_sample=first))

    def advance(
        self, engine: RolloutEngine, sampling: SamplingConfig, seed: int, step: int, wanted: int
    ) -> list[Group]:
        """Sample until `wanted` groups are finished; those groups. Collective.

        Args:
            sampling: its max_response_tokens is the limit of a whole response.
            step: the current step, which says how old the groups are.
        """
        limit, rounds = sampling.max_response_tokens, 0
        in_one_round = replace(sampling, max_response_tokens=self.config.tokens_per_round)
        self.flights = [replace(flight, earlier=_tokens(flight.group)) for flight in self.flights]
        while not self._enough(wanted, step, limit):
            self._round(engine, in_one_round, seed, limit)
            rounds += 1
        finished = [flight for flight in self.flights if _is_finished(flight.group, limit)][:wanted]
        self.flights = [flight for flight in self.flights if flight not in finished]
        tokens = sum(_tokens(flight.group) for flight in finished)
        self.figures = {
            "partial/rounds": rounds,
            "partial/carried_groups": len(self.flights),
            "partial/carried_tokens": sum(_tokens(flight.group) for flight in self.flights),
            "partial/earlier_share": sum(flight.earlier for flight in finished) / max(1, tokens),
            "partial/age/max": max(step - flight.begun for flight in finished),
        }
        return [flight.group for flight in finished]

    def metrics(self) -> dict[str, float]:
        """Of the latest step, once."""
        figures, self.figures = self.figures, {}
        return figures

    # ------------------------------------------------------------ checkpoints

    def arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint has to hold."""
        if not self.flights:
            return {}
        return {
            "in_flight": np.frombuffer(to_lines([flight.group for flight in self.flights]).encode(), np.uint8),
            "in_flight_numbers": np.array([(flight.begun, flight.first_sample) for flight in self.flights], np.int64),
        }

    def restore(self, arrays: dict[str, np.ndarray], source: Path) -> None:
        """Take what `arrays` gave.

        Raises:
            ValueError: it is damaged.
        """
        if "in_flight" not in arrays:
            return
        groups = from_lines(arrays["in_flight"].tobytes().decode(), source)
        self.flights = [
            Flight(group=group, begun=int(begun), first_sample=int(first))
            for group, (begun, first) in zip(groups, arrays["in_flight_numbers"], strict=True)
        ]

    # ------------------------------------------------------------ rounds

    def _enough(self, wanted: int, step: int, limit: int) -> bool:
        finished = [_is_finished(flight.group, limit) for flight in self.flights]
        due = [step - flight.begun >= self.config.max_age for flight in self.flights]
        return sum(finished) >= wanted and all(done for done, now in zip(finished, due, strict=True) if now)

    def _round(self, engine: RolloutEngine, sampling: SamplingConfig, seed: int, limit: int) -> None:
        """One round of all unfinished completions, each flight by one engine."""
        number, member = divmod(distributed.rank(self.world), engine.ranks)
        open_ = [place for place, flight in enumerate(self.flights) if not _is_finished(flight.group, limit)]
        lengths = [_tokens(self.flights[place].group) for place in open_]
        own = [open_[i] for i in share(lengths, distributed.size(self.world) // engine.ranks, number)]
        asked = [
            (place, i)
            for place in own
            for i, completion in enumerate(self.flights[place].group.completions)
            if not _is_done(completion, limit)
        ]
        requests = [self._request(place, i, seed) for place, i in asked]
        answers = dict(zip(asked, engine.generate(requests, sampling) if requests else [], strict=True))
        kept = {key: answers[key] for key in asked[member :: engine.ranks]}
        found = {key: c for part in distributed.all_gather_objects(kept, self.world) for key, c in part.items()}
        for place in open_:
            group = self.flights[place].group
            completions = tuple(
                self._joined(before, found[place, i]) if (place, i) in found else before
                for i, before in enumerate(group.completions)
            )
            self.flights[place] = replace(self.flights[place], group=replace(group, completions=completions))

    def _request(self, place: int, i: int, seed: int) -> Request:
        flight = self.flights[place]
        begun = flight.group.completions[i].token_ids
        return Request(
            prompt=flight.group.prompt,
            sample=flight.first_sample + i,
            seed=seed,
            step=flight.begun,
            begun=begun if len(begun) else None,
        )

    def _joined(self, before: Completion, after: Completion) -> Completion:
        if not len(before.token_ids):
            return after
        token_ids = np.concatenate([before.token_ids, after.token_ids])
        return replace(
            after,
            token_ids=token_ids,
            text=self.decode(token_ids),
            rollout_logprobs=np.concatenate([before.rollout_logprobs, after.rollout_logprobs]),
            policy_version=before.policy_version,
            hidden_score=None,
            hidden_head=None,
        )


def _is_done(completion: Completion, limit: int) -> bool:
    return completion.finish_reason == "stop" or len(completion.token_ids) >= limit


def _is_finished(group: Group, limit: int) -> bool:
    return all(_is_done(completion, limit) for completion in group.completions)


def _tokens(group: Group) -> int:
    return sum(len(completion.token_ids) for completion in group.completions)
