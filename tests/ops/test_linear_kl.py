"""linear_kl against dense float64 softmaxes and their autograd, over chunks, shards, padding and infinities."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from dense_softmax import assert_close
from spawning import spawn

from megatron_srft.ops.linear_kl import DIRECTIONS, linear_kl

ROWS, COLUMNS, VOCAB = 11, 53, 50


def problem(dtype=torch.float32, rows=ROWS, seed=0):
    """Hidden states and heads of a policy (width 6) and a reference (width 5), and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, 6), (COLUMNS, 6), (rows, 5), (COLUMNS, 5)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes], torch.randn(
        rows, generator=generator
    )


def dense(models, vocab_size, temperature, direction):
    """KL by torch's own function for it, in float64."""
    hidden, weight, reference_hidden, reference_weight = models
    policy = (hidden @ weight.t())[:, :vocab_size].div(temperature).log_softmax(dim=1)
    reference = (reference_hidden @ reference_weight.t())[:, :vocab_size].div(temperature).log_softmax(dim=1)
    first, second = (policy, reference) if direction == "policy_reference" else (reference, policy)
    return torch.nn.functional.kl_div(second, first, log_target=True, reduction="none").sum(dim=1)


def run(function, models, upstream):
    """(divergence, gradients of the policy's hidden states and head) of function(models)."""
    hidden, weight, *reference = models
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    divergence = function([hidden, weight, *reference])
    divergence.backward(upstream.to(divergence))
    return divergence.detach(), hidden.grad, weight.grad


def expected(models, upstream, temperature, direction, vocab_size=VOCAB):
    exact = [matrix.double() for matrix in models]
    return run(lambda models: dense(models, vocab_size, temperature, direction), exact, upstream)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk_columns", [1, 7, 25, None])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_value_and_gradients_are_those_of_dense_autograd(direction, temperature, chunk_columns, dtype, tolerance):
    models, upstream = problem(dtype)
    where = dict(vocab_start=0, vocab_size=VOCAB, temperature=temperature, direction=direction)
    found = run(lambda models: linear_kl(*models, chunk_columns=chunk_columns, **where), models, upstream)
    assert found[0].dtype == dtype and found[0].shape == (ROWS,)
    for actual, wanted in zip(found, expected(models, upstream, temperature, direction), strict=True):
        assert_close(actual, wanted, tolerance)
    assert (found[2][VOCAB:] == 0).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bfloat16_keeps_float32_statistics(direction):
    models, upstream = problem(torch.bfloat16)
    where = dict(vocab_start=0, vocab_size=VOCAB, direction=direction, chunk_columns=16)
    divergence, hidden_gradient, weight_gradient = run(lambda models: linear_kl(*models, **where), models, upstream)
    wanted = expected(models, upstream, 1.0, direction)
    assert divergence.dtype == torch.float32 and hidden_gradient.dtype == weight_gradient.dtype == torch.bfloat16
    assert_close(divergence, wanted[0], 2e-5)
    for actual, exact in zip((hidden_gradient, weight_gradient), wanted[1:], strict=True):
        assert (actual.double() - exact).norm() / exact.norm() < 6e-3


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_models_diverge_by_exactly_nothing(direction, dtype):
    (hidden, weight, *_), upstream = problem(dtype)
    found = run(
        lambda models: linear_kl(*models, vocab_start=0, vocab_size=VOCAB, direction=direction, chunk_columns=9),
        [hidden, weight, hidden, weight], upstream,
    )  # fmt: skip
    assert all((values == 0).all() for values in found)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_large_logits_lose_no_digits(direction):
    """A shift of all logits of a row by 300 changes nothing but their rounding."""
    models, upstream = problem()
    models[0][:, 0] = models[2][:, 0] = 300.0
    models[1][:, 0] = models[3][:, 0] = 1.0
    where = dict(vocab_start=0, vocab_size=VOCAB, direction=direction, chunk_columns=11)
    found = run(lambda models: linear_kl(*models, **where), models, upstream)
    assert_close(found[0], expected(models, upstream, 1.0, direction)[0], 1e-3)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("chunk_columns", [1, 5, 53])
def test_tokens_that_both_rule_out_do_not_count(direction, chunk_columns):
    models, upstream = problem()
    kept = torch.tensor([column for column in range(VOCAB) if not 10 <= column < 20])
    models[0][:, 0] = models[2][:, 0] = 1.0
    models[1][10:20, 0] = models[3][10:20, 0] = -torch.inf
    where = dict(vocab_start=0, vocab_size=VOCAB, direction=direction, chunk_columns=chunk_columns)
    divergence, _, weight_gradient = run(lambda models: linear_kl(*models, **where), models, upstream)
    rest = [models[0], models[1][kept], models[2], models[3][kept]]
    wanted = expected(rest, upstream, 1.0, direction, vocab_size=len(kept))
    assert_close(divergence, wanted[0], 2e-5)
    assert_close(weight_gradient[kept], wanted[2], 2e-5)
    assert (weight_gradient[10:20] == 0).all()


@pytest.mark.parametrize("chunk_columns", [1, 5, 53])
@pytest.mark.parametrize("ruled_out", [slice(3, 4), slice(3, 13)])
def test_a_token_that_one_of_them_rules_out(chunk_columns, ruled_out):
    models, _ = problem()
    models[2][:, 0] = 1.0
    models[3][ruled_out, 0] = -torch.inf
    where = dict(vocab_start=0, vocab_size=VOCAB, chunk_columns=chunk_columns)
    assert (linear_kl(*models, direction="policy_reference", **where) == torch.inf).all()
    exact = [matrix.double() for matrix in models]
    policy = (exact[0] @ exact[1].t())[:, :VOCAB].log_softmax(dim=1)
    reference = (exact[2] @ exact[3].t())[:, :VOCAB].log_softmax(dim=1)
    terms = torch.where(reference == -torch.inf, 0, reference.exp() * (reference - policy))
    assert_close(linear_kl(*models, direction="reference_policy", **where), terms.sum(dim=1), 2e-5)


def test_no_rows():
    models, upstream = problem(rows=0)
    found = run(lambda models: linear_kl(*models, vocab_start=0, vocab_size=VOCAB), models, upstream)
    assert found[0].shape == (0,) and found[1].shape == (0, 6) and (found[2] == 0).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_weight_gradient_can_be_added_to_a_buffer(direction):
    models, upstream = problem()
    before = torch.randn(COLUMNS, 6)
    buffer = before.clone()
    where = dict(vocab_start=0, vocab_size=VOCAB, direction=direction, weight_gradient=buffer, chunk_columns=20)
    _, hidden_gradient, weight_gradient = run(lambda models: linear_kl(*models, **where), models, upstream)
    assert weight_gradient is None
    _, of_hidden, of_weight = expected(models, upstream, 1.0, direction)
    assert_close(hidden_gradient, of_hidden, 2e-5)
    assert_close(buffer - before, of_weight, 2e-5)
    assert torch.equal(buffer[VOCAB:], before[VOCAB:])


def test_only_what_is_asked_for_gets_a_gradient():
    models, _ = problem()
    models[0].requires_grad_()
    models[3].requires_grad_()  # as a reference's own parameters may
    linear_kl(*models, vocab_start=0, vocab_size=VOCAB).sum().backward()
    assert models[0].grad is not None and models[1].grad is models[3].grad is None


def matrix(rows, width, dtype=torch.float32):
    return torch.zeros(rows, width, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(direction="both"), "direction must be one of policy_reference, reference_policy, got 'both'"),
        (dict(hidden=torch.zeros(3)), "hidden must be a matrix"),
        (dict(weight=matrix(8, 5)), "hidden and weight must have rows of one length"),
        (dict(reference_weight=matrix(8, 5)), "reference_hidden and reference_weight must have rows of one length"),
        (
            dict(reference_weight=matrix(8, 4, torch.float16)),
            "reference_hidden and reference_weight must have one type",
        ),
        (dict(reference_hidden=matrix(2, 4)), "reference_hidden must have as many rows as hidden"),
        (dict(reference_weight=matrix(7, 4)), "reference_weight must have as many rows as weight"),
        (
            dict(reference_hidden=matrix(3, 4, torch.float64), reference_weight=matrix(8, 4, torch.float64)),
            "both or neither be float64",
        ),
        (dict(weight_gradient=matrix(7, 4)), r"weight_gradient must have the weight's shape \(8, 4\)"),
        (dict(chunk_columns=0), "chunk_columns must be positive"),
        (dict(temperature=0.0), "temperature"),
        (dict(vocab_size=9), "make up the vocabulary of 9"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = dict(hidden=matrix(3, 4), weight=matrix(8, 4), reference_hidden=matrix(3, 4))
    arguments |= dict(reference_weight=matrix(8, 4), vocab_start=0, vocab_size=8)
    with pytest.raises(ValueError, match=message):
        linear_kl(**{**arguments, **change})


# ---------------------------------------------------------------- vocabulary cut over ranks

SHARDS = {1: (53,), 2: (31, 22), 3: (20, 29, 4)}
"""Columns per rank of the padded vocabulary; the last rank of three holds one token and padding."""

CASES = [(dtype, direction, size) for dtype in ("float64", "float32") for direction in DIRECTIONS for size in (50, 20)]
"""With 20 tokens the later ranks hold only padding."""


def test_unequal_shards_over_processes():
    by_rank = spawn(max(SHARDS), sharded_outputs)
    for ranks in SHARDS:
        for index, (dtype, direction, vocab_size) in enumerate(CASES):
            outputs = [by_rank[rank][ranks][index] for rank in range(ranks)]
            values, hidden_gradients, weight_gradients = zip(*outputs, strict=True)
            models, upstream = problem(getattr(torch, dtype))
            wanted = expected(models, upstream, 0.8, direction, vocab_size)
            tolerance = 1e-12 if dtype == "float64" else 2e-5
            assert all((value == values[0]).all() for value in values)  # the same bits on every rank
            assert_close(torch.from_numpy(values[0]), wanted[0], tolerance)
            assert_close(torch.from_numpy(sum(hidden_gradients)), wanted[1], tolerance)
            assert_close(torch.from_numpy(np.concatenate(weight_gradients)), wanted[2], tolerance)


def sharded_outputs():
    """{ranks: results of every case with the vocabulary cut over that many ranks}."""
    dist.init_process_group("gloo")
    outputs = {}
    for ranks, widths in SHARDS.items():
        group = dist.new_group(list(range(ranks)))
        if dist.get_rank() < ranks:
            start = sum(widths[: dist.get_rank()])
            shard = slice(start, start + widths[dist.get_rank()])
            outputs[ranks] = [_sharded_output(*case, shard, group) for case in CASES]
    dist.destroy_process_group()
    return outputs


def _sharded_output(dtype, direction, vocab_size, shard, group):
    (hidden, weight, reference_hidden, reference_weight), upstream = problem(getattr(torch, dtype))
    where = dict(vocab_start=shard.start, vocab_size=vocab_size, temperature=0.8, group=group, direction=direction)
    found = run(
        lambda models: linear_kl(*models, chunk_columns=6, **where),
        [hidden, weight[shard], reference_hidden, reference_weight[shard]], upstream,
    )  # fmt: skip
    return [values.numpy() for values in found]
