"""Whole runs with a hidden-state reward beside a verifier."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from reward_heads import make_head
from runs import Run, final_weights, rewind, saved, write_inputs
from safetensors.torch import load_file
from test_resume_critic import figures
from tiny_models import make_model, make_tokenizer
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoModelForCausalLM

from megatron_srft import config as configuration
from megatron_srft.config import ConfigError
from megatron_srft.guards import RunStopped
from megatron_srft.hidden_reward import BaseModel, prompt_fingerprint, save_head, weights_fingerprint
from megatron_srft.metrics import read_metrics
from megatron_srft.rollout import dump_path, load_dump
from megatron_srft.train import run_training
from megatron_srft.trainer.checkpoint import read_arrays

WEIGHT = 0.2


def base_of(folder: Path) -> BaseModel:
    """A tiny model as heads know it, from its files alone."""
    sizes = json.loads((folder / "config.json").read_text())
    return BaseModel(
        name=str(folder),
        fingerprint=weights_fingerprint(load_file(folder / "model.safetensors").items()),
        num_layers=sizes["num_hidden_layers"],
        hidden_size=sizes["hidden_size"],
        vocab_size=sizes["vocab_size"],
        dtype="float32",
    )


def write_head(folder: Path, model: Path, config: Path, **settings):
    """A head for a model and the prompts of a config; what it gives."""
    data = configuration.load(config).data
    head = make_head(base_of(model), **settings)
    head = replace(head, config=replace(head.config, prompt_format=prompt_fingerprint(data, make_tokenizer())))
    save_head(head, folder)
    return head


def rewards(folder: Path, **swift) -> list[dict]:
    digits = {"kind": "format", "pattern": "(?s).*[0-9].*", "matched": 1.0, "gate": False}
    return [{"kind": "exact"}, digits, {"kind": "swift", "head": str(folder / "head"), "weight": WEIGHT, **swift}]


@pytest.fixture(autouse=True)
def without_a_report(monkeypatch):
    """Its plots take longer than all the rest of a tiny run; the module's own run has one."""
    monkeypatch.setattr("megatron_srft.session.write_report", lambda folder: folder)


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, str]:
    """Prompt -> what the starting policy says to it in the step in which it comes."""
    folder = tmp_path_factory.mktemp("said")
    unmoved = {"optimizer": {"lr": 1e-9}, "checkpoint": {"every": 0}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_srft.session.write_report", lambda folder: folder)
        run_training(configuration.load(write_inputs(folder, name="probe", rewards=[{"kind": "exact"}], **unmoved)))
    rollouts = folder / "runs" / "probe" / "rollouts"
    groups = [group for step in range(4) for group in load_dump(dump_path(rollouts, step))]
    return {group.prompt.text: group.completions[0].text for group in groups}


def write_task(folder: Path, said: dict[str, str], **settings) -> Path:
    """`write_inputs` whose reference answers are what the model says: of each prompt's completions the first is right,
    as long as the policy has hardly moved."""
    path = write_inputs(folder, **{"optimizer": {"lr": 1e-4}, **settings})
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    rows = [row | {"answer": said[row["prompt"]]} for row in rows]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


REFRESH = {"refresh_every": 2, "refresh_window": 3, "refresh_lr": 0.02, "refresh_weight_decay": 0.1}


@pytest.fixture(scope="module")
def run(tmp_path_factory, said):
    """Four steps of SRFT, whose demonstrations count in the advantage; the head is trained on after two and after four.
    The policy of every step is kept."""
    folder = tmp_path_factory.mktemp("swift")
    checkpoint = {"every": 1, "keep": 10, "export_every": 1}
    path = write_task(folder, said, name="reference", rewards=rewards(folder, **REFRESH), checkpoint=checkpoint)
    head = write_head(folder / "head", folder / "model", path)
    run_training(configuration.load(path))
    return folder, head


def policy(folder: Path, step: int) -> torch.nn.Module:
    """Hugging Face's own model with the weights of the policy after so many steps."""
    weights = folder / "model" if step == 0 else folder / "runs" / "reference" / "hf" / f"step-{step:06d}"
    return AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)


def head_after(folder: Path, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias in a checkpoint."""
    arrays = read_arrays(folder / "runs" / "reference" / "checkpoints" / f"step-{step:06d}")
    return torch.from_numpy(arrays["swift_weight"]), torch.from_numpy(arrays["swift_bias"])


def groups_of(folder: Path, step: int):
    return load_dump(dump_path(folder / "runs" / "reference" / "rollouts", step))


@torch.no_grad()
def scored_states(model: torch.nn.Module, prompt: np.ndarray, response: np.ndarray) -> torch.Tensor:
    """[tokens, layers, hidden] float64 of all layers at the response's tokens but the last one."""
    states = model(torch.from_numpy(np.concatenate([prompt, response])[None]).long(), output_hidden_states=True)
    scored = slice(len(prompt), len(prompt) + len(response) - 1)
    return torch.stack([layer[0, scored].double() for layer in states.hidden_states], dim=1)


def stacked_score(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The definition."""
    gate, reward = (torch.einsum("tlh,lrh->tr", states, weight.double()) + bias.double()).unbind(1)
    gate = gate.sigmoid()
    return (gate * reward).sum() / gate.sum()


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_the_logged_scores_are_those_of_the_policy_and_the_head_of_the_step(run, step):
    folder, head = run
    model = policy(folder, step)
    weight, bias = (head.weight, head.bias) if step < 2 else head_after(folder, step)
    compared = 0
    for group in groups_of(folder, step):
        answers = [c.token_ids for c in group.completions] + [group.demonstration.token_ids]
        expected = [
            float(stacked_score(scored_states(model, group.prompt.token_ids, answer), weight, bias))
            for answer in answers
        ]  # fmt: skip
        lowest = min(score for score in expected[:-1] if not np.isnan(score))  # nan: one token only
        expected = [lowest if np.isnan(score) else score for score in expected]
        scores = [*group.scores, group.demonstration_score]
        assert [s.streams["swift"] for s in scores] == pytest.approx(expected, abs=2e-5)
        for score in scores:
            others = score.streams["exact"] + score.streams["format"]
            assert score.reward == pytest.approx(others + WEIGHT * score.streams["swift"], abs=1e-12)
        compared += len(scores)
    assert compared == 12


def test_what_the_run_logs(run):
    folder, _ = run
    lines = read_metrics(folder / "runs" / "reference")
    assert [line["swift/staleness"] for line in lines] == [0, 1, 0, 1]
    assert ["swift/refresh_loss" in line for line in lines] == [False, True, False, True]
    for step, line in enumerate(lines):
        parts = line["reward/exact"] + line["reward/format"] + WEIGHT * line["reward/swift"]
        assert line["reward/mean"] == pytest.approx(parts)
        scores = [score for group in groups_of(folder, step) for score in group.scores]
        right = [score.streams["swift"] for score in scores if score.correct]
        if line["swift/unscored_share"] == 0:
            assert line["swift/score_correct"] == pytest.approx(np.mean(right), abs=1e-12)
            assert line["swift/score"] == pytest.approx(line["reward/swift"], abs=1e-12)
        assert line["accounting/unscored_responses"] >= 9 * line["swift/unscored_share"]
        assert 0 < line["accuracy"] < 1 and 0 <= line["swift/auroc"] <= 1 and line["swift/auroc_groups"] > 0
    assert lines[1]["time/refresh"] > 0 and lines[1]["accounting/skipped_refreshes"] == 0
    report = (folder / "runs" / "reference" / "report.html").read_text()
    assert "Hidden-state reward" in report and "Does the head tell right from wrong?" in report


def test_a_refresh_is_plain_training_on_the_states_of_the_policy_that_follows(run):
    """AdamW on the binary cross-entropy, 16 completions at most to an update, in float64 on Hugging Face's states."""
    folder, head = run
    model, groups = policy(folder, 2), [*groups_of(folder, 0), *groups_of(folder, 1)]
    weight, bias = (one.double().requires_grad_() for one in (head.weight.clone(), head.bias.clone()))
    settings = dict(lr=REFRESH["refresh_lr"], weight_decay=REFRESH["refresh_weight_decay"])
    optimizer = torch.optim.AdamW([weight, bias], **settings)
    order = [groups[place] for place in np.random.default_rng((0, 0)).permutation(6)]
    losses = []
    for batch in (order[:5], order[5:]):
        scored = [
            (stacked_score(scored_states(model, group.prompt.token_ids, completion.token_ids), weight, bias), score)
            for group in batch
            for completion, score in zip(group.completions, group.scores, strict=True)
            if len(completion.token_ids) > 1
        ]
        labels = torch.tensor([float(score.correct) for _, score in scored], dtype=torch.float64)
        loss = binary_cross_entropy_with_logits(torch.stack([value for value, _ in scored]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    found_weight, found_bias = head_after(folder, 2)
    assert float((weight - head.weight).abs().max()) > 0.01, "nothing was to be learned"
    torch.testing.assert_close(found_weight.double(), weight.detach(), rtol=0, atol=2e-4)
    torch.testing.assert_close(found_bias.double(), bias.detach(), rtol=0, atol=2e-4)
    assert read_metrics(folder / "runs" / "reference")[1]["swift/refresh_loss"] == pytest.approx(
        np.mean(losses), abs=1e-4
    )


def test_a_killed_run_goes_on_with_the_same_bits(run, tmp_path):
    """Killed between two refreshes: head, moments and completions of the window come from the checkpoint."""
    folder, _ = run
    arguments = [str(folder / "config.yaml"), "name=killed", f"run_dir={tmp_path}"]
    killed = Run(arguments, tmp_path / "log", event=("open", "step-000004.partial/manifest.json", signal.SIGKILL))
    assert killed.wait() == -signal.SIGKILL, killed.output
    resumed = Run(arguments, tmp_path / "log")
    assert resumed.wait() == 0, resumed.output
    assert "resumed from" in resumed.output
    reference = folder / "runs" / "reference"
    assert figures(tmp_path / "killed") == figures(reference)
    assert final_weights(tmp_path / "killed") == final_weights(reference)
    mine, theirs = (read_arrays(path / "checkpoints" / "step-000004") for path in (tmp_path / "killed", reference))
    assert mine.keys() == theirs.keys() and len(mine) > 12
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


def test_two_ranks_log_the_same(run, tmp_path):
    """Tensor and sequence parallel on the same completions: every figure of the stream and of the refresh, the loss,
    the gradient."""
    folder, _ = run
    reference = folder / "runs" / "reference"
    replayed = ["rollout.kind=replay", f"rollout.folder={reference / 'rollouts'}", "rollout.max_response_tokens=8"]
    layout = ["parallel.tensor=2", "parallel.sequence_parallel=true"]
    arguments = [str(folder / "config.yaml"), "name=two", f"run_dir={tmp_path}", *layout, *replayed]
    two = Run(arguments, tmp_path / "log", ranks=2)
    assert two.wait() == 0, two.output
    mine, theirs = read_metrics(tmp_path / "two"), read_metrics(reference)
    for step in range(4):
        keys = [key for key in theirs[step] if key.startswith(("swift/", "reward"))] + ["loss", "grad_norm"]
        assert "swift/score" in keys and "reward_std/swift" in keys
        for key in keys:
            assert mine[step][key] == pytest.approx(theirs[step][key], rel=1e-3, abs=1e-4), (step, key)


# ---------------------------------------------------------------- refusals


def other_weights(folder: Path, path: Path) -> None:
    other = make_model("qwen2", folder / "other", tied=True, num_hidden_layers=2, seed=1)
    write_head(folder / "head", other, path)


def other_sizes(folder: Path, path: Path) -> None:
    other = make_model("qwen2", folder / "other", tied=True, num_hidden_layers=3)
    write_head(folder / "head", other, path)


def other_prompts(folder: Path, path: Path) -> None:
    head = write_head(folder / "head", folder / "model", path)
    save_head(replace(head, config=replace(head.config, prompt_format="f" * 64)), folder / "head")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (None, "rewards: swift.head: .*reward_head.json is missing; a reward head is a folder with"),
        (other_weights, "rewards: swift.head: .* was trained on other weights"),
        (
            other_sizes,
            "rewards: swift.head: .* is for a model with num_layers 3 .* has 2; name a head that was trained",
        ),
        (other_prompts, "rewards: swift.head: .* was trained on prompts of another form"),
    ],
)
def test_a_head_that_does_not_fit_is_refused_before_anything_is_trained(tmp_path, spoil, sentence):
    """Here of a later stage; the first one has no completions to reward."""
    stages = [{"name": "imitate", "steps": 1, "objective": {"kind": "sft"}}, {"name": "explore", "steps": 1}]
    path = write_inputs(tmp_path, rewards=rewards(tmp_path), stages=stages)
    if spoil is not None:
        spoil(tmp_path, path)
    config = configuration.load(path)
    with pytest.raises(ConfigError, match=sentence):
        run_training(config)
    assert not (config.folder / "metrics.jsonl").exists() and not list((config.folder / "checkpoints").iterdir())


def test_scores_that_are_no_numbers_end_the_run_before_an_update(tmp_path):
    path = write_inputs(tmp_path, rewards=rewards(tmp_path), objective={"kind": "grpo"})
    head = write_head(tmp_path / "head", tmp_path / "model", path)
    save_head(replace(head, weight=head.weight.sign() * 3e38), tmp_path / "head")
    config = configuration.load(path)
    with pytest.raises(ValueError, match="of 9 sequences give no finite reward: the first is sequence"):
        run_training(config)
    assert read_metrics(config.folder) == []


# ---------------------------------------------------------------- age and watch


def test_a_head_that_grows_too_old_stops_the_run_and_a_new_one_lets_it_go_on(tmp_path):
    """ReLIFT's supervised updates, which no config foresees: two updates a step, as no answer is right."""
    path = write_inputs(
        tmp_path,
        rewards=rewards(tmp_path, max_staleness=3),
        objective={"kind": "relift", "buffer_size": 3},
        checkpoint={"every": 0, "export_every": 1},
        optimizer={"lr": 1e-3},
    )
    write_head(tmp_path / "head", tmp_path / "model", path)
    config = configuration.load(path)
    sentence = "is 4 optimizer updates past .* swift.max_staleness is 3; raise it, or train a head"
    with pytest.raises(RunStopped, match=sentence):
        run_training(config)
    assert [line["swift/staleness"] for line in read_metrics(config.folder)] == [0, 2]
    assert saved(config.folder) == ["step-000002"]
    with pytest.raises(RunStopped, match=sentence):
        run_training(config)  # as it was: not one step more
    assert len(read_metrics(config.folder)) == 2

    write_head(tmp_path / "next", config.folder / "hf" / "step-000002", path, seed=1)
    renewed = configuration.load(path, [f"rewards.2.head={tmp_path / 'next'}"])
    run_training(renewed)
    assert [line["swift/staleness"] for line in read_metrics(config.folder)] == [0, 2, 0, 2]
    arrays = read_arrays(config.folder / "checkpoints" / "step-000004")
    assert (int(arrays["swift_version"]), int(arrays["swift_fitted"])) == (4, 4)
    run_training(configuration.load(path, [f"rewards.2.head={tmp_path / 'next'}", "steps=4"]))  # known from then on
    with pytest.raises(ConfigError, match="was trained on other weights"):
        write_head(tmp_path / "late", config.folder / "hf" / "step-000003", path)
        run_training(configuration.load(path, [f"rewards.2.head={tmp_path / 'late'}"]))


def test_without_a_verifier_the_stream_is_the_reward_and_that_is_said(tmp_path, caplog):
    settings = {"objective": {"kind": "grpo"}, "checkpoint": {"every": 0}}
    path = write_inputs(tmp_path, steps=2, rewards=rewards(tmp_path, normalise="group")[2:], **settings)
    write_head(tmp_path / "head", tmp_path / "model", path)
    config = configuration.load(path)
    run_training(config)
    assert "rewards has a hidden-state reward and no verifier: nothing watches" in caplog.text
    for line in read_metrics(config.folder):
        assert line["reward/swift"] == pytest.approx(0.0, abs=0.2) and line["grad_norm"] > 0
        assert "swift/auroc" not in line and "swift/correlation" not in line


def test_a_refresh_without_both_verdicts_leaves_the_head_as_it_is(tmp_path):
    path = write_inputs(tmp_path, steps=2, rewards=rewards(tmp_path, refresh_every=1), objective={"kind": "grpo"})
    head = write_head(tmp_path / "head", tmp_path / "model", path)
    config = configuration.load(path)
    run_training(config)
    lines = read_metrics(config.folder)
    assert [line["accounting/skipped_refreshes"] for line in lines] == [1, 1]
    assert [line["swift/staleness"] for line in lines] == [0, 1]
    arrays = read_arrays(config.folder / "checkpoints" / "step-000002")
    np.testing.assert_array_equal(arrays["swift_weight"], head.weight.numpy())


def test_a_later_stage_goes_on_with_the_head_as_it_is(tmp_path, said):
    """One trained on in the first stage; the second, which a resume begins in, names the same folder."""
    stages = [
        {"name": "first", "steps": 2, "objective": {"kind": "grpo"}},
        {"name": "second", "steps": 2, "objective": {"kind": "grpo"}, "rewards": rewards(tmp_path)},
    ]
    settings = dict(stages=stages, rewards=rewards(tmp_path, refresh_every=2, refresh_lr=0.05))
    path = write_task(tmp_path, said, name="staged", **settings)
    head = write_head(tmp_path / "head", tmp_path / "model", path)
    config = configuration.load(path)
    run_training(config)
    staged = config.folder
    assert [line["swift/staleness"] for line in read_metrics(staged)] == [0, 1, 0, 1]
    moved = [read_arrays(staged / "checkpoints" / f"step-{step:06d}")["swift_weight"] for step in (1, 2, 4)]
    np.testing.assert_array_equal(moved[0], head.weight.numpy())
    assert np.abs(moved[1] - moved[0]).max() > 0.01
    np.testing.assert_array_equal(moved[2], moved[1])
    rewind(staged, tmp_path / "again" / "staged", 3)
    run_training(configuration.load(path, [f"run_dir={tmp_path / 'again'}"]))
    assert figures(tmp_path / "again" / "staged") == figures(staged)
