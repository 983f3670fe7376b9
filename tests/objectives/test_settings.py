"""Objective settings: impossible values are refused by name; presets resolve to the published values."""

import dataclasses
import math
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml
from objective_rows import resolved

from megatron_srft.config import ADVANTAGES, OBJECTIVES, PRESETS, ConfigError, SrftConfig, from_dict

PAGE = Path(__file__).resolve().parents[2] / "docs" / "objectives.md"


def published() -> dict[tuple[str, str | None], tuple[dict, dict]]:
    """(kind, preset) -> (objective, advantage), as the table of presets in docs/objectives.md has them."""
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (?:`([\w-]+)`|-) \| `(\{.*?\})` \| (?:`(\{.*?\})`|-) \| ", text, re.M)
    table = {(kind, preset or None): (yaml.safe_load(a), yaml.safe_load(b or "{}")) for kind, preset, a, b in rows}
    assert len(table) == len(rows), "a preset stands there twice"
    return table


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


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"objective": {"kind": "psft", "entropy_coefficient": "nan"}},
            "objective.entropy_coefficient must be a finite",
        ),
        (
            {"objective": {"kind": "grpo", "entropy_coefficient": math.inf}},
            "objective.entropy_coefficient must be a fin",
        ),
        (
            {"objective": {"kind": "sft_kl", "kl_coefficient": math.inf}},
            "objective.kl_coefficient must be a finite num",
        ),
        ({"objective": {"kind": "luffy", "entropy_coefficient": math.nan}}, "objective.entropy_coefficient must be"),
        (
            {"stages": [{"name": "a", "steps": 1, "objective": {"kind": "psft", "entropy_coefficient": math.nan}}]},
            "stages.0: objective.entropy_coefficient must be a finite number, not nan",
        ),
    ],
)
def test_numbers_that_are_none_are_refused_by_name(tree, message):
    with pytest.raises(ConfigError) as caught:
        from_dict(tree).stage_configs()
    assert str(caught.value).startswith(message)


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


def presets_of(kind: str) -> list[str | None]:
    hint = get_type_hints(OBJECTIVES[kind]).get("preset")
    return list(get_args(hint)) or [None]


ALL = [(kind, preset) for kind in OBJECTIVES for preset in presets_of(kind)]


@pytest.mark.parametrize(("kind", "preset"), ALL, ids=str)
def test_the_table_of_published_constants_is_what_a_preset_resolves_to(kind, preset):
    objective, advantage = published()[kind, preset]
    run = from_dict({"objective": {"kind": kind, **({"preset": preset} if preset else {})}}).resolved()
    assert {key: getattr(run.objective, key) for key in objective} == objective
    assert {key: getattr(run.advantage, key) for key in advantage} == advantage


@pytest.mark.parametrize(("kind", "preset"), ALL, ids=str)
def test_no_published_constant_is_missing_in_the_table(kind, preset):
    objective, advantage = published()[kind, preset]
    ours = {"kind", "preset", "constant_length", "direction"}
    fields = {field.name for field in dataclasses.fields(OBJECTIVES[kind])} - ours
    assert set(objective) >= (set(PRESETS.get(preset, ())) if preset else fields)
    if OBJECTIVES[kind].samples_rollouts:
        assert {*advantage, "include_demonstration"} == set(ADVANTAGES[preset or kind])


def test_the_table_has_no_preset_that_is_not_there():
    assert set(published()) == set(ALL)
