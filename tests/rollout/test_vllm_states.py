"""A head's sums in a forward pass, and what was read of vLLM's passes put together to responses: no vLLM is needed."""

import numpy as np
import pytest
import torch
from reward_heads import TINY, make_head

from megatron_srft.rollout.vllm.model import StateSums
from megatron_srft.rollout.vllm.states import Pass, Rows, StateReader, StatesError

PROMPT, RESPONSE = 3, [11, 12, 13, 14]
LAYERS = torch.tensor(TINY.num_layers + 1)


def reader_of(passes: list[Pass], **settings) -> StateReader:
    reader = StateReader(make_head(**settings), StateSums(TINY.num_layers, TINY.hidden_size, 16))
    reader.passes = passes
    return reader


def run(sums: StateSums, states: torch.Tensor, token_ids: list[int]) -> None:
    """A pass over [layers, tokens, hidden] states, the tokens at positions from 0."""
    found = None
    for layer, hidden in enumerate(states):
        found = sums.add(found, layer, hidden)
    sums.keep(found, torch.arange(len(token_ids)), torch.tensor(token_ids, dtype=torch.int32))


def one_pass(pieces: dict[str, tuple[int, list[int]]], seed: int) -> Pass:
    """{request: (first position, tokens)} with random gates and rewards."""
    counts = [len(tokens) for _, tokens in pieces.values()]
    positions = [start + i for start, tokens in pieces.values() for i in range(len(tokens))]
    token_ids = [token for _, tokens in pieces.values() for token in tokens]
    sums = torch.randn(sum(counts), 2, generator=torch.Generator().manual_seed(seed))
    return Pass(Rows(list(pieces), counts), torch.tensor(positions), torch.tensor(token_ids), sums, LAYERS)


def score(rows: list[torch.Tensor]) -> float:
    """In float64, of [2] sums without the bias."""
    raw = torch.stack(rows).double() + make_head().bias.double()
    gate = raw[:, 0].sigmoid()
    return float((gate * raw[:, 1]).sum() / gate.sum())


def test_a_response_is_put_together_from_all_passes_and_computed_again_replaces():
    """Request 5 is preempted after two tokens of its answer and resumed with its prompt; 6 and 7 stand between."""
    passes = [
        one_pass({"5-aa": (0, [1, 2, 3, 11]), "6-bb": (0, [1])}, 0),
        one_pass({"7-cc": (3, [11, 12]), "5-aa": (4, [12])}, 1),
        one_pass({"6-bb": (1, [9]), "5-aa": (0, [1, 2, 3, 11, 12, 13])}, 2),
        one_pass({"5-aa": (6, [14])}, 3),
        one_pass({"5-aa": (7, [15])}, 4),  # one token too far, as asynchronous scheduling computes it
    ]
    found = reader_of(list(passes)).take({"5": (PROMPT, RESPONSE), "6": (1, [9]), "8": (2, [])})
    again = passes[2].sums
    assert found["5"] == pytest.approx(score([again[4], again[5], again[6], passes[3].sums[0]]), abs=1e-6)
    assert found["6"] == pytest.approx(score([again[0]]), abs=1e-6)
    assert found["8"] is None


@pytest.mark.parametrize(
    ("fed", "said"),
    [([11, 12, 13], "1 not at all and 0 as other"), ([11, 12, 99, 14], "0 not at all and 1 as other")],
)
def test_a_token_that_was_not_read_is_refused_by_name(fed, said):
    passes = [one_pass({"4-aa": (0, [5, 6]), "5-bb": (PROMPT, fed)}, 0)]
    with pytest.raises(StatesError, match=f"of 4 tokens of request 5 .* {said}"):
        reader_of(passes).take({"4": (0, [5, 6]), "5": (PROMPT, RESPONSE)})


def test_what_was_read_counts_for_one_call():
    reader = reader_of([one_pass({"5": (PROMPT, RESPONSE)}, 0)])
    reader.take({"5": (PROMPT, RESPONSE)})
    with pytest.raises(StatesError, match="4 not at all"):
        reader.take({"5": (PROMPT, RESPONSE)})


@pytest.mark.parametrize("column", [0, 1])
def test_a_sum_that_is_not_finite_makes_no_number(column):
    one = one_pass({"5": (PROMPT, RESPONSE)}, 0)
    one.sums[1, column] = -np.inf  # a gate of 0, which would leave the token out
    assert np.isnan(reader_of([one]).take({"5": (PROMPT, RESPONSE)})["5"])


# ---------------------------------------------------------------- a pass


def random_states(tokens: int) -> torch.Tensor:
    shape = (TINY.num_layers + 1, tokens, TINY.hidden_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    "settings", [{}, {"layers": (0, 3)}, {"layers": (1, 4), "normalisation": "rms", "epsilon": 0.1}, {"gate": False}]
)
def test_a_pass_leaves_the_heads_sums_of_its_layers(settings):
    """What the head before left is not in them; rows beyond the announced ones are padding."""
    reader, states = reader_of([], seed=3), random_states(6)
    run(reader.sums, states, [9] * 6)
    head = make_head(**settings)
    reader = StateReader(head, reader.sums)
    reader.expect(Rows(["5-aa"], [5]))
    run(reader.sums, states, [1, 2, 11, 12, 13, 0])
    reader.expect(Rows(["6-aa"], [1]))
    run(reader.sums, states[:, :1], [1])
    found = reader.take({"5": (2, [11, 12, 13])})["5"]
    read = states[list(head.layers), 2:5].double()
    if head.config.normalisation == "rms":
        read = read / (read.square().mean(dim=-1, keepdim=True) + head.config.epsilon).sqrt()
    gate, reward = torch.einsum("ltd,lgd->gt", read, head.weight.double()) + head.bias.double()[:, None]
    assert found == pytest.approx(float((gate.sigmoid() * reward).sum() / gate.sigmoid().sum()), abs=1e-6)


def test_a_pass_that_does_not_read_every_layer_is_refused():
    reader, states = reader_of([]), random_states(2)
    for wanted, fault in ((4, states[:4]), (0, None)):
        reader.expect(Rows(["5-aa"], [2]))
        if fault is not None:
            run(reader.sums, fault, [11, 12])
        with pytest.raises(StatesError, match=f"of the 5 layers .* read {wanted}:"):
            reader.take({"5": (0, [11, 12])})


def test_a_head_that_something_was_loaded_over_is_refused():
    reader = reader_of([])
    reader.expect(Rows(["5-aa"], [2]))
    run(reader.sums, random_states(2), [11, 12])
    reader.sums.weight[1, 0, 3] += 1
    with pytest.raises(StatesError, match="no longer has the reward head's numbers"):
        reader.take({"5": (0, [11, 12])})
