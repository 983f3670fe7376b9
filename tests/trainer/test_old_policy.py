"""PSFT's old policy: which weights its log-probs come from, what a checkpoint keeps of it, and when PSFT is SFT."""

import json
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import final_weights, write_inputs
from safetensors.numpy import load
from training_sequences import make_sequences

from megatron_srft import config as configuration
from megatron_srft.config import ConfigError
from megatron_srft.metrics import read_metrics
from megatron_srft.train import run_training
from megatron_srft.trainer.old_policy import OldPolicy, remarks
from megatron_srft.trainer.step import SequenceStats
from megatron_srft.trainer.trainer import Trainer

STEPS = 6


def settings(steps: int = 20, **objective):
    return configuration.from_dict({"steps": steps, "objective": {"kind": "psft", **objective}})


# ---------------------------------------------------------------- the schedule


@pytest.mark.parametrize(
    ("objective", "windows"),
    [
        ({"refresh_every": 4}, {0: range(4), 3: range(4), 4: range(4, 8), 18: range(16, 20)}),
        ({"refresh_every": 4, "warmup_steps": 3}, {2: None, 3: range(3, 7), 6: range(3, 7), 7: range(7, 11)}),
        ({"refresh_every": 7}, {19: range(14, 21)}),
        ({"refresh_every": None}, {0: range(20), 19: range(20)}),
        ({"refresh_every": None, "warmup_steps": 5}, {4: None, 5: range(5, 20), 19: range(5, 20)}),
        ({"refresh_every": 1}, {0: None, 9: None}),
    ],
)
def test_steps_that_share_an_old_policy(objective, windows):
    policy = OldPolicy(settings(**objective))
    assert {step: policy.window(step) for step in windows} == windows


def test_sft_kl_has_a_fixed_reference():
    policy = OldPolicy(configuration.from_dict({"steps": 20, "objective": {"kind": "sft_kl"}}))
    assert [policy.window(step) for step in (0, 19)] == [range(20)] * 2
    assert policy.watch(19, {}) is None


def test_other_objectives_have_no_old_policy():
    policy = OldPolicy(configuration.from_dict({"objective": {"kind": "sft"}}))
    sequences = make_sequences([(True,)], seed=1)
    assert policy.window(3) is None and policy.arrays(3) == {}
    assert policy.attach(sequences, 3, pytest.fail, pytest.fail) is sequences


class Demonstrations:
    """Six, two per step, so that they come again after three steps; their log-probs say when they were asked."""

    def __init__(self):
        made = make_sequences([(True,)] * 6, seed=2)
        self.all = [replace(s, old_logprobs=None, is_demonstration=True) for s in made]
        self.now, self.asked = 0, []

    def of_step(self, step: int):
        return [self.all[(2 * step + i) % 6] for i in range(2)]

    def measure(self, sequences):
        self.asked += [self.all.index(s) for s in sequences]
        return [
            SequenceStats(
                logprobs=np.full(s.response_length, -self.now - self.all.index(s) / 10, np.float32),
                entropy=np.zeros(s.response_length, np.float32),
            )
            for s in sequences
        ]

    def old_at(self, policy: OldPolicy, step: int) -> list[float] | None:
        self.now = step
        found = policy.attach(self.of_step(step), step, self.measure, self.of_step)
        assert [s.token_ids.tolist() for s in found] == [s.token_ids.tolist() for s in self.of_step(step)]
        return None if found[0].old_logprobs is None else [round(float(s.old_logprobs[0]), 4) for s in found]


def test_log_probs_are_those_at_the_refresh_and_each_demonstration_is_measured_once():
    data, policy = Demonstrations(), OldPolicy(settings(refresh_every=5, warmup_steps=1))
    assert data.old_at(policy, 0) is None and data.old_at(policy, 1) is None  # warm-up; a window's first update
    assert sorted(data.asked) == [0, 1, 2, 3, 4, 5]  # four steps of two
    assert data.old_at(policy, 2) == [-1.4, -1.5]
    assert data.old_at(policy, 5) == [-1.4, -1.5]
    assert data.old_at(policy, 6) is None
    assert data.old_at(policy, 7) == [-6.2, -6.3]


def test_a_checkpoint_keeps_what_the_window_still_needs():
    data, policy = Demonstrations(), OldPolicy(settings(refresh_every=4))
    data.old_at(policy, 0)
    again = OldPolicy(settings(refresh_every=4))
    again.restore(policy.arrays(2))
    assert again.logprobs.keys() == policy.logprobs.keys()
    assert all(again.logprobs[key].tobytes() == value.tobytes() for key, value in policy.logprobs.items())
    assert data.old_at(again, 3) == data.old_at(policy, 3) == [-0.0, -0.1]
    assert policy.arrays(4) == {}  # the next step is a refresh


def test_other_data_inside_a_window_are_refused():
    data, policy = Demonstrations(), OldPolicy(settings(refresh_every=3))
    data.old_at(policy, 0)
    first = data.all[2]
    changed = np.concatenate([first.token_ids[:-1], [1]]).astype(np.int32)
    for other in (replace(first, token_ids=changed), replace(first, prompt_length=first.prompt_length - 1)):
        with pytest.raises(ConfigError, match="between two refreshes of the old policy, and it has no old log-probs"):
            policy.attach([other], 1, data.measure, data.of_step)


# ---------------------------------------------------------------- whole runs


def dense_logprobs(folder, sequence) -> np.ndarray:
    """By transformers, in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    tokens = torch.tensor(sequence.token_ids, dtype=torch.int64)
    with torch.no_grad():
        rows = torch.log_softmax(model(tokens[None]).logits[0, sequence.prompt_length - 1 : -1], -1)
    return rows.gather(1, tokens[sequence.prompt_length :, None])[:, 0].numpy()


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Runs an objective from the same start; returns the run's folder and the sequences of each of its updates."""

    def run(name: str, objective: dict, **changes):
        seen = []
        update = Trainer._update
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_update", lambda self, part, *rest: seen.append(part) or update(self, part, *rest))
            path = write_inputs(tmp_path, name=name, objective=objective, **{"steps": STEPS, **changes})
            config = configuration.load(path)
            run_training(config)
        return config.folder, seen

    return run


@pytest.mark.parametrize(
    ("objective", "refreshes"),
    [
        ({"kind": "sft_kl"}, [None, 0, 0, 0, 0, 0]),
        ({"refresh_every": 3}, [None, 0, 0, None, 3, 3]),
        ({"refresh_every": 4, "warmup_steps": 1}, [None, None, 1, 1, 1, None]),
        ({"refresh_every": None, "warmup_steps": 2}, [None, None, None, 2, 2, 2]),
    ],
    ids=["sft-kl", "windows", "warm-up", "fixed"],
)
def test_old_log_probs_are_those_of_the_weights_at_the_refresh(train, objective, refreshes):
    """Against the weights that the run exported then; twelve demonstrations, so that the fifth step begins again."""
    folder, seen = train("psft", {"kind": "psft", **objective}, checkpoint={"every": 0, "export_every": 1})
    for sequences, refresh in zip(seen, refreshes, strict=True):
        assert all((s.old_logprobs is None) == (refresh is None) for s in sequences)
        if refresh is None:
            continue
        weights = folder / "hf" / f"step-{refresh:06d}" if refresh else folder.parent.parent / "model"
        for sequence in sequences:
            expected = dense_logprobs(weights, sequence)
            np.testing.assert_allclose(sequence.old_logprobs, expected, rtol=0, atol=1e-5)
    lines = [line for line in read_metrics(folder) if "loss" in line]
    for line, refresh in zip(lines, refreshes, strict=True):
        changed = refresh is not None
        if objective.get("kind") == "sft_kl":
            assert (line["loss/kl"] > 0) == changed
        else:
            assert (line["loss"] == pytest.approx(-1, abs=1e-6)) == (not changed)
        assert (line["ratio_demonstrations/max"] > 1.001) == changed
    assert objective.get("kind") == "sft_kl" or any(line["clip_fraction/demonstrations"] > 0 for line in lines)


def test_dpo_is_measured_against_the_weights_that_its_stage_began_with(train, tmp_path):
    """Its margins, from transformers in float64 and the weights that the run exported before each update."""
    rows = [{"prompt": f"{i}+{i}=", "chosen": f"s{i}#{2 * i}", "rejected": f"#{2 * i + 1}"} for i in range(5)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": [str(tmp_path / "pairs.jsonl")], "chat_template": "never", "max_prompt_tokens": 16}
    checkpoint = {"every": 0, "export_every": 1}
    folder, seen = train("dpo", {"kind": "dpo", "beta": 0.3}, data=data, checkpoint=checkpoint, steps=3)
    lines = [line for line in read_metrics(folder) if "loss" in line]
    assert (lines[0]["loss"], lines[0]["dpo/margin"]) == (pytest.approx(math.log(2), abs=1e-6), 0)
    for step, sequences in enumerate(seen):
        assert [s.preferred for s in sequences] == [True, False] * 3
        if step == 0:
            assert all(s.old_logprobs is None for s in sequences)
            continue
        scores = []
        for sequence in sequences:
            reference = dense_logprobs(tmp_path / "model", sequence)
            np.testing.assert_allclose(sequence.old_logprobs, reference, rtol=0, atol=1e-5)
            scores.append((dense_logprobs(folder / "hf" / f"step-{step:06d}", sequence) - reference).sum())
        margins = np.array(scores[::2]) - scores[1::2]
        assert lines[step]["dpo/margin"] == pytest.approx(0.3 * margins.mean(), abs=1e-4)
        assert lines[step]["loss"] == pytest.approx(np.log1p(np.exp(-0.3 * margins)).mean(), abs=1e-4)
        assert lines[step]["dpo/margin"] > 0.01


def parameters(folder) -> dict[str, np.ndarray]:
    return load(final_weights(folder))


@pytest.mark.parametrize(
    ("steps", "objective"),
    [
        (4, {"refresh_every": 1}),
        (4, {"refresh_every": 8, "warmup_steps": 4}),
        (1, {"refresh_every": None}),
        (1, {"refresh_every": 8, "clip": None}),
    ],
    ids=["refresh at every update", "warm-up", "first update of a fixed reference", "first update without a clip"],
)
def test_where_it_is_sft_all_weights_are_those_of_sft(train, steps, objective):
    sft, _ = train("sft", {"kind": "sft"}, steps=steps)
    psft, _ = train("psft", {"kind": "psft", **objective}, steps=steps)
    norms = [[line["grad_norm"] for line in read_metrics(folder) if "loss" in line] for folder in (sft, psft)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)
    expected, found = parameters(sft), parameters(psft)
    assert found.keys() == expected.keys()
    assert max(np.abs(found[name] - value).max() for name, value in expected.items()) < 1e-6


def test_without_a_clip_it_is_neither_sft_nor_psft(train):
    """That control keeps the ratio as a weight."""
    variants = [{"kind": "sft"}, {"kind": "psft"}, {"kind": "psft", "clip": None}]
    folders = [train(str(number), objective, steps=4)[0] for number, objective in enumerate(variants)]
    final = [parameters(folder)["model.norm.weight"] for folder in folders]
    assert len({weights.tobytes() for weights in final}) == len(variants)
    assert not any("clip_fraction/demonstrations" in line for line in read_metrics(folders[2]))


# ---------------------------------------------------------------- warnings


@pytest.mark.parametrize(
    ("objective", "steps", "expected"),
    [
        ({"refresh_every": 1}, 20, "refresh_every is 1: the old policy is always the current one, and this is exactly"),
        (
            {"warmup_steps": 20},
            20,
            "warmup_steps is 20 of 20 steps, and the first update after a refresh has the ratio",
        ),
        ({"warmup_steps": 19}, 20, "warmup_steps is 19 of 20 steps"),
        ({"warmup_steps": 18}, 20, None),
        ({}, 2, None),
    ],
)
def test_settings_that_make_it_sft_are_remarked(objective, steps, expected):
    found = remarks(settings(steps, **objective))
    assert len(found) == (expected is not None)
    assert expected is None or expected in found[0]


@pytest.mark.parametrize(("lr", "told"), [(1e-7, 1), (0.01, 0)])
def test_a_run_that_never_clips_says_so_once(train, caplog, lr, told):
    with caplog.at_level(logging.WARNING, "megatron_srft"):
        train("psft", {"kind": "psft", "refresh_every": 3}, optimizer={"lr": lr})
    assert sum("PSFT has clipped no token so far" in record.message for record in caplog.records) == told


def test_it_is_told_after_ten_windows_too():
    policy = OldPolicy(settings(1000, refresh_every=2))
    metrics = {"clip_fraction/demonstrations": 0.0, "ratio_demonstrations/max": 1.01}
    data, told = Demonstrations(), []
    for step in range(40):
        data.old_at(policy, step)
        told += [step] * (policy.watch(step, metrics) is not None)
    assert told == [20]
