"""One-step-off generation: the completions of the next step are sampled in the background while this one trains.

    step k      take the completions of step k; sync weights v_k; begin those of step k + 1 with v_k; train to v_k+1
    step k + 1  take them; they are of v_k, and the policy is at v_k+1

They are the policy's of one step ago, on which the importance ratio says nothing unless it is told whose they are:
config/checks.py demands a correction. Whatever gives the engine other weights waits for them first, so what is sampled
does not depend on how long anything takes, and a checkpoint holds them.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_srft import distributed
from megatron_srft.config import ConfigError, SamplingConfig
from megatron_srft.rollout import RolloutEngine, Share, assemble, from_lines, to_lines
from megatron_srft.rollout.background import Call
from megatron_srft.sample import Completion, Group, Prompt

ARRAY = "rollouts_ahead"
"""Under which name a checkpoint has them: the JSON lines of a rollout dump, as bytes."""


class RolloutsAhead:
    """The groups of the step that comes next, while they are sampled and afterwards; idle unless `launch` is called."""

    def __init__(self, world: distributed.Group):
        self.world = world
        self.sampling: tuple[Share, Call] | None = None
        """What the engine is at work on; nothing else may ask it, or change its weights, until it is done."""
        self.groups: list[Group] | None = None
        self.seconds = 0.0
        self.taken: dict[str, float] = {}

    def launch(self, engine: RolloutEngine, share: Share, sampling: SamplingConfig) -> None:
        """Begin to sample this rank's share in the background, with the weights that the engine has now."""
        assert self.sampling is None and self.groups is None, "the completions before have not been taken"
        begun = time.perf_counter()

        def sample() -> tuple[list[Completion], float]:
            completions = engine.generate(share.requests, sampling) if share.requests else []
            return completions, time.perf_counter() - begun

        self.sampling = (share, Call(sample))

    def settle(self) -> None:
        """Wait until the engine is idle, and gather what it sampled. Collective.

        Raises:
            RolloutError, ValueError: what `generate` raises.
        """
        if self.sampling is not None:
            (share, call), self.sampling = self.sampling, None
            completions, self.seconds = call.result()
            self.groups = assemble(share, completions, self.world)

    def take(self, prompts: Sequence[Prompt]) -> list[Group] | None:
        """The groups of these prompts, once; None where nothing was sampled ahead. Collective.

        Raises:
            ConfigError: those of a checkpoint are of other prompts.
        """
        self.settle()
        groups, self.groups = self.groups, None
        if groups is None:
            return None
        self.taken = {"ahead/seconds": self.seconds}
        same = len(groups) == len(prompts) and all(
            group.prompt.id == prompt.id and np.array_equal(group.prompt.token_ids, prompt.token_ids)
            for group, prompt in zip(groups, prompts, strict=True)
        )
        if not same:
            raise ConfigError(
                "the checkpoint holds completions that were sampled ahead for the next step, and other prompts come "
                "now; go on with the data, batch and seed that it was made with, or choose another name for a new run"
            )
        return groups

    def metrics(self) -> dict[str, float]:
        """Of the groups that were taken last, once: ahead/seconds, what this rank's part of them took in the background
        (0 for those of a checkpoint)."""
        taken, self.taken = self.taken, {}
        return taken

    # ------------------------------------------------------------ checkpoints

    def arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint has to hold. Collective: waits for what is being sampled."""
        self.settle()
        return {} if self.groups is None else {ARRAY: np.frombuffer(to_lines(self.groups).encode(), np.uint8)}

    def restore(self, arrays: dict[str, np.ndarray], source: Path) -> None:
        """Take what `arrays` gave.

        Raises:
            ValueError: it is damaged.
        """
        if ARRAY in arrays:
            self.groups = from_lines(arrays[ARRAY].tobytes().decode(), source)
