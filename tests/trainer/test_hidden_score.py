"""Scores of the streaming reward head, in every layout, against Hugging Face's stacked hidden states in float64."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from reward_heads import make_head
from spawning import spawn
from tiny_models import make_model
from training_sequences import VOCAB, make_sequences

from megatron_srft import config as configuration
from megatron_srft.hidden_reward import BaseModel, RewardHead, fold_logits, load_head, save_head

FAMILIES = {"qwen2": True, "qwen3": False, "llama": False}
"""Families, and whether the LM head is the embedding."""

BASE = BaseModel(name="tiny", fingerprint="", num_layers=4, hidden_size=32, vocab_size=VOCAB, dtype="float32")
HEADS = {
    "all": {},
    "all, with the last token": {"last_token": "included"},
    "rms": {"normalisation": "rms", "epsilon": 1e-5},
    "last": {"layers": (4,)},
    "embedding and a middle one": {"layers": (0, 2), "last_token": "included"},
    "one stage only": {"layers": (1,)},
    "ungated": {"gate": False},
}
ON_LOGITS = "on logits"


SEQUENCES = make_sequences([(False, False, False, True), (False, False, False)], seed=7)
"""With responses of 10, 7, 8, 1, 11, 1 and 9 tokens."""

ONE_TOKEN = (3, 5)
WHOLE = list(range(7))
SHUFFLED = [5, 2, 6, 0, 3, 1, 4]
CASES = {
    1: [("qwen3", {}, 1000, WHOLE), ("qwen2", {}, 1, SHUFFLED), ("llama", {"recompute": "full"}, 30, SHUFFLED)],
    2: [
        ("llama", {}, 20, SHUFFLED),  # DP2
        ("qwen2", {"tensor": 2}, 1000, WHOLE),
        ("qwen3", {"tensor": 2}, 20, SHUFFLED),
        ("qwen2", {"tensor": 2, "sequence_parallel": True}, 30, SHUFFLED),
        ("qwen2", {"pipeline": 2}, 20, WHOLE),
        ("llama", {"pipeline": 2, "virtual_pipeline": 2}, 20, SHUFFLED),
        ("llama", {"tensor": 2, "sequence_parallel": True, "recompute": "full"}, 1000, WHOLE),
        ("qwen3", {"tensor": 2, "sequence_parallel": True, "recompute": "selective"}, 30, WHOLE),
        ("qwen3", {"context": 2}, 30, SHUFFLED),
    ],
    4: [
        ("qwen2", {"tensor": 2, "pipeline": 2}, 20, WHOLE),
        ("qwen3", {"tensor": 2, "pipeline": 2, "sequence_parallel": True}, 30, SHUFFLED),
        ("llama", {"tensor": 2, "sequence_parallel": True}, 30, WHOLE),  # x DP2
        ("qwen2", {"pipeline": 2, "virtual_pipeline": 2}, 30, WHOLE),  # x DP2
        ("qwen2", {"context": 2, "tensor": 2, "sequence_parallel": True}, 30, SHUFFLED),
        ("llama", {"context": 2, "pipeline": 2}, 20, WHOLE),
        ("qwen3", {"context": 2}, 30, WHOLE),  # x DP2
    ],
}
"""By number of ranks: family, layout, tokens per micro-batch, order of the sequences."""

CUT_DIFFERENTLY = ("all", "rms", "embedding and a middle one", ON_LOGITS)
"""Heads that several ranks are tried with; the others differ from them in nothing that a layout could touch."""


def make_heads(folder: Path, lm_head: torch.Tensor) -> tuple[dict[str, Path], torch.nn.Linear]:
    """Folders of all heads, and the linear layer on logits that one of them was made from."""
    heads = {name: make_head(BASE, seed=number, **settings) for number, (name, settings) in enumerate(HEADS.items())}
    torch.manual_seed(11)
    linear = torch.nn.Linear(VOCAB, 2)
    config = dataclasses.replace(heads["last"].config, last_token="included")
    heads[ON_LOGITS] = fold_logits(linear.weight.detach(), linear.bias.detach(), lm_head, config)
    for name, head in heads.items():
        save_head(head, folder / name)
    return {name: folder / name for name in heads}, linear.double()


@torch.no_grad()
def reference(folder: Path, heads: dict[str, Path], linear: torch.nn.Linear) -> dict[str, list[float | None]]:
    """Scores of each head: one sequence at a time, all hidden states stacked, in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    loaded = {name: load_head(path) for name, path in heads.items()}
    scores = {name: [] for name in heads}
    for sequence in SEQUENCES:
        outputs = model(torch.tensor(sequence.token_ids, dtype=torch.int64)[None], output_hidden_states=True)
        states = torch.stack([state[0] for state in outputs.hidden_states])[:, sequence.prompt_length :]
        assert len(states) == BASE.num_layers + 1
        for name, head in loaded.items():
            tokens = states.shape[1] - (head.config.last_token == "excluded")
            raw = linear(outputs.logits[0, sequence.prompt_length :]) if name == ON_LOGITS else _raw(states, head)
            scores[name].append(_gated_mean(raw[:tokens]) if tokens else None)
    return scores


def _raw(states: torch.Tensor, head: RewardHead) -> torch.Tensor:
    """[tokens, 2] of concatenated states."""
    if head.config.normalisation == "rms":
        states = states / (states.square().mean(dim=-1, keepdim=True) + head.config.epsilon).sqrt()
    features = torch.cat([states[layer] for layer in head.layers], dim=1)
    weight = torch.cat(list(head.weight), dim=1)
    return features @ weight.double().T + head.bias.double()


def _gated_mean(raw: torch.Tensor) -> float:
    gate = torch.sigmoid(raw[:, 0])
    return ((gate * raw[:, 1]).sum() / gate.sum()).item()


def run_config(folder: Path | str, layout: dict, tokens_per_microbatch: int = 1000) -> configuration.RunConfig:
    return configuration.from_dict(
        {
            "model": {"path": str(folder)},
            "parallel": {"distributed_optimizer": False, **layout},
            "batch": {"tokens_per_microbatch": tokens_per_microbatch},
            "data": {"max_prompt_tokens": 16},
            "rollout": {"kind": "local", "max_response_tokens": 16},
        }
    ).resolved()


def measure_all(models: dict[str, tuple[str, dict[str, str]]], cases: list[tuple]) -> list[dict]:
    """On every rank and for each case: {head: scores in the order of SEQUENCES}."""
    return [measure(*models[family], *case) for family, *case in cases]


def measure(folder: str, heads: dict[str, str], layout: dict, budget: int, order: list[int]) -> dict:
    from megatron.core import parallel_state

    from megatron_srft.trainer import parallel
    from megatron_srft.trainer.trainer import Trainer

    config = run_config(folder, layout, budget)
    trainer = Trainer(config, parallel.start(config.parallel, seed=1))
    sequences = [SEQUENCES[index] for index in order]
    plain = trainer.measure(sequences)
    assert all(stats.hidden_score is None for stats in plain)
    found = {}
    for name, path in heads.items():
        trainer.reward_head = load_head(path)
        measured = trainer.measure(sequences)
        for before, stats in zip(plain, measured, strict=True):
            assert np.array_equal(before.logprobs, stats.logprobs) and np.array_equal(before.entropy, stats.entropy)
        scores = {index: stats.hidden_score for index, stats in zip(order, measured, strict=True)}
        found[name] = [scores[index] for index in range(len(SEQUENCES))]
    parallel_state.destroy_model_parallel()
    return found


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_scores_are_those_of_stacked_hidden_states_in_every_layout(tmp_path, world_size):
    models, expected = {}, {}
    for family, tied in FAMILIES.items():
        folder = make_model(family, tmp_path / family, tied=tied, vocab=VOCAB, tokenizer=False)
        heads, linear = make_heads(tmp_path / f"{family}-heads", _lm_head(folder))
        expected[family] = reference(folder, heads, linear)
        chosen = heads if world_size == 1 else CUT_DIFFERENTLY
        models[family] = str(folder), {name: str(heads[name]) for name in chosen}
    ranks = spawn(world_size, measure_all, models, CASES[world_size])
    for case, found in zip(CASES[world_size], ranks[0], strict=True):
        for name, scores in found.items():
            wanted = expected[case[0]][name]
            assert [s is None for s in scores] == [s is None for s in wanted], (case, name)
            pairs = [(own, right) for own, right in zip(scores, wanted, strict=True) if right is not None]
            worst = max(abs(own - right) for own, right in pairs)
            assert worst < 1e-5, (case, name, worst)
    assert all(rank == ranks[0] for rank in ranks)


def _lm_head(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).lm_head.weight.detach()


def test_the_reference_tells_the_cases_apart(tmp_path):
    """Otherwise agreement would show nothing: other layers, rules and gates give other scores, and a short one none."""
    folder = make_model("llama", tmp_path / "model", vocab=VOCAB, tokenizer=False)
    heads, linear = make_heads(tmp_path / "heads", _lm_head(folder))
    scores = reference(folder, heads, linear)
    assert [s is None for s in scores["all"]] == [i in ONE_TOKEN for i in WHOLE]
    assert all(s is not None for s in scores["all, with the last token"])
    rows = np.array([[s for i, s in enumerate(own) if i not in ONE_TOKEN] for own in scores.values()])
    assert np.abs(rows[:, None] - rows[None]).max(axis=2)[np.triu_indices(len(rows), 1)].min() > 0.01
    assert rows.std(axis=1).min() > 0.01


# ---------------------------------------------------------------- in this process


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    from megatron_srft.trainer import parallel
    from megatron_srft.trainer.trainer import Trainer

    folder = make_model("qwen2", tmp_path_factory.mktemp("tap") / "model", vocab=VOCAB, tokenizer=False)
    config = run_config(folder, {}, 30)
    yield Trainer(config, parallel.start(config.parallel, seed=1))
    parallel.stop()


@pytest.fixture
def scoring(trainer):
    trainer.reward_head = make_head(BASE)
    yield trainer
    trainer.reward_head = None


@pytest.fixture
def block(scoring):
    """The second block, to be tampered with."""
    block = scoring.models[0].decoder.layers[1]
    kind, number = type(block), block.layer_number
    yield block
    block.__class__, block.layer_number = kind, number


def test_a_silent_tap_fails_the_pass(scoring, block):
    scoring.measure(SEQUENCES)
    # As a CUDA graph's replay does: the module's hooks are passed by.
    block.__class__ = type(
        "Graphed", (type(block),), {"__call__": lambda self, *args, **kwargs: self.forward(*args, **kwargs)}
    )
    with pytest.raises(Exception, match="hidden states were read of layer 2 for 0; hooks do not fire") as caught:
        scoring.measure(SEQUENCES)
    assert type(caught.value).__name__ == "TapError"
    scoring.reward_head = make_head(BASE, layers=(1, 4))
    assert None in [stats.hidden_score for stats in scoring.measure(SEQUENCES)]  # it does not ask that block


def test_a_layer_that_runs_twice_fails_the_pass(scoring, block):
    def twice(self, *args, **kwargs):
        super(kind, self).__call__(*args, **kwargs)
        return super(kind, self).__call__(*args, **kwargs)

    kind = type("Twice", (type(block),), {"__call__": twice})
    block.__class__ = kind
    with pytest.raises(Exception, match="layer 2 was computed twice for micro-batch 1"):
        scoring.measure(SEQUENCES)


def test_a_layer_that_no_rank_holds_fails_the_pass(scoring, block):
    block.layer_number = 77
    with pytest.raises(Exception, match=r"layers \[2\] were not read by every rank"):
        scoring.measure(SEQUENCES)


def test_hooks_are_gone_after_a_pass_and_after_a_failed_one(scoring, block):
    block.layer_number = 77
    with pytest.raises(Exception, match="not read"):
        scoring.measure(SEQUENCES)
    model = scoring.models[0]
    modules = [model, model.embedding, model.decoder.final_layernorm, *model.decoder.layers]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


@pytest.fixture
def poisoned(scoring):
    """The trainer with an embedding that is not finite for one token of one response, and that sequence's index."""
    index = 0
    own = SEQUENCES[index].token_ids
    token = int(own[6])
    assert sum(int((s.token_ids == token).sum()) for s in SEQUENCES) == 1
    weight = scoring.models[0].embedding.word_embeddings.weight
    before = weight.detach().clone()
    yield scoring, index, weight.data[token]
    weight.data.copy_(before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_states_that_are_not_finite_are_no_score(poisoned, value):
    trainer, index, row = poisoned
    row[3] = value
    trainer.reward_head = make_head(BASE, layers=(0,))
    with pytest.raises(ValueError, match=f"of 1 of 7 sequences .* is sequence {index} of the step, with 1 of its"):
        trainer.measure(SEQUENCES)


def test_an_infinite_gate_does_not_hide_behind_the_sigmoid(poisoned):
    trainer, index, row = poisoned
    row[3] = float("inf")
    head = make_head(BASE, layers=(0,))
    weight = torch.zeros_like(head.weight)
    weight[0, 0, 3] = 1.0
    trainer.reward_head = dataclasses.replace(head, weight=weight)
    # The other columns are zero, and zero times infinity is NaN; a kernel that skips them would leave sigmoid(inf) = 1.
    with pytest.raises(ValueError, match=f"is sequence {index} of the step"):
        trainer.measure(SEQUENCES)


def test_prompts_do_not_count(scoring):
    weight = scoring.models[0].embedding.word_embeddings.weight
    token = int(SEQUENCES[0].token_ids[0])
    assert not any(token in s.token_ids[s.prompt_length :] for s in SEQUENCES)
    scoring.reward_head = make_head(BASE, layers=(0,))
    before, row = [s.hidden_score for s in scoring.measure(SEQUENCES)], weight.data[token].clone()
    weight.data[token] = float("nan")
    assert [s.hidden_score for s in scoring.measure(SEQUENCES)] == before
    weight.data[token] = row


def test_a_head_for_a_model_of_other_sizes_is_refused(scoring):
    before = scoring.reward_head
    with pytest.raises(ValueError, match="num_layers 5"):
        scoring.reward_head = make_head(dataclasses.replace(BASE, num_layers=5))
    assert scoring.reward_head is before


def test_the_base_model_is_the_folder_it_was_read_from(trainer):
    from megatron_srft.hidden_reward import weights_fingerprint

    found = trainer.base_model()
    folder = trainer.source
    own = weights_fingerprint((name, folder.tensor(name)) for name in folder.shapes())
    assert found == dataclasses.replace(BASE, name=str(folder.path), fingerprint=own)
    dist.barrier()
