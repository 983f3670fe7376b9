"""The figures of clipped_ratio by hand, its registrations with torch, and what it says of bad arguments."""

import pytest
import torch
from clipped_ratio_cases import arguments_of, batch, call, terms_of

from megatron_srft.ops import implementations
from megatron_srft.ops.clipped_ratio import Term, clipped_ratio


def test_figures(implementation):
    rows = batch(3000, dtype=torch.float32, seed=1)
    terms = terms_of(rows)["srft"]
    *_, figures = call(rows, terms, implementation=implementation)
    ratio = torch.exp(rows["logprobs"].double() - rows["old_logprobs"])
    gap = (rows["old_logprobs"].double() - rows["engine_logprobs"]).masked_fill(rows["is_demonstration"], 0)
    for mine, found in (
        (~rows["is_demonstration"], figures.rollouts),
        (rows["is_demonstration"], figures.demonstrations),
    ):
        by_hand = {
            "nll": -rows["logprobs"], "entropy": rows["entropy"], "ratio": ratio, "k1": -ratio.log(),
            "k3": ratio - 1 - ratio.log(), "mismatch": gap.abs(), "mismatch_k3": gap.exp() - 1 - gap,
            "corrected": (gap.exp() > 1.1 + 1e-4).double(),
        }  # fmt: skip
        for name, values in by_hand.items():
            assert found[name].item() == pytest.approx(values[mine].double().mean().item(), rel=1e-5, abs=1e-7), name
        assert found["max_ratio"].item() == pytest.approx(ratio[mine].max().item(), rel=1e-6)
        assert found["max_mismatch"].item() == pytest.approx(gap.abs()[mine].max().item(), rel=1e-5)
    negative = ~rows["is_demonstration"] & (rows["advantages"] <= 0)  # the clipped term's rows; its clips are infinite
    assert negative.any() and figures.rollouts["clipped_low"].item() == figures.rollouts["clipped_high"].item() == 0
    of_demonstrations = rows["weights"][rows["is_demonstration"]]
    of_rollouts = rows["weights"][~rows["is_demonstration"]]  # of either sign, though the term has the positive ones
    assert figures.terms[0]["weight"].item() == pytest.approx(of_demonstrations.mean().item(), rel=1e-5)
    assert figures.terms[0]["max_weight"].item() == of_demonstrations.max().item()
    assert figures.terms[2]["weight"].item() == pytest.approx(of_rollouts.mean().item(), rel=1e-5)
    assert figures.terms[2]["max_weight"].item() == of_rollouts.max().item()
    assert figures.terms[4]["weight"].item() == pytest.approx(1.0)


def test_clip_shares_of_both_populations(implementation):
    rows = batch(3000, dtype=torch.float32)
    terms = [Term(loss="clipped", rows="both", scale=1.0, advantages=rows["advantages"], clip_low=0.2, clip_high=0.3)]
    *_, figures = call(rows, terms, implementation=implementation)
    ratio = torch.exp(rows["logprobs"] - rows["old_logprobs"])
    low, high = (rows["advantages"] < 0) & (ratio < 0.8), (rows["advantages"] > 0) & (ratio > 1.3)
    for mine, found in (
        (~rows["is_demonstration"], figures.rollouts),
        (rows["is_demonstration"], figures.demonstrations),
    ):
        assert found["clipped_low"].item() == pytest.approx(low[mine].float().mean().item(), abs=1e-6)
        assert found["clipped_high"].item() == pytest.approx(high[mine].float().mean().item(), abs=1e-6)


@pytest.mark.parametrize("case", ["grpo", "srft"])
def test_registrations(case, implementation):
    rows = batch(6, dtype=torch.float32)
    arguments = arguments_of(rows, terms_of(rows)[case])
    torch.library.opcheck(implementations.kernel("clipped_ratio", implementation), arguments)


def test_compiles_without_a_graph_break(implementation):
    rows = batch(64, dtype=torch.float32)
    terms = terms_of(rows)["srft"]

    def loss_of(logprobs, entropy):
        given = {name: rows[name] for name in ("is_demonstration", "response_lengths", "engine_logprobs")}
        loss, figures = clipped_ratio(logprobs, entropy, terms, tokens=(40, 24), implementation=implementation, **given)
        return loss, figures.rollouts["nll"]

    leaves = [rows[name].clone().requires_grad_() for name in ("logprobs", "entropy")]
    results = []
    for function in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
        loss, nll = function(*leaves)
        results.append(torch.cat([loss[None], nll[None], *torch.autograd.grad(loss, leaves)]))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("logprobs", torch.zeros(4, dtype=torch.bfloat16), "logprobs must be .* float32 or float64"),
        ("logprobs", torch.zeros(4, 1), "logprobs must be"),
        ("entropy", torch.zeros(5), r"entropy must be \[4\] float32 on cpu"),
        ("entropy", torch.zeros(4, dtype=torch.float64), "entropy must be .* not .* float64"),
        ("old_logprobs", torch.zeros(8)[::2], "old_logprobs must be .* not contiguous"),
        ("engine_logprobs", torch.zeros(4, device="meta"), "engine_logprobs must be .* on meta"),
        ("is_demonstration", torch.zeros(4), "is_demonstration must be .* bool"),
        ("importance_weights", torch.zeros(3), "importance_weights"),
        ("terms", [], "terms must be 1 to 8"),
        ("terms", [Term(loss="cispo", rows="rollouts", scale=1.0)], "'cispo'.*clipped"),
        ("terms", [Term(loss="nll", rows="all", scale=1.0)], "'all'.*positive_rollouts"),
        ("terms", [Term(loss="nll", rows="both", scale=1.0, weights=torch.zeros(3))], "weights"),
        ("terms", [Term(loss="logprob", rows="both", scale=1.0, advantages=torch.zeros(4, 1))], "advantages"),
    ],
)
def test_bad_arguments_are_named(argument, value, message):
    rows = batch(4, dtype=torch.float32)
    given = {name: rows[name] for name in ("logprobs", "entropy", "is_demonstration", "response_lengths")}
    given |= {"engine_logprobs": rows["engine_logprobs"], "terms": terms_of(rows)["grpo"], "tokens": (4, 0)}
    with pytest.raises(ValueError, match=message):
        clipped_ratio(**given | {argument: value})
