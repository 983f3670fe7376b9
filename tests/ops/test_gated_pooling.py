"""Gated pooling against stacked hidden states in float64, on the implementations that run on a CPU."""

import math

import pytest
import torch
from pooling_cases import DTYPES, FLOOR, ROUNDING, Problem, assert_near, gradients, problem, stacked

from megatron_srft.ops import implementations
from megatron_srft.ops.gated_pooling import gated_mean, gated_projection


def streamed(given: Problem, implementation: str | None = None) -> tuple:
    """(scores, gate sums), a layer at a time."""
    accumulated = None
    for states, weight in zip(given.states, given.weights, strict=True):
        accumulated = gated_projection(accumulated, states, weight, implementation=implementation)
    return gated_mean(accumulated, given.sequences, given.bias, implementation=implementation)


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("width", [1, 7, 64, 896, 3584])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_scores_and_gradients_are_those_of_stacked_states(dtype, width, layers, implementation):
    given = problem(width, layers=layers, dtype=dtype)
    exact = given.in_float64()
    outputs, expected = streamed(given, implementation), stacked(exact)
    for output, wanted in zip(outputs, expected, strict=True):
        assert output.dtype == torch.float32
        assert_near(output, wanted, 1e-6, "output")
    found = gradients(outputs, given.leaves())
    for leaf, actual, wanted in zip(given.leaves(), found, gradients(expected, exact.leaves()), strict=True):
        assert actual.dtype == leaf.dtype
        assert_near(actual, wanted, max(2e-6, ROUNDING[leaf.dtype]), f"gradient of {list(leaf.shape)}")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("width", [7, 64, 70])
def test_rows_may_lie_apart(width, dtype, implementation):
    given = problem(width, dtype=dtype, extra_stride=5)
    assert given.states[0].stride() == (width + 5, 1)
    exact = given.in_float64()
    outputs, expected = streamed(given, implementation), stacked(exact)
    assert_near(outputs[0], expected[0], 1e-6)
    found, wanted = gradients(outputs, given.leaves()), gradients(expected, exact.leaves())
    assert_near(found[0], wanted[0], max(2e-6, ROUNDING[dtype]))
    assert_near(found[1], wanted[1], 2e-6)


def test_many_rows_go_through_all_chunks_of_the_weight_gradient(implementation):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20011, 3, generator=generator)
    gradient = torch.randn(20011, 2, generator=generator)
    kernel = implementations.kernel("gated_projection_weight_gradient", implementation)
    assert_near(kernel(gradient, hidden), gradient.double().T @ hidden.double(), 3e-6)
    assert torch.equal(kernel(gradient[:0], hidden[:0]), torch.zeros(2, 3))


def test_weights_may_have_the_states_type(implementation):
    given = problem(64, dtype=torch.bfloat16)
    low = given.weights[0].detach().bfloat16().requires_grad_()
    outputs = streamed(Problem(given.states, [low], given.bias, given.sequences), implementation)
    exact = Problem(given.states, [low], given.bias, given.sequences).in_float64()
    expected = stacked(exact)
    assert_near(outputs[0], expected[0], 1e-6)
    (actual,), (wanted,) = gradients(outputs, [low]), gradients(expected, exact.weights)
    assert actual.dtype == torch.bfloat16
    assert_near(actual, wanted, ROUNDING[torch.bfloat16])


def pooled(rows, sequences, implementation, dtype=torch.float32):
    accumulated = torch.tensor(rows, dtype=dtype, requires_grad=True)
    bias = torch.zeros(2, dtype=dtype)
    return accumulated, *gated_mean(accumulated, torch.tensor(sequences), bias, implementation=implementation)


def test_saturated_gates_are_open_or_shut(implementation):
    rows = [[100.0, 3.0], [-100.0, 1e6], [100.0, 5.0]]
    accumulated, scores, gate_sums = pooled(rows, [[0, 3]], implementation)
    assert (scores.item(), gate_sums.item()) == (4.0, 2.0)
    scores.sum().backward()
    torch.testing.assert_close(accumulated.grad, torch.tensor([[0.0, 0.5], [0.0, 0.0], [0.0, 0.5]]), rtol=1e-6, atol=0)


def test_slope_of_an_almost_open_gate_keeps_its_digits(implementation):
    accumulated, scores, gate_sums = pooled([[18.0, 1.0]], [[0, 1]], implementation)
    gate_sums.sum().backward()
    slope = math.exp(-18) / (1 + math.exp(-18)) ** 2
    assert accumulated.grad[0, 0].item() == pytest.approx(slope, rel=1e-5)


def test_below_the_floor_the_gate_sum_is_a_constant(implementation):
    rows = [[-25.0, 2.0], [-30.0, -3.0]]
    accumulated, scores, gate_sums = pooled(rows, [[0, 2]], implementation)
    gates = [1 / (1 + math.exp(25)), 1 / (1 + math.exp(30))]
    assert sum(gates) < FLOOR
    assert scores.item() == pytest.approx((2 * gates[0] - 3 * gates[1]) / FLOOR, rel=1e-5)
    scores.sum().backward()
    expected = [[2 * gates[0] / FLOOR, gates[0] / FLOOR], [-3 * gates[1] / FLOOR, gates[1] / FLOOR]]
    torch.testing.assert_close(accumulated.grad, torch.tensor(expected), rtol=1e-5, atol=0)


def test_gradients_are_those_of_finite_differences():
    given = problem(5, layers=2).in_float64()

    def function(*leaves):
        return streamed(Problem(list(leaves[:2]), list(leaves[2:4]), leaves[4], given.sequences), "reference")

    assert torch.autograd.gradcheck(function, given.leaves())


def test_tokens_of_no_response_do_not_count_and_spoil_nothing(implementation):
    given = problem(16)
    outside = torch.ones(53, dtype=torch.bool)
    for start, end in given.sequences.tolist():
        outside[start:end] = False
    clean = streamed(given, implementation)
    accumulated = gated_projection(None, given.states[0], given.weights[0], implementation=implementation).detach()
    accumulated[outside] = torch.nan
    accumulated.requires_grad_()
    scores, gate_sums = gated_mean(accumulated, given.sequences, given.bias, implementation=implementation)
    assert torch.equal(scores, clean[0])
    assert torch.equal(gate_sums, clean[1])
    (gradient, of_bias) = gradients((scores, gate_sums), [accumulated, given.bias])
    assert torch.equal(gradient[outside], torch.zeros(int(outside.sum()), 2))
    assert gradient[~outside].abs().min() > 0
    assert of_bias.isfinite().all()


def test_nan_states_reach_their_own_response_only(implementation):
    given = problem(16)
    with torch.no_grad():
        given.states[0][12, 3] = torch.nan  # of the third response
    scores, _ = streamed(given, implementation)
    assert scores.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("width", [7, 64])
def test_a_response_scores_the_same_bits_in_any_company(width):
    if reason := implementations.reason_against("native", "cpu"):
        pytest.skip(reason)
    given = problem(width, layers=2)
    together, _ = streamed(given, "native")
    for index, (start, end) in enumerate(given.sequences.tolist()):
        alone = [states[start:end] for states in given.states]
        scores, _ = streamed(Problem(alone, given.weights, given.bias, torch.tensor([[0, end - start]])), "native")
        assert torch.equal(scores[0], together[index])


def test_the_same_bits_again_and_with_other_threads(implementation):
    generator = torch.Generator().manual_seed(0)
    leaf = torch.randn(4099, 40, generator=generator)
    starts = torch.arange(0, 4000, 100)
    sequences = torch.stack((starts, starts + 90), dim=1)

    def run():
        given = Problem([leaf], [weight], bias, sequences)
        outputs = streamed(given, implementation)
        return [*outputs, *gradients(outputs, [weight, bias])]

    weight = torch.randn(2, 40, generator=generator).requires_grad_()
    bias = torch.randn(2, generator=generator).requires_grad_()
    before = torch.get_num_threads()
    first = run()
    try:
        if implementation == "native":
            torch.set_num_threads(2)
        again = run()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_only_what_a_gradient_needs_is_kept_and_computed(implementation):
    given = problem(64)
    states, weight = given.states[0].detach(), given.weights[0].detach()
    kept = []

    def sizes_kept(*arguments) -> list:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.untyped_storage().nbytes()), lambda _: 0):
            gated_projection(*arguments, implementation=implementation)
        return [size for size in kept if size > 0]

    accumulated = torch.zeros(53, 2)
    assert sizes_kept(accumulated, states, weight) == []
    assert sizes_kept(accumulated, states, weight.requires_grad_()) == [states.untyped_storage().nbytes()]
    assert sizes_kept(accumulated, states.requires_grad_(), weight.detach()) == [weight.untyped_storage().nbytes()]
    assert sizes_kept(accumulated.requires_grad_(), states.detach(), weight.detach()) == []


def test_nothing_to_do_is_fine(implementation):
    given = problem(8)
    accumulated = torch.ones(53, 2)
    same = gated_projection(accumulated, given.states[0][:, :0], given.weights[0][:, :0], implementation=implementation)
    assert torch.equal(same, accumulated)
    assert gated_projection(None, given.states[0][:0], given.weights[0], implementation=implementation).shape == (0, 2)
    none = torch.empty(0, 2, dtype=torch.int64)
    scores, gate_sums = gated_mean(accumulated.requires_grad_(), none, given.bias, implementation=implementation)
    assert scores.shape == gate_sums.shape == (0,)
    assert torch.equal(torch.autograd.grad(scores.sum(), accumulated)[0], torch.zeros(53, 2))


def test_kernels_touch_no_memory_outside_whatever_ranges_say(implementation):
    accumulated, bias = torch.zeros(10, 2), torch.zeros(2)
    wild = torch.tensor([[-5, 2], [4, 1000], [2**62, -(2**62)]])
    sums = implementations.kernel("gated_sums", implementation)(accumulated, wild, bias)
    assert sums[:2, 0].tolist() == [1.0, 3.0]
    backward = implementations.kernel("gated_sums_gradient", implementation)
    assert backward(torch.ones(3, 2), accumulated, wild, bias).shape == (10, 2)


def test_ops_are_registered_as_torch_wants(implementation):
    given = problem(7, dtype=torch.bfloat16, extra_stride=2)
    accumulated = torch.randn(53, 2, requires_grad=True)
    gradient, like = torch.randn(53, 2), given.states[0].detach()
    sums = (torch.randn(5, 2), accumulated.detach(), given.sequences, given.bias.detach())
    calls = {
        "gated_projection": (accumulated, given.states[0], given.weights[0]),
        "gated_projection_weight_gradient": (gradient, like),
        "gated_projection_hidden_gradient": (gradient, given.weights[0].detach(), like),
        "gated_sums": (accumulated, given.sequences, given.bias),
        "gated_sums_gradient": sums,
    }
    for name, arguments in calls.items():
        torch.library.opcheck(implementations.kernel(name, implementation), arguments)


def test_compiles_into_one_graph(implementation):
    given = problem(16, layers=2)

    def loss(states, weights, bias, sequences):
        scores, gate_sums = streamed(Problem(states, weights, bias, sequences), implementation)
        return (scores * scores).sum() + gate_sums.sum()

    arguments = (given.states, given.weights, given.bias, given.sequences)
    eager = torch.autograd.grad(loss(*arguments), given.leaves())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(torch.autograd.grad(compiled(*arguments), given.leaves()), eager, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_a_response_without_tokens_scores_nan_where_checks_would_stall():
    compiled = torch.compile(gated_mean, fullgraph=True, backend="aot_eager")
    scores, _ = compiled(torch.zeros(4, 2), torch.tensor([[0, 2], [3, 3]]), torch.ones(2))
    assert scores.isnan().tolist() == [False, True]


FLOATS = torch.zeros(4, 3)
PAIRS = torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, FLOATS[0], PAIRS), "hidden must be floats of shape"),
        ((None, FLOATS.long(), torch.zeros(2, 3)), "hidden must be floats of shape"),
        ((None, torch.zeros(3, 4).T, torch.zeros(2, 3)), "hidden must have adjacent columns"),
        ((None, FLOATS, torch.zeros(3, 2)), r"weight must be \[2, 3\]"),
        ((None, FLOATS, torch.zeros(2, 3).bfloat16()), "weight must be .* of torch.float32"),
        ((None, FLOATS, torch.zeros(2, 3, device="meta")), "weight must be on cpu"),
        ((torch.zeros(3, 2), FLOATS, torch.zeros(2, 3)), r"accumulated must be \[4, 2\]"),
        ((PAIRS.bfloat16(), FLOATS.bfloat16(), torch.zeros(2, 3)), "accumulated must be .* of torch.float32"),
        ((PAIRS.to("meta"), FLOATS, torch.zeros(2, 3)), "accumulated must be on cpu"),
    ],
)
def test_projection_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        gated_projection(*arguments)


@pytest.mark.parametrize(
    ("accumulated", "sequences", "bias", "message"),
    [
        (FLOATS, [[0, 4]], torch.zeros(2), r"accumulated must be \[tokens, 2\]"),
        (PAIRS.bfloat16(), [[0, 4]], torch.zeros(2), "accumulated must be .* float32"),
        (PAIRS, [[0, 4]], torch.zeros(1), r"bias must be \[2\]"),
        (PAIRS, [[0, 4]], torch.zeros(2).double(), "bias must be .* torch.float32"),
        (PAIRS, [[0, 4]], torch.zeros(2, device="meta"), "bias must be on cpu"),
        (PAIRS, [0, 4], torch.zeros(2), "sequences must be int64 of shape"),
        (PAIRS, [[0.0, 4.0]], torch.zeros(2), "sequences must be int64 of shape"),
        (PAIRS, [[0, 5]], torch.zeros(2), r"within \[0, 4\].* response 0 on are \[\[0, 5\]\]"),
        (PAIRS, [[-1, 2]], torch.zeros(2), "ascending, disjoint"),
        (PAIRS, [[0, 2], [3, 2]], torch.zeros(2), r"response 1 on are \[\[3, 2\]\]"),
        (PAIRS, [[0, 2], [1, 3]], torch.zeros(2), r"response 0 on are \[\[0, 2\], \[1, 3\]\]"),
        (PAIRS, [[0, 2], [2, 2], [2, 4]], torch.zeros(2), "response 1 has no token"),
    ],
)
def test_pooling_refuses(accumulated, sequences, bias, message):
    with pytest.raises(ValueError, match=message):
        gated_mean(accumulated, torch.tensor(sequences), bias)
