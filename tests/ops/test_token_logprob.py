"""Token log-prob and entropy against a dense float64 softmax differentiated by autograd."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from spawning import spawn

from megatron_srft.ops.token_logprob import linear_token_logprob, token_logprob


def reference(logits, labels, vocab_size, temperature):
    """Dense float64 log-probs and entropies over the valid columns; 0 log 0 = 0."""
    scaled = logits.double()[:, :vocab_size] / temperature
    logprobs = scaled.log_softmax(dim=-1)
    probabilities = logprobs.exp()
    entropy = -torch.where(probabilities > 0, probabilities * logprobs, 0.0).sum(-1)
    return logprobs.gather(1, labels[:, None])[:, 0], entropy


def reference_gradient(logits, labels, vocab_size, temperature, logprob_gradient, entropy_gradient):
    leaf = logits.detach().double().requires_grad_()
    logprobs, entropy = reference(leaf, labels, vocab_size, temperature)
    ((logprobs * logprob_gradient.double()).sum() + (entropy * entropy_gradient.double()).sum()).backward()
    return leaf.grad


def problem(rows, columns, vocab_size, *, dtype=torch.float32, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(rows, columns, generator=generator)).to(dtype)
    labels = torch.randint(0, vocab_size, (rows,), generator=generator)
    upstream = torch.randn(2, rows, generator=generator)
    return logits, labels, upstream[0], upstream[1]


def run(function, leaves, logprob_gradient, entropy_gradient):
    """Outputs and the leaves' gradients for the given upstream gradients."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    logprobs, entropy = function(*leaves)
    torch.autograd.backward([logprobs, entropy], [logprob_gradient.to(logprobs), entropy_gradient.to(entropy)])
    return logprobs.detach(), entropy.detach(), *[leaf.grad for leaf in leaves]


def assert_close(actual, expected, tolerance):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("vocab_size", [1, 7, 1000, 1001])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_values_and_gradients(vocab_size, temperature, dtype, tolerance):
    logits, labels, g, h = problem(9, vocab_size + 3, vocab_size, dtype=dtype)
    logprobs, entropy, gradient = run(
        lambda x: token_logprob(x, labels, vocab_start=0, vocab_size=vocab_size, temperature=temperature),
        [logits], g, h,
    )  # fmt: skip
    expected = reference(logits, labels, vocab_size, temperature)
    assert logprobs.dtype == entropy.dtype == dtype
    assert_close(logprobs, expected[0], tolerance)
    assert_close(entropy, expected[1], tolerance)
    assert_close(gradient, reference_gradient(logits, labels, vocab_size, temperature, g, h), tolerance)


def test_uniform_logits_have_entropy_log_v_with_positive_sign():
    logprobs, entropy = token_logprob(torch.full((1, 8), 5.0), torch.tensor([3]), vocab_start=0, vocab_size=8)
    assert entropy.item() == pytest.approx(8 * (1 / 8) * 2.0794415)
    assert logprobs.item() == pytest.approx(-2.0794415)


def test_derivative_is_exact_by_finite_differences():
    logits, labels, _, _ = problem(5, 11, 9, dtype=torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: token_logprob(x, labels, vocab_start=0, vocab_size=9, temperature=0.7), (logits,)
    )


@pytest.mark.parametrize("chunk_bytes", [1, 5 * 4 * 8, 1 << 20])
@pytest.mark.parametrize("saved_logits_bytes", [0, 1 << 20])
def test_derivative_of_the_linear_form_is_exact_by_finite_differences(chunk_bytes, saved_logits_bytes):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(5, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(11, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.tensor([0, 8, 3, 4, 4])

    def function(hidden, weight):
        return linear_token_logprob(
            hidden, weight, labels, vocab_start=0, vocab_size=9, temperature=0.7,
            chunk_bytes=chunk_bytes, saved_logits_bytes=saved_logits_bytes,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (hidden, weight))


@pytest.mark.parametrize("offset", [-150.0, 150.0])
def test_large_logits_of_either_sign(offset):
    logits, labels, g, h = problem(6, 33, 33)
    logits += offset
    logits[0] = torch.linspace(-150, 150, 33)  # a span that underflows all but the top
    logprobs, entropy, gradient = run(lambda x: token_logprob(x, labels, vocab_start=0, vocab_size=33), [logits], g, h)
    expected = reference(logits, labels, 33, 1.0)
    assert_close(logprobs, expected[0], 2e-5)
    assert_close(entropy, expected[1], 2e-5)
    assert_close(gradient, reference_gradient(logits, labels, 33, 1.0, g, h), 2e-5)


def test_entropy_of_a_peaked_row_keeps_its_digits_at_a_large_offset():
    """ln S - U/S does not cancel against the maximum: a shift of the logits by 1000 costs nothing."""
    logits = torch.tensor([[0.0, -12.0, -13.0]])
    label = torch.tensor([0])
    at_zero = token_logprob(logits, label, vocab_start=0, vocab_size=3)
    shifted = token_logprob(logits + 1024, label, vocab_start=0, vocab_size=3)
    assert torch.equal(at_zero[0], shifted[0]) and torch.equal(at_zero[1], shifted[1])
    assert_close(at_zero[1], reference(logits, label, 3, 1.0)[1], 1e-7)


def test_minus_infinity_logits_contribute_nothing():
    logits, labels, g, h = problem(4, 12, 12, dtype=torch.float64)
    keep = [0, 2, 3, 5, 8, 9, 11]
    masked = torch.full_like(logits, -torch.inf)
    masked[:, keep] = logits[:, keep]
    labels = torch.tensor([0, 3, 11, 8])
    short_labels = torch.tensor([keep.index(label) for label in labels.tolist()])
    outputs = run(lambda x: token_logprob(x, labels, vocab_start=0, vocab_size=12), [masked], g, h)
    expected = reference(logits[:, keep], short_labels, len(keep), 1.0)
    assert_close(outputs[0], expected[0], 1e-12)
    assert_close(outputs[1], expected[1], 1e-12)
    dropped = [column for column in range(12) if column not in keep]
    assert (outputs[2][:, dropped] == 0).all()
    assert_close(outputs[2][:, keep], reference_gradient(logits[:, keep], short_labels, len(keep), 1.0, g, h), 1e-12)


def test_padding_columns_change_nothing_and_get_no_gradient():
    logits, labels, g, h = problem(5, 10, 7)
    function = lambda x: token_logprob(x, labels, vocab_start=0, vocab_size=7)  # noqa: E731
    plain = run(function, [logits[:, :7]], g, h)
    for filler in (1e30, torch.inf, torch.nan, -torch.inf):
        logits[:, 7:] = filler
        logprobs, entropy, gradient = run(function, [logits], g, h)
        assert torch.equal(logprobs, plain[0]) and torch.equal(entropy, plain[1])
        assert torch.equal(gradient[:, :7], plain[2])
        assert (gradient[:, 7:] == 0).all()


def test_no_rows():
    logits = torch.zeros(0, 5, requires_grad=True)
    hidden, weight = torch.zeros(0, 3, requires_grad=True), torch.ones(5, 3, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64)
    outputs = (
        *token_logprob(logits, labels, vocab_start=0, vocab_size=5),
        *linear_token_logprob(hidden, weight, labels, vocab_start=0, vocab_size=5),
    )
    sum(output.sum() for output in outputs).backward()
    assert [output.shape for output in outputs] == [(0,)] * 4
    assert logits.grad.shape == (0, 5) and hidden.grad.shape == (0, 3)
    assert torch.equal(weight.grad, torch.zeros(5, 3))


def test_each_output_alone_and_neither():
    logits, labels, g, h = problem(4, 9, 9, dtype=torch.float64)
    zero = torch.zeros_like(g)

    def gradient_of(loss):
        leaf = logits.clone().requires_grad_()
        loss(*token_logprob(leaf, labels, vocab_start=0, vocab_size=9)).backward()
        return leaf.grad

    assert_close(
        gradient_of(lambda lp, entropy: (lp * g).sum()), reference_gradient(logits, labels, 9, 1, g, zero), 1e-12
    )
    assert_close(
        gradient_of(lambda lp, entropy: (entropy * h).sum()), reference_gradient(logits, labels, 9, 1, zero, h), 1e-12
    )
    assert (gradient_of(lambda lp, entropy: 0 * (lp.sum() + entropy.sum())) == 0).all()


def test_rows_do_not_see_each_other_and_repeat_bit_for_bit():
    logits, labels, g, h = problem(17, 1001, 1001)
    function = lambda x, rows: token_logprob(x, labels[rows], vocab_start=0, vocab_size=1001)  # noqa: E731
    together = run(lambda x: function(x, slice(None)), [logits], g, h)
    again = run(lambda x: function(x, slice(None)), [logits], g, h)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    for rows in (slice(0, 1), slice(3, 9), slice(16, 17)):
        alone = run(lambda x, rows=rows: function(x, rows), [logits[rows]], g[rows], h[rows])
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, together, strict=True))


def test_blocks_of_rows_are_invisible():
    """2,500 rows of 1,001 columns are worked off in blocks; every row still equals a call of its own."""
    logits, labels, g, h = problem(2500, 1004, 1001)
    function = lambda x, rows: token_logprob(x, labels[rows], vocab_start=0, vocab_size=1001)  # noqa: E731
    together = run(lambda x: function(x, slice(None)), [logits], g, h)
    for rows in (slice(0, 2), slice(1040, 1050), slice(2490, 2500)):
        alone = run(lambda x, rows=rows: function(x, rows), [logits[rows]], g[rows], h[rows])
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("label", [-1, 5, 6])
def test_labels_outside_the_vocabulary_are_refused(label):
    with pytest.raises(ValueError, match=r"\[0, 5\)"):
        token_logprob(torch.zeros(1, 8), torch.tensor([label]), vocab_start=0, vocab_size=5)


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match="temperature"):
        token_logprob(torch.zeros(1, 8), torch.tensor([0]), vocab_start=0, vocab_size=8, temperature=0.0)


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
            chunk_bytes=chunk_columns * 23 * hidden.element_size(), saved_logits_bytes=saved_logits_bytes,
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
            hidden, weight, labels, vocab_start=0, vocab_size=200, chunk_bytes=40 * 4 * 64,
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


def test_bfloat16_logits():
    logits, labels, g, h = problem(12, 100, 97, dtype=torch.bfloat16)
    logprobs, entropy, gradient = run(
        lambda x: token_logprob(x, labels, vocab_start=0, vocab_size=97, temperature=0.5), [logits], g, h
    )
    expected = reference(logits, labels, 97, 0.5)
    assert_close(logprobs, expected[0], 1e-5)
    assert_close(entropy, expected[1], 1e-5)
    assert gradient.dtype == torch.bfloat16
    assert_close(gradient, reference_gradient(logits, labels, 97, 0.5, g, h), 1e-2)


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
            hidden_leaf, weight_leaf, labels, vocab_start=0, vocab_size=151_643, chunk_bytes=1 << 20,
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
            lambda hidden, weight: linear_token_logprob(hidden, weight, labels, chunk_bytes=500, **where),
            [hidden, weight[shard]], g, h,
        )  # fmt: skip

    first, second = linear(), linear()
    from_logits = run(lambda x: token_logprob(x, labels, **where), [(hidden @ weight.t())[:, shard]], g, h)
    values = torch.stack([*first[:2], *from_logits[:2]])
    repeats = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return values.numpy(), first[2].numpy(), first[3].numpy(), from_logits[2].numpy(), repeats
