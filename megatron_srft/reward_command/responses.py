"""From rollouts to what a head is trained on: sequences, verdicts, and a count of everything that was left out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_srft.analysis.sequences import is_dump, sequence
from megatron_srft.config import ConfigError
from megatron_srft.hidden_reward.parts import Responses
from megatron_srft.rollout import load_dump
from megatron_srft.sample import Group, Prompt, Score, TrainingSequence
from megatron_srft.weights.architecture import Architecture


@dataclass(frozen=True, kw_only=True, eq=False)
class Verified:
    """Responses with a verdict and a token to score."""

    sequences: tuple[TrainingSequence, ...]
    responses: Responses
    counts: dict[str, int]
    """What was read, what was left out and why."""


def verified(groups: Sequence[Group], extra: Sequence[Group], *, least_tokens: int) -> Verified:
    """Keep what can be learnt from.

    Two prompts of the same tokens are one question, whatever their ids: its responses must not lie on both sides of
    the split.

    Args:
        extra: groups whose verified demonstrations are responses too.
        least_tokens: a shorter response has no token to score.

    Raises:
        ConfigError: nothing is left.
    """
    rows = [
        (group.prompt, completion.token_ids, score, f"{group.prompt.id}, response {number}")
        for group in groups
        for number, (completion, score) in enumerate(zip(group.completions, group.scores, strict=True))
    ]
    counts = {"responses": len(rows)}
    shown = _demonstrations(extra)
    if extra:
        counts["demonstrations"] = len(shown)
    kept, lost = [], Counter()
    for row in rows + shown:
        reason = _reason_against(row[1], row[2], least_tokens)
        if reason is None:
            kept.append(row)
        else:
            lost[reason] += 1
    counts |= {f"left out: {reason}": number for reason, number in sorted(lost.items())}
    if not kept:
        told = ", ".join(f"{number} {reason}" for reason, number in sorted(lost.items()))
        raise ConfigError(f"no response can be learnt from ({told}); name rollouts with verdicts")
    numbers: dict[bytes, int] = {}
    questions = [numbers.setdefault(prompt.token_ids.tobytes(), len(numbers)) for prompt, *_ in kept]
    labels = np.array([score.correct for _, _, score, _ in kept], bool)
    counts |= {"trained and validated on": len(kept), "questions": len(numbers), "right": int(labels.sum())}
    return Verified(
        sequences=tuple(
            sequence(prompt, ids, question, is_demonstration=False)
            for (prompt, ids, _, _), question in zip(kept, questions, strict=True)
        ),
        responses=Responses(labels=labels, questions=np.array(questions, np.int64), names=[row[3] for row in kept]),
        counts=counts,
    )


Row = tuple[Prompt, np.ndarray, Score | None, str]


def _reason_against(token_ids: np.ndarray, score: Score | None, least_tokens: int) -> str | None:
    if score is None or score.correct is None:
        return f"no verdict ({'not verified' if score is None or score.status == 'verified' else score.status})"
    return "no token to score" if len(token_ids) < least_tokens else None


def _demonstrations(groups: Sequence[Group]) -> list[Row]:
    """Each demonstration once, however many steps used it; a truncated one has no verdict."""
    found: dict[tuple[bytes, bytes], Row] = {}
    for group in groups:
        shown = group.demonstration
        if shown is not None:
            key = (group.prompt.token_ids.tobytes(), shown.token_ids.tobytes())
            name = f"{group.prompt.id}, a demonstration"
            found.setdefault(key, (group.prompt, shown.token_ids, group.demonstration_score, name))
    return list(found.values())


def dumped_groups(files: Sequence[Path]) -> list[Group]:
    """All groups of those files that are dumps.

    Raises:
        ConfigError: none is.
    """
    found = [group for path in files if is_dump(path) for group in load_dump(path)]
    if not found:
        raise ConfigError("--demonstrations takes those of rollout dumps, and no file is one")
    return found


def check_tokens(sequences: Sequence[TrainingSequence], names: Sequence[str], architecture: Architecture) -> None:
    """Raise ConfigError unless the model has an embedding and a position for every token."""
    positions = architecture.attention_window or architecture.max_positions
    for one, name in zip(sequences, names, strict=True):
        largest = int(one.token_ids.max())
        if largest >= architecture.vocab_size:
            raise ConfigError(
                f"{name} has token {largest}, and the model's vocabulary ends at {architecture.vocab_size - 1}; name "
                "the model that sampled the rollouts"
            )
        if len(one.token_ids) > positions:
            raise ConfigError(
                f"{name} has {len(one.token_ids)} tokens with its prompt, and the model {positions} positions; name "
                "the model that sampled the rollouts"
            )
