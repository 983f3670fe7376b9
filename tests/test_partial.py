"""Partial rollouts: nothing is lost, sampled twice or of unknown weights when a completion goes on in later steps."""

import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import Run, final_weights, history, write_inputs

from megatron_srft import config as configuration
from megatron_srft.config import ConfigError
from megatron_srft.data import PromptStream, load_dataset
from megatron_srft.metrics import read_metrics
from megatron_srft.rollout import Request, dump_path, load_dump, load_local_engine, load_tokenizer

STEPS, PROMPTS, EXTRA, SAMPLES, LIMIT = 6, 3, 4, 3, 12
ROLLOUT = {
    "kind": "local",
    "max_response_tokens": LIMIT,
    "dump_every": 1,
    "partial": {"tokens_per_round": 3, "extra_prompts": EXTRA, "max_age": 2},
}


class Partial:
    """Two runs whose completions go on over steps: one that learns, and one whose weights never change."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = write_inputs(
            folder,
            steps=STEPS,
            objective={"kind": "grpo"},
            rollout=ROLLOUT,
            parity={"correction": "truncate", "every": 1, "max_difference": 1e-3},
            checkpoint={"every": 1, "keep": 10, "export_every": 1},
        )
        self.learning = self.run("learning")
        self.still = self.run("still", "optimizer.lr=0")

    def run(self, name: str, *overrides: str, status: int = 0, **options) -> Path:
        run = Run([str(self.config), f"name={name}", *overrides], self.folder / f"{name}.log", **options)
        assert run.wait() == status, run.output
        return self.folder / "runs" / name

    def engine(self, folder: Path):
        model = configuration.load(self.config, [f"model.path={folder}"]).model
        return load_local_engine(model, load_tokenizer(model), torch.device("cpu"), 64)


@pytest.fixture(scope="module")
def partial(tmp_path_factory) -> Partial:
    return Partial(tmp_path_factory.mktemp("partial"))


def rollouts(run: Path, steps: int = STEPS) -> list:
    return [load_dump(dump_path(run / "rollouts", step)) for step in range(steps)]


def drawn(partial: Partial) -> list[tuple[int, str]]:
    """(step in which it is begun, prompt) of everything that should be begun, in order."""
    config = configuration.load(partial.config)
    prompts = load_dataset(config.data, config.rollout, load_tokenizer(config.model)).prompts
    stream = PromptStream(prompts, config.seed, config.data.shuffle)
    order = [prompt.id for prompt in stream.stretch(0, STEPS * PROMPTS + EXTRA)]
    return [(max(0, (place - EXTRA) // PROMPTS), ident) for place, ident in enumerate(order)]


def test_with_unchanged_weights_they_are_the_completions_sampled_at_once(partial):
    """Token for token and to the last digits of the log-probs, whatever the rounds cut them into."""
    config, engine = configuration.load(partial.config), partial.engine(partial.folder / "model")
    begun = drawn(partial)
    for groups in rollouts(partial.still):
        for group in groups:
            found = next(entry for entry in begun if entry[1] == group.prompt.id)
            begun.remove(found)
            requests = [Request(prompt=group.prompt, sample=s, seed=config.seed, step=found[0]) for s in range(SAMPLES)]
            for mine, whole in zip(group.completions, engine.generate(requests, config.rollout), strict=True):
                assert mine.token_ids.tolist() == whole.token_ids.tolist()
                assert (mine.text, mine.finish_reason) == (whole.text, whole.finish_reason)
                np.testing.assert_allclose(mine.rollout_logprobs, whole.rollout_logprobs, atol=1e-5)
    assert len(begun) == EXTRA, "as many are in flight at the end as there are extra ones"


def test_every_prompt_that_is_begun_is_trained_on_once_or_in_flight(partial):
    trained = Counter(group.prompt.id for groups in rollouts(partial.learning) for group in groups)
    assert sum(trained.values()) == STEPS * PROMPTS
    assert trained <= Counter(ident for _, ident in drawn(partial))
    assert all(len(groups) == PROMPTS for groups in rollouts(partial.learning))


def test_log_probs_are_those_of_the_weights_that_sampled_each_token(partial):
    """Every token's is that of one of the policies since the completion was begun, the first round's of the oldest."""
    spread = 0
    for step, groups in enumerate(rollouts(partial.learning)):
        for group in groups:
            for completion in group.completions:
                assert step - 2 <= completion.policy_version <= step
                spread += completion.policy_version < step
                candidates = [
                    teacher_forced(partial, version, group.prompt.token_ids, completion.token_ids)
                    for version in range(completion.policy_version, step + 1)
                ]
                nearest = np.abs(np.stack(candidates) - completion.rollout_logprobs).min(axis=0)
                assert nearest.max() < 1e-4
                first = np.abs(candidates[0] - completion.rollout_logprobs)[:3]
                assert first.max() < 1e-4, "the first round is of the oldest weights"
    assert spread, "no completion went on in a later step"


MODELS: dict = {}


def teacher_forced(partial: Partial, version: int, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    """[response] log-probs under transformers' own forward of the whole sequence."""
    from transformers import AutoModelForCausalLM

    folder = partial.learning / "hf" / f"step-{version:06d}" if version else partial.folder / "model"
    if folder not in MODELS:
        MODELS[folder] = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
    with torch.no_grad():
        logits = MODELS[folder](ids[None]).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, ids[len(prompt) :, None])[:, 0].numpy()


def test_metrics(partial):
    lines = [line for line in read_metrics(partial.learning) if "loss" in line]
    assert all(line["partial/carried_groups"] == EXTRA for line in lines)
    assert all(0 <= line["partial/age/max"] <= 2 for line in lines) and any(line["partial/age/max"] for line in lines)
    assert any(line["partial/earlier_share"] > 0 for line in lines)
    assert all(line["parity/max_difference"] < 1e-4 for line in lines)


def test_a_run_that_is_killed_goes_on_with_what_was_in_flight(partial):
    partial.run("killed", event=("open", "step-000003.partial/manifest.json", signal.SIGKILL), status=-signal.SIGKILL)
    resumed = partial.run("killed")
    assert history(resumed) == history(partial.learning)
    assert final_weights(resumed) == final_weights(partial.learning)


def test_two_ranks_sample_what_one_does(partial):
    both = partial.run("both", "optimizer.lr=0", "steps=3", ranks=2)
    for mine, theirs in zip(rollouts(both, 3), rollouts(partial.still, 3), strict=True):
        assert [g.prompt.id for g in mine] == [g.prompt.id for g in theirs]
        assert [[c.token_ids.tolist() for c in g.completions] for g in mine] == [
            [c.token_ids.tolist() for c in g.completions] for g in theirs
        ]


@pytest.mark.parametrize(
    ("rollout", "words"),
    [
        ({"max_response_tokens": 10}, "must divide rollout.max_response_tokens 10"),
        ({"stop": ["x"]}, "lies across two rounds"),
        ({"steps_ahead": 1}, "use one of them"),
        ({"partial": {"tokens_per_round": 0, "extra_prompts": 1}}, "rollout.partial.tokens_per_round"),
    ],
)
def test_what_would_be_wrong_is_refused(rollout, words):
    with pytest.raises(ConfigError, match=words):
        configuration.from_dict(
            {
                "model": {"path": "x"},
                "objective": {"kind": "grpo"},
                "rollout": ROLLOUT | rollout,
                "parity": {"correction": "mask"},
            }
        )
