"""Groups and measured sequences written out by hand, for the tests of advantages."""

from dataclasses import replace

import numpy as np

from megatron_srft import config as configuration
from megatron_srft.advantages import to_sequences, with_advantages
from megatron_srft.sample import Completion, Group, Prompt, Score, TrainingSequence

PROMPT = Prompt(id="p", text="1+2=", token_ids=np.array([3, 4], np.int32), answer="3", source="s")


def completion(length: int) -> Completion:
    return Completion(
        token_ids=np.arange(length, dtype=np.int32),
        text="",
        rollout_logprobs=np.full(length, -1.0, np.float32),
        finish_reason="stop",
        policy_version=0,
    )


def score(reward: float, dense: dict[str, list[float]] | None = None, correct: bool | None = None) -> Score:
    """A verifier's reward under the name `exact`, and dense ones under theirs; weights are 1."""
    dense = {name: tuple(values) for name, values in (dense or {}).items()}
    streams = {"exact": reward} | {name: sum(values) for name, values in dense.items()}
    verdict = reward > 0 if correct is None else correct
    return Score(reward=sum(streams.values()), streams=streams, dense=dense, correct=verdict)


def group(lengths: list[int], scores: list[Score]) -> Group:
    return Group(prompt=PROMPT, completions=tuple(map(completion, lengths)), scores=tuple(scores))


def settings(objective: dict, rewards: list[dict] | None = None, **sections):
    return configuration.from_dict(
        {"objective": objective, "rewards": rewards or [{"kind": "exact"}], **sections}
    ).resolved()


def advantages_of(groups: list[Group], run, **measured: list[list[float]]) -> list[TrainingSequence]:
    """The step's sequences with advantages under a resolved config, after fields such as values were measured."""
    sequences = to_sequences(groups)
    for name, rows in measured.items():
        arrays = [np.array(row, np.float32) for row in rows]
        sequences = [replace(s, **{name: array}) for s, array in zip(sequences, arrays, strict=True)]
    return with_advantages(sequences, groups, run.advantage, run.rewards, run.kl)
