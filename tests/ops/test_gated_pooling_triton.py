"""The Triton kernels of gated pooling under Triton's interpreter, against the reference in float64."""

import pytest
import torch
from pooling_cases import DTYPES, ROUNDING, assert_near, problem
from triton_kernels import compiled, interpreted, needs_triton

import megatron_srft.ops.gated_pooling  # noqa: F401 - declares the ops
from megatron_srft.ops.implementations import kernel

pytestmark = needs_triton

KERNELS = "megatron_srft.ops.triton.gated_pooling:"


def both(name: str, *arguments, rounding: float, exact_type=torch.float64) -> torch.Tensor:
    """The interpreted kernel's result, which must be near the reference's on the same numbers in float64."""
    result = interpreted(KERNELS + name, *arguments).result
    exact = [argument.to(exact_type) if argument.is_floating_point() else argument for argument in arguments]
    assert_near(result, kernel(name, "reference")(*exact), rounding, name)
    return result


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("width", "extra"), [(1, 0), (7, 0), (64, 0), (64, 8), (64, 3), (520, 0), (1030, 5)])
def test_projection_and_its_gradients_are_those_of_float64(width, extra, dtype):
    given = problem(width, dtype=dtype, extra_stride=extra)
    states, weight = given.states[0].detach(), given.weights[0].detach()
    accumulated, gradient = torch.randn(53, 2), torch.randn(53, 2)
    assert both("gated_projection", accumulated, states, weight, rounding=1e-6).dtype == torch.float32
    assert both("gated_projection_weight_gradient", gradient, states, rounding=2e-6).dtype == torch.float32
    of_states = both("gated_projection_hidden_gradient", gradient, weight, states, rounding=ROUNDING[dtype])
    assert of_states.dtype == dtype


@pytest.mark.parametrize("rows", [0, 1, 1025])
def test_many_and_no_rows(rows):
    generator = torch.Generator().manual_seed(rows)
    states, gradient = torch.randn(rows, 9, generator=generator), torch.randn(rows, 2, generator=generator)
    weight = torch.randn(2, 9, generator=generator)
    if rows == 0:
        for name, shape in (("gated_projection", (0, 2)), ("gated_projection_hidden_gradient", (0, 9))):
            arguments = (gradient, states, weight) if name == "gated_projection" else (gradient, weight, states)
            assert interpreted(KERNELS + name, *arguments).result.shape == shape
        of_weight = interpreted(KERNELS + "gated_projection_weight_gradient", gradient, states).result
        assert torch.equal(of_weight, torch.zeros(2, 9))
        return
    both("gated_projection", gradient, states, weight, rounding=1e-6)
    both("gated_projection_weight_gradient", gradient, states, rounding=2e-6)


@pytest.mark.parametrize("spread", [1.0, 60.0])
@pytest.mark.parametrize(
    "sequences",
    [[[1, 2], [2, 5], [9, 26], [26, 43], [50, 1300]], [[0, 1300]], [[0, 0], [0, 40], [40, 40], [600, 601]], []],
    ids=["ragged", "one", "empty ones", "none"],
)
def test_sums_and_their_gradient_are_those_of_float64(sequences, spread):
    generator = torch.Generator().manual_seed(0)
    accumulated = spread * torch.randn(1300, 2, generator=generator)
    ranges, bias = torch.tensor(sequences, dtype=torch.int64).reshape(-1, 2), torch.randn(2, generator=generator)
    gradient = torch.randn(len(ranges), 2, generator=generator)
    if sequences:
        both("gated_sums", accumulated, ranges, bias, rounding=2e-6)
    both("gated_sums_gradient", gradient, accumulated, ranges, bias, rounding=1e-6)


def test_rows_outside_and_ranges_beyond_the_rows_are_left_alone():
    accumulated = torch.randn(40, 2)
    accumulated[20:30] = torch.nan
    bias, gradient = torch.zeros(2), torch.ones(2, 2)
    inside = torch.tensor([[0, 20], [30, 40]])
    beyond = torch.tensor([[-3, 20], [30, 99]])
    sums = both("gated_sums", accumulated, inside, bias, rounding=1e-6)
    assert torch.equal(interpreted(KERNELS + "gated_sums", accumulated, beyond, bias).result, sums)
    of_rows = both("gated_sums_gradient", gradient, accumulated, inside, bias, rounding=1e-6)
    assert not of_rows[20:30].any()


def states(rows: int, width: int, dtype, extra: int = 0) -> torch.Tensor:
    return torch.zeros(rows, width + extra, dtype=dtype)[:, :width]


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(("dtype", "width", "vectors"), [("bf16", 3584, 4), ("fp32", 896, 4), ("bf16", 7, 0)])
def test_kernels_keep_to_registers_and_load_whole_vectors(dtype, width, vectors, architecture):
    hidden, weight, pairs = states(16, width, DTYPES[dtype]), torch.zeros(2, width), torch.zeros(16, 2)
    launches = {
        "gated_projection": ((pairs, hidden, weight), vectors),
        "gated_projection_weight_gradient": ((pairs, hidden), vectors // 4),
        "gated_projection_hidden_gradient": ((pairs, weight, hidden), vectors // 4),
        "gated_sums": ((pairs, torch.zeros(4, 2, dtype=torch.int64), torch.zeros(2)), 0),
        "gated_sums_gradient": ((pairs[:4], pairs, torch.zeros(4, 2, dtype=torch.int64), torch.zeros(2)), 0),
    }
    for name, (arguments, vector_loads) in launches.items():
        (build,) = compiled(KERNELS + name, architecture, [arguments])
        print(f"{name} sm_{architecture}: {build.registers} registers")
        assert (build.stack_bytes, build.local_memory) == (0, 0)
        assert build.registers <= 96
        assert build.count("LDG.E.128", "LDG.E.ENL2.256") >= vector_loads


def test_other_numbers_do_not_compile_a_kernel_again():
    for rows, width, extra in ((16, 3584, 0), (1, 4000, 64), (33, 2056, 8)):
        hidden, weight, pairs = states(rows, width, torch.bfloat16, extra), torch.zeros(2, width), torch.zeros(rows, 2)
        first = (torch.zeros(16, 2), states(16, 3584, torch.bfloat16), torch.zeros(2, 3584))
        assert len(compiled(KERNELS + "gated_projection", 90, [first, (pairs, hidden, weight)])) == 1
