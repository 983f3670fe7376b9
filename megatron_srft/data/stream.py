"""The order in which prompts and demonstrations are visited, as a function of (seed, step).

Nothing has to be saved to resume: step 1,000 of a resumed run draws what step 1,000 of an unbroken run draws.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_srft.sample import Demonstration, Prompt


@dataclass(frozen=True)
class PromptStream:
    """Prompts in epochs without end; each epoch visits every prompt once, shuffled independently of the others.

    Step s takes the positions [s * prompts_per_step, (s + 1) * prompts_per_step) of the concatenated epochs, so a
    batch may straddle two epochs and then can hold a prompt twice, once from each.
    """

    prompts: Sequence[Prompt]
    seed: int
    shuffle: bool = True

    def batch(self, step: int, prompts_per_step: int) -> list[Prompt]:
        """The prompts of one step.

        Args:
            step: counted from 0.

        Raises:
            ValueError: there are fewer prompts than one step takes.
        """
        if prompts_per_step > len(self.prompts):
            raise ValueError(
                f"batch.prompts_per_step is {prompts_per_step}, but the data hold only {len(self.prompts)} prompts; "
                "lower it, or use more data"
            )
        return self.stretch(step * prompts_per_step, prompts_per_step)

    def stretch(self, start: int, count: int) -> list[Prompt]:
        """The prompts at `count` places of the endless order, from place `start` on."""
        epoch, place = divmod(start, len(self.prompts))
        order = self._order(epoch)[place : place + count]
        while len(order) < count:
            epoch += 1
            order = np.concatenate([order, self._order(epoch)[: count - len(order)]])
        return [self.prompts[index] for index in order]

    def _order(self, epoch: int) -> np.ndarray:
        """A permutation of the prompt indices, [prompts] int64."""
        if not self.shuffle:
            return np.arange(len(self.prompts))
        return np.argsort(_random(len(self.prompts), self.seed, epoch), kind="stable")


def choose_demonstration(prompt: Prompt, seed: int, step: int) -> Demonstration | None:
    """One of the prompt's demonstrations, each equally likely, a function of (seed, step, prompt id)."""
    if not prompt.demonstrations:
        return None
    draw = _random(1, seed, step, zlib.crc32(prompt.id.encode()))[0]
    return prompt.demonstrations[int(draw % np.uint64(len(prompt.demonstrations)))]


def _random(size: int, *key: int) -> np.ndarray:
    """[size] uint64. Raw bits, whose sequence numpy guarantees; that of Generator's methods may change."""
    return np.random.PCG64(np.random.SeedSequence(key)).random_raw(size)
