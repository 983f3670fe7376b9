"""What scoring one candidate costs: SWIFT beside a text reward model of the base's own size.

Floating-point operations of prompt and response, P + n = T tokens, counting a multiply-add as two:

    blocks        2 * matrices * T + layers * 4 * heads * head_dim * (pairs of a token and one it looks at)
                  matrices: weights of one forward pass' matrix products, over all layers; the pairs are T (T + 1) / 2,
                  fewer with a sliding window; queries times keys, and probabilities times values, are 2 each
    LM head       2 * vocabulary * hidden * n
    SWIFT head    4 * F * (n scored tokens), F = layers read * hidden: gate and reward
    scalar head   2 * hidden, once

Norms, rotations and activations are left out on all sides. Three ways to score are compared:

    swift, marginal   the head in a log-prob pass that is made anyway (training, or Best-of-N that wants log-probs too)
    swift, alone      blocks and head, no LM head: candidates that some other engine has sampled
    text reward model blocks and a scalar head; a real forward of the base's architecture, weights and layout

Seconds are medians over repetitions in turn (so that a machine's moods meet all alike), per candidate: processor time
of this process on a CPU, wall time after synchronisation on a GPU. The marginal ones are medians of differences; where
the quartiles lie on both sides of zero they are smaller than what can be measured here.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_srft import distributed
from megatron_srft.hidden_reward import RewardHead
from megatron_srft.sample import TrainingSequence
from megatron_srft.trainer import parallel
from megatron_srft.trainer.hidden_score import score_pass
from megatron_srft.trainer.trainer import Trainer
from megatron_srft.trainer.trunk import text_rewards
from megatron_srft.weights.architecture import Architecture

PASS, MARGINAL, ALONE, TEXT = "log-prob pass", "swift, marginal", "swift, alone", "text reward model"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one candidate, on average."""

    flops: float
    seconds: float
    """Median."""
    lower: float
    """Quartiles of the repetitions, in seconds."""
    upper: float


@dataclass(frozen=True, kw_only=True)
class Costs:
    candidates: int
    """That were timed."""
    repetitions: int
    clock: str
    """What the seconds are of."""
    ranks: int
    of: dict[str, Cost]
    """The pass without a head, then the three ways to score."""


# ---------------------------------------------------------------- operations


def block_flops(model: Architecture, tokens: int) -> int:
    """All blocks on one sequence."""
    query, key = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    matrices = model.num_layers * model.hidden_size * (2 * query + 2 * key + 3 * model.ffn_size)
    window = min(model.attention_window or tokens, tokens)
    pairs = window * (window + 1) // 2 + (tokens - window) * window
    return 2 * matrices * tokens + 4 * model.num_layers * query * pairs


def lm_head_flops(model: Architecture, response: int) -> int:
    return 2 * model.vocab_size * model.hidden_size * response


def swift_flops(features: int, scored: int) -> int:
    return 4 * features * scored


def flops(model: Architecture, head: RewardHead, sequences: Sequence[TrainingSequence]) -> dict[str, float]:
    """Mean over the candidates of each way to score, and of the log-prob pass without a head."""
    blocks = [block_flops(model, len(s.token_ids)) for s in sequences]
    logits = [lm_head_flops(model, s.response_length) for s in sequences]
    unscored = head.config.last_token == "excluded"
    swift = [swift_flops(head.config.features, s.response_length - unscored) for s in sequences]
    return {
        PASS: float(np.mean(blocks) + np.mean(logits)),
        MARGINAL: float(np.mean(swift)),
        ALONE: float(np.mean(blocks) + np.mean(swift)),
        TEXT: float(np.mean(blocks) + 2 * model.hidden_size),
    }


# ---------------------------------------------------------------- seconds


def measure_costs(
    trainer: Trainer, head: RewardHead, sequences: Sequence[TrainingSequence], repetitions: int = 5
) -> Costs:
    """Time all ways to score on these candidates; collective over all ranks, of which the first one's times count.

    Args:
        trainer: without a reward head, before and after.
    """
    assert trainer.reward_head is None
    weight = torch.zeros(head.config.base.hidden_size, device=parallel.device())
    local = head.to(parallel.device())
    batches = trainer.microbatches(sequences)

    def with_head() -> None:
        trainer.reward_head = head
        trainer.measure(sequences)
        trainer.reward_head = None

    ways: dict[str, Callable[[], object]] = {
        PASS: lambda: trainer.measure(sequences),
        MARGINAL: with_head,
        ALONE: lambda: score_pass(trainer.policy, batches, local),
        TEXT: lambda: text_rewards(trainer.policy, batches, weight),
    }
    times = {name: [] for name in ways}
    for repetition in range(repetitions + 1):
        for name, way in ways.items():
            seconds = _timed(way) / len(sequences)
            if repetition:  # the first one warms up
                times[name].append(seconds)
    spent = {name: np.array(values) for name, values in times.items()}
    spent[MARGINAL] = spent[MARGINAL] - spent[PASS]
    operations = flops(trainer.models[0].architecture, head, sequences)
    return Costs(
        candidates=len(sequences),
        repetitions=repetitions,
        clock="wall, GPU" if torch.cuda.is_available() else "processor, CPU",
        ranks=distributed.size(trainer.groups.world),
        of={
            name: Cost(
                flops=operations[name],
                seconds=float(np.median(values)),
                lower=float(np.quantile(values, 0.25)),
                upper=float(np.quantile(values, 0.75)),
            )
            for name, values in spent.items()
        },
    )


def _timed(way: Callable[[], object]) -> float:
    if not torch.cuda.is_available():
        start = time.process_time()
        way()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    way()
    torch.cuda.synchronize()
    return time.perf_counter() - start
