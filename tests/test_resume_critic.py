"""Runs with a critic, a reference policy or dynamic sampling, killed or moved to another layout in the middle."""

import signal

import numpy as np
import pytest
from runs import Run, final_weights, history, rewind, write_inputs
from safetensors.numpy import load

from megatron_srft import config as configuration
from megatron_srft.config import ConfigError
from megatron_srft.data import PromptStream, load_dataset
from megatron_srft.metrics import read_metrics
from megatron_srft.rollout import load_dump, load_tokenizer
from megatron_srft.train import run_training

OTHERWISE = ("timestamp", "time/", "tokens/s", "parity/")
"""Speed, and the comparison with the engine, which a run makes when it starts."""


def figures(run) -> list[dict]:
    """Every number of every training step that a resume must not change."""
    return [{k: v for k, v in line.items() if not k.startswith(OTHERWISE)} for line in read_metrics(run)]


@pytest.fixture(scope="module")
def ppo(tmp_path_factory):
    """PPO whose reference is refreshed before steps 2 and 4, two updates per step, and a step for the critic alone."""
    folder = tmp_path_factory.mktemp("ppo")
    path = write_inputs(
        folder,
        name="reference",
        objective={"kind": "ppo"},
        batch={"prompts_per_step": 4, "rollouts_per_prompt": 3, "tokens_per_microbatch": 64, "updates_per_step": 2},
        kl={"coefficient": 0.1, "estimator": "k1", "place": "reward", "refresh_every": 2},
        # Epsilons that keep rounding in a small gradient from turning into a full-sized update.
        critic={"warmup_steps": 1, "optimizer": {"lr": 0.03, "adam_epsilon": 1e-3}},
        optimizer={"lr": 0.01, "adam_epsilon": 1e-3},
    )
    run_training(configuration.load(path))
    return path, folder / "runs" / "reference"


def test_the_figures_of_a_run_with_a_critic(ppo):
    """Values are 0 before the first step; in it only the critic learns; the reference is the policy at a refresh."""
    first, second, third, fourth = read_metrics(ppo[1])
    assert first["value/mean"] == 0.0 and first["value/explained_variance"] == 0.0
    assert "loss" not in first and "lr" not in first
    assert [line["value/lr"] for line in (first, fourth)] == [0.03, 0.03]
    assert second["value/mean"] != 0.0 and second["loss"] != 0.0 and second["grad_norm"] > 0
    assert [line["mismatch/max"] < 1e-5 for line in (second, third, fourth)] == [True] * 3
    assert abs(fourth["kl/reference_k1"]) > 1e-3
    assert all(line["accounting/skipped_critic_updates"] == 0 for line in (first, second, third, fourth))


def test_a_killed_run_with_a_critic_goes_on_with_the_same_bits(ppo, tmp_path):
    """The reference at step 3 is the policy of step 2, which no other part of the checkpoint holds."""
    path, reference = ppo
    arguments = [str(path), "name=killed", f"run_dir={tmp_path}"]
    killed = Run(arguments, tmp_path / "log", event=("open", "step-000004.partial/manifest.json", signal.SIGKILL))
    assert killed.wait() == -signal.SIGKILL, killed.output
    resumed = Run(arguments, tmp_path / "log")
    assert resumed.wait() == 0, resumed.output
    assert "resumed from" in resumed.output
    assert figures(tmp_path / "killed") == figures(reference)
    assert final_weights(tmp_path / "killed") == final_weights(reference)


@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.pipeline=2"])
def test_critic_and_reference_are_resumed_by_another_layout(ppo, tmp_path, layout):
    """From one rank to two. The completions are replayed, so that none can tip over through another rounding."""
    path, reference = ppo
    rewind(reference, tmp_path / "moved", 1)
    overrides = [layout, "rollout.kind=replay", f"rollout.folder={reference / 'rollouts'}"]
    arguments = [str(path), "name=moved", f"run_dir={tmp_path}", *overrides, "rollout.max_response_tokens=8"]
    run = Run(arguments, tmp_path / "log", ranks=2)
    assert run.wait() == 0, run.output
    keys = ("value/loss", "value/grad_norm", "value/explained_variance", "loss", "grad_norm", "kl/reference_k1")
    for mine, theirs in zip(read_metrics(tmp_path / "moved")[1:], read_metrics(reference)[1:], strict=True):
        for key in keys:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), (mine["step"], key)
    expected = load(final_weights(reference))
    for name, tensor in load(final_weights(tmp_path / "moved")).items():
        np.testing.assert_allclose(tensor, expected[name], rtol=0, atol=1e-5, err_msg=name)


def test_a_run_without_a_critic_or_reference_does_not_become_one_with_them(ppo, tmp_path):
    def run(objective: str, steps: int, coefficient: float) -> None:
        stage = f"stages=[{{name: only, steps: {steps}, objective: {{kind: {objective}}}}}]"
        overrides = ["name=plain", f"run_dir={tmp_path}", stage, f"kl.coefficient={coefficient}"]
        run_training(configuration.load(ppo[0], overrides))

    run("grpo", 1, 0.0)
    with pytest.raises(ConfigError, match="holds no critic, which objective.kind ppo needs"):
        run("ppo", 2, 0.0)
    with pytest.raises(ConfigError, match="holds no reference policy, which kl.coefficient above 0"):
        run("grpo", 2, 0.1)


# ---------------------------------------------------------------- dynamic sampling


def test_dynamic_sampling_draws_the_same_prompts_after_a_kill(tmp_path):
    """Two draws of five of the twelve prompts in each step, since no answer is right: the draws go round and round."""
    path = write_inputs(
        tmp_path,
        objective={"kind": "grpo", "preset": "reinforce_pp"},
        batch={"prompts_per_step": 5, "rollouts_per_prompt": 2, "dynamic_sampling": True, "max_draws": 2},
    )
    whole = Run([str(path), "name=whole"], tmp_path / "log")
    assert whole.wait() == 0, whole.output
    arguments = [str(path), "name=killed"]
    killed = Run(arguments, tmp_path / "killed", event=("open", "step-000003.partial/manifest.json", signal.SIGKILL))
    assert killed.wait() == -signal.SIGKILL, killed.output
    assert Run(arguments, tmp_path / "killed").wait() == 0
    runs = tmp_path / "runs"
    assert history(runs / "killed") == history(runs / "whole")
    assert final_weights(runs / "killed") == final_weights(runs / "whole")
    for line in read_metrics(runs / "killed"):
        assert (line["dynamic/draws"], line["dynamic/groups"], line["count/groups"]) == (2, 10, 5)
        assert line["dynamic/response_tokens"] > line["response_length/mean"] * 10
    # The step goes on with its second draw: batches 1, 3, 5 and 7 of the stream.
    dumps = [load_dump(file) for file in sorted((runs / "killed" / "rollouts").iterdir())]
    drawn = [[group.prompt.id for group in groups] for groups in dumps]
    config = configuration.load(path).resolved()
    prompts = load_dataset(config.data, config.rollout, load_tokenizer(config.model)).prompts
    stream = PromptStream(prompts, config.seed, config.data.shuffle)
    assert drawn == [[p.id for p in stream.batch(number, 5)] for number in (1, 3, 5, 7)]
