"""The methods that the study compares: one line each in METHODS, settings over config.yaml.

Every method gets the same prompts and the same budget. Of that it uses all it has a use for:

    rollouts         steps * prompts * 8 completions           every method that samples
    demonstrations   steps * prompts * demonstrated_share      every method that learns from them

A method that does both in one step meets a demonstration with about every fourth prompt. One that only imitates makes
as many updates, each from the demonstrations that such a step would have had. In a run of two stages the first one
spends all demonstrations, `prompts` an update, and the second one all rollouts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What each run may spend."""

    steps: int = 160
    """Updates of a stage that samples."""
    prompts: int = 16
    """Prompts of such a step."""
    demonstrated_share: float = 0.25
    """Share of the prompts that have a demonstration: 300 of 1,200, see task.py."""

    @property
    def demonstrations_per_step(self) -> int:
        return round(self.prompts * self.demonstrated_share)

    @property
    def first_stage_steps(self) -> int:
        return round(self.steps * self.demonstrated_share)


Settings = dict[str, Any]
Method = Callable[[Budget], Settings]

COSINE = [
    {"kind": "exact", "answer_after": "#", "weight": 0.0},
    {"kind": "cosine"},
    {"kind": "repetition", "ngram": 8, "penalty": -0.05, "gamma": 0.99},
]
"""Long-chain-of-thought rewards: the paper's, but for an n-gram that fits responses of 64 tokens (there 40)."""


def imitating(kind: str, **objective: Any) -> Method:
    """Demonstrations only."""
    return lambda budget: {
        "steps": budget.steps,
        "batch": {"prompts_per_step": budget.demonstrations_per_step},
        "objective": {"kind": kind, **objective},
    }


def sampling(kind: str, rewards: list[Settings] | None = None, **objective: Any) -> Method:
    """Rollouts, with demonstrations where the objective learns from them."""
    return lambda budget: {
        "steps": budget.steps,
        "batch": {"prompts_per_step": budget.prompts},
        "objective": {"kind": kind, **objective},
        **({"rewards": rewards} if rewards else {}),
    }


def then_grpo(kind: str, rewards: list[Settings] | None = None, **objective: Any) -> Method:
    """Two stages: all demonstrations first, all rollouts after, with rewards of their own if any are given."""
    shaped = {"rewards": rewards} if rewards else {}
    return lambda budget: {
        "batch": {"prompts_per_step": budget.prompts},
        "stages": [
            {"name": kind, "steps": budget.first_stage_steps, "objective": {"kind": kind, **objective}},
            {"name": "grpo", "steps": budget.steps, "objective": {"kind": "grpo"}, **shaped},
        ],
    }


METHODS: dict[str, Method] = {
    "sft": imitating("sft"),
    "grpo": sampling("grpo"),
    "sft-then-grpo": then_grpo("sft"),
    "srft-released": sampling("srft", preset="srft-released"),
    "srft-paper": sampling("srft", preset="srft-paper"),
    "luffy": sampling("luffy"),
    "psft": imitating("psft"),
    "psft-then-grpo": then_grpo("psft"),
    "sft-then-grpo-cosine": then_grpo("sft", rewards=COSINE),
    "grpo-cosine": sampling("grpo", rewards=COSINE),
    "sft-kl": imitating("sft_kl"),
    "rl-sft": sampling("rl_sft"),
    "chord-mu": sampling("chord", preset="chord-mu", mu_decay_steps=100),
    "chord-phi": sampling("chord", preset="chord-phi"),
    "hpt": sampling("hpt"),
    "relift": sampling("relift", buffer_size=16, sft_lr=2.0e-4),
}
"""Name -> settings. A name is also the start of its run folders' names. Published settings, except where a length or a
learning rate of the papers is one of runs a hundred times as large."""

BASELINE = "sft-then-grpo"
"""What the cost of the others is compared with."""
QUICK = ("sft", "grpo", "sft-then-grpo", "srft-paper", "srft-released")
"""The methods of the quick form."""
