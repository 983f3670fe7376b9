"""Objective settings: impossible values are refused by name; presets resolve to the published values."""

import pytest
from objective_rows import resolved

from megatron_srft.config import ConfigError, SrftConfig, from_dict


@pytest.mark.parametrize(
    "objective",
    [
        {"kind": "sft", "constant_length": 0},
        {"kind": "grpo", "dual_clip": 0.9},
        {"kind": "grpo", "clip_low": -0.1},
        {"kind": "luffy", "gamma": 0.0},
        {"kind": "luffy", "clip": -1.0},
        {"kind": "srft", "exponent_limit": 0.0},
    ],
)
def test_impossible_values_are_refused_by_name(objective):
    with pytest.raises(ConfigError, match=f"objective.{list(objective)[1]}"):
        from_dict({"objective": objective})


def test_a_field_overrides_its_preset_and_zero_is_a_value():
    config = resolved(SrftConfig(preset="srft-paper", sft_entropy_sign=0, entropy_coefficient=0.5))
    assert (config.sft_entropy_sign, config.entropy_coefficient, config.rl_entropy_sign) == (0, 0.5, 1)


def test_presets_of_the_two_sources():
    paper, released = resolved(SrftConfig(preset="srft-paper")), resolved(SrftConfig(preset="srft-released"))
    assert (paper.sft_weight, paper.rl_weight) == (released.sft_weight, released.rl_weight) == (0.5, 0.1)
    assert (paper.sft_entropy_sign, released.sft_entropy_sign) == (-1, 1)
    assert (paper.rollout_advantage, released.rollout_advantage) == ("plus_minus_one", "group")
    assert (paper.demonstration_shaping, released.demonstration_shaping) == ("none", "p_div_p_gamma")
    assert (paper.joint_rl_count, released.joint_rl_count) == (False, True)
