import dataclasses
import textwrap

import pytest

from megatron_srft import config as configuration
from megatron_srft.config import ConfigError, from_dict, load, merge, to_dict, to_yaml


def write(tmp_path, text: str):
    path = tmp_path / "config.yaml"
    path.write_text(textwrap.dedent(text))
    return path


def test_default_then_file_then_command_line(tmp_path):
    path = write(tmp_path, "optimizer: {lr: 0.5, weight_decay: 0.25}")
    config = load(path, ["optimizer.lr=2e-6"])
    assert config.optimizer.lr == 2e-6  # YAML 1.1 alone would read 2e-6 as a string
    assert config.optimizer.weight_decay == 0.25
    assert config.optimizer.adam_beta1 == 0.9


def test_a_float_written_as_1e_6_in_the_file(tmp_path):
    assert load(write(tmp_path, "optimizer: {lr: 1e-6}")).optimizer.lr == 1e-6


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"optim": {}}, "unknown key optim; did you mean optimizer?"),
        ({"optimizer": {"lrr": 1}}, "unknown key optimizer.lrr; did you mean optimizer.lr?"),
        ({"objective": {"kind": "srft", "gama": 1}}, "unknown key objective.gama; did you mean objective.gamma?"),
        ({"rewards": [{"kind": "math", "wieght": 1}]}, "unknown key rewards.0.wieght; did you mean rewards.0.weight?"),
        ({"objective": {"kind": "grpo", "gamma": 1}}, "unknown key objective.gamma; known keys there: "),
        ({"objective": {"kind": "srtf"}}, "objective.kind: unknown kind 'srtf'; choose from "),
        ({"steps": "ten"}, "steps: input should be a valid integer"),
        ({"model": {"dtype": "float16"}}, "model.dtype: input should be 'float32' or 'bfloat16' (got 'float16')"),
        ({"data": {"train": "a.jsonl"}}, "data.train needs a list; write data.train: [a.jsonl]"),
        ({"parallel": {"tensor": 0}}, "parallel.tensor must be at least 1"),
        ({"parallel": {"context": 0}}, "parallel.context must be at least 1"),
        ({"parallel": {"virtual_pipeline": 2}}, "parallel.virtual_pipeline must be at least 2 and needs"),
        ({"parallel": {"sequence_parallel": True}}, "parallel.sequence_parallel needs parallel.tensor > 1"),
        ({"batch": {"prompts_per_step": 3, "updates_per_step": 2}}, "batch.prompts_per_step must be a multiple of"),
        ({"evaluation": {"samples": 4}}, "evaluation.samples > 1 needs evaluation.temperature > 0"),
        ({"rollout": {"temperature": 0}}, "rollout.temperature must be above 0 for training"),
        ({"rollout": {"kind": "replay"}}, "rollout.folder must name a folder"),
        ({"rollout": {"top_p": 0}}, "rollout.top_p must lie in (0, 1], not 0"),
        (
            {"rollout": {"max_concurrent_sequences": 0}},
            "rollout.max_concurrent_sequences must be a number of at least 1",
        ),
        ({"rollout": {"dump_every": -1}}, "rollout.dump_every must be a number of at least 0, not -1"),
        ({"rollout": {"stop": [""]}}, "rollout.stop holds an empty string"),
        ({"evaluation": {"max_problems": -1}}, "evaluation.max_problems must be a number of at least 0, not -1"),
        ({"evaluation": {"every": -1}}, "evaluation.every must be a number of at least 0, not -1"),
        ({"checkpoint": {"keep": 0}}, "checkpoint.keep must be a number of at least 1, not 0"),
        ({"parity": {"max_difference": float("nan")}}, "parity.max_difference must be a number of at least 0, not nan"),
        ({"optimizer": {"adam_beta1": 1}}, "optimizer.adam_beta1 must lie in [0, 1), not 1"),
        ({"optimizer": {"weight_decay": -1}}, "optimizer.weight_decay must be a number of at least 0"),
        ({"seed": 2**63}, "seed must lie between 0 and 2**63 - 1"),
        ({"name": ""}, "name must be the name of one folder, not ''"),
        ({"name": "a/b"}, "name must be the name of one folder, not 'a/b'; run_dir says where that folder goes"),
        ({"name": ".."}, "name must be the name of one folder, not '..'"),
        ({"rewards": []}, "rewards has no verifier"),
        ({"rewards": [{"kind": "format"}]}, "rewards has no verifier"),
        ({"rewards": {"kind": "math"}}, "rewards needs a list, not {'kind': 'math'}"),
        ({"objective": "srft"}, "objective needs keys of its own, as in objective: {key: value}, not 'srft'"),
        ({"optimizer": None}, "optimizer needs keys of its own"),
        ({"stages": [{"name": "a", "batch": {"prompts_per_step": 0}}]}, "stages.0: batch.prompts_per_step must be at"),
        ({"stages": [{"steps": 5}]}, "stages.0 needs a name"),
        ({"stages": [{"name": "a"}, {"name": "a"}]}, "stages.1.name 'a' is used twice"),
        ({"stages": [{"name": "a", "model": {}}]}, "stages.0.model cannot differ between stages"),
        (
            {"stages": [{"name": "a", "optimzer": {}}]},
            "unknown key stages.0.optimzer; did you mean stages.0.optimizer?",
        ),
    ],
)
def test_a_mistake_names_the_key_and_the_remedy(tree, message):
    with pytest.raises(ConfigError) as caught:
        from_dict(tree).stage_configs()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr", "override 'optimizer.lr' must look like key.path=value"),
        ("rewards.3.weight=1", "override 'rewards.3.weight': '3' is no item number of that list"),
        ("steps.x=1", "override 'steps.x': 'x' lies below a plain value; check the path"),
    ],
)
def test_a_wrong_override_is_named(tmp_path, override, message):
    path = write(tmp_path, "{steps: 3, rewards: [{kind: exact}]}")
    with pytest.raises(ConfigError) as caught:
        load(path, [override])
    assert str(caught.value) == message


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(ConfigError, match="config.yaml:2: not valid YAML"):
        load(write(tmp_path, "steps: 3\nname: a: b\n"))
    with pytest.raises(ConfigError, match="must hold a mapping"):
        load(write(tmp_path, "- 1\n- 2\n"))
    with pytest.raises(ConfigError, match="cannot read the config file .*: Is a directory"):
        load(tmp_path)


def test_an_override_reaches_into_a_list_and_leaves_the_rest(tmp_path):
    path = write(tmp_path, "rewards: [{kind: exact, answer_after: '#'}, {kind: format, gate: false}]")
    first, second = load(path, ["rewards.0.weight=2"]).rewards
    assert (first.kind, first.answer_after, first.weight) == ("exact", "#", 2.0)
    assert (second.kind, second.gate) == ("format", False)


def test_a_section_without_a_kind_is_of_the_default_kind(tmp_path):
    config = load(write(tmp_path, "{}"), ["rollout.max_response_tokens=7", "objective.gamma=0.5"])
    assert (config.rollout.kind, config.rollout.max_response_tokens) == ("local", 7)
    assert (config.objective.kind, config.objective.gamma) == ("srft", 0.5)


def test_another_kind_starts_afresh():
    base = {"objective": {"kind": "srft", "gamma": 0.5}}
    assert merge(base, {"objective": {"kind": "grpo"}}) == {"objective": {"kind": "grpo"}}
    assert merge(base, {"objective": {"gamma": 0.1}}) == {"objective": {"kind": "srft", "gamma": 0.1}}


@pytest.mark.parametrize("preset", ["srft-paper", "srft-released"])
def test_a_preset_fills_only_what_is_not_set(preset):
    resolved = from_dict({"objective": {"kind": "srft", "preset": preset, "sft_weight": 0.125}}).resolved().objective
    published = configuration.PRESETS[preset]
    assert resolved.sft_weight == 0.125
    assert {k: getattr(resolved, k) for k in published if k != "sft_weight"} == {
        k: v for k, v in published.items() if k != "sft_weight"
    }


def test_the_two_sources_of_srft_disagree_on_the_sign():
    signs = [
        from_dict({"objective": {"kind": "srft", "preset": preset}}).resolved().objective.sft_entropy_sign
        for preset in ("srft-paper", "srft-released")
    ]
    assert signs == [-1, 1]


@pytest.mark.parametrize("kind", ["sft", "sft_kl", "psft", "grpo", "luffy", "srft"])
def test_what_a_run_writes_can_be_run_again(tmp_path, kind):
    config = from_dict({"name": "käse", "objective": {"kind": kind}, "rollout": {"stop": ["\n", "#"]}})
    resolved = config.resolved()
    assert resolved.resolved() == resolved
    assert load(write(tmp_path, to_yaml(resolved))) == resolved
    assert None not in (resolved.advantage.normalize_std, resolved.objective.constant_length)


def test_stages_override_sections_and_keep_the_rest():
    config = from_dict(
        {
            "steps": 9,
            "optimizer": {"lr": 0.5, "clip_grad": 2.0},
            "stages": [
                {"name": "warm", "steps": 4, "objective": {"kind": "sft"}, "optimizer": {"lr": 0.25}},
                {"name": "rl", "objective": {"kind": "grpo"}},
            ],
        }
    )
    (first_name, first), (second_name, second) = config.stage_configs()
    assert (first_name, first.steps, first.objective.kind, first.optimizer.lr) == ("warm", 4, "sft", 0.25)
    assert (second_name, second.steps, second.objective.kind, second.optimizer.lr) == ("rl", 9, "grpo", 0.5)
    assert first.optimizer.clip_grad == 2.0


def test_the_tree_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        from_dict({}).steps = 3


def test_a_plain_tree_of_the_defaults_gives_the_defaults():
    assert from_dict(to_dict(from_dict({}))) == from_dict({})


def test_a_key_given_twice_is_refused(tmp_path):
    path = write(tmp_path, "name: a\noptimizer:\n  lr: 1\n  lr: 2\n")
    with pytest.raises(ConfigError, match=r"config.yaml:4: not valid YAML: the key lr stands there twice"):
        load(path)


def test_yaml_anchors_and_merges_are_not_taken_for_a_key_given_twice(tmp_path):
    text = "data: &d {max_prompt_tokens: 5}\nstages: [{name: a, data: {<<: *d, shuffle: false}}, {name: b, data: *d}]"
    config = load(write(tmp_path, text))
    assert [c.data.max_prompt_tokens for _, c in config.stage_configs()] == [5, 5]


def test_a_config_in_another_encoding(tmp_path):
    (tmp_path / "c.yaml").write_bytes("name: ä".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"c.yaml: not UTF-8 text \(.* at byte 6\); convert the file"):
        load(tmp_path / "c.yaml")
