"""HPT's gate and ReLIFT's queue on groups written out by hand, and whole runs with them."""

from dataclasses import replace

import numpy as np
import pytest
from runs import final_weights, history, rewind, write_inputs

from megatron_srft import config as configuration
from megatron_srft.advantages import to_sequences
from megatron_srft.config import ConfigError, HptConfig, ReliftConfig, SrftConfig, from_dict
from megatron_srft.metrics import read_metrics
from megatron_srft.routing import Router, gated
from megatron_srft.sample import Completion, Demonstration, Group, Prompt, Score
from megatron_srft.train import run_training


def group(name: str, verdicts: str, *, demonstrated: bool = True) -> Group:
    """`verdicts` has a letter for each completion: r(ight), w(rong), or a failed verification (x)."""
    tokens = np.array([5, 6], np.int32)
    demonstration = Demonstration(token_ids=tokens, text="d") if demonstrated else None
    completion = Completion(
        token_ids=tokens, text="c", rollout_logprobs=np.zeros(2, np.float32), finish_reason="stop", policy_version=0
    )
    prompt = Prompt(
        id=name,
        text=name,
        token_ids=tokens,
        answer="1",
        source="s",
        demonstrations=(demonstration,) if demonstrated else (),
    )
    return Group(
        prompt=prompt,
        completions=(completion,) * len(verdicts),
        demonstration=demonstration,
        scores=tuple(Score(reward=float(v == "r"), correct={"r": True, "w": False, "x": None}[v]) for v in verdicts),
        demonstration_score=Score(reward=1.0, correct=True) if demonstrated else None,
    )


GROUPS = [
    group("unsolved", "wwww"),
    group("failed", "xxww"),
    group("rare", "wrww"),
    group("bare", "wwww", demonstrated=False),
    group("easy", "rrrr"),
]


@pytest.mark.parametrize(("gate", "taught"), [(0.0, {0, 1}), (0.25, {0, 1, 2}), (0.24, {0, 1})])
def test_the_gate_keeps_completions_or_the_demonstration(gate, taught):
    kept, metrics = gated(to_sequences(GROUPS), GROUPS, gate)
    members = {index: [s.is_demonstration for s in kept if s.group == index] for index in range(5)}
    assert members == {index: [True] if index in taught else [False] * 4 for index in range(5)}
    assert metrics == {
        "hpt/supervised_prompts": len(taught),
        "hpt/policy_gradient_prompts": 5 - len(taught),
        "hpt/without_demonstration": 1,
        "hpt/dropped_completions": 4 * len(taught),
    }


def test_unsolved_prompts_wait_in_order_until_they_are_enough():
    router = Router(ReliftConfig(buffer_size=3))
    kept, metrics = router.select(to_sequences(GROUPS), GROUPS)
    assert len(kept) == 20 and not any(s.is_demonstration for s in kept)
    assert metrics == {"relift/queued": 2, "relift/without_demonstration": 1, "relift/waiting": 2}
    assert router.take() == []
    again = Router(ReliftConfig(buffer_size=3))  # a checkpoint between the two steps
    again.restore(router.arrays())
    _, metrics = again.select(to_sequences(GROUPS[:1]), GROUPS[:1])
    _, metrics = again.select(to_sequences(GROUPS[:1]), GROUPS[:1])
    assert metrics["relift/waiting"] == 4
    assert again.take() == ["unsolved", "failed", "unsolved"]
    assert again.take() == [] and again.waiting == ["unsolved"]
    assert again.remark(4, steps=6) is None
    assert again.remark(5, steps=6).startswith("1 prompts without a right answer were still waiting")


def test_other_objectives_learn_from_everything():
    router, sequences = Router(SrftConfig()), to_sequences(GROUPS)
    assert router.select(sequences, GROUPS) == (sequences, {})
    assert router.take() == [] and router.arrays() == {}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"objective": {"kind": "hpt", "gate": 1.0}}, r"objective.gate must lie in \[0, 1\), not 1.0"),
        ({"objective": {"kind": "hpt", "sft_weight": -1}}, "objective.sft_weight must be a number of at least 0"),
        ({"objective": {"kind": "relift", "buffer_size": 0}}, "objective.buffer_size must be a number of at least 1"),
        ({"objective": {"kind": "relift"}, "batch": {"rollouts_per_prompt": 1}}, "raise batch.rollouts_per_prompt"),
        ({"objective": {"kind": "hpt"}, "batch": {"rollouts_per_prompt": 1}}, "raise batch.rollouts_per_prompt"),
    ],
)
def test_impossible_settings_are_refused_with_the_key(tree, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(tree)


def test_a_run_with_the_gate(tmp_path):
    """A random model solves nothing: every prompt teaches its demonstration, and the rollouts have no part."""
    config = configuration.load(write_inputs(tmp_path, steps=1, objective={"kind": "hpt"}))
    run_training(config)
    (line,) = read_metrics(config.folder)
    assert line["hpt/supervised_prompts"] == 3 and line["hpt/dropped_completions"] == 9
    assert "entropy/rollouts" not in line and line["loss/rollouts"] == 0.0
    assert line["loss/sft"] == pytest.approx(line["nll/demonstrations"])


@pytest.fixture(scope="module")
def relift(tmp_path_factory):
    """Three unsolved prompts a step, a supervised update of four: after steps 2, 3 and 4, with 3 to 5 waiting."""
    folder = tmp_path_factory.mktemp("relift")
    objective = {"kind": "relift", "buffer_size": 4, "sft_lr": 0.01}
    path = write_inputs(folder, name="run", steps=4, objective=objective)
    run_training(configuration.load(path))
    return path, folder / "runs" / "run"


def test_a_run_with_the_queue(relift):
    lines = read_metrics(relift[1])
    assert [line["relift/waiting"] for line in lines] == [3, 6, 5, 4]
    assert ["relift/loss" in line for line in lines] == [False, True, True, True]
    taught = lines[1]
    bonus = 0.001 * taught["entropy/demonstrations"]
    assert taught["relift/loss"] == pytest.approx(taught["nll/demonstrations"] - bonus, rel=1e-5)
    assert lines[3]["nll/demonstrations"] < taught["nll/demonstrations"]
    assert "nll/demonstrations" not in lines[0]


@pytest.mark.parametrize("step", [1, 3])
def test_the_queue_survives_a_resume_with_the_same_bits(relift, tmp_path, step):
    path, run = relift
    rewind(run, tmp_path / "run", step)
    run_training(configuration.load(path, [f"run_dir={tmp_path}"]))
    assert final_weights(tmp_path / "run") == final_weights(run)
    assert history(tmp_path / "run") == history(run)


def test_other_data_under_a_queue_are_refused(relift, tmp_path):
    path, run = relift
    rewind(run, tmp_path / "run", 1)
    renamed = path.parent / "train.jsonl"
    (tmp_path / "other.jsonl").write_text(renamed.read_text())
    config = configuration.load(path, [f"run_dir={tmp_path}", f"data.train=[{tmp_path}/other.jsonl]"])
    with pytest.raises(ConfigError, match="waiting for a supervised update, and data.train has none of that name"):
        run_training(config)


def test_a_gate_is_an_objectives_own():
    assert Router(replace(HptConfig(), gate=0.5)).select(to_sequences(GROUPS), GROUPS)[1]["hpt/supervised_prompts"] == 3
