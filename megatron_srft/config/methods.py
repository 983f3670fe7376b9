"""All objectives, and the published values of their presets. A further one has its class and its place in the union."""

import math
from typing import Annotated, Any, get_args

import pydantic

from megatron_srft.config.combined import ChordConfig, HptConfig, ReliftConfig, RlSftConfig
from megatron_srft.config.mixed import LuffyConfig, SrftConfig
from megatron_srft.config.policy_gradient import GrpoConfig, PpoConfig
from megatron_srft.config.preferences import DpoConfig
from megatron_srft.config.supervised import PsftConfig, SftConfig, SftKlConfig

Objectives = (
    SftConfig
    | SftKlConfig
    | PsftConfig
    | GrpoConfig
    | PpoConfig
    | LuffyConfig
    | SrftConfig
    | RlSftConfig
    | ChordConfig
    | HptConfig
    | ReliftConfig
    | DpoConfig
)

ObjectiveConfig = Annotated[Objectives, pydantic.Field(discriminator="kind")]

OBJECTIVES = {cls.kind: cls for cls in get_args(Objectives)}
"""Class of each kind."""

UNCLIPPED = dict(clip_low=math.inf, clip_high=math.inf)
CHORD = dict(clip_low=0.2, clip_high=0.2, denominator="tokens", entropy_coefficient=0.0, mu_warmup_steps=0)
HPT = UNCLIPPED | dict(denominator="constant", entropy_coefficient=0.001)

PRESETS: dict[str, dict[str, Any]] = {
    "grpo": dict(clip_low=0.2, clip_high=0.2, denominator="sequence_mean"),
    "dapo": dict(clip_low=0.2, clip_high=0.28, denominator="tokens"),
    "dr_grpo": dict(clip_low=0.2, clip_high=0.2, denominator="constant"),
    "rloo": UNCLIPPED | dict(denominator="sequence_sum"),
    "reinforce_pp": dict(clip_low=0.2, clip_high=0.2, denominator="tokens"),
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
    "rl-with-sft-loss": UNCLIPPED | dict(denominator="constant", entropy_coefficient=0.001),
    "sft-plus-rl": dict(clip_low=0.2, clip_high=0.2, denominator="sequence_mean", entropy_coefficient=0.0),
    "chord-mu": CHORD | dict(mu=0.9, mu_end=0.05, mu_decay_steps=200, token_weight="none"),
    "chord-phi": CHORD | dict(mu=0.1, mu_end=0.1, mu_decay_steps=0, token_weight="phi"),
    "hpt-qwen": HPT | dict(gate=0.0),
    "hpt-llama": HPT | dict(gate=0.25),
    "relift": dict(clip_low=0.2, clip_high=0.2, denominator="constant", entropy_coefficient=0.0),
}  # fmt: skip
"""Published values per preset, or per objective that has none; sources in docs/objectives.md."""

GROUP = dict(kind="group", normalize_std=True, normalize_batch=False, include_demonstration=False)
GROUP_MEAN = GROUP | dict(normalize_std=False)

ADVANTAGES: dict[str, dict[str, Any]] = {
    "sft": GROUP,
    "sft_kl": GROUP,
    "psft": GROUP,
    "grpo": GROUP,
    "dapo": GROUP,
    "dr_grpo": GROUP_MEAN,
    "rloo": GROUP_MEAN | dict(kind="leave_one_out"),
    "reinforce_pp": GROUP_MEAN | dict(kind="none", normalize_batch=True),
    "ppo": GROUP_MEAN | dict(kind="gae", normalize_batch=True),
    "luffy": GROUP_MEAN | dict(include_demonstration=True),
    "srft-paper": GROUP | dict(include_demonstration=True),
    "srft-released": GROUP_MEAN | dict(include_demonstration=True),
    "rl-with-sft-loss": GROUP_MEAN,
    "sft-plus-rl": GROUP,
    "chord-mu": GROUP,
    "chord-phi": GROUP,
    "hpt-qwen": GROUP_MEAN,
    "hpt-llama": GROUP_MEAN,
    "relift": GROUP_MEAN,
    "dpo": GROUP,
}
"""Published advantage settings per objective or preset."""
