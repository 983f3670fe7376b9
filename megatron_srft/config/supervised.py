"""Objectives that learn from demonstrations alone."""

from typing import ClassVar, Literal

from megatron_srft.config.base import require, section
from megatron_srft.config.denominators import Denominator, require_clips, require_positive


@section
class SftConfig:
    kind: Literal["sft"] = "sft"
    samples_rollouts: ClassVar[bool] = False
    learns_from_demonstrations: ClassVar[bool] = True

    denominator: Denominator = "tokens"
    """How the negative log-likelihood is averaged."""

    constant_length: int | None = None
    """Tokens per sequence for the constant denominator. null: data.max_demonstration_tokens."""

    def __post_init__(self):
        require_positive(self, "constant_length")


@section
class SftKlConfig:
    kind: Literal["sft_kl"] = "sft_kl"
    samples_rollouts: ClassVar[bool] = False
    learns_from_demonstrations: ClassVar[bool] = True

    kl_coefficient: float = 0.5
    """Weight of the divergence from the policy at the stage's start (PSFT's baseline 0.5, SRFT's 0.2)."""

    estimator: Literal["k3", "full"] = "k3"
    """k3: from the log-probs of the demonstrations' own tokens. full: over the whole vocabulary at each of them, which
    needs the starting policy's weights in host memory and a second forward pass of every update."""

    direction: Literal["policy_reference", "reference_policy"] = "policy_reference"
    """Of the full divergence: KL(policy || reference), or KL(reference || policy)."""

    denominator: Denominator = "tokens"
    """How the negative log-likelihood and the divergence are averaged."""

    constant_length: int | None = None
    """Tokens per sequence for the constant denominator. null: data.max_demonstration_tokens."""

    def __post_init__(self):
        require_positive(self, "constant_length")
        require(
            self.estimator == "full" or self.direction == "policy_reference",
            "objective.direction is of the divergence over the whole vocabulary; set objective.estimator to full",
        )
        require(self.kl_coefficient >= 0, f"objective.kl_coefficient must not be negative, got {self.kl_coefficient}")


@section
class PsftConfig:
    kind: Literal["psft"] = "psft"
    samples_rollouts: ClassVar[bool] = False
    learns_from_demonstrations: ClassVar[bool] = True

    clip: float | None = 0.28
    """A demonstration's token whose probability has grown by more than this share since the latest refresh gets no
    gradient. null: all get one, the control with the same schedule."""

    refresh_every: int | None = 8
    """Optimizer updates that share an old policy, which is the policy before the first of them. 1: exactly SFT. null:
    a fixed reference, the policy at the end of the warm-up."""

    warmup_steps: int = 0
    """Updates of plain SFT before that. (For another learning rate there, put a stage of kind sft before this one.)"""

    denominator: Denominator = "tokens"
    """How the loss is averaged."""

    constant_length: int | None = None
    """Tokens per sequence for the constant denominator. null: data.max_demonstration_tokens."""

    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus over the demonstrations' tokens, subtracted from the loss."""

    def __post_init__(self):
        require_positive(self, "constant_length")
        require_clips(self, "clip")
        require(
            self.refresh_every is None or self.refresh_every >= 1,
            f"objective.refresh_every must be at least 1 (exactly SFT) or null (never), not {self.refresh_every}",
        )
        require(self.warmup_steps >= 0, f"objective.warmup_steps must not be negative, got {self.warmup_steps}")
