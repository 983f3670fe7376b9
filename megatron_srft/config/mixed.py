"""Objectives that learn from demonstrations and rollouts in one stage."""

from typing import ClassVar, Literal

from megatron_srft.config.base import section
from megatron_srft.config.denominators import Denominator, require_clips, require_positive

Shaping = Literal["none", "p_div_p_gamma", "logp", "p_logp", "power"]


@section
class LuffyConfig:
    kind: Literal["luffy"] = "luffy"
    samples_rollouts: ClassVar[bool] = True
    learns_from_demonstrations: ClassVar[bool] = True

    shaping: Shaping = "p_div_p_gamma"
    """Off-policy shaping of the demonstration's probability p: none is p itself, p_div_p_gamma p / (p + gamma), logp
    log p, p_logp p + gamma log p, power p^gamma (square root: gamma 0.5)."""

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
        require_positive(self, "constant_length", "gamma")
        require_clips(self, "clip")


@section
class SrftConfig:
    kind: Literal["srft"] = "srft"
    samples_rollouts: ClassVar[bool] = True
    learns_from_demonstrations: ClassVar[bool] = True

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

    demonstration_shaping: Shaping | None = None
    """Off-policy RL term on demonstrations: none, p itself (paper), p_div_p_gamma, p / (p + gamma) (released), or one
    of LUFFY's others (see its shaping)."""

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
        require_positive(self, "constant_length", "gamma", "exponent_limit")
        require_clips(self, "clip_low", "clip_high")
