"""Scored sequences of random tokens, as the loop hands them to the trainer."""

from collections.abc import Sequence

import numpy as np

from megatron_srft.sample import TrainingSequence

VOCAB = 99


def make_sequences(groups: Sequence[Sequence[bool]], seed: int) -> list[TrainingSequence]:
    """One sequence for each entry of each group, a demonstration where the entry is true; of 4 tokens and more."""
    random = np.random.default_rng(seed)
    sequences = []
    for group, members in enumerate(groups):
        prompt = random.integers(3, VOCAB, 3 + group)
        sequences += [_sequence(random, prompt, group, is_demonstration) for is_demonstration in members]
    return sequences


def _sequence(random: np.random.Generator, prompt: np.ndarray, group: int, is_demonstration: bool) -> TrainingSequence:
    response = random.integers(3, VOCAB, random.integers(1, 12))
    sampled, old = (-4.5 + random.normal(0, 0.3, (2, len(response)))).astype(np.float32)
    return TrainingSequence(
        token_ids=np.concatenate([prompt, response]).astype(np.int32),
        prompt_length=len(prompt),
        is_demonstration=is_demonstration,
        advantages=np.full(len(response), random.normal(), np.float32),
        correct=bool(random.integers(2)),
        group=group,
        rollout_logprobs=None if is_demonstration else sampled,
        old_logprobs=old,
    )
