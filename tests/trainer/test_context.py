"""How context ranks share a row of tokens, and their attention against attention written out with a dense mask."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from attention_reference import dense_attention, random_inputs
from spawning import spawn
from training_sequences import make_sequences

from megatron_srft.data.packing import pack, padded_length
from megatron_srft.trainer import attention
from megatron_srft.trainer.context import chunks, grain, local_part, local_tokens

LENGTHS = {
    "one sequence": [40],
    "cut in both chunks": [7, 30, 3],
    "on the chunks' edges": [5, 5, 10, 5, 5, 10],
    "the first of two ranks needs no keys of the other": [10, 20, 10],
    "many": [1, 2, 3, 4, 5, 6, 7, 8, 4],
    "padding as the last": [17, 23],
    "empty sequences": [0, 20, 0, 20, 0],
}
"""Each 40 tokens, which 2 and 4 ranks can share."""

SEQUENCES = make_sequences([(False, True), (False, False, False)], seed=2)
BATCH = pack(SEQUENCES, (0,), len(SEQUENCES[0].token_ids))


def bounds(lengths):
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_every_token_has_one_rank_and_attention_costs_all_ranks_alike(ranks):
    tokens = 6 * grain(ranks)
    shares = [[t for chunk in chunks(tokens, ranks, number) for t in chunk] for number in range(ranks)]
    assert sorted(sum(shares, [])) == list(range(tokens))
    assert len({len(share) for share in shares}) == 1
    # Of one sequence as long as the row, token t attends to t + 1 keys.
    assert len({sum(t + 1 for t in share) for share in shares}) == 1


def test_alone_a_rank_has_the_row_as_it_is():
    batch = pack(SEQUENCES, tuple(range(len(SEQUENCES))), 64)
    part = local_part(batch, None, thd=False)
    assert part.rows is batch.rows and part.token_ids is batch.token_ids and part.params.cut is None
    assert part.whole(batch.labels) is batch.labels
    assert torch.equal(local_tokens(5, None), torch.arange(5))


def join() -> dist.ProcessGroup:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    return dist.group.WORLD


def states_of(tokens) -> torch.Tensor:
    """[tokens, 2] of a micro-batch or a part of it."""
    return torch.stack((tokens.token_ids, tokens.position_ids), dim=1).double()


def parts_of_a_batch() -> dict:
    """On every rank: what it has of the micro-batch, and what all make of it together."""
    group = join()
    length = padded_length(sum(len(s.token_ids) for s in SEQUENCES), grain(group.size()))
    batch = pack(SEQUENCES, tuple(range(len(SEQUENCES))), length)
    part = local_part(batch, group, thd=False)
    figures = part.token_ids[part.rows].double().requires_grad_()
    whole = part.whole(figures)
    (whole * torch.arange(1, len(whole) + 1)).sum().backward()
    states = states_of(part)
    asked = torch.tensor([0, length - 1, 5])
    states[~torch.isin(local_tokens(length, group), asked)] = torch.nan  # of no concern
    return {
        "local": local_tokens(length, group).tolist(),
        "tokens": part.token_ids.tolist(),
        "rows": (part.rows.tolist(), part.labels.tolist(), part.own.tolist()),
        "whole": (whole.tolist(), batch.token_ids[batch.rows].tolist()),
        "gradient": figures.grad.tolist(),
        "at": (part.at(asked, states).tolist(), states_of(batch)[asked].tolist()),
        "batch": (batch.token_ids.tolist(), batch.rows.tolist(), batch.labels.tolist()),
    }


@pytest.mark.parametrize("ranks", [2, 4])
def test_what_ranks_make_of_their_own_tokens_is_put_together(ranks):
    seen = []
    for found in spawn(ranks, parts_of_a_batch):
        token_ids, rows, labels = found["batch"]
        assert found["tokens"] == [token_ids[t] for t in found["local"]]
        own_rows, own_labels, own = found["rows"]
        assert [found["local"][row] for row in own_rows] == [rows[place] for place in own]
        assert own_labels == [labels[place] for place in own]
        assert found["whole"][0] == found["whole"][1]
        assert found["gradient"] == [place + 1 for place in own]  # its own rows' alone, and once
        assert found["at"][0] == found["at"][1]
        seen += own
    assert sorted(seen) == list(range(len(rows)))


def attention_of_rank(names: list[str], key_heads: int, block: int) -> dict:
    """Output and gradients of this rank's tokens; every rank adds the loss of its own tokens."""
    group, found, attention.QUERY_BLOCK = join(), {}, block
    for name in names:
        lengths = LENGTHS[name]
        tokens = sum(lengths)
        whole = random_inputs(tokens, key_heads=key_heads)
        upstream = torch.randn(whole[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        local = local_tokens(tokens, group)
        nothing = torch.zeros(tokens, dtype=torch.int64)
        batch = replace(BATCH, cu_seqlens=bounds(lengths), token_ids=nothing, position_ids=nothing)
        params = local_part(batch, group, thd=False).params
        inputs = [t.detach()[local].requires_grad_() for t in whole]
        out = attention.context_attention(*inputs, params.cut, 0.3)
        gradients = torch.autograd.grad(out, inputs, upstream[local])
        found[name] = local.numpy(), out.detach().numpy(), [gradient.numpy() for gradient in gradients]
    return found


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("key_heads", "block"), [(1, 1024), (4, 3)])
def test_matches_dense_attention_and_its_gradients(ranks, key_heads, block):
    """Also with queries in blocks of 3, of which a piece of a sequence has several and a shorter last one."""
    results = spawn(ranks, attention_of_rank, list(LENGTHS), key_heads, block)
    for name, lengths in LENGTHS.items():
        inputs = random_inputs(sum(lengths), key_heads=key_heads)
        theirs = dense_attention(*inputs, lengths, 0.3)
        upstream = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1), dtype=theirs.dtype)
        gradients = torch.autograd.grad(theirs, inputs, upstream)
        for found in results:
            local, out, mine = found[name]
            np.testing.assert_allclose(out, theirs.detach().numpy()[local], atol=1e-12, rtol=0, err_msg=name)
            for a, b in zip(mine, gradients, strict=True):
                np.testing.assert_allclose(a, b.numpy()[local], atol=1e-12, rtol=0, err_msg=name)
