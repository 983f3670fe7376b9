"""One-step-off generation: what a step trains on is what the weights of the step before would have sampled, exactly."""

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import Run, final_weights, history, rewind, write_inputs

from megatron_srft import config as configuration
from megatron_srft.config import ConfigError
from megatron_srft.metrics import read_metrics
from megatron_srft.rollout import Request, dump_path, load_dump, load_local_engine, load_tokenizer

STEPS = 4
CORRECTED = {"correction": "truncate", "every": 1, "max_difference": 1e-3}


class Ahead:
    """A run a step ahead, with every step's rollouts and weights kept."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = write_inputs(
            folder,
            steps=STEPS,
            rollout={"kind": "local", "max_response_tokens": 8, "dump_every": 1, "steps_ahead": 1},
            checkpoint={"every": 1, "keep": 10, "export_every": 1},
            parity=CORRECTED,
        )
        self.reference = self.run("reference")

    def run(self, name: str, *overrides: str, status: int = 0, **options) -> Path:
        run = Run([str(self.config), f"name={name}", *overrides], self.folder / f"{name}.log", **options)
        assert run.wait() == status, run.output
        return self.folder / "runs" / name

    def rollouts(self, run: Path) -> list:
        return [load_dump(dump_path(run / "rollouts", step)) for step in range(STEPS)]

    def weights_after(self, updates: int) -> Path:
        return self.reference / "hf" / f"step-{updates:06d}" if updates else self.folder / "model"


@pytest.fixture(scope="module")
def ahead(tmp_path_factory) -> Ahead:
    return Ahead(tmp_path_factory.mktemp("ahead"))


def tokens(groups) -> list[list[int]]:
    return [completion.token_ids.tolist() for group in groups for completion in group.completions]


def test_completions_are_those_of_the_weights_of_the_step_before(ahead):
    config = configuration.load(ahead.config)
    for step, groups in enumerate(ahead.rollouts(ahead.reference)):
        version = max(0, step - 1)
        assert {c.policy_version for group in groups for c in group.completions} == {version}
        model = configuration.load(ahead.config, [f"model.path={ahead.weights_after(version)}"]).model
        engine = load_local_engine(model, load_tokenizer(model), torch.device("cpu"), 64)
        requests = [Request(prompt=g.prompt, sample=s, seed=config.seed, step=step) for g in groups for s in range(3)]
        expected = engine.generate(requests, config.rollout)
        assert tokens(groups) == [completion.token_ids.tolist() for completion in expected]
    assert len({tuple(group.prompt.id for group in groups) for groups in ahead.rollouts(ahead.reference)}) == STEPS


def test_the_gate_compares_completions_of_the_current_weights(ahead):
    """The step's own are of others: their log-probs differ by more than the gate would let pass."""
    lines = [line for line in read_metrics(ahead.reference) if "loss" in line]
    assert all(line["parity/max_difference"] < 1e-4 for line in lines)
    assert lines[0]["mismatch/max"] < 1e-4 and all(line["mismatch/max"] > 1e-3 for line in lines[1:])
    assert all(line["ahead/seconds"] > 0 for line in lines[1:])


@pytest.mark.parametrize("moment", ["step-000002.partial/manifest.json", "step-000003.partial/manifest.json"])
def test_a_run_that_is_killed_has_what_was_sampled_ahead(ahead, moment):
    name = moment[:11]
    ahead.run(name, event=("open", moment, signal.SIGKILL), status=-signal.SIGKILL)
    resumed = ahead.run(name)
    assert history(resumed) == history(ahead.reference)
    assert final_weights(resumed) == final_weights(ahead.reference)


def test_rewound_to_a_checkpoint_with_other_prompts_it_says_so(ahead):
    rewind(ahead.reference, ahead.folder / "runs" / "moved", 2)
    run = Run([str(ahead.config), "name=moved", "seed=7"], ahead.folder / "moved.log")
    assert run.wait() == 2
    assert "sampled ahead for the next step, and other prompts come now" in run.output


def test_two_ranks_sample_what_one_does(ahead):
    both = ahead.run("both", "steps=2", ranks=2)
    alone = ahead.rollouts(ahead.reference)
    for step in range(2):
        groups = load_dump(dump_path(both / "rollouts", step))
        assert tokens(groups) == tokens(alone[step])
        for mine, theirs in zip(groups, alone[step], strict=True):
            for a, b in zip(mine.completions, theirs.completions, strict=True):
                np.testing.assert_allclose(a.rollout_logprobs, b.rollout_logprobs, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "nothing corrects for it"),
        ({"parity": CORRECTED, "batch": {"dynamic_sampling": True}}, "batch.dynamic_sampling draws more"),
    ],
)
def test_what_would_be_wrong_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        run = {"model": {"path": "x"}, "objective": {"kind": "grpo"}, "rollout": {"kind": "local", "steps_ahead": 1}}
        configuration.from_dict({**run, **settings})
