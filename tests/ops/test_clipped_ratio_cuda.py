"""The CUDA kernels of clipped_ratio without a GPU: run by the emulation against float64, and compiled by nvcc."""

import ctypes
import functools

import emulated
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler")

PER_LENGTH, CORRECTED, ADVANTAGES, WEIGHTS = 16, 32, 64, 128
GIVEN = ADVANTAGES | WEIGHTS
POPULATION_FIGURES, TERM_FIGURES = 12, 3
THREADS = 256


@functools.cache
def kernels() -> ctypes.CDLL:
    return emulated.library("clipped_ratio")


def pointer(array: np.ndarray | None) -> ctypes.c_void_p:
    assert array is None or array.flags.c_contiguous or array.strides[0] == 0
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def run(rows: dict, losses, row_bits, parameters, tokens):
    """(loss, gradients, figures) of the emulated kernels; arrays as the op takes them."""
    count, terms = len(rows["logprobs"]), len(losses)
    figures = 2 * POPULATION_FIGURES + TERM_FIGURES * terms
    partial = np.full((figures, (count + THREADS - 1) // THREADS), np.nan, np.float32)
    loss, gradients = np.full(1, np.nan, np.float32), np.full((2 if 5 in losses else 1, count), np.nan, np.float32)
    found = np.full(figures, np.nan, np.float32)
    matrices = []
    for name in ("advantages", "weights"):
        matrix = rows[name]
        stride = 0 if matrix is None else matrix.strides[0] // 4
        matrices += [pointer(matrix), ctypes.c_int64(stride)]
    numbers = [np.asarray(losses, np.int64), np.asarray(row_bits, np.int64)]
    numbers += [np.asarray(parameters, np.float64), np.asarray(tokens, np.int64)]
    names = ("logprobs", "entropy", "is_demonstration", "response_lengths", "engine_logprobs", "old_logprobs")
    error = kernels().clipped_ratio(
        ctypes.c_int64(count),
        *[pointer(rows[name]) for name in (*names, "importance_weights")],
        *matrices,
        ctypes.c_int64(terms),
        *[pointer(array) for array in (*numbers, partial, loss, gradients, found)],
    )
    emulated.check(kernels(), error)
    return loss[0], gradients, found


def random_rows(count: int, terms: int, seed: int = 0, spread: float = 0.4) -> dict:
    generator = np.random.default_rng(seed)
    logprobs = generator.uniform(-6, -0.01, count)
    old = logprobs + spread * generator.standard_normal(count)
    rows = {
        "logprobs": logprobs, "old_logprobs": old, "engine_logprobs": old + 0.1 * generator.standard_normal(count),
        "entropy": generator.uniform(0.05, 4, count), "response_lengths": generator.integers(1, 50, count),
        "importance_weights": generator.uniform(0.5, 1.5, count),
        "advantages": generator.standard_normal((terms, count)), "weights": generator.uniform(0.1, 2, (terms, count)),
    }  # fmt: skip
    rows = {name: values.astype(np.float32) for name, values in rows.items()}
    return rows | {"is_demonstration": generator.random(count) < 0.4}


INF = float("inf")
TERMS = {  # losses, bits of rows, scale, lower, upper, dual clip, gamma
    "sft": ([0], [0b1100 | WEIGHTS], [0.01, -INF, INF, INF, 0.1]),
    "sft without weights": ([0], [0b1100], [0.01, -INF, INF, INF, 0.1]),
    "grpo": ([2], [0b0011 | CORRECTED | GIVEN], [0.01, 0.8, 1.28, INF, 0.1]),
    "dual clip": ([2], [0b1111 | PER_LENGTH | ADVANTAGES], [0.5, 0.9, 1.1, 1.5, 0.1]),
    "srft": (
        [0, 4, 1, 2, 5],
        [
            0b1100 | WEIGHTS,
            0b1100 | PER_LENGTH | GIVEN,
            0b0001 | CORRECTED | GIVEN,
            0b0010 | PER_LENGTH | CORRECTED | GIVEN,
            0b1111,
        ],
        [0.02, 1, 1, 1, 0.1, 0.3, 1, 1, 1, 0.3, 0.04, 1, 1, 1, 1, 0.5, 0.8, 1.2, INF, 1, 0.001, 1, 1, 1, 1],
    ),
    "shapings": (
        [6, 6, 7, 7],
        [0b1100 | PER_LENGTH | ADVANTAGES, 0b0011 | GIVEN, 0b1100 | CORRECTED | ADVANTAGES, 0b1111 | WEIGHTS],
        [0.02, 1, 1, 1, 0.5, 0.03, 1, 1, 1, 1.5, 0.04, 1, 1, 1, 0.3, 0.05, 1, 1, 1, 1],
    ),
    "eight": ([2, 3] * 4, [0b1111 | GIVEN] * 8, [0.1, 0.8, 1.2, 3.0, 0.1] * 8),
}


def check(rows: dict, case: str) -> None:
    """The kernels against the op's reference in float64."""
    import torch

    from megatron_srft.ops.clipped_ratio import reference

    losses, row_bits, parameters = TERMS[case]
    tokens = [int((~rows["is_demonstration"]).sum()), int(rows["is_demonstration"].sum())]
    loss, gradients, figures = run(rows, losses, row_bits, parameters, tokens)
    tensors = {
        name: values if values is None else torch.from_numpy(np.ascontiguousarray(values))
        for name, values in rows.items()
    }
    exact = {n: v.double() if v is not None and v.is_floating_point() else v for n, v in tensors.items()}
    names = ("logprobs", "entropy", "is_demonstration", "response_lengths", "engine_logprobs", "old_logprobs")
    arguments = [exact[name] for name in (*names, "importance_weights", "advantages", "weights")]
    expected = reference(*arguments, losses, row_bits, parameters, tokens)
    np.testing.assert_allclose(gradients, expected[1].numpy(), rtol=5e-6, atol=1e-7)
    np.testing.assert_allclose(loss, expected[0].numpy(), rtol=5e-6, atol=1e-5)
    np.testing.assert_allclose(figures, expected[2].numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", TERMS)
@pytest.mark.parametrize("count", [0, 1, 31, 33, 255, 256, 257, 1500])
def test_kernels_agree_with_float64(case, count):
    check(random_rows(count, len(TERMS[case][0]), seed=count), case)


@pytest.mark.parametrize("case", ["grpo", "srft"])
def test_extreme_log_ratios(case):
    check(random_rows(700, len(TERMS[case][0]), spread=15.0), case)


@pytest.mark.parametrize("missing", ["old_logprobs", "importance_weights"])
def test_what_may_be_missing(missing):
    check(random_rows(700, 5) | {missing: None}, "srft")


def test_terms_without_advantages_and_weights():
    check(random_rows(700, 1) | {"advantages": None, "weights": None}, "sft without weights")


def test_one_row_of_advantages_for_all_terms():
    rows = random_rows(700, 5)
    check(rows | {"advantages": np.broadcast_to(rows["advantages"][0], (5, 700))}, "srft")


def test_a_population_alone():
    for demonstrations in (False, True):
        check(random_rows(300, 5) | {"is_demonstration": np.full(300, demonstrations)}, "srft")


def test_nan_shows_in_the_loss_its_own_gradient_and_the_largest_values():
    rows = random_rows(600, 1)
    rows["is_demonstration"][:] = False
    rows["logprobs"][500] = np.nan
    loss, gradients, figures = run(rows, *TERMS["grpo"], [600, 0])
    assert np.isnan(loss) and np.isnan(figures[[0, 2, 10]]).all()
    assert np.isnan(gradients).nonzero()[1].tolist() == [500]


def test_order_of_threads_and_blocks_does_not_matter():
    rows = random_rows(700, 5)
    results = []
    for order in (0, 1):
        kernels().emulation_set_reversed(order)
        results.append(np.concatenate([part.ravel() for part in run(rows, *TERMS["srft"], [400, 300])]))
    kernels().emulation_set_reversed(0)
    assert (results[0] == results[1]).all()


def test_memory_is_respected():
    """Also the test that runs under the sanitizers: arrays end where the rows do."""
    for count in (0, 1, 257):
        case = TERMS["srft"]
        loss, gradients, figures = run(random_rows(count, len(case[0])), *case, [count, count])
        assert np.isfinite(loss) and np.isfinite(gradients).all() and np.isfinite(figures).all()


@pytest.mark.skipif(
    emulated.compiler() is None or emulated.sanitizer_runtime() is None, reason="the compiler has no AddressSanitizer"
)
def test_sanitizers_find_nothing():
    done = emulated.run_sanitized(__file__, "test_memory_is_respected")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(".")  # one test, passed
