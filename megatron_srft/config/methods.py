"""How rewards become a loss: advantages, objectives, and the published values of their presets."""

from typing import Annotated, Any, Literal

import pydantic

from megatron_srft.config.base import require, require_at_least, section

Denominator = Literal["tokens", "sequence_mean", "sequence_sum", "constant"]
"""How a sum over one token population becomes a mean; every count is global over the optimizer update.

tokens         sum over tokens / number of tokens                      (DAPO, SFT)
sequence_mean  mean over sequences of the mean over their tokens       (GRPO)
sequence_sum   mean over sequences of the sum over their tokens
constant       sum over tokens / (number of sequences * constant_length)   (Dr.GRPO)
"""


@section
class AdvantageConfig:
    kind: Literal["group", "leave_one_out"] = "group"
    """group: reward minus the group's mean (GRPO). leave_one_out: minus the mean of the others (RLOO)."""

    normalize_std: bool | None = None
    """Divide by the group's standard deviation (GRPO) or not (Dr.GRPO). null: the objective's published setting."""

    include_demonstration: bool | None = None
    """Count the demonstration as a member of its group. null: the objective's published setting."""

    std_epsilon: float = 1e-6
    """Added to the standard deviation; a group with equal rewards gets advantage 0 whatever this is."""

    def __post_init__(self):
        require_at_least(0, self, "advantage", "std_epsilon")


def _require_positive(objective: Any, *names: str) -> None:
    for name in names:
        value = getattr(objective, name)
        require(value is None or value > 0, f"objective.{name} must be above 0, got {value}")


def _require_clips(objective: Any, *names: str) -> None:
    for name in names:
        value = getattr(objective, name)
        require(value is None or value >= 0, f"objective.{name} must not be negative, got {value}")


@section
class SftConfig:
    kind: Literal["sft"] = "sft"

    denominator: Denominator = "tokens"
    """How the negative log-likelihood is averaged."""

    constant_length: int | None = None
    """Tokens per sequence for the constant denominator. null: data.max_demonstration_tokens."""

    def __post_init__(self):
        _require_positive(self, "constant_length")


@section
class SftKlConfig:
    kind: Literal["sft_kl"] = "sft_kl"

    kl_coefficient: float = 0.5
    """Weight of the divergence from the policy at the stage's start (PSFT's baseline 0.5, SRFT's 0.2)."""

    denominator: Denominator = "tokens"
    """How the negative log-likelihood and the divergence are averaged."""

    constant_length: int | None = None
    """Tokens per sequence for the constant denominator. null: data.max_demonstration_tokens."""

    def __post_init__(self):
        _require_positive(self, "constant_length")
        require(self.kl_coefficient >= 0, f"objective.kl_coefficient must not be negative, got {self.kl_coefficient}")


@section
class PsftConfig:
    kind: Literal["psft"] = "psft"

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
        _require_positive(self, "constant_length")
        _require_clips(self, "clip")
        require(
            self.refresh_every is None or self.refresh_every >= 1,
            f"objective.refresh_every must be at least 1 (exactly SFT) or null (never), not {self.refresh_every}",
        )
        require(self.warmup_steps >= 0, f"objective.warmup_steps must not be negative, got {self.warmup_steps}")


@section
class GrpoConfig:
    kind: Literal["grpo"] = "grpo"

    preset: Literal["grpo", "dapo", "dr_grpo"] = "grpo"
    """grpo: clip 0.2, sequence_mean, std. dapo: clip 0.2/0.28, tokens, std. dr_grpo: clip 0.2, constant, no std."""

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
        _require_positive(self, "constant_length")
        _require_clips(self, "clip_low", "clip_high")
        require(
            self.dual_clip is None or self.dual_clip > 1, "objective.dual_clip must be above 1; null switches it off"
        )


@section
class LuffyConfig:
    kind: Literal["luffy"] = "luffy"

    shaping: Literal["p_div_p_gamma", "none"] = "p_div_p_gamma"
    """Off-policy shaping of the demonstration's probability p: p / (p + gamma), or p itself."""

    gamma: float = 0.1
    """The shaping constant."""

    clip: float | None = None
    """Symmetric clip of the rollouts' ratio; null leaves it unclipped, as the paper's runs did."""

    denominator: Denominator = "constant"
    """How each term is averaged; the count runs over rollouts and demonstrations together (paper eq. 4)."""

    constant_length: int | None = None
    """Tokens per sequence for the constant denominator. null: rollout.max_response_tokens."""

    entropy_coefficient: float = 0.001
    """Weight of the entropy bonus over both populations (paper 0.01, released script 0.001)."""

    def __post_init__(self):
        _require_positive(self, "constant_length", "gamma")
        _require_clips(self, "clip")


@section
class SrftConfig:
    kind: Literal["srft"] = "srft"

    preset: Literal["srft-paper", "srft-released"] = "srft-released"
    """Which of the two disagreeing sources fills the fields below: arXiv 2506.19767v1, or the released code."""

    sft_weight: float | None = None
    """Constant in front of the SFT term (0.5)."""

    sft_entropy_sign: Literal[-1, 0, 1] | None = None
    """The SFT weight is sft_weight * exp(sign * H). Paper -1, released code +1, 0 switches the weighting off."""

    rl_weight: float | None = None
    """Constant in front of the positive rollouts (0.1)."""

    rl_entropy_sign: Literal[-1, 0, 1] | None = None
    """The positive rollouts' weight is rl_weight * exp(sign * H). Both sources +1; 0 switches the weighting off."""

    entropy_level: Literal["token", "sequence", "group", "batch"] | None = None
    """What H is averaged over. The paper does not say (sequence here, as HPT); the released code uses tokens."""

    exponent_limit: float = 5.0
    """sign * H is clamped to [-limit, limit] before exp."""

    rollout_advantage: Literal["plus_minus_one", "group"] | None = None
    """Sign and size of the rollout terms: +1/-1 by correctness (paper) or the group advantage (released code)."""

    rollout_surrogate: Literal["logprob", "ratio", "clipped_ratio"] | None = None
    """What is weighted on rollouts: log-probability (paper), importance ratio (released), clipped ratio."""

    clip_low: float = 0.2
    """Lower clip of clipped_ratio."""

    clip_high: float = 0.2
    """Upper clip of clipped_ratio."""

    demonstration_shaping: Literal["none", "p_div_p_gamma"] | None = None
    """Off-policy RL term on demonstrations: p (paper) or p / (p + gamma) (released)."""

    demonstration_rl_weight: float = 1.0
    """Multiplies the off-policy RL term on demonstrations."""

    gamma: float = 0.1
    """The shaping constant."""

    entropy_coefficient: float | None = None
    """Weight of the entropy bonus over both populations. Paper 0, released code 0.001."""

    denominator: Denominator | None = None
    """How the RL terms are averaged. Paper tokens, released code constant. (The SFT term is a token mean in both.)"""

    joint_rl_count: bool | None = None
    """Divide the RL terms by rollouts and demonstrations counted together (released code, as LUFFY's eq. 4), or each
    by its own population (paper)."""

    constant_length: int | None = None
    """Tokens per sequence for the constant denominator. null: rollout.max_response_tokens."""

    def __post_init__(self):
        _require_positive(self, "constant_length", "gamma", "exponent_limit")
        _require_clips(self, "clip_low", "clip_high")


ObjectiveConfig = Annotated[
    SftConfig | SftKlConfig | PsftConfig | GrpoConfig | LuffyConfig | SrftConfig, pydantic.Field(discriminator="kind")
]

DEMONSTRATIONS_ONLY = ("sft", "sft_kl", "psft")
"""Kinds of objectives that need no completions, and hence no rewards."""

PRESETS: dict[str, dict[str, Any]] = {
    "grpo": dict(clip_low=0.2, clip_high=0.2, denominator="sequence_mean"),
    "dapo": dict(clip_low=0.2, clip_high=0.28, denominator="tokens"),
    "dr_grpo": dict(clip_low=0.2, clip_high=0.2, denominator="constant"),
    "srft-paper": dict(
        sft_weight=0.5, sft_entropy_sign=-1, rl_weight=0.1, rl_entropy_sign=1, entropy_level="sequence",
        rollout_advantage="plus_minus_one", rollout_surrogate="logprob", demonstration_shaping="none",
        entropy_coefficient=0.0, denominator="tokens", joint_rl_count=False,
    ),
    "srft-released": dict(
        sft_weight=0.5, sft_entropy_sign=1, rl_weight=0.1, rl_entropy_sign=1, entropy_level="token",
        rollout_advantage="group", rollout_surrogate="ratio", demonstration_shaping="p_div_p_gamma",
        entropy_coefficient=0.001, denominator="constant", joint_rl_count=True,
    ),
}  # fmt: skip
"""Published values per preset; sources in docs/objectives.md."""

ADVANTAGES: dict[str, dict[str, bool]] = {
    "sft": dict(normalize_std=True, include_demonstration=False),
    "sft_kl": dict(normalize_std=True, include_demonstration=False),
    "psft": dict(normalize_std=True, include_demonstration=False),
    "grpo": dict(normalize_std=True, include_demonstration=False),
    "dapo": dict(normalize_std=True, include_demonstration=False),
    "dr_grpo": dict(normalize_std=False, include_demonstration=False),
    "luffy": dict(normalize_std=False, include_demonstration=True),
    "srft-paper": dict(normalize_std=True, include_demonstration=True),
    "srft-released": dict(normalize_std=False, include_demonstration=True),
}
"""Published advantage settings per objective or preset."""
