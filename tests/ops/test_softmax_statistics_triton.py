"""The Triton kernels of the softmax statistics under Triton's interpreter, against float64."""

import pytest
import torch
from softmax_cases import CASES, DTYPES, ROUNDING, case, check_gradient, check_statistics, coefficients, make
from triton_kernels import interpreted, needs_triton

pytestmark = needs_triton

KERNELS = "megatron_srft.ops.triton.softmax_statistics:"


def statistics(problem):
    return interpreted(KERNELS + "softmax_statistics", *problem.statistics_arguments).result


def kept(problem, buffer):
    """Statistics, and what the buffer holds afterwards."""
    answer = interpreted(KERNELS + "softmax_statistics_keep", *problem.statistics_arguments, buffer)
    return answer.result, answer.arguments[-1]


def gradient(problem, terms):
    return interpreted(KERNELS + "softmax_gradient", *problem.gradient_arguments(terms)).result


@pytest.mark.parametrize("name", CASES)
def test_statistics_are_those_of_float64(name):
    problem = case(name)
    check_statistics(statistics(problem), problem)


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_float64(name):
    problem = case(name)
    terms = coefficients(problem)
    result = gradient(problem, terms)
    check_gradient(result, problem, terms)
    assert result.is_contiguous()


@pytest.mark.parametrize("name", ["padded", "odd-stride", "padded-wide", "no-rows", "no-columns"])
def test_gradient_in_place_is_the_same_and_stays_within_its_columns(name):
    problem = case(name)
    terms = coefficients(problem)
    problem.logits._base.masked_fill_(problem.logits._base.isnan(), 7.0)  # between the rows, where no column is
    around = problem.logits._base.clone()
    answer = interpreted(KERNELS + "softmax_gradient_", *problem.gradient_arguments(terms))
    assert answer.result is None
    written = answer.arguments[0]
    assert torch.equal(written, gradient(problem, terms))
    outside = torch.ones_like(around, dtype=torch.bool)
    outside.as_strided(problem.logits.shape, problem.logits.stride(), problem.logits.storage_offset())[:] = False
    whole = written.as_strided(around.shape, around.stride(), 0)
    assert torch.equal(whole[outside], around[outside])


@pytest.mark.parametrize("kept_type", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["1001-fp32", "padded", "odd-stride", "large", "masked-bf16"])
def test_kept_logits_are_relative_to_the_maximum(name, kept_type):
    problem = case(name)
    rows, stride = len(problem.logits), problem.logits.stride(0) + 16  # as aligned as the logits are
    result, written = kept(problem, torch.full((rows, stride), 7.0, dtype=kept_type))
    assert torch.equal(result, statistics(problem))
    check_kept(written, result, problem)


def test_kept_logits_may_be_less_aligned_than_the_logits():
    problem = case("two-blocks")
    result, written = kept(problem, torch.full((len(problem.logits), problem.columns + 3), 7.0, dtype=torch.bfloat16))
    check_statistics(result, problem)
    check_kept(written, result, problem)


def check_kept(written, result, problem):
    maximum = torch.where(result[0] == -torch.inf, 0, result[0]).double()
    expected = (problem.scaled - maximum[:, None]).clamp(min=-1e4)
    atol = 3e-7 * problem.scaled.nan_to_num(neginf=0).abs().max().item() + 6e-8
    rtol = 1.01 * ROUNDING[written.dtype]
    torch.testing.assert_close(written[:, : problem.columns].double(), expected, rtol=rtol, atol=atol)
    assert (written[:, problem.columns :] == 7).all()


@pytest.mark.parametrize("name", ["two-blocks", "padded", "odd-stride"])
def test_logits_may_be_kept_in_their_own_memory(name):
    problem = case(name)
    apart = kept(problem, torch.zeros_like(problem.logits))
    together = kept(problem, problem.logits)
    assert torch.equal(together[0], apart[0])
    assert torch.equal(together[1][:, : problem.columns], apart[1][:, : problem.columns])


def test_labels_far_outside_match_no_column():
    problem = make(4, 40)
    problem.labels[:] = torch.tensor([2**32 + 3, 3 - 2**32, -100, 2**62])
    check_statistics(statistics(problem), problem)
    terms = coefficients(problem)
    check_gradient(gradient(problem, terms), problem, terms)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 700, 5000])
def test_nan_and_infinity_show_in_their_row_only(bad, column):
    problem = make(3, 5001)
    clean = statistics(problem)
    problem.logits[1, column] = bad
    result = statistics(problem)
    assert result[:3, 1].isnan().all()
    assert torch.equal(result[:, [0, 2]], clean[:, [0, 2]])


def test_nan_shows_in_the_gradient():
    problem = make(3, 1000)
    terms = coefficients(problem)
    problem.logits[0, 17] = torch.nan
    terms[0, 1] = torch.nan
    result = gradient(problem, terms)
    assert result[0].isnan().nonzero().flatten().tolist() == [17]
    assert result[1].isnan().all() and not result[2].isnan().any()


def test_results_are_the_same_bits_again_and_whatever_the_other_rows_are():
    problem = make(4, 5000, torch.bfloat16)
    terms = coefficients(problem)
    whole, slopes = statistics(problem), gradient(problem, terms)
    assert torch.equal(statistics(problem), whole)
    problem.logits, problem.labels, terms = problem.logits[3:4], problem.labels[3:4], terms[:, 3:4]
    assert torch.equal(statistics(problem), whole[:, 3:4])
    assert torch.equal(gradient(problem, terms), slopes[3:4])


@pytest.mark.parametrize(
    ("cuts", "temperature"), [((0, 1000), 0.5), ((0, 333, 1000), 1.0), ((0, 1, 600, 1000, 1000), 1.5)]
)
def test_shards_give_log_prob_entropy_and_gradient_of_the_whole(cuts, temperature):
    vocabulary = cuts[-1]
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, vocabulary, generator=generator)
    edges = sorted({position for cut in cuts for position in (cut - 1, cut) if 0 <= position < vocabulary})
    labels = torch.tensor((edges * 6)[:6])
    upstream = torch.randn(2, 6, generator=generator, dtype=torch.float64)

    leaf = logits.double().requires_grad_()
    logprobs = (leaf / temperature).log_softmax(1)
    taken, entropy = logprobs.gather(1, labels[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(1)
    torch.autograd.backward([taken, entropy], list(upstream))

    parts = []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        parts.append(interpreted(
            KERNELS + "softmax_statistics", logits[:, start:stop], labels, start, stop - start, 1 / temperature
        ).result)  # fmt: skip
    maxima, sums, weighted, label_logits = torch.stack(parts, dim=1).double()
    maximum = maxima.amax(0)
    shifts = torch.where(maxima == -torch.inf, -1e4, maxima - maximum)
    total = (shifts.exp() * sums).sum(0)
    normaliser = maximum + total.log()
    mean = (shifts.exp() * (weighted + shifts * sums)).sum(0) / total
    torch.testing.assert_close(label_logits.sum(0) - normaliser, taken, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(total.log() - mean, entropy, rtol=1e-6, atol=1e-6)

    of_logprob, of_entropy = upstream
    terms = torch.stack((
        normaliser, -(of_logprob + of_entropy * entropy) / temperature, -of_entropy / temperature,
        of_logprob / temperature,
    )).float().detach()  # fmt: skip
    for start, stop in zip(cuts, cuts[1:], strict=False):
        result = interpreted(
            KERNELS + "softmax_gradient", logits[:, start:stop], labels, terms, start, stop - start, 1 / temperature
        ).result
        torch.testing.assert_close(result.double(), leaf.grad[:, start:stop], rtol=1e-5, atol=1e-6)


def rows_far_apart():
    """Statistics and gradients of a row that lies 2^31 elements into the memory, and of the same row by itself."""
    from megatron_srft.ops.triton.softmax_statistics import softmax_gradient_, softmax_statistics_keep

    apart = 1 << 30
    row = torch.linspace(-3, 5, 100).bfloat16()
    labels, terms = torch.tensor([0, 0, 40]), torch.tensor([5.0, 1, 2, 3])[:, None].expand(4, 3)
    results = []
    for stride in (apart, 104):
        logits = torch.empty(2 * stride + 104, dtype=torch.bfloat16).as_strided((3, 100), (stride, 1))
        logits[:2], logits[2] = 0, row
        statistics = softmax_statistics_keep(logits, labels, 0, 100, 1.0, logits)
        kept = logits[2].clone()
        softmax_gradient_(logits, labels, terms, 0, 100, 1.0)
        results.append((statistics[:, 2], kept, logits[2].clone()))
    return results


def test_offsets_of_rows_do_not_overflow():
    far, near = interpreted("ops.test_softmax_statistics_triton:rows_far_apart").result
    for one, other in zip(far, near, strict=True):
        assert torch.equal(one, other)


def differentiated(logits, labels):
    """Statistics through the torch op, and the logits' gradient of their weighted sum."""
    import megatron_srft.ops.softmax_statistics  # noqa: F401

    leaf = logits.clone().requires_grad_()
    statistics = torch.ops.srft_triton.softmax_statistics(leaf, labels, 2, leaf.shape[1], 0.5)
    (statistics[1:] * torch.tensor([[2.0], [3.0], [5.0]])).sum().backward()
    return statistics.detach(), leaf.grad


def test_the_torch_op_runs_these_kernels_and_differentiates():
    logits, labels = torch.randn(3, 40), torch.tensor([2, 41, 1])
    statistics, slopes = interpreted("ops.test_softmax_statistics_triton:differentiated", logits, labels).result
    leaf = logits.double().requires_grad_()
    shifted = leaf / 2 - statistics[0].double()[:, None]
    total, weighted = shifted.exp().sum(1), (shifted * shifted.exp()).sum(1)
    label_logits = leaf[0, 0] / 2 + leaf[1, 39] / 2
    (2 * total.sum() + 3 * weighted.sum() + 5 * label_logits).backward()
    torch.testing.assert_close(statistics[1].double(), total.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(slopes.double(), leaf.grad, rtol=1e-5, atol=1e-6)
