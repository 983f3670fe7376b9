"""What sections of a run's config demand of each other. Raises ConfigError naming the key and the remedy."""

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megatron_srft.config.base import require
from megatron_srft.config.critic import check_critic
from megatron_srft.config.hidden_reward import check_swift, swift_reward
from megatron_srft.config.methods import PRESETS
from megatron_srft.config.rewards import VERIFIERS

if TYPE_CHECKING:
    from megatron_srft.config.methods import ObjectiveConfig
    from megatron_srft.config.run import RunConfig


def check_run(run: "RunConfig") -> None:
    """What holds for a whole run and for each of its stages."""
    plain = bool(run.name) and run.name not in (".", "..") and not set(run.name) & set("/\0")
    require(plain, f"name must be the name of one folder, not {run.name!r}; run_dir says where that folder goes")
    _check_numbers(run)
    require(run.steps >= 0, "steps must not be negative")
    require(0 <= run.seed < 2**63, f"seed must lie between 0 and 2**63 - 1, not {run.seed}")
    _check_rewards(run)
    require(
        run.rollout.kind != "replay" or not run.evaluation.files,
        "rollout.kind replay cannot answer held-out problems; set evaluation.files to []",
    )
    require(
        not run.samples_rollouts or run.rollout.temperature > 0,
        "rollout.temperature must be above 0 for training (0 is greedy and has no log-probs to learn from)",
    )
    cut = run.rollout.top_p < 1 or run.rollout.top_k > 0
    require(
        not (run.samples_rollouts and run.rollout.kind.startswith("vllm") and cut and run.rollout.temperature != 1),
        f"rollout.kind {run.rollout.kind} has no log-probs after the temperature and before top_p and top_k, which "
        "training needs; set rollout.temperature to 1, or rollout.top_p to 1 and rollout.top_k to 0",
    )


def check_stage(run: "RunConfig") -> None:
    """What holds for one stage's settings; those of a run with stages are only what its stages start from."""
    _check_old_logprobs(run)
    _check_stale_rollouts(run)
    _check_old_policy(run)
    _check_kl(run)
    _check_dynamic_sampling(run)
    require(
        run.objective.kind not in ("hpt", "relift") or run.batch.rollouts_per_prompt > 1,
        f"objective {run.objective.kind} asks how many of a prompt's completions are right, and compares them "
        "with each other; raise batch.rollouts_per_prompt above 1",
    )
    check_critic(run)
    check_swift(run, verified=any(reward.kind in VERIFIERS for reward in run.rewards))


def _check_numbers(run: "RunConfig") -> None:
    """Comparisons with NaN are false, so other checks let it through or not as it happens; infinity can be no limit."""
    for key, value in _numbers(run, ""):
        bound = "finite number" if key.endswith(("coefficient", "weight")) else "number"
        fits = math.isfinite(value) if bound == "finite number" else not math.isnan(value)
        require(fits, f"{key} must be a {bound}, not {value}")


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    """Every float in a section and those below it, with its key."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _numbers(getattr(value, field.name), f"{key}.{field.name}".lstrip("."))
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            yield from _numbers(item, f"{key}.{number}")
    elif isinstance(value, float):
        yield key, value


def _check_rewards(run: "RunConfig") -> None:
    verified = any(reward.kind in VERIFIERS for reward in run.rewards)
    require(
        not run.samples_rollouts or verified or swift_reward(run.rewards) is not None,
        "rewards has no verifier, so no answer could be right; add an item of kind math, exact or judge",
    )
    require(
        verified or all(reward.kind != "cosine" for reward in run.rewards),
        "rewards: a cosine reward asks a verifier for the verdict; add an item of kind math, exact or judge",
    )


def _check_old_logprobs(run: "RunConfig") -> None:
    require(
        run.parity.old_logprobs == "trainer" or has_ratio(run.objective),
        "parity.old_logprobs engine has no effect on an objective without an importance ratio on rollouts, which srft "
        "is with rollout_surrogate logprob; set parity.correction instead, or choose another rollout_surrogate",
    )


def _check_stale_rollouts(run: "RunConfig") -> None:
    key = "rollout.steps_ahead" if run.steps_ahead else "rollout.partial" if run.partial else None
    if key is None:
        return
    require(
        run.parity.correction != "none" or run.parity.old_logprobs == "engine",
        f"{key} trains on completions of the policy of earlier steps, and nothing corrects for it; set "
        "parity.correction (truncate, for example), or parity.old_logprobs to engine",
    )
    require(
        not run.batch.dynamic_sampling,
        f"batch.dynamic_sampling draws more prompts once it has seen a step's answers, which {key} does not wait for; "
        "use one of them",
    )
    if run.partial is None:
        return
    require(
        not run.steps_ahead,
        "rollout.partial carries completions over, and rollout.steps_ahead samples them before; use one of them",
    )
    limit, size = run.rollout.max_response_tokens, run.partial.tokens_per_round
    require(
        limit % size == 0,
        f"rollout.partial.tokens_per_round {size} must divide rollout.max_response_tokens {limit}, so that the last "
        "round is as long as the others",
    )
    require(
        not run.rollout.stop,
        "rollout.partial cannot find a rollout.stop string that lies across two rounds; remove one of them",
    )


def has_ratio(objective: "ObjectiveConfig") -> bool:
    """Whether the loss of rollouts has an importance ratio. All have, but SRFT as the paper writes it."""
    if objective.kind != "srft":
        return True
    surrogate = objective.rollout_surrogate or PRESETS[objective.preset]["rollout_surrogate"]
    return surrogate != "logprob"


def _check_kl(run: "RunConfig") -> None:
    require(
        run.kl.coefficient == 0 or run.samples_rollouts,
        f"kl.coefficient is {run.kl.coefficient}, and objective {run.objective.kind} has no rollouts to take the "
        "divergence on; set it to 0 (for demonstrations there is objective.kind sft_kl)",
    )
    require(
        not run.kl.coefficient or run.kl.against == "reference" or run.batch.updates_per_step > 1,
        "kl.against old has no effect with one update per step, when the old policy is the current one; raise "
        "batch.updates_per_step, or choose kl.against reference",
    )


def _check_dynamic_sampling(run: "RunConfig") -> None:
    if not run.batch.dynamic_sampling:
        return
    require(
        run.samples_rollouts and not run.objective.learns_from_demonstrations,
        f"batch.dynamic_sampling drops prompts that objective {run.objective.kind} learns from; set it to false",
    )
    require(
        run.batch.rollouts_per_prompt > 1,
        "batch.dynamic_sampling needs batch.rollouts_per_prompt above 1: one answer is never both right and wrong",
    )


def _check_old_policy(run: "RunConfig") -> None:
    updates, objective = run.batch.updates_per_step, run.objective
    require(
        updates == 1 or objective.kind not in ("psft", "sft_kl", "dpo"),
        f"batch.updates_per_step is {updates}, and objective {objective.kind} needs 1, since its old policy is not "
        f"that of the step; divide batch.prompts_per_step by {updates} for updates of the same size",
    )
    warmup = objective.warmup_steps if objective.kind == "psft" else 0
    require(
        warmup <= run.steps,
        f"objective.warmup_steps is {warmup}, and the stage has only {run.steps} steps; lower it, or raise steps",
    )
