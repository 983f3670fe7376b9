"""A step of the trainer: several updates, and what the optimizer does in every layout."""

from dataclasses import replace

import numpy as np
import pytest
import torch.distributed as dist
from spawning import spawn
from tiny_models import make_model
from training_sequences import VOCAB, make_sequences

from megatron_srft import config as configuration
from megatron_srft.sample import TrainingSequence


def sequences_of_step(demonstrations: tuple[bool, ...]) -> list[TrainingSequence]:
    """One group of two rollouts for each entry, and a demonstration where the entry is true."""
    groups = [(False, False, True) if shown else (False, False) for shown in demonstrations]
    return [replace(sequence, old_logprobs=None) for sequence in make_sequences(groups, seed=5)]


def run_config(folder: str, layout: dict, optimizer: dict, updates: int):
    return configuration.from_dict(
        {
            "model": {"path": folder},
            "parallel": layout,
            "batch": {"prompts_per_step": 2 * updates, "updates_per_step": updates, "tokens_per_microbatch": 20},
            "data": {"max_prompt_tokens": 16},
            "rollout": {"kind": "local", "max_response_tokens": 16},
            "optimizer": optimizer,
        }
    ).resolved()


def steps(folder: str, layout: dict, optimizer: dict, demonstrations: list[tuple[bool, ...]], updates: int = 1):
    """The metrics of one step per entry of `demonstrations`, and the weights after the last; then leave the groups."""
    from megatron.core import parallel_state

    from megatron_srft.trainer import parallel
    from megatron_srft.trainer.trainer import Trainer

    config = run_config(folder, layout, optimizer, updates)
    trainer = Trainer(config, parallel.start(config.parallel, seed=1))
    metrics = [trainer.step(sequences_of_step(shown), 0) for shown in demonstrations]
    weights = {name: tensor.float().numpy().copy() for name, tensor in trainer.hf_weights()}
    parallel_state.destroy_model_parallel()
    return metrics, weights


def steps_alone(*arguments):
    """The same in this process, as one rank."""
    try:
        return steps(*arguments)
    finally:
        dist.destroy_process_group()


def steps_in_layouts(folders: list[str], layouts: list[dict], *rest):
    return [[steps(folder, layout, *rest) for layout in layouts] for folder in folders]


def test_an_update_without_demonstrations_among_several(tmp_path):
    """With a learning rate of 0 the first of two updates is a step of its own."""
    folder = str(make_model("qwen2", tmp_path / "model", vocab=VOCAB, tokenizer=False))
    first, second = (True, False), (False, False)
    (both,), _ = steps_alone(folder, {}, {"lr": 0.0}, [first + second], 2)
    (alone,), _ = steps_alone(folder, {}, {"lr": 0.0}, [first])
    assert both["nll/demonstrations"] == pytest.approx(alone["nll/demonstrations"])
    assert both["weight_sft/max"] == pytest.approx(alone["weight_sft/max"])
    assert both["accounting/skipped_updates"] == 0


LAYOUTS = [
    {"distributed_optimizer": True},  # DP2
    {"distributed_optimizer": False, "overlap_communication": True},
    {"tensor": 2},
    {"tensor": 2, "distributed_optimizer": False, "sequence_parallel": True},
    {"pipeline": 2},
    {"pipeline": 2, "virtual_pipeline": 2, "distributed_optimizer": False},
    {"context": 2},
    {"context": 2, "distributed_optimizer": False, "overlap_communication": True},
]
SMOOTH = {"lr": 0.3, "adam_epsilon": 1.0, "weight_decay": 0.1, "clip_grad": 0.05}
"""Clips, decays, and has an epsilon that keeps rounding in a small gradient from turning into a full-sized update."""


def test_gradient_norm_and_weights_after_two_steps_are_those_of_one_rank(tmp_path):
    """Tied embeddings on two stages, norms on two tensor ranks, shards of the optimizer: all counted once."""
    folders = [
        str(make_model(family, tmp_path / family, tied=tied, vocab=VOCAB, tokenizer=False))
        for family, tied in (("qwen2", True), ("qwen3", False))
    ]
    shown = [(True, False), (True, True)]
    expected = [steps_alone(folder, {}, SMOOTH, shown) for folder in folders]
    for of_rank in spawn(2, steps_in_layouts, folders, LAYOUTS, SMOOTH, shown):
        for (wanted, weights), of_folder in zip(expected, of_rank, strict=True):
            assert all(step["grad_norm"] > 2 * SMOOTH["clip_grad"] for step in wanted)
            for layout, (metrics, found) in zip(LAYOUTS, of_folder, strict=True):
                for mine, theirs in zip(metrics, wanted, strict=True):
                    assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5), layout
                for name, tensor in weights.items():
                    np.testing.assert_allclose(found[name], tensor, rtol=1e-4, atol=1e-5, err_msg=f"{layout} {name}")
