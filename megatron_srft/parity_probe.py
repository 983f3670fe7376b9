"""What can be found out when trainer and rollout engine disagree, before the run stops: is it the weights, and where?

Two questions narrow it down. Does the engine hold the trainer's weights? And does it agree on tokens that have a single
token before them? There attention has nothing to choose from, so rope, position ids, windows and the query and key
matrices have no say.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_srft import distributed
from megatron_srft.advantages import to_sequences
from megatron_srft.config import RunConfig, SamplingConfig
from megatron_srft.rollout import RolloutEngine, collect
from megatron_srft.rollout.parity import compare, within_limits
from megatron_srft.sample import Prompt, Score, TrainingSequence
from megatron_srft.trainer.trainer import Trainer

PROBES = 32
"""Prompts that are tried."""

STREAM = -4
"""Takes the place of the step in the random streams; no training step and no command has this number."""

NAMED = 5
"""Tensors named in the message."""


def investigate(
    engine: RolloutEngine,
    trainer: Trainer,
    sequences: Sequence[TrainingSequence],
    config: RunConfig,
    world: distributed.Group,
) -> tuple[str, ...]:
    """Findings for the diagnosis, the same on every rank. Collective."""
    own = engine.unlike(trainer.hf_weights())
    names = sorted({name for part in distributed.all_gather_objects(own, world) for name in part})
    agree = _agree_after_one_token(engine, trainer, sequences, config, world)
    return (_about_weights(names), _about_context(agree, not names))


def sample_afresh(
    engine: RolloutEngine, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int, world: distributed.Group
) -> list[TrainingSequence]:
    """One completion of each of some prompts under the engine's weights, to be compared and no more. Collective."""
    some = list(prompts)[:PROBES]
    groups = collect(engine, some, [None] * len(some), 1, sampling, seed, STREAM, world)
    # A prompt may bring answers to learn from; they are not compared.
    plain = [replace(g, prompt=replace(g.prompt, preference=None), scores=(Score(reward=0.0),)) for g in groups]
    return to_sequences(plain)


def _about_weights(names: list[str]) -> str:
    if not names:
        return "the engine holds the trainer's weights, all of them: it computes something else with them"
    shown = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    return (
        f"the engine does not hold the trainer's weights: {len(names)} tensor(s) differ, {shown} "
        "(few: a corrupted or forgotten one; all: a weight sync that did not arrive)"
    )


def _about_context(agree: bool, same_weights: bool) -> str:
    if not agree:
        return "they disagree even after a single token, where positions play no part: rope is not the cause"
    blamed = "rope settings (rope_theta, scaling), position ids or a sliding window"
    if not same_weights:
        blamed += ", or query and key weights"
    return f"after a single token they agree, with more context they do not: {blamed}"


def _agree_after_one_token(
    engine: RolloutEngine,
    trainer: Trainer,
    sequences: Sequence[TrainingSequence],
    config: RunConfig,
    world: distributed.Group,
) -> bool:
    """Sample one token after each of some tokens of the compared sequences, and compare its log-probs."""
    tokens = np.unique(np.concatenate([sequence.token_ids for sequence in sequences]))[:PROBES]
    prompts = [
        Prompt(id=f"parity/{token}", text="", token_ids=np.array([token], np.int32), answer=None, source="parity")
        for token in tokens
    ]
    once = SamplingConfig(temperature=config.rollout.temperature, max_response_tokens=1)
    probes = sample_afresh(engine, prompts, once, 0, world)
    report = compare([m.logprobs for m in trainer.measure(probes)], [s.rollout_logprobs for s in probes])
    return within_limits(report, config.parity)
