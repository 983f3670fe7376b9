"""clipped_ratio against formulas written out once more and differentiated by float64 autograd."""

import re
from pathlib import Path

import pytest
import torch
from clipped_ratio_cases import CASES, batch, call, check, expected, replaced, terms_of

from megatron_srft.ops.clipped_ratio import Term
from megatron_srft.ops.token_losses import LOSSES


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_autograd(case, implementation):
    for dtype in (torch.float64, torch.float32) if implementation == "reference" else (torch.float32,):
        rows = batch(20_000, dtype=dtype)
        check(rows, terms_of(rows)[case], implementation)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [0, 1, 2, 15, 16, 17, 511, 512, 513, 1025])
def test_any_number_of_rows(case, count, implementation):
    rows = batch(count, dtype=torch.float32, seed=count)
    check(rows, terms_of(rows)[case], implementation)


@pytest.mark.parametrize("demonstrations", [0.0, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_missing_populations(case, demonstrations, implementation):
    rows = batch(300, dtype=torch.float32, demonstrations=demonstrations)
    check(rows, terms_of(rows)[case], implementation)


@pytest.mark.parametrize("case", CASES)
def test_extreme_log_ratios(case, implementation):
    rows = batch(4096, dtype=torch.float32, spread=15.0, seed=3)
    assert ((rows["logprobs"] - rows["old_logprobs"]).abs() > 20).sum() > 100
    terms = [replaced(term, torch.float32) for term in terms_of(rows)[case]]
    exact = {name: value.double() if value.is_floating_point() else value for name, value in rows.items()}
    _, by_logprob, _ = expected(exact, [replaced(term, torch.float64) for term in terms])
    loss, gradient, _, _ = call(rows, terms, implementation=implementation)
    assert torch.isfinite(loss)
    torch.testing.assert_close(gradient.double(), by_logprob, rtol=3e-6, atol=1e-7)


def test_the_gradient_is_zero_exactly_where_the_clip_or_the_clamp_holds(implementation):
    ratios = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.9, 3.1])
    advantages = torch.tensor([1.0, -1.0]).repeat_interleave(8)
    rows = batch(18, dtype=torch.float32, demonstrations=0.0)
    rows["logprobs"], rows["old_logprobs"] = torch.full((18,), -2.0), torch.full((18,), -2.0)
    rows["old_logprobs"][:16] -= ratios.log().repeat(2)
    rows["old_logprobs"][16:] -= torch.tensor([20.5, -20.5])
    rows["importance_weights"] = torch.ones(18)
    term = Term(
        loss="clipped", rows="rollouts", scale=1.0, clip_low=0.2, clip_high=0.2, dual_clip=3.0,
        advantages=torch.cat([advantages, torch.tensor([-1.0, 1.0])]),
    )  # fmt: skip
    _, gradient, _, figures = call(rows, [term], implementation=implementation)
    assert (gradient != 0).tolist() == [True] * 5 + [False] * 3 + [False] * 2 + [True] * 5 + [False] * 3
    assert figures.rollouts["clipped_high"].item() * 18 == pytest.approx(3)
    assert figures.rollouts["clipped_low"].item() * 18 == pytest.approx(2)


FACTORS = {
    "scale": dict(scale=0.02),
    "weights": dict(weights=torch.full((40,), 2.0)),
    "advantages": dict(advantages=torch.full((40,), 2.0)),
    "importance weights": dict(importance_weights=torch.full((40,), 2.0)),
    "lengths": dict(response_lengths=torch.full((40,), 0.5)),
    "upstream": dict(upstream=2.0),
}


@pytest.mark.parametrize("factor", FACTORS)
def test_each_factor_multiplies_the_gradient(factor, implementation):
    ones = torch.ones(40)
    rows = batch(40, dtype=torch.float32) | {"importance_weights": ones, "response_lengths": ones}
    of_term = dict(loss="clipped", rows="both", scale=0.01, per_length=True, weights=ones, advantages=ones)
    _, once, _, _ = call(rows, [Term(**of_term)], implementation=implementation)
    changes = dict(FACTORS[factor])
    of_term |= {name: changes.pop(name) for name in list(changes) if name in of_term}
    _, twice, _, _ = call(rows, [Term(**of_term)], implementation=implementation, **changes)
    assert (once != 0).all()
    torch.testing.assert_close(twice, 2 * once, rtol=0, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_rows_of_no_term_do_not_matter(loss, implementation):
    """NaN and infinity on a population that is not summed reach neither the loss nor the gradients."""
    rows = batch(100, dtype=torch.float32)
    terms = [Term(loss=loss, rows="rollouts", scale=0.1, advantages=rows["advantages"], weights=rows["weights"])]
    spoilt = {
        name: torch.where(rows["is_demonstration"], torch.tensor([torch.nan, torch.inf]).repeat(50), value)
        for name, value in rows.items()
        if value.is_floating_point()
    }
    bad_terms = [replaced(terms[0], torch.float32)]
    object.__setattr__(bad_terms[0], "advantages", spoilt["advantages"])
    object.__setattr__(bad_terms[0], "weights", spoilt["weights"])
    good = call(rows, terms, implementation=implementation)
    bad = call(rows | spoilt, bad_terms, implementation=implementation)
    assert bad[0] == good[0]
    assert torch.equal(bad[1], good[1])
    assert {name: value.item() for name, value in bad[3].rollouts.items()} == {
        name: value.item() for name, value in good[3].rollouts.items()
    }


def test_nan_among_the_summed_rows_shows(implementation):
    rows = batch(700, dtype=torch.float32, demonstrations=0.0)
    rows["logprobs"][600] = torch.nan
    loss, gradient, _, figures = call(rows, terms_of(rows)["grpo"], implementation=implementation)
    assert loss.isnan() and gradient.isnan().nonzero().tolist() == [[600]]
    assert figures.rollouts["nll"].isnan() and figures.rollouts["max_ratio"].isnan()


def test_without_old_logprobs_the_ratio_is_one(implementation):
    rows = batch(50, dtype=torch.float32)
    terms = terms_of(rows)["grpo"]
    fresh = call(rows, terms, old_logprobs=None, implementation=implementation)
    same = call(rows, terms, old_logprobs=rows["logprobs"], implementation=implementation)
    assert torch.equal(fresh[1], same[1]) and fresh[3].rollouts["ratio"].item() == pytest.approx(1.0)
    engine = fresh[3].rollouts["mismatch"].item()
    assert engine == pytest.approx(same[3].rollouts["mismatch"].item()) and engine > 0.1


def test_equal_inputs_give_equal_bits_on_any_number_of_threads(implementation):
    rows = batch(30_000, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 1, 2, 3):
            torch.set_num_threads(number)
            loss, gradient, entropy_gradient, figures = call(
                rows, terms_of(rows)["srft"], implementation=implementation
            )
            values = [*figures.rollouts.values(), *figures.demonstrations.values()]
            values += [value for term in figures.terms for value in term.values()]
            results.append(torch.cat([gradient, entropy_gradient, torch.stack([loss, *values])]))
    finally:
        torch.set_num_threads(threads)
    equal = [torch.equal(results[0], result) for result in results[1:]]
    assert equal[0] and (implementation == "reference" or all(equal))  # torch sums as its threads see fit


def test_the_losses_have_the_numbers_of_the_kernels():
    header = (Path(__file__).resolve().parents[2] / "csrc/core/clipped_ratio.h").read_text(encoding="utf-8")
    names = re.search(r"enum Loss : int {(.*), kLossCount }", header)[1].split(", ")
    assert [name.strip().removeprefix("k").lower() for name in names] == list(LOSSES)
