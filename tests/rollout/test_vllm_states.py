"""What was read of vLLM's passes, put together to responses: no vLLM is needed for that."""

import numpy as np
import pytest
import torch
from reward_heads import make_head

from megatron_srft.rollout.vllm_states import Pass, Rows, StateReader, StatesError

PROMPT, RESPONSE = 3, [11, 12, 13, 14]


def reader_of(passes: list[Pass]) -> StateReader:
    reader = StateReader.__new__(StateReader)
    reader.head, reader.passes = make_head(), passes
    return reader


def one_pass(pieces: dict[str, tuple[int, list[int]]], seed: int) -> Pass:
    """{request: (first position, tokens)} with random gates and rewards."""
    counts = [len(tokens) for _, tokens in pieces.values()]
    positions = [start + i for start, tokens in pieces.values() for i in range(len(tokens))]
    token_ids = [token for _, tokens in pieces.values() for token in tokens]
    sums = torch.randn(sum(counts), 2, generator=torch.Generator().manual_seed(seed))
    return Pass(Rows(list(pieces), counts), torch.tensor(positions), torch.tensor(token_ids), sums)


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
