"""All objectives, and the published values of their presets. A further one has its class and its place in the union."""

import math
from typing import Annotated, Any, get_args

import pydantic

from megatron_srft.config.mixed import LuffyConfig, SrftConfig
from megatron_srft.config.policy_gradient import GrpoConfig
from megatron_srft.config.supervised import PsftConfig, SftConfig, SftKlConfig

Objectives = SftConfig | SftKlConfig | PsftConfig | GrpoConfig | LuffyConfig | SrftConfig

ObjectiveConfig = Annotated[Objectives, pydantic.Field(discriminator="kind")]

OBJECTIVES = {cls.kind: cls for cls in get_args(Objectives)}
"""Class of each kind."""

PRESETS: dict[str, dict[str, Any]] = {
    "grpo": dict(clip_low=0.2, clip_high=0.2, denominator="sequence_mean"),
    "dapo": dict(clip_low=0.2, clip_high=0.28, denominator="tokens"),
    "dr_grpo": dict(clip_low=0.2, clip_high=0.2, denominator="constant"),
    "rloo": dict(clip_low=math.inf, clip_high=math.inf, denominator="sequence_sum"),
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
}  # fmt: skip
"""Published values per preset; sources in docs/objectives.md."""

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
    "luffy": GROUP_MEAN | dict(include_demonstration=True),
    "srft-paper": GROUP | dict(include_demonstration=True),
    "srft-released": GROUP_MEAN | dict(include_demonstration=True),
}
"""Published advantage settings per objective or preset."""
