"""A penalty that holds the policy near another one, over the rollouts' tokens."""

from typing import Literal

from megatron_srft.config.base import require, require_at_least, section


@section
class KlConfig:
    coefficient: float = 0.0
    """Weight of the divergence of the policy from the other one, over the rollouts' tokens; 0 switches it off."""

    estimator: Literal["k1", "k2", "k3"] = "k3"
    """With d = log p - log q of KL(p || q): k1 is d, k2 is d^2 / 2, k3 is exp(-d) - 1 + d (GRPO's). docs/objectives.md
    says which one has which bias in the loss and in the reward."""

    place: Literal["loss", "reward"] = "loss"
    """loss: a term of the loss (GRPO). reward: subtracted from every token's reward (PPO, REINFORCE++)."""

    gamma: float = 1.0
    """Discount of the divergence as a reward; only with place reward."""

    against: Literal["reference", "old"] = "reference"
    """reference: KL(policy || the policy at the stage's start or latest refresh). old: KL(policy before the step ||
    policy), the penalty form of TRPO's and PPO's trust region; needs place loss and batch.updates_per_step above 1."""

    refresh_every: int | None = None
    """Steps after which the current policy becomes the reference. null: never within a stage."""

    def __post_init__(self):
        require_at_least(0, self, "kl", "coefficient")
        require(0 < self.gamma <= 1, f"kl.gamma must lie above 0 and at most at 1, not {self.gamma}")
        every = self.refresh_every
        require(every is None or every >= 1, f"kl.refresh_every must be at least 1, or null (never), not {every}")
        require(
            self.against == "reference" or self.place == "loss",
            "kl.against old needs kl.place loss: the policy that sampled has no divergence from itself to be paid for",
        )
        require(
            not (self.coefficient and self.place == "loss" and self.estimator == "k1" and self.against == "reference"),
            "kl.estimator k1 in the loss pulls the policy nowhere: the mean of its gradient is 0; choose k2 (whose "
            "gradient is that of the divergence) or k3, or kl.place reward",
        )

    @property
    def in_loss(self) -> bool:
        return self.coefficient > 0 and self.place == "loss"

    @property
    def in_reward(self) -> bool:
        return self.coefficient > 0 and self.place == "reward"

    @property
    def needs_reference(self) -> bool:
        return self.coefficient > 0 and self.against == "reference"
