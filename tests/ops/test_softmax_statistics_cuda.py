"""The CUDA kernels of the softmax statistics, run on a CPU (see emulated.py), and the C++ ones, against float64.

Without torch, so that the sanitizers can run it.
"""

import ctypes
import os
from dataclasses import dataclass

import emulated
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler (g++)")

TYPES = ("float32", "bfloat16", "float16")
ROUNDING = {"float32": 2**-24, "bfloat16": 2**-8, "float16": 2**-11}
SMALLEST = -1e4
SIZES = (1, 7, 1000, 1001, 32000, 151936)
WARP_ROWS = 4100  # columns of a row that gets a block in CUDA for float32 and bfloat16


class StatisticsArguments(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("logits", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("labels", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("vocab_start", ctypes.c_int64),
        ("inverse_temperature", ctypes.c_float),
        ("statistics", ctypes.c_void_p),
        ("kept_type", ctypes.c_int),
        ("kept", ctypes.c_void_p),
        ("kept_stride", ctypes.c_int64),
    ]


class GradientArguments(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("logits", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("labels", ctypes.c_void_p),
        ("coefficients", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("vocab_start", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("gradient", ctypes.c_void_p),
        ("gradient_stride", ctypes.c_int64),
    ]


@dataclass
class Matrix:
    """[rows, columns] numbers of a type in rows of `stride`, `offset` elements beyond an address that 64 divides."""

    type: str
    rows: int
    columns: int
    stride: int
    offset: int = 0

    def __post_init__(self) -> None:
        storage = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}[self.type]
        size = self.offset + max(0, (self.rows - 1) * self.stride + self.columns)
        item = np.dtype(storage).itemsize
        raw = np.zeros(size * item + 64, np.uint8)
        start = -raw.ctypes.data % 64
        self.memory = raw[start : start + size * item].view(storage)  # ends where the allocation does, but for 64 bytes
        shape, strides = (self.rows, self.columns), (self.stride * item, item)
        self.elements = np.lib.stride_tricks.as_strided(self.memory[self.offset :], shape, strides)

    @property
    def address(self) -> int:
        return self.memory.ctypes.data + self.offset * self.memory.itemsize

    @property
    def values(self) -> np.ndarray:
        if self.type == "bfloat16":
            return (self.elements.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return self.elements.astype(np.float64)

    def fill(self, values: np.ndarray) -> "Matrix":
        with np.errstate(over="ignore"):
            self.elements[:] = rounded_bits(values) if self.type == "bfloat16" else values
        return self

    def bits(self) -> bytes:
        return self.memory.tobytes()


def rounded_bits(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return emulated.library("softmax_statistics")


@pytest.fixture(params=["cuda", "cpu"])
def device(request) -> str:
    return request.param


def run(library, kernel: str, arguments: ctypes.Structure) -> None:
    emulated.check(library, getattr(library, kernel)(ctypes.byref(arguments)))


def statistics(
    library,
    device: str,
    logits: Matrix,
    labels: np.ndarray,
    vocab_start: int = 0,
    columns: int | None = None,
    inverse_temperature: float = 1.0,
    kept: Matrix | None = None,
) -> np.ndarray:
    result = np.full((4, logits.rows), 7.0, np.float32)
    columns = logits.columns if columns is None else columns
    kept_fields = (TYPES.index(kept.type), kept.address, kept.stride) if kept else (0, None, 0)
    arguments = StatisticsArguments(
        TYPES.index(logits.type),
        logits.address,
        logits.stride,
        labels.ctypes.data,
        logits.rows,
        columns,
        vocab_start,
        inverse_temperature,
        result.ctypes.data,
        *kept_fields,
    )
    run(library, f"{device}_statistics", arguments)
    return result


def gradient(
    library,
    device: str,
    logits: Matrix,
    labels: np.ndarray,
    coefficients: np.ndarray,
    vocab_start: int = 0,
    columns: int | None = None,
    scale: float = 1.0,
    into: Matrix | None = None,
) -> Matrix:
    into = into or Matrix(logits.type, logits.rows, logits.columns, logits.columns)
    columns = logits.columns if columns is None else columns
    arguments = GradientArguments(
        TYPES.index(logits.type),
        logits.address,
        logits.stride,
        labels.ctypes.data,
        coefficients.ctypes.data,
        logits.rows,
        columns,
        logits.columns,
        vocab_start,
        scale,
        into.address,
        into.stride,
    )
    run(library, f"{device}_gradient", arguments)
    return into


def expected_statistics(values: np.ndarray, labels: np.ndarray, vocab_start: int, inverse: float) -> np.ndarray:
    """The definition in float64; `values` has the real columns only."""
    result = np.zeros((4, len(values)))
    for n, row in enumerate(values * inverse):
        local = labels[n] - vocab_start
        result[3, n] = row[local] if 0 <= local < len(row) else 0
        finite = row[row > -np.inf]
        result[0, n] = finite.max(initial=-np.inf)
        shifted = finite - result[0, n]
        result[1, n], result[2, n] = np.exp(shifted).sum(), (shifted * np.exp(shifted)).sum()
    return result


def expected_gradient(values, labels, coefficients, vocab_start, columns, scale) -> np.ndarray:
    r, a, b, c = coefficients.astype(np.float64)[:, :, None]
    t = np.maximum(values * np.float64(np.float32(scale)) - np.where(r == -np.inf, 0, r), SMALLEST)
    ids = np.arange(values.shape[1])
    result = np.exp(t) * (a + b * t) + (ids + vocab_start == labels[:, None]) * c
    return np.where(ids < columns, result, 0)


def assert_statistics(actual: np.ndarray, expected: np.ndarray) -> None:
    """To float32's rounding of the scaled logits (exponents are differences of those) and 1e-6."""
    size = np.abs(np.where(np.isinf(expected[0]), 0, expected[0]))
    tolerance = 1e-6 + size * 2**-23
    np.testing.assert_allclose(actual[[0, 3]], expected[[0, 3]], rtol=2**-23)
    assert np.all(np.abs(actual[1] - expected[1]) <= tolerance * expected[1]), (actual[1], expected[1])
    weights = np.abs(expected[2]) + expected[1]
    assert np.all(np.abs(actual[2] - expected[2]) <= 2 * tolerance * weights), (actual[2], expected[2])


def assert_rounded(actual: np.ndarray, expected: np.ndarray, type: str, absolute: float = 0.0) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1.1 * ROUNDING[type] + 4e-6, atol=absolute)


def random_logits(seed: int, type: str, rows: int, columns: int, stride: int = 0, offset: int = 0) -> Matrix:
    values = np.random.default_rng(seed).normal(scale=4, size=(rows, columns))
    return Matrix(type, rows, columns, max(stride, columns), offset).fill(values)


def edge_labels(rows: int, start: int, columns: int) -> np.ndarray:
    """First and last column, and the columns just outside."""
    return np.resize(np.array([start, start + columns - 1, start - 1, start + columns], np.int64), rows)


def size_id(columns: int) -> str:
    return f"{'long' if columns > 5000 else 'short'}-{columns}"


# --- values ---


@pytest.mark.parametrize("inverse_temperature", [1.0, 2.0, 2 / 3])
@pytest.mark.parametrize("columns", SIZES, ids=size_id)
@pytest.mark.parametrize("type", TYPES)
def test_statistics(library, device, type, columns, inverse_temperature):
    rows = 5 if columns < 5000 else 2
    logits = random_logits(columns, type, rows, columns)
    labels = edge_labels(rows, 100, columns)
    actual = statistics(library, device, logits, labels, 100, inverse_temperature=inverse_temperature)
    expected = expected_statistics(logits.values, labels, 100, np.float64(np.float32(inverse_temperature)))
    assert_statistics(actual, expected)


@pytest.mark.parametrize("stride,offset", [(1024, 0), (1009, 0), (1016, 8), (1016, 1), (1003, 3)])
@pytest.mark.parametrize("columns", [1000, 1001, 997])
@pytest.mark.parametrize("type", TYPES)
def test_statistics_and_gradient_at_any_alignment(library, device, type, columns, stride, offset):
    logits = random_logits(1, type, 3, columns, stride, offset)
    labels = edge_labels(3, 0, columns)
    assert_statistics(statistics(library, device, logits, labels), expected_statistics(logits.values, labels, 0, 1.0))
    coefficients = np.array([[9, 8, 7], [-1, -2, 1], [0.5, 0, -0.5], [1, 2, 3]], np.float32)
    into = Matrix(type, 3, columns, stride, offset)
    actual = gradient(library, device, logits, labels, coefficients, into=into)
    expected = expected_gradient(logits.values, labels, coefficients, 0, columns, 1.0)
    assert_rounded(actual.values, expected, type, absolute=1e-7)


@pytest.mark.parametrize("columns", [1000, WARP_ROWS])
@pytest.mark.parametrize("type", TYPES)
def test_large_logits(library, device, type, columns):
    """Logits around 150 and -150, as a whole and mixed, where exp of the plain logits overflows or vanishes."""
    shifts = np.array([150.0, -150.0, 0.0])[:, None]
    values = random_logits(2, "float32", 3, columns).values + shifts
    values[2, ::2] += 150
    values[2, 1::2] -= 150
    logits = Matrix(type, 3, columns, columns).fill(values)
    labels = edge_labels(3, 0, columns)
    for inverse in (1.0, 2.0):
        actual = statistics(library, device, logits, labels, inverse_temperature=inverse)
        assert_statistics(actual, expected_statistics(logits.values, labels, 0, inverse))


@pytest.mark.parametrize("columns", [40, WARP_ROWS])
@pytest.mark.parametrize("type", TYPES)
def test_infinite_logits(library, device, type, columns):
    logits = random_logits(3, type, 5, columns)
    values = logits.values
    values[0, 1::3] = -np.inf
    values[1] = -np.inf
    values[2, : columns - 1] = -np.inf
    values[3, 5] = np.inf
    values[4, 7] = np.nan
    logits.fill(values)
    labels = np.array([1, 2, columns - 1, 3, 4], np.int64)
    kept = Matrix(type, 5, columns, columns)
    actual = statistics(library, device, logits, labels, kept=kept)
    assert_statistics(actual[:, :3], expected_statistics(values[:3], labels, 0, 1.0))
    assert actual[0, 1] == -np.inf and not actual[1:3, 1].any()
    assert np.isnan(actual[:3, 3:]).all()
    smallest = Matrix(type, 1, 1, 1).fill(np.array([[SMALLEST]])).values[0, 0]
    assert (kept.values[0, 1::3] == smallest).all() and (kept.values[1] == smallest).all()

    coefficients = np.array([[20, -np.inf, 20, 20, 20], [1] * 5, [1] * 5, [0] * 5], np.float32)
    result = gradient(library, device, logits, labels, coefficients).values
    assert not result[0, 1::3].any() and not result[1].any() and not result[2, : columns - 1].any()
    assert np.isnan(result[4, 7]) and np.isfinite(np.delete(result[4], 7)).all()


@pytest.mark.parametrize("columns", [0, 1, 9, 600, 1003])
@pytest.mark.parametrize("type", TYPES)
def test_padding_is_neither_read_nor_kept_and_gets_no_gradient(library, device, type, columns):
    width = 1003
    logits = random_logits(4, type, 4, width)
    values = logits.values
    values[:, columns:] = np.nan
    logits.fill(values)
    labels = edge_labels(4, 50, columns)
    labels[0] = 50 + columns  # a padded column, if there is one
    kept = Matrix(type, 4, width, width).fill(np.full((4, width), 3.0))
    actual = statistics(library, device, logits, labels, 50, columns, kept=kept)
    assert_statistics(actual, expected_statistics(values[:, :columns], labels, 50, 1.0))
    assert (kept.values[:, columns:] == 3).all()
    coefficients = np.array([[5] * 4, [-1] * 4, [0.5] * 4, [1, 2, 3, 4]], np.float32)
    result = gradient(library, device, logits, labels, coefficients, 50, columns).values
    assert not result[:, columns:].any()
    expected = expected_gradient(values[:, :columns], labels, coefficients, 50, columns, 1.0)
    assert_rounded(result[:, :columns], expected, type, absolute=1e-7)


def test_long_rows_lose_no_digits(library, device):
    """Equal logits: the sum is the number of columns, to which a single float would add up badly."""
    columns = 151936
    logits = Matrix("float32", 1, columns, columns).fill(np.full((1, columns), 3.0))
    logits.elements[0, 0] = 3.0 + np.log(3)
    actual = statistics(library, device, logits, np.zeros(1, np.int64))
    expected = expected_statistics(logits.values, np.zeros(1, np.int64), 0, 1.0)
    np.testing.assert_allclose(actual, expected, rtol=5e-7)


# --- kept logits ---


@pytest.mark.parametrize("columns,stride", [(7, 8), (1000, 1000), (1001, 1003), (WARP_ROWS, WARP_ROWS + 4)])
@pytest.mark.parametrize("kept_type", TYPES)
@pytest.mark.parametrize("type", TYPES)
def test_kept_logits(library, device, type, kept_type, columns, stride):
    logits = random_logits(5, type, 3, columns, stride)
    labels = edge_labels(3, 0, columns)
    kept = Matrix(kept_type, 3, columns, stride)
    actual = statistics(library, device, logits, labels, inverse_temperature=2.0, kept=kept)
    assert actual.tobytes() == statistics(library, device, logits, labels, inverse_temperature=2.0).tobytes()
    expected = logits.values * 2 - actual[0].astype(np.float64)[:, None]
    assert_rounded(kept.values, expected, kept_type, absolute=1e-6)


@pytest.mark.parametrize("columns", [1, 9, 1000, 1001, WARP_ROWS])
@pytest.mark.parametrize("type", TYPES)
def test_kept_in_place(library, device, type, columns):
    logits = random_logits(6, type, 3, columns)
    labels = edge_labels(3, 0, columns)
    kept = Matrix(type, 3, columns, columns)
    apart = statistics(library, device, logits, labels, inverse_temperature=0.5, kept=kept)
    together = statistics(library, device, logits, labels, inverse_temperature=0.5, kept=logits)
    assert apart.tobytes() == together.tobytes()
    assert logits.bits() == kept.bits()


# --- gradient ---


@pytest.mark.parametrize("columns", SIZES, ids=size_id)
@pytest.mark.parametrize("type", TYPES)
def test_gradient_of_logprob_and_entropy(library, device, type, columns):
    """With the normaliser as r and a, b, c of given upstream gradients, against the softmax in float64."""
    rows, inverse = (5, 1.5) if columns < 5000 else (1, 1.5)
    logits = random_logits(7, type, rows, columns)
    labels = edge_labels(rows, 30, columns)
    m, s, u, _ = expected_statistics(logits.values, labels, 30, inverse)
    normaliser, entropy = m + np.log(s), np.log(s) - u / s
    upstream = np.random.default_rng(8).normal(size=(2, rows))
    a, b = -inverse * (upstream[0] + upstream[1] * entropy), -inverse * upstream[1]
    coefficients = np.stack([normaliser, a, b, inverse * upstream[0]]).astype(np.float32)
    actual = gradient(library, device, logits, labels, coefficients, 30, scale=inverse).values

    logprobs = logits.values * inverse - normaliser[:, None]
    one_hot = np.arange(columns) + 30 == labels[:, None]
    of_logprob = one_hot - np.exp(logprobs)
    of_entropy = -np.exp(logprobs) * (logprobs + entropy[:, None])
    expected = inverse * (upstream[0][:, None] * of_logprob + upstream[1][:, None] * of_entropy)
    np.testing.assert_allclose(actual, expected, rtol=2 * ROUNDING[type] + 1e-5, atol=1e-5 + 1e-7 / columns)


@pytest.mark.parametrize("columns", [1, 9, 1000, 1001, WARP_ROWS])
@pytest.mark.parametrize("type", TYPES)
def test_gradient_in_place(library, device, type, columns):
    logits = random_logits(9, type, 3, columns)
    labels = edge_labels(3, 0, columns)
    coefficients = np.random.default_rng(10).normal(size=(4, 3)).astype(np.float32)
    apart = gradient(library, device, logits, labels, coefficients, columns=max(1, columns - 3))
    gradient(library, device, logits, labels, coefficients, columns=max(1, columns - 3), into=logits)
    assert apart.bits() == logits.bits()


@pytest.mark.parametrize("exponent,expected", [(-200.0, 0.0), (-30.0, np.exp(-30.0)), (0.0, 1.0), (95.0, np.inf)])
def test_gradient_of_any_exponent(library, device, exponent, expected):
    logits = Matrix("float32", 1, 20, 20).fill(np.full((1, 20), exponent))
    coefficients = np.array([[0], [1], [0], [0]], np.float32)
    result = gradient(library, device, logits, np.zeros(1, np.int64), coefficients)
    np.testing.assert_allclose(result.values, expected, rtol=2e-6)


@pytest.mark.parametrize("type", TYPES)
def test_results_are_rounded_to_nearest_even(library, device, type):
    """Through the c of a gradient without a and b: ties, subnormal numbers, the largest numbers, infinity and NaN."""
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 2**-25, 3 * 2**-25, 2**-24 * 1.5, 1e-7])
    values = np.concatenate([values, [65504, 65519.9, 65520, 3.4e38, 1e-40, 0, np.inf, np.nan]])
    values = np.concatenate([values, -values]).astype(np.float32)
    rows = len(values)
    logits = Matrix(type, rows, 1, 1).fill(np.zeros((rows, 1)))
    coefficients = np.stack([np.zeros_like(values), np.zeros_like(values), np.zeros_like(values), values])
    result = gradient(library, device, logits, np.zeros(rows, np.int64), coefficients)
    with np.errstate(over="ignore"):
        expected = Matrix(type, rows, 1, 1).fill(values[:, None]).values
    np.testing.assert_array_equal(result.values, expected)


# --- what a result depends on ---


@pytest.mark.parametrize("columns", [7, 1001, WARP_ROWS])
@pytest.mark.parametrize("type", TYPES)
def test_bits_depend_neither_on_order_nor_on_other_rows(library, device, type, columns):
    logits = random_logits(11, type, 6, columns)
    labels = edge_labels(6, 0, columns)
    coefficients = np.random.default_rng(12).normal(size=(4, 6)).astype(np.float32)
    kept = Matrix(type, 6, columns, columns)
    first = statistics(library, device, logits, labels, kept=kept)
    first_gradient = gradient(library, device, logits, labels, coefficients)
    again = Matrix(type, 6, columns, columns)
    library.emulation_set_reversed(1)
    try:
        assert first.tobytes() == statistics(library, device, logits, labels, kept=again).tobytes()
        assert first_gradient.bits() == gradient(library, device, logits, labels, coefficients).bits()
    finally:
        library.emulation_set_reversed(0)
    assert kept.bits() == again.bits()
    for n in (0, 5):
        alone = Matrix(type, 1, columns, columns)
        alone.elements[:] = logits.elements[n]
        assert statistics(library, device, alone, labels[n : n + 1]).tobytes() == first[:, n].tobytes()
        row = gradient(library, device, alone, labels[n : n + 1], np.ascontiguousarray(coefficients[:, n]))
        assert row.elements.tobytes() == first_gradient.elements[n].tobytes()


def test_no_rows(library, device):
    logits, labels = Matrix("float32", 0, 9, 9), np.zeros(0, np.int64)
    assert statistics(library, device, logits, labels).shape == (4, 0)
    gradient(library, device, logits, labels, np.zeros((4, 0), np.float32))


@pytest.mark.slow
@pytest.mark.skipif(emulated.SANITIZED_PROCESS in os.environ, reason="this is the sanitized process")
def test_under_sanitizers():
    """Short rows again, with AddressSanitizer and UndefinedBehaviorSanitizer."""
    if emulated.sanitizer_runtime() is None:
        pytest.skip("the compiler has no AddressSanitizer")
    done = emulated.run_sanitized(
        __file__, "(alignment or padding or kept or in_place or no_rows or nearest_even) and not sanitizers"
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
