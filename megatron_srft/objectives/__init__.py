"""Training objectives: pure functions from token statistics to a loss and metrics, one paper's equation per file.

Equations, config keys, published constants and the points where papers and code disagree: docs/objectives.md.
"""

from collections.abc import Callable

from megatron_srft.config import KlConfig, ObjectiveConfig
from megatron_srft.objectives.chord import chord, scheduled
from megatron_srft.objectives.dpo import dpo
from megatron_srft.objectives.grpo import grpo
from megatron_srft.objectives.hpt import hpt
from megatron_srft.objectives.kl import add_penalty
from megatron_srft.objectives.luffy import luffy
from megatron_srft.objectives.metrics import Metrics
from megatron_srft.objectives.psft import psft
from megatron_srft.objectives.relift import relift
from megatron_srft.objectives.rl_sft import rl_sft
from megatron_srft.objectives.sft import sft
from megatron_srft.objectives.sft_kl import sft_kl
from megatron_srft.objectives.srft import srft
from megatron_srft.objectives.terms import ObjectiveInputs, ObjectiveOutput, gather_inputs, with_importance_weights
from megatron_srft.sample import Counts

__all__ = [
    "Metrics",
    "ObjectiveInputs",
    "ObjectiveOutput",
    "compute",
    "gather_inputs",
    "scheduled",
    "with_importance_weights",
]

FORMULAS: dict[str, Callable[[ObjectiveInputs, Counts, ObjectiveConfig], ObjectiveOutput]] = {
    "sft": sft,
    "sft_kl": sft_kl,
    "psft": psft,
    "grpo": grpo,
    "ppo": grpo,
    "luffy": luffy,
    "srft": srft,
    "rl_sft": rl_sft,
    "chord": chord,
    "hpt": hpt,
    "relift": relift,
    "dpo": dpo,
}
"""The function of each kind of objective."""

NO_PENALTY = KlConfig()


def compute(
    inputs: ObjectiveInputs, counts: Counts, config: ObjectiveConfig, kl: KlConfig = NO_PENALTY
) -> ObjectiveOutput:
    """This micro-batch's share of the configured objective.

    Args:
        inputs: the micro-batch's rows.
        counts: token populations of the whole optimizer update, over all micro-batches and ranks.
        config: a resolved objective config (`RunConfig.resolved().objective`).
        kl: a penalty to be added where it says so.
    """
    output = FORMULAS[config.kind](inputs, counts, config)
    penalised = kl.coefficient and counts.rollout_tokens  # an update of demonstrations alone has no reference log-probs
    return add_penalty(output, inputs, counts, config, kl) if penalised else output
