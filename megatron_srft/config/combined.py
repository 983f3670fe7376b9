"""Objectives that put the likelihood of demonstrations beside a policy gradient on rollouts.

In one sum (rl_sft, chord), prompt by prompt (hpt), or in updates of their own (relift).
"""

from typing import ClassVar, Literal

from megatron_srft.config.base import require, require_at_least, section
from megatron_srft.config.denominators import Denominator, require_clips, require_positive


@section
class SurrogateConfig:
    """The policy gradient that these objectives have in common."""

    samples_rollouts: ClassVar[bool] = True
    learns_from_demonstrations: ClassVar[bool] = True

    clip_low: float | None = None
    """The rollouts' importance ratio is clipped below at 1 - clip_low; .inf: not at all. null: the published value."""

    clip_high: float | None = None
    """It is clipped above at 1 + clip_high; .inf: not at all. null: the published value."""

    denominator: Denominator | None = None
    """How the rollouts' term is averaged; the demonstrations' is a mean over their tokens. null: the published one."""

    constant_length: int | None = None
    """Tokens per sequence for the constant denominator. null: rollout.max_response_tokens."""

    entropy_coefficient: float | None = None
    """Weight of the entropy bonus, subtracted from the loss. null: the published value."""

    def __post_init__(self):
        require_positive(self, "constant_length")
        require_clips(self, "clip_low", "clip_high")


@section
class RlSftConfig(SurrogateConfig):
    kind: Literal["rl_sft"] = "rl_sft"

    preset: Literal["rl-with-sft-loss", "sft-plus-rl"] = "rl-with-sft-loss"
    """rl-with-sft-loss: the baseline of LUFFY, no clip, constant, no std. sft-plus-rl: the plain sum of SRFT's paper
    (section 3.2.2) with GRPO, clip 0.2, sequence_mean, std."""

    sft_weight: float = 1.0
    """Weight of the demonstrations' negative log-likelihood."""

    def __post_init__(self):
        super().__post_init__()
        require_at_least(0, self, "objective", "sft_weight")


@section
class ChordConfig(SurrogateConfig):
    kind: Literal["chord"] = "chord"

    preset: Literal["chord-mu", "chord-phi"] = "chord-mu"
    """chord-mu: mu falls from 0.9 to 0.05 in 200 steps. chord-phi: mu 0.1, tokens weighted by p (1 - p)."""

    mu: float | None = None
    """Share of the demonstrations' term at the end of mu_warmup_steps; the rollouts' has 1 - mu. null: the preset's."""

    mu_end: float | None = None
    """Its value after mu_decay_steps, and from then on. null: the preset's."""

    mu_warmup_steps: int | None = None
    """Steps of the stage in which mu rises from 0 in equal parts. null: the preset's, 0."""

    mu_decay_steps: int | None = None
    """Steps after those in which it goes from mu to mu_end along half a cosine. null: the preset's."""

    token_weight: Literal["none", "phi", "probability"] | None = None
    """Factor of a demonstration's token with the probability p: 1, p (1 - p), or p (DFT), without gradient. null: the
    preset's."""

    def __post_init__(self):
        super().__post_init__()
        require_at_least(0, self, "objective", "mu_warmup_steps", "mu_decay_steps")
        for name in ("mu", "mu_end"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, f"objective.{name} must lie between 0 and 1, not {value}")


@section
class HptConfig(SurrogateConfig):
    kind: Literal["hpt"] = "hpt"

    preset: Literal["hpt-qwen", "hpt-llama"] = "hpt-qwen"
    """The gate that the paper has for these models: 0, 0.25 (2 of 8 answers right)."""

    gate: float | None = None
    """A prompt of whose completions no more than this share is right teaches its demonstration, and its completions are
    dropped; the others teach by their completions alone. null: the preset's."""

    sft_weight: float = 1.0
    """Weight of the demonstrations' negative log-likelihood (1.0; 0.3 for the paper's model of 1.5B)."""

    def __post_init__(self):
        super().__post_init__()
        require_at_least(0, self, "objective", "sft_weight")
        require(
            self.gate is None or 0 <= self.gate < 1,
            f"objective.gate must lie in [0, 1), not {self.gate}; at 1 no completion would ever be learned from",
        )


@section
class ReliftConfig(SurrogateConfig):
    kind: Literal["relift"] = "relift"

    buffer_size: int = 128
    """Prompts without a right answer that are waited for; then their demonstrations make one supervised update, at most
    one in a step."""

    sft_lr: float = 1e-6
    """Learning rate of the supervised updates, constant; optimizer.lr is that of the others."""

    sft_entropy_coefficient: float = 0.001
    """Weight of the entropy bonus over the demonstrations' tokens in the supervised updates."""

    def __post_init__(self):
        super().__post_init__()
        require_at_least(1, self, "objective", "buffer_size")
        require_at_least(0, self, "objective", "sft_lr")
