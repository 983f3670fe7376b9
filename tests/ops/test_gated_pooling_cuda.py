"""The CUDA kernels of gated pooling without a GPU: run by the emulation, against float64."""

import ctypes
import functools
import os

import emulated
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler")

TYPES = {"fp32": (0, np.float32, 2e-7), "bf16": (1, np.uint16, 2**-8), "fp16": (2, np.float16, 2**-11)}
"""Number of the type, numpy's type of its memory, rounding."""

SHAPES = {  # rows, width, elements between rows beyond the width, elements before the first
    "one": (1, 1, 0, 0),
    "narrow": (5, 7, 0, 0),
    "odd rows": (19, 64, 0, 0),
    "short of a warp": (3, 24, 8, 0),
    "padded rows": (4, 264, 16, 8),
    "odd stride": (4, 64, 3, 0),
    "odd start": (4, 64, 0, 1),
    "odd width": (4, 515, 5, 0),
    "several tiles": (34, 1064, 0, 0),
    "one step of a warp": (3, 256, 0, 0),
    "qwen": (3, 896, 0, 0),
    "wide": (2, 3584, 0, 0),
    "many rows": (2500, 8, 0, 0),
}


@functools.cache
def kernels() -> ctypes.CDLL:
    library = emulated.library("gated_pooling")
    library.weight_gradient_chunks.restype = ctypes.c_int64
    return library


def call(name: str, *arguments) -> None:
    """Arrays as pointers, numbers as int64, the element type (a str) as its number."""
    plain = []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            plain.append(ctypes.c_void_p(argument.ctypes.data))
        else:
            plain.append(TYPES[argument][0] if isinstance(argument, str) else ctypes.c_int64(argument))
    emulated.check(kernels(), getattr(kernels(), name)(*plain))


def to_memory(values: np.ndarray, kind: str) -> np.ndarray:
    if kind != "bf16":
        return values.astype(TYPES[kind][1])
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def to_float64(memory: np.ndarray, kind: str) -> np.ndarray:
    if kind != "bf16":
        return memory.astype(np.float64)
    return (memory.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def aligned(shape, dtype, skip: int = 0) -> np.ndarray:
    """Memory that begins `skip` elements after a multiple of 16 bytes and ends where its allocation does."""
    raw = np.empty(skip + int(np.prod(shape)), dtype)
    assert raw.ctypes.data % 16 == 0
    return raw[skip:].reshape(shape)


def floats(generator, *shape) -> np.ndarray:
    array = aligned(shape, np.float32)
    array[...] = generator.standard_normal(shape)
    return array


def hidden_states(generator, shape: str, kind: str) -> np.ndarray:
    """[rows, width] states; what lies between the rows is NaN."""
    rows, width, gap, skip = SHAPES[shape]
    memory = aligned(rows * (width + gap) - gap, TYPES[kind][1], skip)
    memory[...] = to_memory(np.full(len(memory), np.nan), kind)
    stride = (width + gap) * memory.itemsize
    states = np.lib.stride_tricks.as_strided(memory, (rows, width), (stride, memory.itemsize))
    states[...] = to_memory(generator.standard_normal((rows, width)), kind)
    return states


def described(states: np.ndarray, kind: str) -> tuple:
    return kind, states, states.strides[0] // states.itemsize, *states.shape


def near(actual: np.ndarray, expected: np.ndarray, rounding: float) -> None:
    assert not np.isnan(actual).any()
    assert np.abs(actual - expected).max() <= rounding * np.abs(expected).max()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_projection_and_its_gradients_are_those_of_float64(shape, kind):
    generator = np.random.default_rng(0)
    states = hidden_states(generator, shape, kind)
    rows, width = states.shape
    accumulated, gradient = floats(generator, rows, 2), floats(generator, rows, 2)
    weight = floats(generator, 2, width)
    exact = to_float64(states, kind)

    result = np.full((rows, 2), np.nan, np.float32)
    call("gated_projection", *described(states, kind), accumulated, weight, result)
    near(result, accumulated + exact @ weight.T.astype(np.float64), 1e-6)

    of_weight = np.full((2, width), np.nan, np.float32)
    partial = aligned((kernels().weight_gradient_chunks(ctypes.c_int64(rows)), 2, width), np.float32)
    partial[...] = np.nan
    call("weight_gradient", *described(states, kind), gradient, partial, of_weight)
    near(of_weight, gradient.T.astype(np.float64) @ exact, 2e-6)

    of_states = aligned((rows, width), TYPES[kind][1], SHAPES[shape][3])
    of_states[...] = to_memory(np.full((rows, width), np.nan), kind)
    call("hidden_gradient", kind, gradient, weight, rows, width, of_states)
    expected = gradient.astype(np.float64) @ weight
    assert np.all(np.abs(to_float64(of_states, kind) - expected) <= TYPES[kind][2] * np.abs(expected) + 1e-6)


SEQUENCES = {
    "ragged": [[1, 2], [2, 5], [9, 26], [26, 43], [50, 1700]],
    "one": [[0, 1703]],
    "short": [[3, 4], [5, 6]],
    "empty ones": [[0, 0], [0, 40], [40, 40], [900, 901]],
    "beyond the rows": [[-4, 10], [1000, 5000]],
    "none": [],
}


def pooling(generator, name: str, spread: float = 1.0) -> tuple:
    accumulated = spread * floats(generator, 1703, 2)
    return accumulated, np.array(SEQUENCES[name], np.int64).reshape(-1, 2), floats(generator, 2)


def pooled(accumulated, sequences, bias) -> np.ndarray:
    sums = np.full((len(sequences), 2), np.nan, np.float32)
    call("gated_sums", accumulated, len(accumulated), sequences, len(sequences), bias, sums)
    return sums


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


@pytest.mark.parametrize("spread", [1.0, 60.0])
@pytest.mark.parametrize("name", SEQUENCES)
def test_sums_and_their_gradient_are_those_of_float64(name, spread):
    generator = np.random.default_rng(1)
    accumulated, sequences, bias = pooling(generator, name, spread)
    of_sums = floats(generator, len(sequences), 2)
    raw, reward = (accumulated.astype(np.float64) + bias).T
    gate, slope = sigmoid(raw), sigmoid(raw) * sigmoid(-raw)

    sums = pooled(accumulated, sequences, bias)
    expected, of_rows = np.zeros(sums.shape), np.zeros(accumulated.shape)
    for index, (start, end) in enumerate(sequences.clip(0, len(accumulated))):
        span = slice(start, end)
        expected[index] = gate[span].sum(), (gate[span] * reward[span]).sum()
        of_gate_sum, of_weighted = of_sums[index]
        of_rows[span, 0] = (of_gate_sum + of_weighted * reward[span]) * slope[span]
        of_rows[span, 1] = of_weighted * gate[span]
    if len(sequences):
        near(sums, expected, 2e-6)

    found = np.full(accumulated.shape, np.nan, np.float32)
    call("gated_sums_gradient", accumulated, len(accumulated), sequences, len(sequences), bias, of_sums, found)
    near(found, of_rows, 1e-6)
    assert not found[(of_rows == 0).all(axis=1)].any()


def test_results_depend_on_no_order_of_threads():
    generator = np.random.default_rng(2)
    states = hidden_states(generator, "several tiles", "bf16")
    rows, width = states.shape
    gradient, weight = floats(generator, rows, 2), floats(generator, 2, width)
    given = pooling(generator, "ragged")

    def run() -> list[np.ndarray]:
        result, of_weight = np.empty((rows, 2), np.float32), np.empty((2, width), np.float32)
        partial = aligned((kernels().weight_gradient_chunks(ctypes.c_int64(rows)), 2, width), np.float32)
        call("gated_projection", *described(states, "bf16"), gradient, weight, result)
        call("weight_gradient", *described(states, "bf16"), gradient, partial, of_weight)
        return [result, of_weight, pooled(*given)]

    forwards = run()
    kernels().emulation_set_reversed(1)
    try:
        backwards = run()
    finally:
        kernels().emulation_set_reversed(0)
    assert all(np.array_equal(a, b) for a, b in zip(forwards, backwards, strict=True))


def test_rows_and_sequences_do_not_depend_on_others():
    generator = np.random.default_rng(3)
    states = hidden_states(generator, "many rows", "fp32")[:600]
    accumulated, weight = floats(generator, 600, 2), floats(generator, 2, 8)
    together, alone = np.empty((600, 2), np.float32), np.empty((597, 2), np.float32)
    call("gated_projection", *described(states, "fp32"), accumulated, weight, together)
    call("gated_projection", *described(states[3:], "fp32"), accumulated[3:].copy(), weight, alone)
    assert np.array_equal(together[3:], alone)

    accumulated, sequences, bias = pooling(generator, "ragged")
    sums = pooled(accumulated, sequences, bias)
    for index, (start, end) in enumerate(sequences):
        own = accumulated[start:end].copy()
        assert np.array_equal(pooled(own, np.array([[0, end - start]]), bias)[0], sums[index])


def test_nothing_to_do_launches_nothing():
    empty, weight = np.empty((0, 8), np.float32), np.ones((2, 8), np.float32)
    of_weight = np.full((2, 8), np.nan, np.float32)
    call("gated_projection", *described(empty, "fp32"), empty, weight, empty)
    call("hidden_gradient", "fp32", empty, weight, 0, 8, empty)
    call("weight_gradient", *described(empty, "fp32"), empty, empty, of_weight)
    assert not of_weight.any()


@pytest.mark.skipif(emulated.sanitizer_runtime() is None, reason="the compiler has no AddressSanitizer")
@pytest.mark.skipif(emulated.SANITIZED_PROCESS in os.environ, reason="is the sanitized process")
def test_kernels_stay_within_their_memory():
    done = emulated.run_sanitized(__file__, "(bf16 and not many) or 1.0 or nothing")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("..................")
