"""The kernels of the softmax statistics on a GPU, each implementation against float64."""

import pytest
import torch
from softmax_cases import CASES, case, check_gradient, check_statistics, coefficients, make

import megatron_srft.ops.softmax_statistics  # noqa: F401  declares the ops
from megatron_srft.ops.implementations import kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def statistics(implementation, problem):
    return kernel("softmax_statistics", implementation)(*problem.statistics_arguments)


def gradient(implementation, problem, terms):
    return kernel("softmax_gradient", implementation)(*problem.gradient_arguments(terms))


@pytest.mark.parametrize("name", CASES)
def test_statistics_are_those_of_float64(implementation, name):
    problem = case(name, "cuda")
    check_statistics(statistics(implementation, problem), problem)


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_float64_in_place_too(implementation, name):
    problem = case(name, "cuda")
    terms = coefficients(problem)
    result = gradient(implementation, problem, terms)
    check_gradient(result, problem, terms)
    kernel("softmax_gradient_", implementation)(*problem.gradient_arguments(terms))
    assert torch.equal(problem.logits, result)


@pytest.mark.parametrize("name", ["padded", "large", "odd-stride", "two-blocks", "151936-bf16"])
def test_logits_are_kept_relative_to_the_maximum_in_their_own_memory_too(implementation, name):
    problem = case(name, "cuda")
    keep = kernel("softmax_statistics_keep", implementation)
    kept = torch.zeros_like(problem.logits)
    result = keep(*problem.statistics_arguments, kept)
    check_statistics(result, problem)
    expected = problem.scaled - result[0].cpu().double()[:, None]
    rtol = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}[kept.dtype]
    columns = problem.columns
    torch.testing.assert_close(kept[:, :columns].cpu().double(), expected, rtol=rtol, atol=1e-4)
    keep(*problem.statistics_arguments, problem.logits)
    assert torch.equal(problem.logits[:, :columns], kept[:, :columns])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_show_in_their_row_only(implementation, bad):
    problem = make(3, 5001, device="cuda")
    clean = statistics(implementation, problem)
    problem.logits[1, 5000] = bad
    result = statistics(implementation, problem)
    assert result[1:3, 1].isnan().all()
    assert torch.equal(result[:, [0, 2]], clean[:, [0, 2]])


@pytest.mark.parametrize("implementation", ["native", "triton"], indirect=True)
def test_many_rows_give_the_same_bits_twice_and_alone(implementation):
    """More rows than a grid's second dimension may have. Plain torch need not give the same bits."""
    problem = make(70000, 1000, torch.bfloat16, device="cuda")
    terms = coefficients(problem)
    whole, slopes = statistics(implementation, problem), gradient(implementation, problem, terms)
    check_statistics(whole, problem)
    check_gradient(slopes, problem, terms)
    assert torch.equal(statistics(implementation, problem), whole)
    problem.logits, problem.labels, terms = problem.logits[69999:], problem.labels[69999:], terms[:, 69999:].clone()
    assert torch.equal(statistics(implementation, problem), whole[:, 69999:])
    assert torch.equal(gradient(implementation, problem, terms), slopes[69999:])


@pytest.mark.parametrize("implementation", ["native", "triton"], indirect=True)
def test_offsets_of_rows_beyond_32_bits(implementation):
    rows, columns = 16384, 140000  # 4.3 GiB of bfloat16, 2.3e9 elements
    logits = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    logits[-1] = torch.linspace(-3, 5, columns)
    labels = torch.full((rows,), 70000, device="cuda")
    last = logits[-1:].clone()
    run = kernel("softmax_statistics", implementation)
    whole = run(logits, labels, 0, columns, 1.0)
    assert torch.equal(whole[:, -1:], run(last, labels[:1], 0, columns, 1.0))
    terms = torch.tensor([5.0, 1, 2, 3], device="cuda")[:, None].repeat(1, rows)
    kernel("softmax_gradient_", implementation)(logits, labels, terms, 0, columns, 1.0)
    expected = kernel("softmax_gradient", implementation)(last, labels[:1], terms[:, :1].clone(), 0, columns, 1.0)
    assert torch.equal(logits[-1:], expected)
