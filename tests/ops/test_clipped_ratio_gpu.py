"""clipped_ratio on a GPU: each implementation against float64 autograd of formulas written out once more."""

import pytest
import torch
from clipped_ratio_cases import CASES, batch, call, expected, replaced, terms_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(rows: dict) -> dict:
    return {name: value.cuda() for name, value in rows.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [0, 1, 257, 20_000])
def test_loss_and_gradients_are_those_of_autograd(case, count, implementation):
    rows = batch(count, dtype=torch.float32, seed=count)
    exact = {name: value.double() if value.is_floating_point() else value for name, value in rows.items()}
    losses, by_logprob, by_entropy = expected(exact, [replaced(t, torch.float64) for t in terms_of(rows)[case]])
    given = on_gpu(rows)
    loss, found, found_entropy, figures = call(given, terms_of(given)[case], implementation=implementation)
    of_terms = torch.stack([of_term["loss"] for of_term in figures.terms])
    size = count**0.5 + 1  # rounding errors add up like a random walk
    torch.testing.assert_close(of_terms.cpu().double(), losses, rtol=1e-5, atol=1e-6 * size)
    torch.testing.assert_close(loss.cpu().double(), losses.sum(), rtol=1e-5, atol=1e-6 * size)
    torch.testing.assert_close(found.cpu().double(), by_logprob, rtol=1e-5, atol=1e-7)
    if found_entropy is not None:
        torch.testing.assert_close(found_entropy.cpu().double(), by_entropy, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", ["grpo", "srft"])
def test_figures_are_those_of_the_reference_in_float64(case, implementation):
    rows = batch(5000, dtype=torch.float32, spread=2.0)
    *_, right = call(
        {name: value.double() if value.is_floating_point() else value for name, value in rows.items()},
        [replaced(term, torch.float64) for term in terms_of(rows)[case]],
        implementation="reference",
    )
    given = on_gpu(rows)
    *_, found = call(given, terms_of(given)[case], implementation=implementation)
    torch.testing.assert_close(found.values.cpu().double(), right.values, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["native", "triton"], indirect=True)
def test_equal_inputs_give_equal_bits(implementation):
    """Plain torch need not."""
    given = on_gpu(batch(300_000, dtype=torch.float32))
    once, again = (call(given, terms_of(given)["srft"], implementation=implementation) for _ in range(2))
    assert all(torch.equal(left, right) for left, right in zip(once[:3], again[:3], strict=True))
    assert torch.equal(once[3].values, again[3].values)


def test_nan_shows_in_the_loss_and_its_own_gradient(implementation):
    given = on_gpu(batch(700, dtype=torch.float32, demonstrations=0.0))
    given["logprobs"][600] = torch.nan
    loss, gradient, _, figures = call(given, terms_of(given)["grpo"], implementation=implementation)
    assert loss.isnan() and gradient.isnan().nonzero().tolist() == [[600]]
    assert figures.rollouts["nll"].isnan() and figures.rollouts["max_ratio"].isnan()
