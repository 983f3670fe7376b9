"""One step's groups: prompts shared over all ranks, completions sampled, everything gathered on every rank."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_srft import distributed
from megatron_srft.config import SamplingConfig
from megatron_srft.rollout.engine import Request, RolloutEngine
from megatron_srft.sample import Completion, Demonstration, Group, Prompt

Score = Callable[[list[Group]], list[Group]]


def collect(
    engine: RolloutEngine,
    prompts: list[Prompt],
    demonstrations: list[Demonstration | None],
    n: int,
    sampling: SamplingConfig,
    seed: int,
    step: int,
    world: distributed.Group,
    *,
    sampled: Sequence[Prompt] = (),
    score: Score | None = None,
) -> list[Group]:
    """Sample `n` completions of every prompt, each prompt by one of the engines of `world`.

    Args:
        prompts: the same list on every rank.
        demonstrations: one (or None) per prompt, the same on every rank.
        step: keys the random streams, with `seed`; the completions do not depend on the number of ranks.
        sampled: prompts for which `n` completions each were sampled before in this step.
        score: called on this rank's own groups before they are gathered, for example `Scorer.score`.

    Returns:
        One group per prompt, in the order of `prompts`; the same list on every rank.
    """
    share = deal(engine, prompts, demonstrations, n, seed, step, world, sampled=sampled)
    completions = engine.generate(share.requests, sampling) if share.requests else []
    return assemble(share, completions, world, score=score)


@dataclass(frozen=True, kw_only=True, eq=False)
class Share:
    """One rank's part of a step's rollouts.

    Example: of 3 prompts with n=2 on two ranks, own=[0, 2], kept=[(0, 0), (1, 2)] and 4 requests on the first of them.
    """

    prompts: list[Prompt]
    """All prompts of the step."""
    demonstrations: list[Demonstration | None]
    """One per prompt."""
    n: int
    """Completions of each prompt."""
    own: list[int]
    """Prompts that this rank's engine answers, as indices."""
    kept: list[tuple[int, int]]
    """(place in `own`, prompt) of those whose answers this rank hands on; the engine's other ranks hand on the rest."""
    requests: list[Request]
    """n for each of `own`."""


def deal(
    engine: RolloutEngine,
    prompts: list[Prompt],
    demonstrations: list[Demonstration | None],
    n: int,
    seed: int,
    step: int,
    world: distributed.Group,
    *,
    sampled: Sequence[Prompt] = (),
) -> Share:
    """This rank's share; arguments as of `collect`."""
    assert len(demonstrations) == len(prompts)
    engine_number, member = divmod(distributed.rank(world), engine.ranks)
    lengths = [len(prompt.token_ids) for prompt in prompts]
    own = share(lengths, distributed.size(world) // engine.ranks, engine_number)
    first = first_samples(prompts, n, sampled)
    requests = [Request(prompt=prompts[i], sample=first[i] + s, seed=seed, step=step) for i in own for s in range(n)]
    kept = list(enumerate(own))[member :: engine.ranks]
    return Share(prompts=prompts, demonstrations=demonstrations, n=n, own=own, kept=kept, requests=requests)


def assemble(
    share: Share, completions: list[Completion], world: distributed.Group, *, score: Score | None = None
) -> list[Group]:
    """All ranks' groups in prompt order, the same list on every rank. Collective.

    Args:
        completions: one for each of the share's requests.
    """
    groups = [
        Group(
            prompt=share.prompts[i],
            completions=tuple(completions[place * share.n : (place + 1) * share.n]),
            demonstration=share.demonstrations[i],
        )
        for place, i in share.kept
    ]
    if score is not None:
        groups = score(groups)
    own = {i: group for (_, i), group in zip(share.kept, groups, strict=True)}
    return gather(own, share.prompts, share.demonstrations, world)


def first_samples(prompts: list[Prompt], n: int, sampled: Sequence[Prompt] = ()) -> list[int]:
    """Number of each prompt's first sample: 0, or n * k for a prompt that stands k times before it or in `sampled`.

    A step that straddles two epochs, or draws several times, can hold a prompt twice; numbered alike, its groups would
    be the same completions.
    """
    seen = Counter(prompt.id for prompt in sampled)
    first = []
    for prompt in prompts:
        first.append(n * seen[prompt.id])
        seen[prompt.id] += 1
    return first


def share(lengths: list[int], engines: int, number: int) -> list[int]:
    """Indices of one engine's part of what has these lengths: dealt out from the longest on, back and forth."""
    by_length = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    rounds = [by_length[start : start + engines] for start in range(0, len(by_length), engines)]
    dealt = [(deal if place % 2 == 0 else deal[::-1]) for place, deal in enumerate(rounds)]
    if dealt and len(dealt[-1]) < engines:
        dealt[-1] = sorted(dealt[-1])
    return sorted(deal[number] for deal in dealt if number < len(deal))


def gather(
    own: dict[int, Group], prompts: list[Prompt], demonstrations: list[Demonstration | None], world: distributed.Group
) -> list[Group]:
    """All ranks' groups in prompt order. Prompts and demonstrations stay where they are; only the rest travels."""
    sampled = {i: (group.completions, group.scores, group.demonstration_score) for i, group in own.items()}
    everyone = {i: parts for rank in distributed.all_gather_objects(sampled, world) for i, parts in rank.items()}
    assert len(everyone) == len(prompts)
    return [
        Group(
            prompt=prompts[i],
            completions=everyone[i][0],
            demonstration=demonstrations[i],
            scores=everyone[i][1],
            demonstration_score=everyone[i][2],
        )
        for i in range(len(prompts))
    ]
