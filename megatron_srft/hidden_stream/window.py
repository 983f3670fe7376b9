"""The latest steps' completions with the verifier's verdicts, which a refresh trains the head on."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatron_srft.config import SwiftRewardConfig
from megatron_srft.sample import Group

PREFIX = "swift_window_"


class Judged(NamedTuple):
    """A completion whose verdict was reached."""

    step: int
    """Of the stage."""
    group: int
    """Index of its group within the step."""
    token_ids: np.ndarray
    """[prompt + response] int32."""
    prompt_length: int
    correct: bool


class Window:
    """Over the steps of one stage."""

    def __init__(self, config: SwiftRewardConfig):
        self.config = config
        self.judged: list[Judged] = []

    def add(self, groups: Sequence[Group], stage_step: int) -> None:
        """Take a step's groups, scored, if a refresh is to learn from them; forget what none will learn from."""
        every = self.config.refresh_every
        if every is None:
            return
        refresh = stage_step + every - stage_step % every  # steps of the stage behind it when it is made
        first = refresh - self.config.refresh_window
        self.judged = [old for old in self.judged if old.step >= first]
        if stage_step < first:
            return
        self.judged += [
            Judged(
                step=stage_step,
                group=number,
                token_ids=np.concatenate([group.prompt.token_ids, completion.token_ids]).astype(np.int32),
                prompt_length=len(group.prompt.token_ids),
                correct=bool(score.correct),
            )
            for number, group in enumerate(groups)
            for completion, score in zip(group.completions, group.scores or (), strict=True)
            if score.is_judged
        ]

    # ------------------------------------------------------------ checkpoints

    def arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint has to hold; nothing without a refresh to come."""
        if not self.judged:
            return {}
        columns = zip(
            *((j.step, j.group, len(j.token_ids), j.prompt_length, j.correct) for j in self.judged), strict=True
        )
        names = ("step", "group", "length", "prompt_length", "correct")
        table = {PREFIX + name: np.array(column, np.int64) for name, column in zip(names, columns, strict=True)}
        return {**table, PREFIX + "tokens": np.concatenate([j.token_ids for j in self.judged])}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Take what `arrays` gave."""
        if PREFIX + "tokens" not in arrays:
            return
        step, group, length, prompt_length, correct = (
            arrays[PREFIX + name].tolist() for name in ("step", "group", "length", "prompt_length", "correct")
        )
        tokens = np.split(arrays[PREFIX + "tokens"], np.cumsum(length)[:-1])
        self.judged = [
            Judged(*row, correct=bool(right))
            for *row, right in zip(step, group, tokens, prompt_length, correct, strict=True)
        ]
