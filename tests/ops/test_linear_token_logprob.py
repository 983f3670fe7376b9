"""Token log-prob and entropy from hidden states, and over shards, against a dense float64 softmax."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from dense_softmax import assert_close, reference, reference_gradient, run
from spawning import spawn

from megatron_srft.ops.implementations import kernel
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
def test_linear_form_over_chunks(chunk_columns, saved_logits_bytes, dtype, tolerance, implementation):
    if dtype == torch.float64:
        implementation = "reference"
    hidden, weight, labels, g, h = linear_problem(23, 303, 16, dtype)
    outputs = run(
        lambda hidden, weight: linear_token_logprob(
            hidden, weight, labels, vocab_start=0, vocab_size=300, temperature=1.3,
            chunk_columns=chunk_columns, saved_logits_bytes=saved_logits_bytes, implementation=implementation,
        ),
        [hidden, weight], g, h,
    )  # fmt: skip
    for actual, expected in zip(outputs, linear_reference(hidden, weight, labels, 300, 1.3, g, h), strict=True):
        assert_close(actual, expected, tolerance)
    assert (outputs[3][300:] == 0).all()


@pytest.mark.parametrize(("saved_logits_bytes", "tolerance"), [(0, 6e-3), (1 << 30, 6e-3)])
def test_linear_form_in_bfloat16_keeps_float32_statistics(saved_logits_bytes, tolerance, implementation):
    hidden, weight, labels, g, h = linear_problem(40, 203, 32, torch.bfloat16)
    logprobs, entropy, hidden_gradient, weight_gradient = run(
        lambda hidden, weight: linear_token_logprob(
            hidden, weight, labels, vocab_start=0, vocab_size=200, chunk_columns=64,
            saved_logits_bytes=saved_logits_bytes, implementation=implementation,
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


@pytest.mark.parametrize("saved_logits_bytes", [0, 1 << 30])
def test_the_weight_gradient_can_be_added_to_a_buffer(saved_logits_bytes, implementation):
    hidden, weight, labels, g, h = linear_problem(12, 103, 8, torch.bfloat16)
    where = dict(
        vocab_start=0, vocab_size=100, chunk_columns=40, saved_logits_bytes=saved_logits_bytes,
        implementation=implementation,
    )  # fmt: skip
    before = torch.randn(103, 8)
    buffer = before.clone()
    leaf = weight.clone().requires_grad_()
    outputs = linear_token_logprob(hidden.requires_grad_(), leaf, labels, weight_gradient=buffer, **where)
    torch.autograd.backward(outputs, [g, h])
    assert leaf.grad is None
    expected = linear_reference(hidden.detach(), weight, labels, 100, 1.0, g, h)[3]
    assert (buffer - before - expected).norm() / expected.norm() < 4e-3  # bfloat16 logit gradients, float32 sums
    assert torch.equal(buffer[100:], before[100:])


def test_kept_logits_serve_one_backward_pass(implementation):
    hidden, weight, labels, _, _ = linear_problem(12, 103, 8)
    logprobs, _ = linear_token_logprob(
        hidden.requires_grad_(), weight, labels, vocab_start=0, vocab_size=100, implementation=implementation
    )
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.sum().backward()


def test_a_shard_of_padding_alone_has_no_gradient(implementation):
    """Beside a shard that holds the whole vocabulary, as the last ranks' may."""
    hidden, weight, labels, g, h = linear_problem(5, 20, 4)
    statistics, kept, maxima = kernel("linear_softmax_statistics", implementation)(
        hidden, weight, labels, 20, 0, 1.0, 8, True
    )
    assert statistics.tolist() == [[-torch.inf] * 5, [0] * 5, [0] * 5, [0] * 5]
    gradient = torch.full_like(weight, torch.nan)
    hidden_gradient = kernel("linear_softmax_gradient", implementation)(
        hidden, weight, labels, statistics, kept, maxima, 20, 0, 1.0, 8, True, True, gradient, False
    )
    assert (hidden_gradient == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("keep", [False, True])
def test_registration_is_complete(keep, implementation):
    hidden, weight, labels, g, _ = linear_problem(5, 36, 4)
    forward = (hidden, weight, labels, 0, 33, 0.5, 10, keep)
    statistics, kept, maxima = kernel("linear_softmax_statistics", implementation)(*forward)
    coefficients = torch.stack((statistics[0], g, g, g))
    checks = torch.library.opcheck(kernel("linear_softmax_statistics", implementation), forward)
    checks |= torch.library.opcheck(
        kernel("linear_softmax_gradient", implementation),
        (hidden, weight, labels, coefficients, kept, maxima, *forward[3:7], keep, True, torch.zeros(36, 4), True),
    )
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("saved_logits_bytes", [0, 1 << 30])
def test_compiles_into_one_graph(saved_logits_bytes, implementation):
    hidden, weight, labels, g, h = linear_problem(7, 53, 8)

    def function(hidden, weight):
        logprobs, entropy = linear_token_logprob(
            2 * hidden, weight, labels, vocab_start=0, vocab_size=50, chunk_columns=20,
            saved_logits_bytes=saved_logits_bytes, implementation=implementation,
        )  # fmt: skip
        return logprobs.sin(), entropy.cos()

    eager = run(function, [hidden, weight], g, h)
    compiled = run(torch.compile(function, fullgraph=True), [hidden, weight], g, h)
    for actual, expected in zip(compiled, eager, strict=True):
        assert_close(actual, expected, 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(hidden=torch.zeros(3)), "hidden must be a matrix"),
        (dict(weight=torch.zeros(8, 4, dtype=torch.bfloat16)), "one type and device"),
        (dict(weight=torch.zeros(8, 4, device="meta")), "one type and device"),
        (dict(weight=torch.zeros(8, 5)), "rows of one length"),
        (dict(weight=torch.zeros(4, 8).t()), "columns side by side"),
        (dict(weight_gradient=torch.zeros(7, 4)), r"weight_gradient must have the weight's shape \(8, 4\)"),
        (dict(chunk_columns=0), "chunk_columns"),
        (dict(labels=torch.tensor([0, 8, 2])), r"\[0, 8\)"),
        (dict(vocab_size=9), "make up the vocabulary of 9"),
        (dict(temperature=-1.0), "temperature"),
        (dict(implementation="triton"), "triton"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = dict(
        hidden=torch.zeros(3, 4), weight=torch.zeros(8, 4), labels=torch.tensor([0, 7, 2]), vocab_start=0, vocab_size=8
    )
    with pytest.raises(ValueError, match=message):
        linear_token_logprob(**{**arguments, **change})


# ---------------------------------------------------------------- vocabulary cut over ranks

SHARDS = {2: (40, 23), 3: (17, 30, 16), 4: (20, 20, 20, 3)}
"""Columns per rank of a padded vocabulary of 63. With 20 valid tokens, the later ranks hold only padding."""

CASES = [(60, "float64"), (60, "float32"), (20, "float64"), (20, "float32")]

EDGE_LABELS = [0, 16, 17, 19, 39, 40, 46, 47, 59]


def test_unequal_shards_over_processes(implementation):
    by_rank = spawn(max(SHARDS), sharded_outputs, implementation)
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


def sharded_outputs(implementation):
    """{ranks: results of every case with the vocabulary cut over that many ranks}."""
    dist.init_process_group("gloo")
    outputs = {}
    for ranks, widths in SHARDS.items():
        group = dist.new_group(list(range(ranks)))
        if dist.get_rank() < ranks:
            start = sum(widths[: dist.get_rank()])
            shard = slice(start, start + widths[dist.get_rank()])
            outputs[ranks] = [_sharded_output(*case, shard, group, implementation) for case in CASES]
    dist.destroy_process_group()
    return outputs


def _sharded_output(vocab_size, dtype, shard, group, implementation):
    hidden, weight, labels, g, h = sharded_case(vocab_size, dtype)
    where = dict(vocab_start=shard.start, vocab_size=vocab_size, temperature=0.8, group=group)
    if dtype == "float32":
        where["implementation"] = implementation

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


def test_shards_that_do_not_fit_together_are_refused_on_every_rank():
    messages = spawn(2, _overlapping_shards)
    assert all("[0, 30), [20, 50)" in message and "vocabulary of 50" in message for message in messages)


def _overlapping_shards():
    dist.init_process_group("gloo")
    start = 20 * dist.get_rank()
    try:
        token_logprob(
            torch.zeros(2, 30), torch.tensor([0, 1]), vocab_start=start, vocab_size=50, group=dist.group.WORLD
        )
    except ValueError as error:
        return str(error)
    finally:
        dist.destroy_process_group()
