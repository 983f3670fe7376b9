"""Comparison of runs: figures computed by hand, spread over seeds, the page, and what a user is told."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_srft import config as configuration
from megatron_srft.analysis.compare import compare_runs, group_runs, over_seeds
from megatron_srft.analysis.comparison_page import setting_differences, write_comparison


def write_run(folder: Path, steps: list[dict], evaluations: dict[int, dict], **settings) -> Path:
    """A run folder with these metrics; the evaluation of a step stands before the step's own line."""
    folder.mkdir(parents=True)
    config = configuration.from_dict({"name": folder.name, "run_dir": str(folder.parent), "steps": 4, **settings})
    (folder / "config.yaml").write_text(configuration.to_yaml(config.resolved()))
    lines = []
    for step in range(len(steps) + 1):
        head = {"step": step, "stage": "s", "timestamp": 1.0 + step}
        if step in evaluations:
            lines.append(head | {f"eval/{key}": value for key, value in evaluations[step].items()})
        if step < len(steps):
            lines.append(head | steps[step])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def rl_step(length: float, seconds: float, **more: float) -> dict:
    return {"count/completions": 8.0, "response_length/mean": length, "time/step": seconds, "loss": 0.1, **more}


@pytest.fixture
def runs(tmp_path) -> dict[str, list[Path]]:
    """Two seeds of an RL method with 4 steps, and SFT with 2."""
    first = [
        rl_step(5.0, 2.0, **{"time/evaluate": 1.0}, accuracy=0.1),
        rl_step(6.0, 1.0, accuracy=0.2),
        rl_step(7.0, 4.0, accuracy=0.5, **{"time/evaluate": 1.5, "time/save": 0.5}),
        rl_step(8.0, 1.0, accuracy=0.7),
    ]
    accuracies = {0: {"a/greedy": 0.1, "a/length": 3.0}, 2: {"a/greedy": 0.6}, 4: {"a/greedy": 0.9}}
    a = write_run(tmp_path / "rl-0", first, accuracies, objective={"kind": "grpo"})
    second = [rl_step(10.0, 1.0, accuracy=0.3) for _ in range(4)]
    evaluations = {0: {"a/greedy": 0.1}, 2: {"a/greedy": 0.8}, 4: {"a/greedy": 0.7}}
    b = write_run(tmp_path / "rl-1", second, evaluations, objective={"kind": "grpo"}, seed=1)
    sft = [{"loss": 1.0, "time/step": 0.5, "entropy/demonstrations": 0.4} for _ in range(2)]
    c = write_run(tmp_path / "sft", sft, {0: {"a/greedy": 0.1}, 2: {"a/greedy": 0.3}}, objective={"kind": "sft"})
    return {"rl": [a, b], "sft": [c]}


def test_figures_are_those_computed_by_hand(runs):
    comparison = compare_runs(runs, target=0.6)
    first, second = comparison.methods["rl"]
    figures = first.files["a"]
    assert (figures.metric, figures.first, figures.final, figures.final_step) == ("greedy", 0.1, 0.9, 4)
    assert (figures.best, figures.best_step) == (0.9, 4)
    # Before step 2: 8 * 5 + 8 * 6 tokens; 2 - 1 + 1 seconds. The evaluation of step 2 is timed in line 2.
    assert (figures.reached.step, figures.reached.rollout_tokens, figures.reached.seconds) == (2, 88.0, 2.0)
    assert (first.steps, first.rollout_tokens, first.seconds) == (4, 208.0, 5.0)
    assert (second.files["a"].best, second.files["a"].best_step, second.files["a"].final) == (0.8, 2, 0.7)
    assert first.late["accuracy"] == 0.7  # a tenth of four steps is at least one
    (sft,) = comparison.methods["sft"]
    assert (sft.rollout_tokens, sft.seconds, sft.files["a"].reached) == (0.0, 1.0, None)
    assert sft.late == {"entropy/demonstrations": 0.4}


def test_groups_that_dynamic_sampling_dropped_were_paid_for_too(tmp_path):
    steps = [rl_step(5.0, 1.0), rl_step(5.0, 1.0, **{"dynamic/response_tokens": 100.0})]
    (figures,) = compare_runs({"dapo": [write_run(tmp_path / "dapo", steps, {})]}).methods["dapo"]
    assert figures.rollout_tokens == 8 * 5 + 100


def test_spread_over_seeds_is_the_unbiased_deviation(runs):
    comparison = compare_runs(runs, target=0.6)
    final = comparison.spread("rl", "a", "final")
    assert final.mean == pytest.approx(0.8) and final.deviation == pytest.approx(0.02**0.5)
    tokens = comparison.spread("rl", "a", "reached_rollout_tokens")
    assert tokens.values == (88.0, 160.0) and tokens.mean == 124.0
    assert comparison.spread("sft", "a", "final").deviation is None
    assert comparison.spread("sft", "a", "reached_step") is None and comparison.num_reached("sft", "a") == 0


def test_seeds_that_do_not_reach_the_target_are_counted_and_not_averaged(runs):
    comparison = compare_runs(runs, target=0.85)
    assert comparison.num_reached("rl", "a") == 1
    assert comparison.spread("rl", "a", "reached_step").values == (4,)
    row = next(line for line in comparison.to_markdown().splitlines() if line.startswith("| rl |"))
    assert row == "| rl | 2 | 10.0% ± 0.0% | 80.0% ± 14.1% | 85.0% ± 7.1% | 3 ± 1 | 1 of 2 | 4 | 208 | 5.0 |"


def test_json_holds_runs_and_summary(runs):
    tree = json.loads(json.dumps(compare_runs(runs, target=0.6).to_json(), allow_nan=False))
    assert tree["methods"]["rl"]["runs"][0]["files"]["a"]["reached"]["rollout_tokens"] == 88.0
    summary = tree["methods"]["rl"]["summary"]
    assert summary["files"]["a"]["final"]["mean"] == pytest.approx(0.8)
    assert summary["files"]["a"]["runs"] == summary["files"]["a"]["reached"] == 2
    assert tree["methods"]["sft"]["summary"]["late"]["accuracy"] is None


def test_what_makes_a_spread_doubtful_is_said(runs, tmp_path):
    assert compare_runs(runs).remarks() == []
    short = write_run(tmp_path / "short", [rl_step(5.0, 1.0)], {})
    same_seed, other_steps, unevaluated = compare_runs({"rl": [runs["rl"][0], short], "sft": runs["sft"]}).remarks()
    assert same_seed.startswith("rl: several runs have the same seed (0, 0)")
    assert other_steps.startswith("rl: its runs have 1 and 4 steps")
    assert unevaluated == "a: not all runs of rl were evaluated on it"


def test_the_mean_curve_runs_over_steps_that_all_seeds_have():
    mean, (low, high) = over_seeds([[(0, 1.0), (1, 2.0), (2, 9.0)], [(0, 3.0), (1, 2.0)], []])
    assert mean == [(0, 2.0), (1, 2.0)]
    assert low[0][1] == pytest.approx(2 - 2**0.5) and high[0][1] == pytest.approx(2 + 2**0.5)
    assert low[1] == high[1] == (1, 2.0)
    assert over_seeds([[(0, 1.0)]]) == ([(0, 1.0)], None) and over_seeds([]) == ([], None)


def test_the_page_is_self_contained_and_draws_bands_for_several_seeds_only(runs, tmp_path):
    page, figures, text = write_comparison(tmp_path / "out" / "c.html", compare_runs(runs, target=0.6))
    html = page.read_text()
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)
    assert html.count("<svg") == 4 + 2 + 1  # held-out (three axes, and length), accuracy and length, entropy
    assert "http" not in html and "<script" not in html
    assert set(re.findall(r"fill: var\(--c(\d)\); fill-opacity: 0.15", html)) == {"0"}
    assert "objective.kind" in html and "88" in html
    assert json.loads(figures.read_text())["target"] == 0.6 and text.read_text().startswith("**a: greedy**")


def test_settings_that_differ_are_listed_without_names_and_seeds(runs):
    differences = setting_differences(compare_runs(runs).runs)
    assert differences["objective.kind"] == ["grpo", "sft"]
    assert not {"name", "seed", "run_dir", "steps"} & set(differences)


def test_groups_take_the_runs_with_their_prefix_and_the_longest_prefix_wins():
    folders = [Path(f"runs/{name}") for name in ("sft-0", "sft-1", "sft_kl-0", "other")]
    assert group_runs(folders, ["sft", "sft_kl"]) == {"sft": folders[:2], "sft_kl": folders[2:3], "other": folders[3:]}


@pytest.mark.parametrize("act, message", [
    (lambda runs: compare_runs(runs, target=90), r"must be a share in \(0, 1\], not 90"),
    (lambda runs: compare_runs({"a": []}), "nothing to compare: no run of a"),
    (lambda runs: compare_runs({"a": runs["rl"], "b": runs["rl"][:1]}), "rl-0 is named twice"),
    (lambda runs: compare_runs({"a": [runs["rl"][0].parent / "x"]}), "not a run folder: it does not exist"),
    (lambda runs: compare_runs({"a": [write_run(runs["sft"][0].parent / "young", [], {})]}), "has no metrics yet"),
    (lambda runs: group_runs(runs["rl"], ["dpo"]), "--group dpo: no run folder's name starts with it"),
    (lambda runs: group_runs([Path("a/x"), Path("b/x")], []), "two runs are called x"),
])  # fmt: skip
def test_bad_input_is_refused_with_a_remedy(runs, act, message):
    with pytest.raises(ValueError, match=message):
        act(runs)
