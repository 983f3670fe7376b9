"""Token log-prob and entropy from hidden states, and over shards, against a dense float64 softmax."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from dense_softmax import assert_close, reference, reference_gradient, run
from spawning import spawn

from megatron_srft.ops.linear_token_logprob import linear_token_logprob
from megatron_srft.ops.token_logprob import token_logprob


@pytest.mark.parametrize("chunk_columns", [1, 4, 100])
def test_derivative_of_the_linear_form_is_exact_by_finite_differences(chunk_columns):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(5, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(11, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.tensor([0, 8, 3, 4, 4])

    def function(hidden, weight):
        return linear_token_logprob(
            hidden, weight, labels, vocab_start=0, vocab_size=9, temperature=0.7,
            chunk_columns=chunk_columns, saved_logits_bytes=0,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (hidden, weight))


# ---------------------------------------------------------------- from hidden states


def linear_problem(rows, columns, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = torch.randn(columns, width, generator=generator).to(dtype)
    labels = torch.randint(0, columns - 3, (rows,), generator=generator)
    return hidden, weight, labels, *torch.randn(2, rows, generator=generator)


def linear_reference(hidden, weight, labels, vocab_size, temperature, g, h):
    def function(hidden, weight):
        return reference(hidden @ weight.t(), labels, vocab_size, temperature)

    return run(function, [hidden.double(), weight.double()], g, h)


@pytest.mark.parametrize("chunk_columns", [1, 64, 250, 10_000])
@pytest.mark.parametrize("saved_logits_bytes", [0, 1 << 30])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_linear_form_over_chunks(chunk_columns, saved_logits_bytes, dtype, tolerance):
    hidden, weight, labels, g, h = linear_problem(23, 303, 16, dtype)
    outputs = run(
        lambda hidden, weight: linear_token_logprob(
            hidden, weight, labels, vocab_start=0, vocab_size=300, temperature=1.3,
            chunk_columns=chunk_columns, saved_logits_bytes=saved_logits_bytes,
        ),
        [hidden, weight], g, h,
    )  # fmt: skip
    for actual, expected in zip(outputs, linear_reference(hidden, weight, labels, 300, 1.3, g, h), strict=True):
        assert_close(actual, expected, tolerance)
    assert (outputs[3][300:] == 0).all()


@pytest.mark.parametrize(("saved_logits_bytes", "tolerance"), [(0, 6e-3), (1 << 30, 6e-3)])
def test_linear_form_in_bfloat16_keeps_float32_statistics(saved_logits_bytes, tolerance):
    hidden, weight, labels, g, h = linear_problem(40, 203, 32, torch.bfloat16)
    logprobs, entropy, hidden_gradient, weight_gradient = run(
        lambda hidden, weight: linear_token_logprob(
            hidden, weight, labels, vocab_start=0, vocab_size=200, chunk_columns=64,
            saved_logits_bytes=saved_logits_bytes,
        ),
        [hidden, weight], g, h,
    )  # fmt: skip
    expected = linear_reference(hidden, weight, labels, 200, 1.0, g, h)
    assert logprobs.dtype == torch.float32 and hidden_gradient.dtype == weight_gradient.dtype == torch.bfloat16
    assert_close(logprobs, expected[0], 2e-5)  # bfloat16 logits would be off by 1e-2
    assert_close(entropy, expected[1], 2e-5)
    for actual, wanted in ((hidden_gradient, expected[2]), (weight_gradient, expected[3])):
        assert (actual.double() - wanted).norm() / wanted.norm() < tolerance


def test_linear_form_needs_only_the_gradients_asked_for():
    hidden, weight, labels, g, _ = linear_problem(6, 20, 4)
    hidden.requires_grad_()
    logprobs, _ = linear_token_logprob(hidden, weight, labels, vocab_start=0, vocab_size=17)
    (logprobs * g).sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_a_large_vocabulary_in_bounded_memory():
    """151,936 columns, 16 rows: full logits would be 10 MB; a run with recomputation holds chunks of about 1 MB."""
    hidden, weight, labels, g, h = linear_problem(16, 151_936, 8)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    weight_leaf, hidden_leaf = weight.clone().requires_grad_(), hidden.clone().requires_grad_()
    with Watch():
        logprobs, entropy = linear_token_logprob(
            hidden_leaf, weight_leaf, labels, vocab_start=0, vocab_size=151_643, chunk_columns=16_384,
            saved_logits_bytes=0,
        )  # fmt: skip
        torch.autograd.backward([logprobs, entropy], [g, h])
    assert largest == weight.untyped_storage().nbytes()  # the weight's gradient, 5 MB, and nothing larger
    expected = reference(hidden @ weight.t(), labels, 151_643, 1.0)
    assert_close(logprobs, expected[0], 2e-5)
    assert_close(entropy, expected[1], 2e-5)


# ---------------------------------------------------------------- vocabulary cut over ranks

SHARDS = {2: (40, 23), 3: (17, 30, 16), 4: (20, 20, 20, 3)}
"""Columns per rank of a padded vocabulary of 63. With 20 valid tokens, the later ranks hold only padding."""

CASES = [(60, "float64"), (60, "float32"), (20, "float64"), (20, "float32")]

EDGE_LABELS = [0, 16, 17, 19, 39, 40, 46, 47, 59]


def test_unequal_shards_over_processes():
    by_rank = spawn(max(SHARDS), sharded_outputs)
    for ranks in SHARDS:
        for case, outputs in zip(
            CASES, zip(*[by_rank[rank][ranks] for rank in range(ranks)], strict=True), strict=True
        ):
            check_shards(*case, outputs)


def check_shards(vocab_size, dtype, outputs):
    hidden, weight, labels, g, h = sharded_case(vocab_size, dtype)
    expected = linear_reference(hidden, weight, labels, vocab_size, 0.8, g, h)
    dense_gradient = reference_gradient(hidden @ weight.t(), labels, vocab_size, 0.8, g, h)
    tolerance = 1e-11 if dtype == "float64" else 3e-5
    values, hidden_gradients, weight_gradients, logit_gradients, repeats = zip(*outputs, strict=True)
    assert all((value == values[0]).all() for value in values)  # the same bits on every rank
    assert all(repeats)
    assert_close(torch.from_numpy(values[0]), torch.stack([*expected[:2], *expected[:2]]), tolerance)
    assert_close(torch.from_numpy(sum(hidden_gradients)), expected[2], tolerance)
    assert_close(torch.from_numpy(np.concatenate(weight_gradients)), expected[3], tolerance)
    assert_close(torch.from_numpy(np.concatenate(logit_gradients, axis=1)), dense_gradient, tolerance)


def sharded_case(vocab_size, dtype):
    dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(vocab_size)
    hidden = torch.randn(len(EDGE_LABELS), 6, generator=generator).to(dtype)
    weight = torch.randn(63, 6, generator=generator).to(dtype)
    labels = torch.tensor([min(label, vocab_size - 1) for label in EDGE_LABELS])
    return hidden, weight, labels, *torch.randn(2, len(EDGE_LABELS), generator=generator)


def sharded_outputs():
    """{ranks: results of every case with the vocabulary cut over that many ranks}."""
    dist.init_process_group("gloo")
    outputs = {}
    for ranks, widths in SHARDS.items():
        group = dist.new_group(list(range(ranks)))
        if dist.get_rank() < ranks:
            start = sum(widths[: dist.get_rank()])
            shard = slice(start, start + widths[dist.get_rank()])
            outputs[ranks] = [_sharded_output(*case, shard, group) for case in CASES]
    dist.destroy_process_group()
    return outputs


def _sharded_output(vocab_size, dtype, shard, group):
    hidden, weight, labels, g, h = sharded_case(vocab_size, dtype)
    where = dict(vocab_start=shard.start, vocab_size=vocab_size, temperature=0.8, group=group)

    def linear():
        return run(
            lambda hidden, weight: linear_token_logprob(hidden, weight, labels, chunk_columns=13, **where),
            [hidden, weight[shard]], g, h,
        )  # fmt: skip

    first, second = linear(), linear()
    from_logits = run(lambda x: token_logprob(x, labels, **where), [(hidden @ weight.t())[:, shard]], g, h)
    values = torch.stack([*first[:2], *from_logits[:2]])
    repeats = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return values.numpy(), first[2].numpy(), first[3].numpy(), from_logits[2].numpy(), repeats
