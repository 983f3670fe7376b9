"""The reward that a head reads off the policy's own hidden states (SWIFT), as one stream of a run."""

from collections.abc import Sequence
from typing import Any, Literal

from megatron_srft.config.base import require, require_at_least, section
from megatron_srft.config.verifiers import StreamConfig, require_finite


@section
class SwiftRewardConfig(StreamConfig):
    kind: Literal["swift"] = "swift"

    head: str = ""
    """Folder of the reward head, as `megatron-srft reward train` writes it for the policy of model.path."""

    scored_by: Literal["trainer", "engine"] = "trainer"
    """Where the completions' hidden states are read. trainer: in the pass that measures log-probs. engine: while they
    are sampled, which needs rollout.kind vllm and saves that pass where nothing else asks for it. Demonstrations are
    the trainer's."""

    normalise: Literal["none", "sigmoid", "group"] = "none"
    """What the reward is. none: the head's score, a logit. sigmoid: its sigmoid, from 0 to 1. group: its distance from
    the mean of the group's completions, in their (population) standard deviations."""

    max_staleness: int | None = None
    """Stop when the policy is more than this many optimizer updates past the weights that the head was trained for.
    null: no limit."""

    refresh_every: int | None = None
    """Train the head on after every Nth step of the stage, on the verifier's verdicts. null: never."""

    refresh_window: int = 4
    """Latest steps whose completions a refresh trains on, with the hidden states that the policy has then."""

    refresh_epochs: int = 1
    """Passes of a refresh over those completions."""

    refresh_loss: Literal["bce", "hinge", "pairwise", "infonca", "nca"] = "bce"
    """What a refresh minimises; those of `megatron-srft reward train`."""

    refresh_lr: float = 1e-4
    """Learning rate of the head's AdamW, which goes on from refresh to refresh."""

    refresh_weight_decay: float = 1e-5
    """Weight decay of the head's AdamW."""

    def __post_init__(self):
        StreamConfig.__post_init__(self)
        require(bool(self.head), "rewards: head of a swift reward is not set; it must name a reward head's folder")
        require_finite(self, "refresh_lr", "refresh_weight_decay")
        require_at_least(0, self, "rewards: swift", "max_staleness", "refresh_weight_decay")
        require_at_least(1, self, "rewards: swift", "refresh_every", "refresh_window", "refresh_epochs")
        require(self.refresh_lr > 0, f"rewards: swift.refresh_lr must be above 0, not {self.refresh_lr}")


def swift_reward(rewards: Sequence[Any]) -> SwiftRewardConfig | None:
    """The one that reads hidden states, where there is one."""
    return next((reward for reward in rewards if isinstance(reward, SwiftRewardConfig)), None)


def check_swift(run: Any, verified: bool) -> None:
    """What a hidden-state reward asks of the rest of a stage. Raises ConfigError.

    Args:
        verified: whether the rewards have a verifier.
    """
    streams = [reward for reward in run.rewards if isinstance(reward, SwiftRewardConfig)]
    require(
        len(streams) <= 1,
        f"rewards has {len(streams)} items of kind swift, and there is one pass over the hidden states; keep one",
    )
    if not streams or not run.samples_rollouts:
        return
    (swift,) = streams
    require(
        swift.refresh_every is None or verified,
        "rewards: swift.refresh_every trains the head on a verifier's verdicts; add an item of kind math, exact or "
        "judge (weight 0 keeps it out of the reward), or set refresh_every to null",
    )
    require(
        verified or not run.evaluation.files,
        "evaluation.files asks which answers are right, and a swift reward is no verdict; add an item of kind math, "
        "exact or judge to rewards (weight 0 keeps it out of the reward)",
    )
    require(
        swift.refresh_every is None or run.parallel.context == 1,
        "rewards: swift.refresh_every trains the head on hidden states of whole responses, which context ranks share; "
        "set it to null, or parallel.context to 1",
    )
    needs_verdicts = run.objective.kind in ("srft", "hpt", "relift") or run.batch.dynamic_sampling
    what = "batch.dynamic_sampling" if run.batch.dynamic_sampling else f"objective {run.objective.kind}"
    require(
        verified or not needs_verdicts,
        f"{what} asks which answers are right, and a swift reward is no verdict; add an item of kind math, exact or "
        "judge to rewards",
    )


def check_scorer(stages: Sequence[tuple[str, Any]]) -> None:
    """A run whose engine is to read hidden states must have one that can. Raises ConfigError.

    Args:
        stages: name and settings of each stage.
    """
    for _, run in stages:
        if not run.scored_by_engine:
            continue
        require(
            run.rollout.kind == "vllm",
            f"rewards: swift.scored_by is engine, and an engine of rollout.kind {run.rollout.kind} reads no hidden "
            "states; set swift.scored_by to trainer, or rollout.kind to vllm",
        )
        require(
            run.partial is None,
            "rewards: swift.scored_by is engine, and with rollout.partial a completion's states are those of several "
            "policies; set swift.scored_by to trainer, or rollout.partial to null",
        )


def check_staleness(stages: Sequence[tuple[str, Any]]) -> None:
    """A run in which a head would certainly grow older than its limit is refused. Raises ConfigError.

    Updates that are skipped make a head younger, and ReLIFT's supervised ones older; a guard counts those as they come.

    Args:
        stages: name and settings of each stage, in order.
    """
    updates = 0
    fitted: dict[str, int] = {}  # head's folder -> updates behind the weights that it was last trained for
    for name, run in stages:
        swift = swift_reward(run.rewards) if run.samples_rollouts else None
        for step in range(run.steps if swift is not None else 0):
            age = updates + _updates(run, step) - fitted.get(swift.head, 0)
            require(swift.max_staleness is None or age <= swift.max_staleness, _too_old(name, step, age, swift))
            if refreshes_after(swift, step + 1):
                fitted[swift.head] = updates + _updates(run, step + 1)
        updates += _updates(run, run.steps)


def refreshes_after(swift: SwiftRewardConfig, steps: int) -> bool:
    """Whether the head is trained on after so many steps of a stage; also after the last one, since a run can be
    resumed with more steps, and another stage may go on with the head."""
    return swift.refresh_every is not None and steps % swift.refresh_every == 0


def _updates(run: Any, steps: int) -> int:
    """Updates of the policy in a stage's first steps, unless some are skipped."""
    warmup = run.critic.warmup_steps if run.uses_critic else 0
    return max(steps - warmup, 0) * run.batch.updates_per_step


def _too_old(stage: str, step: int, age: int, swift: SwiftRewardConfig) -> str:
    remedy = "set swift.refresh_every, so that the head is trained on in between, or raise swift.max_staleness"
    if step == 0:
        remedy = (
            "end the run before this stage, train a head for the model that it exports, and start a run from that "
            "model, or raise swift.max_staleness"
        )
    elif swift.refresh_every is not None:
        remedy = f"lower swift.refresh_every from {swift.refresh_every}, or raise swift.max_staleness"
    return (
        f"rewards: swift.max_staleness is {swift.max_staleness}, and at step {step + 1} of stage {stage} the policy is "
        f"{age} optimizer updates past the weights that the head was trained for; {remedy}"
    )
