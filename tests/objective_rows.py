"""Builds objective inputs from sequences written out by hand, in float64."""

from dataclasses import dataclass, field

import torch

from megatron_srft.config import RunConfig
from megatron_srft.objectives import ObjectiveInputs, ObjectiveOutput, compute
from megatron_srft.sample import Counts


@dataclass
class Sequence:
    """One sequence's response tokens; missing lists are filled in with values that do no harm."""

    logprobs: list[float]
    demonstration: bool = False
    advantage: float = 0.0
    correct: bool = False
    entropy: list[float] = field(default_factory=list)
    old: list[float] | None = None
    rollout: list[float] | None = None
    pooled_entropy: float = 0.0


def resolved(objective):
    """The objective with its preset's values filled in."""
    return RunConfig(objective=objective).resolved().objective


def inputs_of(sequences: list[Sequence], **changes) -> ObjectiveInputs:
    """One micro-batch of these sequences; log-probs and entropies are leaves that collect gradients."""

    def rows(values, dtype=torch.float64):
        return torch.tensor([v for s in sequences for v in values(s)], dtype=dtype)

    return ObjectiveInputs(
        logprobs=changes.get("logprobs", rows(lambda s: s.logprobs).requires_grad_()),
        entropy=changes.get("entropy", rows(lambda s: s.entropy or [1.0] * len(s.logprobs)).requires_grad_()),
        advantages=rows(lambda s: [s.advantage] * len(s.logprobs)),
        is_demonstration=rows(lambda s: [s.demonstration] * len(s.logprobs), torch.bool),
        correct=rows(lambda s: [s.correct] * len(s.logprobs), torch.bool),
        sequence=torch.tensor([i for i, s in enumerate(sequences) for _ in s.logprobs], dtype=torch.int64),
        num_sequences=len(sequences),
        response_lengths=rows(lambda s: [len(s.logprobs)] * len(s.logprobs)),
        rollout_logprobs=rows(lambda s: s.rollout or s.logprobs),
        old_logprobs=rows(lambda s: s.old or s.logprobs) if any(s.old for s in sequences) else None,
        pooled_entropy=rows(lambda s: [s.pooled_entropy] * len(s.logprobs)),
    )


def counts_of(sequences: list[Sequence]) -> Counts:
    rollouts = [s for s in sequences if not s.demonstration]
    demonstrations = [s for s in sequences if s.demonstration]
    return Counts(
        rollout_tokens=sum(len(s.logprobs) for s in rollouts),
        rollout_sequences=len(rollouts),
        demonstration_tokens=sum(len(s.logprobs) for s in demonstrations),
        demonstration_sequences=len(demonstrations),
    )


def random_sequences(rollouts: int, demonstrations: int, seed: int = 0) -> list[Sequence]:
    """Sequences of 1 to 6 tokens with everything random, populations interleaved; ratios reach both clips."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, n=1):
        return (low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)).tolist()

    kinds = torch.tensor([False] * rollouts + [True] * demonstrations)
    kinds = kinds[torch.randperm(len(kinds), generator=generator)].tolist()
    sequences = []
    for demonstration in kinds:
        length = int(torch.randint(1, 7, (), generator=generator))
        logprobs = uniform(-3.0, -0.05, length)
        sequences.append(
            Sequence(
                logprobs=logprobs,
                demonstration=demonstration,
                advantage=uniform(-1.5, 1.5)[0],
                correct=uniform(0, 1)[0] > 0.5,
                entropy=uniform(0.1, 2.0, length),
                old=[value + shift for value, shift in zip(logprobs, uniform(-0.6, 0.6, length), strict=True)],
                rollout=[value + shift for value, shift in zip(logprobs, uniform(-0.1, 0.1, length), strict=True)],
                pooled_entropy=uniform(0.1, 2.0)[0],
            )
        )
    return sequences


def run(config, sequences: list[Sequence]) -> tuple[ObjectiveOutput, ObjectiveInputs]:
    """One micro-batch through an objective and back; the inputs hold the gradients."""
    inputs = inputs_of(sequences)
    output = compute(inputs, counts_of(sequences), resolved(config))
    output.loss.backward()
    return output, inputs
