"""The gate: the same loss, metrics and gradient of every parameter, however the work is cut.

The reference is Hugging Face's own model in float64, one sequence at a time, with a dense log-softmax and torch's
autograd; the objective is evaluated once over all tokens. Every layout, packing and micro-batch split has to match it.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from spawning import spawn
from tiny_models import make_model
from training_sequences import VOCAB, make_sequences

from megatron_srft import config as configuration
from megatron_srft import objectives
from megatron_srft.data.packing import pack
from megatron_srft.sample import TokenStats, TrainingSequence, count

TEMPERATURE = 0.9
SEQUENCES = make_sequences([(False, False, False, True), (False, False, False)], seed=3)
OBJECTIVES = {
    "sft": {"kind": "sft"},
    "sft-kl": {"kind": "sft_kl"},
    "psft": {"kind": "psft", "entropy_coefficient": 0.01},
    "grpo": {"kind": "grpo", "preset": "dapo", "entropy_coefficient": 0.01},
    "luffy": {"kind": "luffy", "constant_length": 7},
    "srft-paper": {"kind": "srft", "preset": "srft-paper"},
    "srft-released": {"kind": "srft", "preset": "srft-released", "constant_length": 7},
    "chord-phi": {"kind": "chord", "preset": "chord-phi"},
    "relift": {"kind": "relift", "constant_length": 7},  # rl_sft and hpt have the same terms
    "dpo": {"kind": "dpo", "beta": 0.7, "label_smoothing": 0.1, "sft_coefficient": 0.3},
    "dpo-ipo": {"kind": "dpo", "loss": "ipo"},
}


def make_pairs() -> list[TrainingSequence]:
    """Three pairs, of which the first one's answers are longer than some budgets below."""
    answers = make_sequences([(True, True)] * 3, seed=5)
    return [dataclasses.replace(s, preferred=index % 2 == 0) for index, s in enumerate(answers)]


PAIRS = make_pairs()


def sequences_of(name: str) -> list[TrainingSequence]:
    """What an objective learns from."""
    return PAIRS if name.startswith("dpo") else SEQUENCES


def run_config(folder: Path, layout: dict, tokens_per_microbatch: int = 1000) -> configuration.RunConfig:
    return configuration.from_dict(
        {
            "model": {"path": str(folder)},
            "parallel": {"distributed_optimizer": False, **layout},
            "batch": {"tokens_per_microbatch": tokens_per_microbatch},
            "data": {"max_prompt_tokens": 16},
            "rollout": {"kind": "local", "temperature": TEMPERATURE, "max_response_tokens": 16},
        }
    ).resolved()


def resolved_objective(name: str):
    return configuration.from_dict({"objective": OBJECTIVES[name]}).resolved().objective


def reference(folder: Path, name: str) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Metrics (with the loss), and gradients by Hugging Face names, in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    logprobs, entropy, sequences = [], [], sequences_of(name)
    for sequence in sequences:
        tokens = torch.tensor(sequence.token_ids, dtype=torch.int64)
        logits = model(tokens[None]).logits[0, sequence.prompt_length - 1 : -1] / TEMPERATURE
        distribution = torch.log_softmax(logits, -1)
        logprobs.append(distribution.gather(1, tokens[sequence.prompt_length :, None])[:, 0])
        entropy.append(-(distribution.exp() * distribution).sum(-1))
    batch = pack(sequences, tuple(range(len(sequences))), sum(len(s.token_ids) for s in sequences))
    inputs = objectives.gather_inputs(batch, TokenStats(logprobs=torch.cat(logprobs), entropy=torch.cat(entropy)))
    output = objectives.compute(inputs, count(sequences), resolved_objective(name))
    output.loss.backward()
    # The trainer reports a maximum `max/<name>` as `<name>/max`.
    names = {k: f"{k.removeprefix('max/')}/max" if k.startswith("max/") else k for k in output.metrics}
    return {names[k]: v.item() for k, v in output.metrics.items()}, {
        n: p.grad.numpy() for n, p in model.named_parameters()
    }


def in_order(sequences: list[TrainingSequence], order: list[int]) -> list[TrainingSequence]:
    """In another order; pairs stay whole."""
    if sequences is PAIRS:
        return [sequences[2 * i + side] for i in order if i < len(PAIRS) // 2 for side in (0, 1)]
    return [sequences[i] for i in order]


def measure(folder: str, layout: dict, tokens_per_microbatch: int, order: list[int], names: list[str]) -> dict:
    """On every rank: {objective: (metrics, gradients by Hugging Face names)} of the layout."""
    from megatron.core import parallel_state

    from megatron_srft.trainer import parallel
    from megatron_srft.trainer.conversion import parameters
    from megatron_srft.trainer.step import train_pass
    from megatron_srft.trainer.trainer import Trainer
    from megatron_srft.weights.streaming import Parameter, export_hf

    config = run_config(Path(folder), layout, tokens_per_microbatch)
    groups = parallel.start(config.parallel, seed=1)
    results = {}
    trainer = Trainer(config, groups)
    for name in names:
        for chunk in trainer.policy.chunks:
            chunk.zero_grad_buffer()
        sequences = in_order(sequences_of(name), order)
        batches = trainer.microbatches(sequences)
        settings = dataclasses.replace(config, objective=resolved_objective(name))
        metrics = train_pass(trainer.policy, batches, count(sequences), settings)
        owned = [Parameter(p.name, p.layer_offset, p.tensor.main_grad) for p in parameters(trainer.models)]
        gradients = export_hf(owned, trainer.models[0].architecture, groups)
        results[name] = metrics, {n: g.numpy().copy() for n, g in gradients}
    # Only Megatron's groups: a process cannot leave the world and join it again through the same store.
    parallel_state.destroy_model_parallel()
    return results


def measure_all(folder: str, cases: list[tuple], names: list[str]) -> list[dict]:
    return [measure(folder, layout, budget, order, names) for layout, budget, order in cases]


WHOLE = list(range(7))
SHUFFLED = [5, 2, 6, 0, 3, 1, 4]
CASES = {
    1: [({}, 1000, WHOLE), ({}, 1, WHOLE), ({}, 30, SHUFFLED)],
    2: [
        ({}, 1000, WHOLE),  # DP2
        ({}, 20, SHUFFLED),
        ({"tensor": 2}, 1000, WHOLE),
        ({"tensor": 2}, 20, SHUFFLED),
        ({"tensor": 2, "sequence_parallel": True}, 30, WHOLE),
        ({"pipeline": 2}, 20, WHOLE),
        ({"pipeline": 2, "virtual_pipeline": 2}, 20, SHUFFLED),
        ({"tensor": 2, "recompute": "full"}, 30, WHOLE),
        ({"tensor": 2, "sequence_parallel": True, "recompute": "selective"}, 30, WHOLE),
        ({"overlap_communication": True}, 20, WHOLE),
        ({"context": 2}, 1000, WHOLE),
        ({"context": 2}, 1, SHUFFLED),  # a sequence at a time, cut in the middle
        ({"context": 2, "recompute": "full"}, 20, SHUFFLED),
    ],
    4: [
        ({"tensor": 2, "pipeline": 2}, 20, WHOLE),
        ({"tensor": 2, "pipeline": 2, "sequence_parallel": True}, 30, SHUFFLED),
        ({"tensor": 2}, 30, WHOLE),  # TP2 x DP2
        ({"pipeline": 2, "virtual_pipeline": 2}, 30, WHOLE),  # x DP2
        ({"context": 4}, 1, WHOLE),
        ({"context": 2}, 30, SHUFFLED),  # x DP2
        ({"context": 2, "tensor": 2}, 20, WHOLE),
        ({"context": 2, "tensor": 2, "sequence_parallel": True, "recompute": "selective"}, 30, SHUFFLED),
        ({"context": 2, "pipeline": 2}, 20, WHOLE),
    ],
}


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("qwen3", False)])
def test_loss_metrics_and_gradients_match_hugging_face_in_every_layout(tmp_path, world_size, family, tied):
    folder = make_model(family, tmp_path / "model", tied=tied, vocab=VOCAB, tokenizer=False)
    names = list(OBJECTIVES) if family == "qwen2" else ["srft-released"]
    expected = {name: reference(folder, name) for name in names}
    for rank_results in spawn(world_size, measure_all, str(folder), CASES[world_size], names):
        for case, results in zip(CASES[world_size], rank_results, strict=True):
            for name in names:
                metrics, gradients = results[name]
                wanted_metrics, wanted = expected[name]
                assert metrics == pytest.approx(wanted_metrics, rel=2e-5, abs=2e-6), (case, name)
                assert set(gradients) == set(wanted), (case, name)
                scale = max(np.abs(g).max() for g in wanted.values())
                for parameter, gradient in wanted.items():
                    difference = np.abs(gradients[parameter] - gradient).max()
                    assert difference <= 2e-5 * scale, (case, name, parameter, difference / scale)
