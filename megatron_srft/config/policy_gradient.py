"""Objectives that learn from rollouts alone."""

from typing import ClassVar, Literal

from megatron_srft.config.base import section
from megatron_srft.config.denominators import Denominator, require_clips, require_dual_clip, require_positive


@section
class GrpoConfig:
    kind: Literal["grpo"] = "grpo"
    samples_rollouts: ClassVar[bool] = True
    learns_from_demonstrations: ClassVar[bool] = False

    preset: Literal["grpo", "dapo", "dr_grpo", "rloo", "reinforce_pp"] = "grpo"
    """grpo: clip 0.2, sequence_mean, std. dapo: clip 0.2/0.28, tokens, std. dr_grpo: clip 0.2, constant, no std.
    rloo: no clip, sequence_sum, leave-one-out. reinforce_pp: clip 0.2, tokens, no group, normalised over the batch."""

    clip_low: float | None = None
    """The importance ratio is clipped below at 1 - clip_low. null: the preset's."""

    clip_high: float | None = None
    """The importance ratio is clipped above at 1 + clip_high. null: the preset's."""

    dual_clip: float | None = None
    """Bound on the ratio for negative advantages (dual-clip PPO); null switches it off."""

    denominator: Denominator | None = None
    """How the loss is averaged. null: the preset's."""

    constant_length: int | None = None
    """Tokens per sequence for the constant denominator. null: rollout.max_response_tokens."""

    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus, subtracted from the loss."""

    def __post_init__(self):
        require_positive(self, "constant_length")
        require_clips(self, "clip_low", "clip_high")
        require_dual_clip(self)


@section
class PpoConfig:
    kind: Literal["ppo"] = "ppo"
    samples_rollouts: ClassVar[bool] = True
    learns_from_demonstrations: ClassVar[bool] = False

    clip_low: float = 0.2
    """The importance ratio is clipped below at 1 - clip_low."""

    clip_high: float = 0.2
    """The importance ratio is clipped above at 1 + clip_high."""

    dual_clip: float | None = None
    """Bound on the ratio for negative advantages (dual-clip PPO); null switches it off."""

    denominator: Denominator = "sequence_mean"
    """How the loss is averaged; the long-chain paper (arXiv 2502.03373) has sequence_mean."""

    constant_length: int | None = None
    """Tokens per sequence for the constant denominator. null: rollout.max_response_tokens."""

    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus, subtracted from the loss."""

    def __post_init__(self):
        require_positive(self, "constant_length")
        require_clips(self, "clip_low", "clip_high")
        require_dual_clip(self)
