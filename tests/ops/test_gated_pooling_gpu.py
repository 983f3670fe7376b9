"""Gated pooling on a GPU against stacked hidden states in float64 on the CPU."""

import pytest
import torch
from pooling_cases import DTYPES, ROUNDING, Problem, assert_near, gradients, problem, stacked

from megatron_srft.ops.gated_pooling import gated_mean, gated_projection

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """A leaf with the same strides: a plain copy would close the gaps between rows."""
    memory = torch.zeros(tensor.shape[0] * tensor.stride(0), dtype=tensor.dtype, device="cuda")
    copy = memory.as_strided(tensor.shape, tensor.stride())
    return copy.copy_(tensor.detach()).requires_grad_()


@pytest.mark.parametrize("extra_stride", [0, 3, 8])
@pytest.mark.parametrize("width", [1, 7, 64, 896, 3584])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_scores_and_gradients_are_those_of_stacked_states(dtype, width, extra_stride, implementation):
    host = problem(width, layers=2, dtype=dtype, extra_stride=extra_stride)
    exact = host.in_float64()
    states, weights = ([on_gpu(tensor) for tensor in tensors] for tensors in (host.states, host.weights))
    given = Problem(states, weights, on_gpu(host.bias), host.sequences.cuda())
    results = []
    for _ in range(2):
        accumulated = None
        for states, weight in zip(given.states, given.weights, strict=True):
            accumulated = gated_projection(accumulated, states, weight, implementation=implementation)
        outputs = gated_mean(accumulated, given.sequences, given.bias, implementation=implementation)
        results.append([*outputs, *gradients(outputs, given.leaves())])
    expected = stacked(exact)
    wanted = [*expected, *gradients(expected, exact.leaves())]
    for found, again, right in zip(*results, wanted, strict=True):
        assert torch.equal(found, again)
        assert_near(found.cpu(), right, max(4e-6, ROUNDING[found.dtype]))


def test_a_response_without_tokens_scores_nan(implementation):
    ranges = torch.tensor([[0, 2], [3, 3]]).cuda()
    scores, _ = gated_mean(torch.zeros(4, 2).cuda(), ranges, torch.ones(2).cuda(), implementation=implementation)
    assert scores.isnan().tolist() == [False, True]
