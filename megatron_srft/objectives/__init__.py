"""Training objectives: pure functions from token statistics to a loss and metrics, one paper's equation per file.

Equations, config keys, published constants and the points where papers and code disagree: docs/objectives.md.
"""

from megatron_srft.config import (
    GrpoConfig,
    LuffyConfig,
    ObjectiveConfig,
    PsftConfig,
    SftConfig,
    SftKlConfig,
    SrftConfig,
)
from megatron_srft.objectives.grpo import grpo
from megatron_srft.objectives.luffy import luffy
from megatron_srft.objectives.metrics import Metrics
from megatron_srft.objectives.psft import psft
from megatron_srft.objectives.sft import sft
from megatron_srft.objectives.sft_kl import sft_kl
from megatron_srft.objectives.srft import srft
from megatron_srft.objectives.terms import ObjectiveInputs, ObjectiveOutput, gather_inputs, with_importance_weights
from megatron_srft.sample import Counts

__all__ = ["Metrics", "ObjectiveInputs", "ObjectiveOutput", "compute", "gather_inputs", "with_importance_weights"]


def compute(inputs: ObjectiveInputs, counts: Counts, config: ObjectiveConfig) -> ObjectiveOutput:
    """This micro-batch's share of the configured objective.

    Args:
        inputs: the micro-batch's rows.
        counts: token populations of the whole optimizer update, over all micro-batches and ranks.
        config: a resolved objective config (`RunConfig.resolved().objective`).
    """
    match config:
        case SftConfig():
            return sft(inputs, counts, config)
        case SftKlConfig():
            return sft_kl(inputs, counts, config)
        case PsftConfig():
            return psft(inputs, counts, config)
        case GrpoConfig():
            return grpo(inputs, counts, config)
        case LuffyConfig():
            return luffy(inputs, counts, config)
        case SrftConfig():
            return srft(inputs, counts, config)
