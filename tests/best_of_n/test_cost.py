"""Operations of a model and a head against torch's own counter, and the passes that are timed against Hugging Face."""

import numpy as np
import pytest
import torch
from reward_heads import make_head
from spawning import spawn
from tiny_models import make_model
from torch.utils.flop_counter import FlopCounterMode
from training_sequences import VOCAB, make_sequences
from transformers import AutoModelForCausalLM

from megatron_srft import config as configuration
from megatron_srft.best_of_n import cost
from megatron_srft.hidden_reward import BaseModel, load_head, save_head
from megatron_srft.weights.architecture import read_architecture

SEQUENCES = make_sequences([(False, False, True), (False, False)], seed=3)
BASE = BaseModel(name="tiny", fingerprint="", num_layers=4, hidden_size=32, vocab_size=VOCAB, dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cost")
    make_model("qwen2", folder / "model", vocab=VOCAB, tokenizer=False)
    save_head(make_head(BASE, seed=1), folder / "head")
    return folder


@pytest.mark.parametrize(("family", "overrides"), [("qwen2", {}), ("qwen3", {}), ("mistral", {"sliding_window": 4})])
def test_operations_are_those_that_torch_counts(tmp_path, family, overrides):
    """torch counts attention over all pairs of tokens, whatever the mask; the rest to the operation."""
    model = AutoModelForCausalLM.from_pretrained(
        make_model(family, tmp_path, vocab=VOCAB, tokenizer=False, **overrides), attn_implementation="eager"
    )
    tokens, response = 9, 5
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(tokens)[None], logits_to_keep=response)
    architecture = read_architecture(model.config)
    layers, query = architecture.num_layers, architecture.num_heads * architecture.head_dim
    visible = [min(position + 1, overrides.get("sliding_window", tokens)) for position in range(tokens)]
    hidden_pairs = tokens * tokens - sum(visible)
    ours = cost.block_flops(architecture, tokens) + cost.lm_head_flops(architecture, response)
    rotation = layers and counter.get_total_flops() - ours - 4 * layers * query * hidden_pairs
    # The rotary angles are one small matrix product per forward.
    assert 0 <= rotation <= 2 * tokens * architecture.head_dim


def test_a_head_costs_four_operations_per_feature_and_token():
    with FlopCounterMode(display=False) as counter:
        torch.nn.Linear(160, 2)(torch.zeros(7, 160))
    assert cost.swift_flops(160, 7) == counter.get_total_flops()
    # The paper's figure for an 8B model: 540,672 operations per token.
    assert cost.swift_flops(33 * 4096, 1) == 540_672


def measured(folder, layout):
    """On every rank: (scores of the log-prob pass, of the pass alone, text rewards, costs) in the layout."""
    from megatron.core import parallel_state

    from megatron_srft.trainer import parallel
    from megatron_srft.trainer.hidden_score import score_pass
    from megatron_srft.trainer.trainer import Trainer
    from megatron_srft.trainer.trunk import text_rewards

    config = configuration.from_dict(
        {
            "model": {"path": str(folder / "model")},
            "parallel": layout,
            "batch": {"tokens_per_microbatch": 30},
            "data": {"max_prompt_tokens": 16},
            "rollout": {"kind": "local", "max_response_tokens": 16},
            "objective": {"kind": "sft"},
        }
    ).resolved()
    trainer, head = Trainer(config, parallel.start(config.parallel, 0)), load_head(folder / "head")
    trainer.reward_head = head
    beside = [one.hidden_score for one in trainer.measure(SEQUENCES)]
    trainer.reward_head = None
    batches = trainer.microbatches(SEQUENCES)
    alone = gathered(score_pass(trainer.policy, batches, head))
    text = gathered(text_rewards(trainer.policy, batches, torch.linspace(-1, 1, 32)))
    costs = cost.measure_costs(trainer, head, SEQUENCES, repetitions=1)
    parallel_state.destroy_model_parallel()
    return beside, alone, text, costs


def gathered(by_index):
    return [by_index[index] for index in range(len(SEQUENCES))]


def in_layouts(folder, layouts):
    return [measured(folder, layout) for layout in layouts]


@torch.no_grad()
def rewards_by_hand(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    weight = torch.linspace(-1, 1, 32).double()
    return [
        float(model.model(torch.tensor(s.token_ids)[None].long()).last_hidden_state[0, -1] @ weight) for s in SEQUENCES
    ]


def test_both_passes_give_the_same_scores_and_text_rewards_are_a_real_forward(folder):
    layouts = [{}, {"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}, {"context": 2}]
    expected = rewards_by_hand(folder)
    results = [each for rank in spawn(2, in_layouts, folder, layouts) for each in rank]
    for beside, alone, text, costs in results:
        assert alone == pytest.approx(beside, rel=1e-5, abs=1e-6)
        assert text == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert list(costs.of) == [cost.PASS, cost.MARGINAL, cost.ALONE, cost.TEXT]
        assert all(costs.of[name].seconds > 0 for name in (cost.PASS, cost.ALONE, cost.TEXT))
    scores = np.array([[value for value in beside if value is not None] for beside, *_ in results])
    assert np.abs(scores - scores[0]).max() < 1e-5


def test_costs_are_means_over_candidates(folder):
    architecture = read_architecture(AutoModelForCausalLM.from_pretrained(folder / "model").config)
    head, pair = make_head(BASE), SEQUENCES[:2]
    found = cost.flops(architecture, head, pair)
    scored = sum(s.response_length - 1 for s in pair)
    assert found[cost.MARGINAL] == 4 * 5 * 32 * scored / 2
    blocks = sum(cost.block_flops(architecture, len(s.token_ids)) for s in pair) / 2
    assert found[cost.ALONE] == blocks + found[cost.MARGINAL]
    assert found[cost.TEXT] == blocks + 2 * 32
    assert found[cost.PASS] == blocks + 2 * VOCAB * 32 * sum(s.response_length for s in pair) / 2
