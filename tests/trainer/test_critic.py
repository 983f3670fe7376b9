"""The critic's values and gradients against Hugging Face's model with a linear head in float64, in several layouts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from spawning import spawn
from tiny_models import make_model
from training_sequences import VOCAB, make_sequences

from megatron_srft import config as configuration
from megatron_srft.config import ConfigError
from megatron_srft.sample import count

RANDOM = np.random.default_rng(7)
HEAD = RANDOM.normal(0, 0.1, 32)
SEQUENCES = [
    replace(
        s,
        values=RANDOM.normal(0, 0.2, s.response_length).astype(np.float32),
        returns=RANDOM.normal(0, 1, s.response_length).astype(np.float32),
    )
    for s in make_sequences([(False, False, False), (False, False)], seed=3)
]
CLIP = 0.2
CASES = {
    1: [({}, 1000), ({}, 1)],
    2: [
        ({"distributed_optimizer": False}, 20),  # DP2
        ({"tensor": 2}, 30),
        ({"tensor": 2, "sequence_parallel": True}, 30),
        ({"context": 2, "distributed_optimizer": False}, 20),
        ({"pipeline": 2}, 20),
        ({"pipeline": 2, "virtual_pipeline": 2, "overlap_communication": True}, 20),
    ],
}


def run_config(folder: str, layout: dict, tokens_per_microbatch: int, **sections) -> configuration.RunConfig:
    return configuration.from_dict(
        {
            "model": {"path": folder},
            "parallel": layout,
            "batch": {"tokens_per_microbatch": tokens_per_microbatch},
            "data": {"max_prompt_tokens": 16},
            "rollout": {"kind": "local", "max_response_tokens": 16},
            "objective": {"kind": "ppo"},
            "critic": {"value_clip": CLIP, "optimizer": {"lr": 0.1, "adam_epsilon": 1.0, "clip_grad": 0.0}},
            **sections,
        }
    ).resolved()


def reference(folder: Path) -> tuple[float, list[np.ndarray], dict[str, np.ndarray]]:
    """Loss, values of each sequence, and gradients by Hugging Face names, in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").model
    head = torch.tensor(HEAD.astype(np.float32), dtype=torch.float64, requires_grad=True)
    total, tokens, found = torch.zeros((), dtype=torch.float64), 0, []
    for s in SEQUENCES:
        hidden = model(torch.tensor(s.token_ids, dtype=torch.int64)[None]).last_hidden_state[0]
        values = hidden[s.prompt_length - 1 : -1] @ head
        old, returns = (torch.tensor(array, dtype=torch.float64) for array in (s.values, s.returns))
        near = old + (values - old).clamp(-CLIP, CLIP)
        total = total + 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2).sum()
        tokens += len(values)
        found.append(values.detach().numpy())
    loss = total / tokens
    loss.backward()
    gradients = {f"model.{name}": p.grad.numpy() for name, p in model.named_parameters()}
    return loss.item(), found, {**gradients, "head": head.grad.numpy()}


def measure(folder: str, layout: dict, tokens_per_microbatch: int) -> tuple:
    """On every rank: loss, values, and gradients (the head's where the rank has it) of the layout."""
    from megatron.core import parallel_state

    from megatron_srft.trainer import parallel
    from megatron_srft.trainer.conversion import parameters
    from megatron_srft.trainer.trainer import Trainer
    from megatron_srft.weights.streaming import Parameter, export_hf

    config = run_config(folder, layout, tokens_per_microbatch)
    trainer = Trainer(config, parallel.start(config.parallel, seed=1))
    zeros = [s.values for s in trainer.prepare([replace(s, values=None) for s in SEQUENCES])]
    assert all((values == 0).all() and len(values) for values in zeros)
    last = trainer.critic.models[-1]
    if last.post_process:
        with torch.no_grad():
            last.output_layer.weight.copy_(torch.tensor(HEAD)[None])
    batches = trainer.microbatches(SEQUENCES)
    values = trainer.critic.values(batches)
    metrics = trainer.critic.update(batches, count(SEQUENCES), lr=0.0)
    owned = [Parameter(p.name, p.layer_offset, p.tensor.main_grad) for p in parameters(trainer.critic.models)]
    gradients = {n: g.numpy().copy() for n, g in export_hf(owned, trainer.models[0].architecture, trainer.groups)}
    if last.post_process:
        gradients["head"] = last.output_layer.weight.main_grad.numpy()[0].copy()
    parallel_state.destroy_model_parallel()
    return metrics, [values[i] for i in range(len(SEQUENCES))], gradients


def measure_all(folder: str, cases: list[tuple]) -> list[tuple]:
    return [measure(folder, layout, budget) for layout, budget in cases]


@pytest.mark.parametrize("world_size", [1, 2])
def test_values_loss_and_gradients_match_hugging_face(tmp_path, world_size):
    folder = make_model("qwen2", tmp_path / "model", tied=True, vocab=VOCAB, tokenizer=False)
    loss, values, wanted = reference(folder)
    norm = np.sqrt(sum((gradient**2).sum() for gradient in wanted.values()))
    scale = max(np.abs(gradient).max() for gradient in wanted.values())
    for of_rank in spawn(world_size, measure_all, str(folder), CASES[world_size]):
        for case, (metrics, found, gradients) in zip(CASES[world_size], of_rank, strict=True):
            assert metrics["value/loss"] == pytest.approx(loss, rel=2e-5), case
            assert metrics["value/grad_norm"] == pytest.approx(norm, rel=2e-5), case
            for mine, theirs in zip(found, values, strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=2e-6, err_msg=str(case))
            assert set(wanted) - set(gradients) <= {"head"}, case
            for name, gradient in gradients.items():
                difference = np.abs(gradient - wanted[name]).max()
                assert difference <= 2e-5 * scale, (case, name, difference / scale)


# ---------------------------------------------------------------- where the critic starts


def starts(folder: str, other: str, larger: str) -> tuple[list[dict], str]:
    """The critic's trunk, started from the policy of model.path and from another folder; what a third one is told.

    A later stage starts it from the policy as it then is: here the second trainer's, with every weight doubled.
    """
    from megatron.core import parallel_state

    from megatron_srft.trainer import parallel
    from megatron_srft.trainer.conversion import parameters
    from megatron_srft.trainer.trainer import Trainer
    from megatron_srft.weights.streaming import export_hf

    found = []
    for path in (None, other):
        config = run_config(folder, {"tensor": 2}, 100, critic={"path": path})
        trainer = Trainer(config, parallel.start(config.parallel, seed=1))
        trunk = export_hf(parameters(trainer.critic.models), trainer.models[0].architecture, trainer.groups)
        found.append({name: tensor.numpy().copy() for name, tensor in trunk})
        if path is None:
            parallel_state.destroy_model_parallel()
    for trained in trainer.models:
        for parameter in trained.parameters():
            parameter.detach().mul_(2)
    trainer.begin_stage(run_config(folder, {"tensor": 2}, 100), 10)
    trunk = export_hf(parameters(trainer.critic.models), trainer.models[0].architecture, trainer.groups)
    found.append({name: tensor.numpy() / 2 for name, tensor in trunk})
    parallel_state.destroy_model_parallel()
    config = run_config(folder, {"tensor": 2}, 100, critic={"path": larger})
    with pytest.raises(ConfigError) as refused:
        Trainer(config, parallel.start(config.parallel, seed=1))
    return found, str(refused.value)


def test_the_trunk_starts_from_the_policy_or_from_a_folder_of_its_sizes(tmp_path):
    from safetensors.numpy import load_file

    folders = [
        make_model(
            "qwen2", tmp_path / f"{seed}", tied=True, vocab=VOCAB, tokenizer=False, seed=seed, num_hidden_layers=n
        )
        for seed, n in ((0, 2), (1, 2), (2, 4))
    ]
    for of_rank, message in spawn(2, starts, *map(str, folders)):
        for folder, found in zip([folders[0], folders[1], folders[0]], of_rank, strict=True):
            expected = load_file(folder / "model.safetensors")
            assert set(found) == set(expected)
            for name, tensor in expected.items():
                np.testing.assert_array_equal(found[name], tensor, err_msg=name)
        assert message == (
            f"critic.path {folders[2]} has num_layers 4, and model.path has 2; name a model of the policy's sizes"
        )


def test_a_missing_folder_is_told_by_the_key(tmp_path):
    from megatron_srft.trainer.critic import check_folder
    from megatron_srft.weights.architecture import read_architecture
    from megatron_srft.weights.folder import read_config

    folder = make_model("qwen2", tmp_path / "model", vocab=VOCAB, tokenizer=False, num_hidden_layers=2)
    architecture = read_architecture(read_config(folder))
    nowhere = run_config(str(folder), {}, 100, critic={"path": str(tmp_path / "nowhere")})
    with pytest.raises(ConfigError, match="critic.path: .*nowhere is not a folder"):
        check_folder(nowhere, architecture)
    check_folder(run_config(str(folder), {}, 100, critic={"path": str(folder)}), architecture)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        check_folder(run_config(str(folder), {}, 100, critic={"path": str(folder)}), architecture)
