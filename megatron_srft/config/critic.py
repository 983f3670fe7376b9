"""PPO's critic: its optimizer, its loss, and what it asks of the rest of the run."""

from dataclasses import field
from typing import Any, ClassVar

from megatron_srft.config.base import require, require_at_least, section
from megatron_srft.config.setup import OptimizerConfig


@section
class CriticOptimizerConfig(OptimizerConfig):
    SECTION: ClassVar[str] = "critic.optimizer"

    lr: float = 9e-6
    """Peak learning rate of AdamW; arXiv 2502.03373 has 9e-6, and 4.5e-6 in its longest runs."""


@section
class CriticConfig:
    path: str | None = None
    """Hugging Face folder that the critic starts from, of the policy's sizes; its value head starts from zero. null:
    the policy as it is when the stage begins."""

    warmup_steps: int = 0
    """Steps at the stage's beginning in which only the critic is updated."""

    updates_per_step: int | None = None
    """The critic's updates from one step's rollouts, each over its own share of the prompts. null:
    batch.updates_per_step."""

    value_clip: float | None = 0.2
    """A value that has moved further than this from the one before the step earns nothing by moving on; null switches
    it off. It acts from the second update of a step on."""

    loss_coefficient: float = 0.5
    """Weight of the mean squared error."""

    optimizer: CriticOptimizerConfig = field(default_factory=CriticOptimizerConfig)
    """The critic's own AdamW; its keys are below."""

    def __post_init__(self):
        require_at_least(0, self, "critic", "warmup_steps", "value_clip", "loss_coefficient")
        require_at_least(1, self, "critic", "updates_per_step")
        require(self.path != "", "critic.path is empty; name a Hugging Face folder, or null for the policy's weights")


def check_critic(run: Any) -> None:
    """PPO and advantage.kind gae need each other, and gae has needs of its own. Raises ConfigError."""
    kind, objective = run.advantage.kind, run.objective.kind
    require(
        kind != "gae" or objective == "ppo",
        f"advantage.kind gae needs a critic, and objective {objective} has none; choose objective.kind ppo",
    )
    if objective != "ppo":
        return
    require(kind in (None, "gae"), f"objective.kind ppo needs advantage.kind gae, not {kind}; leave it out")
    for name in ("include_demonstration", "normalize_std"):
        require(
            not getattr(run.advantage, name),
            f"advantage.{name} is about a group of answers, and the critic takes the group's place; set it to false",
        )
    gammas = {reward.gamma for reward in run.rewards} | ({run.kl.gamma} if run.kl.in_reward else set())
    require(
        len(gammas) == 1 or run.advantage.lam == 1,
        f"advantage.lam is {run.advantage.lam}, and the rewards (and kl) have several gammas, "
        f"{', '.join(map(str, sorted(gammas)))}; one value per token cannot be discounted by all of them: set "
        "advantage.lam to 1, or one gamma everywhere",
    )
    warmup, updates = run.critic.warmup_steps, run.critic.updates_per_step or 1
    require(
        warmup <= run.steps,
        f"critic.warmup_steps is {warmup}, and the stage has only {run.steps} steps; lower it, or raise steps",
    )
    require(
        run.batch.prompts_per_step % updates == 0,
        f"batch.prompts_per_step must be a multiple of critic.updates_per_step, and {run.batch.prompts_per_step} is "
        f"none of {updates}",
    )
