"""Keeping, watching and guarding a run."""

from typing import Literal

from megatron_srft.config.base import require, require_at_least, section


@section
class CheckpointConfig:
    every: int = 0
    """Save the full state every N steps (and after the last step); 0 saves only after the last step."""

    keep: int = 2
    """Newest checkpoints kept; older ones are deleted after the new one is complete."""

    export_every: int = 0
    """Write a Hugging Face folder every N steps; 0 writes only the final one and those of export_stages."""

    export_stages: bool = True
    """Also write one after the last step of each stage, so that it can be evaluated or begun from."""

    resume: bool = True
    """Continue from the newest complete checkpoint in the run folder, if there is one."""

    def __post_init__(self):
        require_at_least(0, self, "checkpoint", "every", "export_every")
        require_at_least(1, self, "checkpoint", "keep")


@section
class EvaluationConfig:
    files: tuple[str, ...] = ()
    """Held-out JSONL or parquet files; each is scored by the rewards' verifier."""

    every: int = 0
    """Evaluate every N steps, and before the first and after the last; 0 only before the first and after the last."""

    samples: int = 1
    """Completions per problem."""

    temperature: float = 0.0
    """Sampling temperature of the evaluation; 0 is greedy and needs samples = 1."""

    top_p: float = 1.0
    """Nucleus sampling of the evaluation."""

    max_problems: int = 0
    """Use only the first N problems of each file; 0 uses all."""

    def __post_init__(self):
        require_at_least(1, self, "evaluation", "samples")
        require_at_least(0, self, "evaluation", "every", "temperature", "max_problems")
        require(0 < self.top_p <= 1, f"evaluation.top_p must lie in (0, 1], not {self.top_p}")
        require(
            self.temperature > 0 or self.samples == 1,
            "evaluation.samples > 1 needs evaluation.temperature > 0 (greedy samples are all the same)",
        )


@section
class LoggingConfig:
    tensorboard: bool = False
    """Also write TensorBoard events to runs/<name>/tensorboard."""

    wandb_project: str | None = None
    """Also log to this Weights & Biases project (needs `pip install wandb`)."""

    sample_rollouts: int = 4
    """Completions of each step kept for the report."""

    def __post_init__(self):
        require_at_least(0, self, "logging", "sample_rollouts")


@section
class ParityConfig:
    every: int = 20
    """Compare trainer and engine log-probs before the first update and then every N steps; 0 only at the start."""

    max_mean_difference: float = 0.02
    """Largest allowed mean |trainer - engine| log-prob difference, in nats."""

    max_difference: float = 1.0
    """Largest allowed single difference, in nats."""

    on_failure: Literal["stop", "warn"] = "stop"
    """stop: end the run with a diagnosis. warn: say so and go on, for which a correction is advisable."""

    correction: Literal["none", "truncate", "mask", "mask_sequences"] = "none"
    """Importance weights of the rollout tokens, policy before the step / engine, in every step. truncate: truncated.
    mask: those beyond the limit are left out. mask_sequences: whole completions are, by the mean over their tokens; the
    others' weights are truncated."""

    old_logprobs: Literal["trainer", "engine"] = "trainer"
    """The denominator of the importance ratio on rollouts. trainer: log-probs of the policy before the step. engine:
    those that came with the completions, so that the ratio itself corrects, and clips, what the engine does otherwise
    (mismatch/* then compares them with themselves; ratio/* has the difference)."""

    importance_limit: float = 2.0
    """Truncate the importance weight at this value; leave out what lies beyond it or its inverse."""

    def __post_init__(self):
        require_at_least(0, self, "parity", "every", "max_mean_difference", "max_difference")
        require_at_least(1, self, "parity", "importance_limit")
        require(
            self.correction == "none" or self.old_logprobs == "trainer",
            f"parity.correction {self.correction} has nothing to correct when parity.old_logprobs is engine: the ratio "
            "is to the engine already; set one of them back",
        )


@section
class AccountingConfig:
    max_verifier_failure_share: float = 0.1
    """Stop when more than this share of a step's answers got no verdict: the verifier crashed or ran out of time, or
    the reference cannot be read."""

    max_truncated_share: float = 1.0
    """Stop when more than this share of a step's completions hit the length limit."""

    max_skipped_updates: int = 3
    """Stop when more than this many optimizer updates in a row were skipped for a gradient that was not finite."""

    def __post_init__(self):
        require_at_least(0, self, "accounting", "max_verifier_failure_share", "max_truncated_share")
        require_at_least(0, self, "accounting", "max_skipped_updates")
