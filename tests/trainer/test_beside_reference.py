"""SFT-KL over the whole vocabulary: loss and every gradient are those of two dense float64 models, in every layout."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import final_weights, history, rewind, write_inputs
from spawning import spawn
from tiny_models import make_model
from training_sequences import VOCAB, make_sequences

from megatron_srft import config as configuration
from megatron_srft.config import ConfigError
from megatron_srft.metrics import read_metrics
from megatron_srft.sample import count
from megatron_srft.train import run_training

TEMPERATURE, COEFFICIENT = 0.9, 0.7
SEQUENCES = [
    dataclasses.replace(s, old_logprobs=None) for s in make_sequences([(True, True), (True,), (True, True)], seed=3)
]
DIRECTIONS = ("policy_reference", "reference_policy")


def settings(policy: str, layout: dict, budget: int, direction: str) -> configuration.RunConfig:
    objective = {"kind": "sft_kl", "estimator": "full", "direction": direction, "kl_coefficient": COEFFICIENT}
    return configuration.from_dict(
        {
            "model": {"path": policy},
            "parallel": {"distributed_optimizer": False, **layout},
            "batch": {"tokens_per_microbatch": budget},
            "data": {"max_prompt_tokens": 16},
            "rollout": {"kind": "local", "temperature": TEMPERATURE, "max_response_tokens": 16},
            "objective": objective,
        }
    ).resolved()


def dense(policy: Path, reference: Path, direction: str) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Metrics, and gradients by Hugging Face names, of transformers' models in float64."""
    from transformers import AutoModelForCausalLM

    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
        for folder in (policy, reference)
    ]
    nll, divergence, tokens = 0.0, 0.0, sum(s.response_length for s in SEQUENCES)
    for sequence in SEQUENCES:
        ids = torch.tensor(sequence.token_ids, dtype=torch.int64)
        own, other = (
            torch.log_softmax(model(ids[None]).logits[0, sequence.prompt_length - 1 : -1] / TEMPERATURE, -1)
            for model in models
        )
        nll = nll - own.gather(1, ids[sequence.prompt_length :, None]).sum()
        first, second = (own, other.detach()) if direction == "policy_reference" else (other.detach(), own)
        divergence = divergence + (first.exp() * (first - second)).sum()
    loss = (nll + COEFFICIENT * divergence) / tokens
    loss.backward()
    metrics = {
        "loss": loss.item(),
        "loss/sft": nll.item() / tokens,
        "loss/kl": COEFFICIENT * divergence.item() / tokens,
        "kl/demonstrations_full": divergence.item() / tokens,
    }
    return metrics, {name: p.grad.numpy() for name, p in models[0].named_parameters()}


def measure(policy: str, reference: str, layout: dict, budget: int, direction: str):
    """Metrics and gradients in a layout; the weights that the run starts from are the reference's."""
    from megatron.core import parallel_state

    from megatron_srft.trainer import parallel
    from megatron_srft.trainer.beside_reference import beside_reference
    from megatron_srft.trainer.conversion import load_policy, parameters
    from megatron_srft.trainer.step import train_pass
    from megatron_srft.trainer.trainer import Trainer
    from megatron_srft.weights.folder import HfFolder
    from megatron_srft.weights.streaming import Parameter, export_hf

    config = settings(reference, layout, budget, direction)
    groups = parallel.start(config.parallel, seed=1)
    trainer = Trainer(config, groups)
    load_policy(trainer.models, HfFolder(policy), groups)
    for chunk in trainer.policy.chunks:
        chunk.zero_grad_buffer()
    batches = trainer.microbatches(SEQUENCES)
    beside, batches = beside_reference(trainer.policy, trainer.reference, batches, direction)
    metrics = train_pass(beside, batches, count(SEQUENCES), config)
    owned = [Parameter(p.name, p.layer_offset, p.tensor.main_grad) for p in parameters(trainer.models)]
    gradients = {n: g.numpy().copy() for n, g in export_hf(owned, trainer.models[0].architecture, groups)}
    parallel_state.destroy_model_parallel()
    return metrics, gradients


def measure_all(policy: str, reference: str, cases: list[tuple]):
    return [measure(policy, reference, *case) for case in cases]


FORWARD, REVERSE = DIRECTIONS
CASES = {
    1: [({}, 1000, FORWARD), ({}, 1, FORWARD), ({}, 30, REVERSE)],
    2: [
        ({}, 20, FORWARD),  # DP2
        ({"tensor": 2}, 30, FORWARD),
        ({"tensor": 2, "sequence_parallel": True}, 30, REVERSE),
        ({"pipeline": 2}, 20, FORWARD),
        ({"pipeline": 2, "virtual_pipeline": 2}, 20, FORWARD),
        ({"tensor": 2, "recompute": "full"}, 30, REVERSE),
        ({"context": 2}, 20, FORWARD),
    ],
}


@pytest.mark.parametrize(("ranks", "family", "tied"), [(1, "qwen2", True), (2, "qwen2", True), (2, "qwen3", False)])
def test_loss_and_gradients_match_two_dense_models(tmp_path, ranks, family, tied):
    policy, reference = (
        make_model(family, tmp_path / name, tied=tied, vocab=VOCAB, tokenizer=False, seed=seed)
        for seed, name in enumerate(("policy", "reference"))
    )
    expected = {direction: dense(policy, reference, direction) for direction in DIRECTIONS}
    assert expected[FORWARD][0]["kl/demonstrations_full"] > 0.01
    for of_rank in spawn(ranks, measure_all, str(policy), str(reference), CASES[ranks]):
        for case, (metrics, gradients) in zip(CASES[ranks], of_rank, strict=True):
            wanted_metrics, wanted = expected[case[2]]
            assert {n: metrics[n] for n in wanted_metrics} == pytest.approx(wanted_metrics, rel=2e-5), case
            scale = max(np.abs(g).max() for g in wanted.values())
            for name, gradient in wanted.items():
                assert np.abs(gradients[name] - gradient).max() <= 2e-5 * scale, (case, name)


# ---------------------------------------------------------------- whole runs

OBJECTIVE = {"kind": "sft_kl", "estimator": "full", "kl_coefficient": 5.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three updates of SFT-KL that is held hard; its config and its folder."""
    folder = tmp_path_factory.mktemp("full")
    path = write_inputs(folder, name="run", steps=3, objective=OBJECTIVE)
    run_training(configuration.load(path))
    return path, folder / "runs" / "run"


def test_the_divergence_is_0_at_first_and_smaller_for_being_paid_for(run, tmp_path):
    held = read_metrics(run[1])
    free = {}
    for name, objective in (("unpaid", OBJECTIVE | {"kl_coefficient": 0}), ("sft", {"kind": "sft"})):
        run_training(configuration.load(write_inputs(tmp_path, name=name, steps=3, objective=objective)))
        free[name] = read_metrics(tmp_path / "runs" / name)
    assert final_weights(tmp_path / "runs" / "unpaid") == final_weights(tmp_path / "runs" / "sft")
    assert held[0]["kl/demonstrations_full"] == 0 and held[0]["grad_norm"] == free["sft"][0]["grad_norm"]
    paid, unpaid = ([line["kl/demonstrations_full"] for line in lines] for lines in (held, free["unpaid"]))
    assert paid[1] == unpaid[1] > 0  # the first update had nothing to pay
    assert 0 < paid[2] < unpaid[2]
    assert not any("ratio/demonstrations" in line for line in held)


def test_the_reference_survives_a_resume_with_the_same_bits(run, tmp_path):
    path, whole = run
    rewind(whole, tmp_path / "run", 1)
    run_training(configuration.load(path, [f"run_dir={tmp_path}"]))
    assert history(tmp_path / "run") == history(whole)
    assert final_weights(tmp_path / "run") == final_weights(whole)


def test_a_checkpoint_without_a_reference_is_refused(run, tmp_path):
    config = configuration.load(write_inputs(tmp_path, name="k3", steps=1, objective={"kind": "sft_kl"}))
    run_training(config)
    objective = dataclasses.replace(config.objective, estimator="full")
    with pytest.raises(ConfigError, match="holds no reference policy, which kl.coefficient above 0 and objective.est"):
        run_training(dataclasses.replace(config, steps=2, objective=objective))


def test_a_direction_needs_the_full_estimator():
    with pytest.raises(ConfigError, match="objective.direction is of the divergence over the whole vocabulary"):
        configuration.from_dict({"objective": {"kind": "sft_kl", "direction": "reference_policy"}})
