"""Token log-prob and entropy from logits, against a dense float64 softmax differentiated by autograd."""

import pytest
import torch
from dense_softmax import assert_close, problem, reference, reference_gradient, run

from megatron_srft.ops.implementations import kernel
from megatron_srft.ops.token_logprob import token_logprob

GRID = [(7, 1), (9, 7), (9, 1000), (9, 1001), (5, 32_000), (2, 151_936)]
"""(rows, vocabulary): the smallest, one below and one above a multiple of the vector length, and two real ones."""

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}
ROUNDING = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Relative error of a gradient's last rounding, to its logits' type."""


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
@pytest.mark.parametrize(("rows", "vocab_size"), GRID)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(rows, vocab_size, temperature, dtype, implementation):
    logits, labels, g, h = problem(rows, vocab_size + 3, vocab_size, dtype=dtype)
    labels[0], labels[-1] = 0, vocab_size - 1
    logprobs, entropy, gradient = run(
        lambda x: token_logprob(
            x, labels, vocab_start=0, vocab_size=vocab_size, temperature=temperature, implementation=implementation
        ),
        [logits], g, h,
    )  # fmt: skip
    expected = reference(logits, labels, vocab_size, temperature)
    assert logprobs.dtype == entropy.dtype == torch.float32 and gradient.dtype == dtype
    assert_close(logprobs, expected[0], TOLERANCE[dtype])
    assert_close(entropy, expected[1], TOLERANCE[dtype])
    expected = reference_gradient(logits, labels, vocab_size, temperature, g, h)
    torch.testing.assert_close(gradient.double(), expected, rtol=2e-5 + ROUNDING[dtype], atol=2e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("vocab_size", [1, 7, 1001])
def test_values_and_gradients_in_float64(vocab_size, temperature):
    logits, labels, g, h = problem(9, vocab_size + 3, vocab_size, dtype=torch.float64)
    logprobs, entropy, gradient = run(
        lambda x: token_logprob(x, labels, vocab_start=0, vocab_size=vocab_size, temperature=temperature),
        [logits], g, h,
    )  # fmt: skip
    expected = reference(logits, labels, vocab_size, temperature)
    assert logprobs.dtype == entropy.dtype == torch.float64
    assert_close(logprobs, expected[0], 1e-12)
    assert_close(entropy, expected[1], 1e-12)
    assert_close(gradient, reference_gradient(logits, labels, vocab_size, temperature, g, h), 1e-12)


def test_uniform_logits_have_entropy_log_v_with_positive_sign(implementation):
    logprobs, entropy = token_logprob(
        torch.full((1, 8), 5.0), torch.tensor([3]), vocab_start=0, vocab_size=8, implementation=implementation
    )
    assert entropy.item() == pytest.approx(8 * (1 / 8) * 2.0794415)
    assert logprobs.item() == pytest.approx(-2.0794415)


def test_derivative_is_exact_by_finite_differences():
    logits, labels, _, _ = problem(5, 11, 9, dtype=torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: token_logprob(x, labels, vocab_start=0, vocab_size=9, temperature=0.7), (logits,)
    )


@pytest.mark.parametrize("offset", [-150.0, 150.0])
def test_large_logits_of_either_sign(offset, implementation):
    logits, labels, g, h = problem(6, 33, 33)
    logits += offset
    logits[0] = torch.linspace(-150, 150, 33)  # a span that underflows all but the top
    logprobs, entropy, gradient = run(
        lambda x: token_logprob(x, labels, vocab_start=0, vocab_size=33, implementation=implementation), [logits], g, h
    )
    expected = reference(logits, labels, 33, 1.0)
    assert_close(logprobs, expected[0], 2e-5)
    assert_close(entropy, expected[1], 2e-5)
    assert_close(gradient, reference_gradient(logits, labels, 33, 1.0, g, h), 2e-5)


def test_entropy_of_a_peaked_row_keeps_its_digits_at_a_large_offset(implementation):
    """ln S - U/S does not cancel against the maximum: a shift of the logits by 1000 costs nothing."""
    logits = torch.tensor([[0.0, -12.0, -13.0]])
    label = torch.tensor([0])
    at_zero = token_logprob(logits, label, vocab_start=0, vocab_size=3, implementation=implementation)
    shifted = token_logprob(logits + 1024, label, vocab_start=0, vocab_size=3, implementation=implementation)
    assert torch.equal(at_zero[0], shifted[0]) and torch.equal(at_zero[1], shifted[1])
    assert_close(at_zero[1], reference(logits, label, 3, 1.0)[1], 1e-7)


def test_minus_infinity_logits_contribute_nothing(implementation):
    logits, labels, g, h = problem(4, 12, 12)
    keep = [0, 2, 3, 5, 8, 9, 11]
    masked = torch.full_like(logits, -torch.inf)
    masked[:, keep] = logits[:, keep]
    labels = torch.tensor([0, 3, 11, 8])
    short_labels = torch.tensor([keep.index(label) for label in labels.tolist()])
    outputs = run(
        lambda x: token_logprob(x, labels, vocab_start=0, vocab_size=12, implementation=implementation), [masked], g, h
    )
    expected = reference(logits[:, keep], short_labels, len(keep), 1.0)
    assert_close(outputs[0], expected[0], 1e-6)
    assert_close(outputs[1], expected[1], 1e-6)
    dropped = [column for column in range(12) if column not in keep]
    assert (outputs[2][:, dropped] == 0).all()
    assert_close(outputs[2][:, keep], reference_gradient(logits[:, keep], short_labels, len(keep), 1.0, g, h), 1e-6)


def test_padding_columns_change_nothing_and_get_no_gradient(implementation):
    logits, labels, g, h = problem(5, 10, 7)
    function = lambda x: token_logprob(x, labels, vocab_start=0, vocab_size=7, implementation=implementation)  # noqa: E731
    plain = run(function, [logits[:, :7]], g, h)
    for filler in (1e30, torch.inf, torch.nan, -torch.inf):
        logits[:, 7:] = filler
        logprobs, entropy, gradient = run(function, [logits], g, h)
        assert torch.equal(logprobs, plain[0]) and torch.equal(entropy, plain[1])
        assert torch.equal(gradient[:, :7], plain[2])
        assert (gradient[:, 7:] == 0).all()


def test_no_rows(implementation):
    logits, labels = torch.zeros(0, 5, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    outputs = token_logprob(logits, labels, vocab_start=0, vocab_size=5, implementation=implementation)
    sum(output.sum() for output in outputs).backward()
    assert [output.shape for output in outputs] == [(0,), (0,)]
    assert logits.grad.shape == (0, 5)


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


def test_rows_do_not_see_each_other_and_repeat_bit_for_bit(implementation):
    logits, labels, g, h = problem(17, 1001, 1001)

    def function(x, rows):
        return token_logprob(x, labels[rows], vocab_start=0, vocab_size=1001, implementation=implementation)

    together = run(lambda x: function(x, slice(None)), [logits], g, h)
    again = run(lambda x: function(x, slice(None)), [logits], g, h)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    for rows in (slice(0, 1), slice(3, 9), slice(16, 17)):
        alone = run(lambda x, rows=rows: function(x, rows), [logits[rows]], g[rows], h[rows])
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, together, strict=True))


def test_blocks_of_rows_are_invisible(implementation):
    """2,500 rows of 1,001 columns are worked off in blocks; every row still equals a call of its own."""
    logits, labels, g, h = problem(2500, 1004, 1001)

    def function(x, rows):
        return token_logprob(x, labels[rows], vocab_start=0, vocab_size=1001, implementation=implementation)

    together = run(lambda x: function(x, slice(None)), [logits], g, h)
    for rows in (slice(0, 2), slice(1040, 1050), slice(2490, 2500)):
        alone = run(lambda x, rows=rows: function(x, rows), [logits[rows]], g[rows], h[rows])
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, together, strict=True))


def test_rows_without_any_finite_logit_have_no_distribution_and_stay_alone(implementation):
    logits, labels, g, h = problem(3, 40, 40)
    logits[1] = -torch.inf
    logprobs, entropy, gradient = run(
        lambda x: token_logprob(x, labels, vocab_start=0, vocab_size=40, implementation=implementation), [logits], g, h
    )
    assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("filler", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_show(filler, implementation):
    logits, labels, _, _ = problem(2, 100, 100)
    logits[1, 63] = filler
    logprobs, entropy = token_logprob(logits, labels, vocab_start=0, vocab_size=100, implementation=implementation)
    assert logprobs.isfinite().tolist() == entropy.isfinite().tolist() == [True, False]


def test_rows_may_lie_apart(implementation):
    """A slice of a wider matrix: rows at odd distances, misaligned for vector loads."""
    wide, labels, g, h = problem(6, 77, 50)
    function = lambda x: token_logprob(x, labels, vocab_start=0, vocab_size=50, implementation=implementation)  # noqa: E731
    for start in range(4):
        part = wide[:, start : start + 51]
        expected = run(function, [part.contiguous()], g, h)
        leaf = wide.clone().requires_grad_()
        logprobs, entropy = function(leaf[:, start : start + 51])
        torch.autograd.backward([logprobs, entropy], [g, h])
        assert_close(logprobs, expected[0], 1e-6)
        assert_close(entropy, expected[1], 1e-6)
        assert_close(leaf.grad[:, start : start + 51], expected[2], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overwriting_the_logits_gives_the_same_gradient_once(dtype, implementation):
    logits, labels, g, h = problem(6, 103, 100, dtype=dtype)
    where = dict(vocab_start=0, vocab_size=100, implementation=implementation)
    expected = run(lambda x: token_logprob(x, labels, **where), [logits], g, h)
    leaf = logits.clone().requires_grad_()
    owned = leaf * 1
    address = owned.data_ptr()
    owned.register_hook(lambda gradient: addresses.append(gradient.data_ptr()))
    addresses = []
    outputs = token_logprob(owned, labels, overwrite_logits=True, **where)
    torch.autograd.backward(outputs, [g, h], retain_graph=True)
    assert addresses == [address]
    assert torch.equal(leaf.grad, expected[2])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(outputs, [g, h])


# ---------------------------------------------------------------- as torch ops


def op_arguments(rows=5, columns=33):
    logits, labels, g, _ = problem(rows, columns + 3, columns)
    return logits, labels, torch.stack((logits.amax(1), g, g, g)), 0, columns


@pytest.mark.parametrize(
    "name", ["softmax_statistics", "softmax_statistics_keep", "softmax_gradient", "softmax_gradient_"]
)
def test_registration_is_complete(name, implementation):
    logits, labels, coefficients, start, columns = op_arguments()
    arguments = {
        "softmax_statistics": (logits.requires_grad_(), labels, start, columns, 0.5),
        "softmax_statistics_keep": (logits.detach(), labels, start, columns, 0.5, torch.empty(5, 36)),
        "softmax_gradient": (logits.detach(), labels, coefficients, start, columns, 0.5),
        "softmax_gradient_": (logits.detach().clone(), labels, coefficients, start, columns, 0.5),
    }[name]
    checks = torch.library.opcheck(kernel(name, implementation), arguments)
    assert set(checks.values()) == {"SUCCESS"}


def test_compiles_into_one_graph(implementation):
    logits, labels, g, h = problem(6, 53, 50)

    def function(x):
        logprobs, entropy = token_logprob(
            2 * x, labels, vocab_start=0, vocab_size=50, temperature=0.7, implementation=implementation
        )
        return logprobs.sin(), entropy.cos()

    eager, compiled = run(function, [logits], g, h), run(torch.compile(function, fullgraph=True), [logits], g, h)
    for actual, expected in zip(compiled, eager, strict=True):
        assert_close(actual, expected, 1e-6)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(logits=torch.zeros(3)), "logits must be a matrix"),
        (dict(logits=torch.zeros(3, 8, dtype=torch.int64)), "logits must be a matrix of floats"),
        (dict(logits=torch.zeros(8, 3).t()), "columns side by side"),
        (dict(labels=torch.zeros(3)), "labels must be int64"),
        (dict(labels=torch.zeros(4, dtype=torch.int64)), r"shape \(3,\)"),
        (dict(labels=torch.zeros(3, dtype=torch.int64, device="meta")), "device"),
        (dict(labels=torch.zeros(6, dtype=torch.int64)[::2]), "labels must lie side by side"),
        (dict(labels=torch.tensor([0, -1, 2])), r"\[0, 8\)"),
        (dict(labels=torch.tensor([0, 8, 2])), r"\[0, 8\)"),
        (dict(vocab_size=9), r"make up the vocabulary of 9.*\[0, 8\)"),
        (dict(vocab_start=1), "make up the vocabulary of 8"),
        (dict(vocab_start=-1), "not negative"),
        (dict(vocab_size=0), "positive"),
        (dict(temperature=0.0), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(implementation="fast"), "no such implementation.*auto, reference, native, triton"),
        (dict(implementation="native", logits=torch.zeros(3, 8, dtype=torch.float64)), "not float64"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = dict(
        logits=torch.zeros(3, 8), labels=torch.tensor([0, 7, 2]), vocab_start=0, vocab_size=8, temperature=1.0
    )
    with pytest.raises(ValueError, match=message):
        token_logprob(**{**arguments, **change})
