"""Cosine, repetition per token and an overlong penalty through a whole run: config, engine, scores, advantages, log."""

import numpy as np
import pytest
from runs import write_inputs

from megatron_srft import config as configuration
from megatron_srft.advantages import to_sequences, with_advantages
from megatron_srft.config import from_dict
from megatron_srft.metrics import read_metrics
from megatron_srft.rewards import lengths, repetition
from megatron_srft.rollout import dump_path, load_dump
from megatron_srft.train import run_training

REWARDS = [
    {"kind": "exact", "answer_after": "#", "weight": 0.0},
    {"kind": "cosine", "gamma": 0.9},
    {"kind": "repetition", "ngram": 1, "penalty": -0.25, "gamma": 0.5},
    {"kind": "overlong", "buffer_tokens": 4, "weight": 0.5},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    path = write_inputs(folder, name="cosine", steps=2, rewards=REWARDS, objective={"kind": "grpo"})
    run_training(configuration.load(path))
    return folder / "runs" / "cosine"


def test_every_answer_has_what_the_formulas_say(run):
    _, cosine, repeated, overlong = (
        from_dict({"rewards": REWARDS, "rollout": {"max_response_tokens": 8}}).resolved().rewards
    )
    groups = [group for step in (0, 1) for group in load_dump(dump_path(run / "rollouts", step))]
    answers = [pair for group in groups for pair in zip(group.completions, group.scores, strict=True)]
    assert len(answers) == 2 * 3 * 3
    for completion, score in answers:
        length, cut = len(completion.token_ids), completion.finish_reason == "length"
        penalties = repetition.dense(completion.token_ids.tolist(), 1, -0.25)
        expected = {
            "exact": float(score.correct),
            "cosine": lengths.cosine(length, score.correct, cut, cosine),
            "repetition": sum(penalties),
            "overlong": lengths.overlong(length, cut, overlong),
        }
        assert score.streams == expected
        assert score.dense == {"repetition": penalties}
        assert score.reward == pytest.approx(expected["cosine"] + expected["repetition"] + 0.5 * expected["overlong"])
    assert repeated.penalty == -0.25


def test_tokens_of_one_response_have_advantages_of_their_own(run):
    config = configuration.load(run / "config.yaml").resolved()
    groups = load_dump(dump_path(run / "rollouts", 0))
    sequences = with_advantages(to_sequences(groups), groups, config.advantage, config.rewards)
    assert max(len(np.unique(s.advantages)) for s in sequences) > 2


def test_the_streams_are_logged_apart(run):
    for line in [line for line in read_metrics(run) if "loss" in line]:
        groups = load_dump(dump_path(run / "rollouts", line["step"]))
        scores = [score for group in groups for score in group.scores]
        for name in ("exact", "cosine", "repetition", "overlong"):
            values = [score.streams[name] for score in scores]
            assert line[f"reward/{name}"] == pytest.approx(np.mean(values))
            assert line[f"reward_std/{name}"] == pytest.approx(np.std(values))
            assert line[f"reward_wrong/{name}"] == pytest.approx(
                np.mean([v for s, v in zip(scores, values, strict=True) if not s.correct])
            )
        assert line["grad_norm"] > 0
