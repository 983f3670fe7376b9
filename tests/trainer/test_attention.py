"""Packed attention against attention written out with a dense mask, in float64."""

import pytest
import torch
from attention_reference import dense_attention, random_inputs

from megatron_srft.trainer.attention import packed_attention, packed_params, plan_segments, rotate, rotation

CASES = {
    "one": [7],
    "equal": [4, 4, 4],
    "mixed": [1, 30, 2, 29, 3, 17, 1],
    "empty sequences": [0, 5, 0, 3],
    "many short": [3 + i % 11 for i in range(40)],
}


@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES)
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_matches_dense_attention_and_its_gradients(lengths, key_heads):
    inputs = random_inputs(sum(lengths), key_heads=key_heads)
    segments = plan_segments(lengths, torch.device("cpu"))
    ours = packed_attention(*inputs, segments, 0.3)
    theirs = dense_attention(*inputs, lengths, 0.3)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=ours.dtype)
    for name, a, b in zip(
        ("query", "key", "value"),
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(theirs, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0, msg=name)


def test_one_sequence_does_not_touch_the_others_by_a_bit():
    lengths = [6, 3, 9, 3]
    segments = plan_segments(lengths, torch.device("cpu"))
    inputs = random_inputs(sum(lengths), dtype=torch.float32)
    before = packed_attention(*inputs, segments, 0.3)
    changed = [t.detach().clone() for t in inputs]
    for t in changed:
        t[6:9] = torch.nan  # the second sequence, not even as NaN
    after = packed_attention(*changed, segments, 0.3)
    assert torch.equal(before[:6], after[:6]) and torch.equal(before[9:], after[9:])
    assert after[6:9].isnan().all()


@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES)
def test_plan_holds_every_token_once_with_little_padding(lengths):
    segments = plan_segments(lengths, torch.device("cpu"))
    assert torch.equal(segments.token[segments.slot], torch.arange(sum(lengths)))
    assert sum(n * length for n, length in segments.batches) == len(segments.token) <= sum(lengths) / 0.7


def test_many_short_sequences_share_a_few_batches():
    lengths = [20 + i % 20 for i in range(200)]
    assert len(plan_segments(lengths, torch.device("cpu")).batches) <= 4


def test_rotation_is_a_product_of_complex_numbers():
    heads, *_ = random_inputs(5)
    positions, frequencies = torch.tensor([0, 1, 2, 0, 7]), torch.tensor([1.0, 0.3, 0.1, 0.02])
    turned = rotate(heads, *rotation(positions, frequencies, torch.float64))
    factor = torch.exp(1j * torch.outer(positions.float(), frequencies))[:, None, :].to(torch.complex128)
    expected = torch.complex(*heads.chunk(2, -1)) * factor
    expected = torch.cat((expected.real, expected.imag), -1)
    torch.testing.assert_close(turned, expected, atol=1e-6, rtol=0)
    upstream = torch.randn(turned.shape, generator=torch.Generator().manual_seed(1), dtype=turned.dtype)
    gradients = [torch.autograd.grad(out, heads, upstream)[0] for out in (turned, expected)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=0)


def test_packed_params_describe_the_sequences():
    params = packed_params(torch.tensor([0, 3, 3, 8], dtype=torch.int32))
    assert (params.max_seqlen_q, params.qkv_format) == (5, "sbhd")
    assert params.segments.batches == ((1, 5), (1, 3))
    assert packed_params(torch.tensor([0, 3], dtype=torch.int32), thd=True).qkv_format == "thd"
