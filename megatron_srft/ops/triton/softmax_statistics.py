"""Softmax statistics of rows of logits, and the gradient of the logits from four coefficients per row, in Triton.

Statistics of a row, over its first `columns` columns (the others are padding), at temperature T:

    m = max_j x_j/T    s = sum_j exp(x_j/T - m)    u = sum_j (x_j/T - m) exp(x_j/T - m)    z = x_y/T of the label, or 0

One program takes one row. Each of its threads folds its own columns into an (m, s, u) of its own, rescaled when a
block raises its maximum (the online softmax of Milakov and Gimelshein, 2018), so that the loop over the row has no
communication between threads; they are merged once, after it. Gradient, elementwise, with t = x_j * scale - r:

    out_j = exp(t) (a + b t) + 1[j = label] c, and 0 in padded columns

-inf logits contribute nothing. NaN and +inf reach the result: `tl.max` skips NaN, but the sums do not, and where the
sum is NaN the maximum is made NaN. Everything but the input and output types is float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

EXP_IS_ZERO = tl.constexpr(-1e4)
"""exp of this is 0; clamping exponents to it keeps 0 * -inf out of the weighted sums."""

ELEMENTS_PER_THREAD = 16
VECTOR_BYTES = 16
SMALLEST_BLOCK, LARGEST_BLOCK = 512, 4096
"""Columns that a program takes at once: 1 to 8 warps. Beyond 4096 registers grow without more loads in flight."""

NOT_SPECIALISED = (
    *("labels", "coefficients", "result", "row_vectors", "kept_vectors", "out_vectors"),
    *("rows", "vocab_start", "columns", "width", "scale"),
)
"""Arguments whose value or alignment must not compile a kernel again: all but the pointers to whole rows."""

LOG2_E = tl.constexpr(1.4426950408889634)
HAS_PTX = tl.constexpr(torch.version.hip is None and not triton.knobs.runtime.interpret)


def softmax_statistics(
    logits: Tensor, labels: Tensor, vocab_start: int, columns: int, inverse_temperature: float
) -> Tensor:
    """Statistics [4, rows] (m, s, u, z) of logits [rows, at least `columns`]; labels [rows] are ids of tokens."""
    return _statistics(logits, labels, vocab_start, columns, inverse_temperature, None)


def softmax_statistics_keep(
    logits: Tensor, labels: Tensor, vocab_start: int, columns: int, inverse_temperature: float, kept: Tensor
) -> Tensor:
    """The same, and x_j/T - m into `kept`, in its own type; it may be the memory of the logits."""
    return _statistics(logits, labels, vocab_start, columns, inverse_temperature, kept)


def softmax_gradient(
    logits: Tensor, labels: Tensor, coefficients: Tensor, vocab_start: int, columns: int, scale: float
) -> Tensor:
    """Gradient of the logits, in their type, contiguous, from coefficients [4, rows]: r, a, b, c."""
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _gradient(logits, labels, coefficients, vocab_start, columns, scale, gradient)
    return gradient


def softmax_gradient_(
    logits: Tensor, labels: Tensor, coefficients: Tensor, vocab_start: int, columns: int, scale: float
) -> None:
    """The same, in the memory of the logits."""
    _gradient(logits, labels, coefficients, vocab_start, columns, scale, logits)


def _statistics(
    logits: Tensor, labels: Tensor, vocab_start: int, columns: int, scale: float, kept: Tensor | None
) -> Tensor:
    rows = logits.shape[0]
    result = torch.empty((4, rows), dtype=torch.float32, device=logits.device)
    if rows == 0:
        return result
    block, warps = _block_and_warps(columns)
    vector = _vector(logits, logits if kept is None else kept)
    with torch.cuda.device_of(logits):
        statistics_kernel[(rows,)](
            logits,
            labels.contiguous(),
            kept,
            result,
            logits.stride(0) // vector,
            0 if kept is None else kept.stride(0) // vector,
            rows,
            vocab_start,
            columns,
            scale,
            TILES=ELEMENTS_PER_THREAD // vector,
            THREADS=block // ELEMENTS_PER_THREAD,
            VECTOR=vector,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return result


def _gradient(
    logits: Tensor, labels: Tensor, coefficients: Tensor, vocab_start: int, columns: int, scale: float, out: Tensor
) -> None:
    rows, width = logits.shape
    if rows == 0 or width == 0:
        return
    block, warps = _block_and_warps(width)
    vector = _vector(logits, out)
    with torch.cuda.device_of(logits):
        gradient_kernel[(rows, triton.cdiv(width, block))](
            logits,
            labels.contiguous(),
            coefficients.contiguous(),
            out,
            logits.stride(0) // vector,
            out.stride(0) // vector,
            rows,
            vocab_start,
            columns,
            width,
            scale,
            BLOCK=block,
            VECTOR=vector,
            num_warps=warps,
            enable_fp_fusion=True,
        )


def _block_and_warps(columns: int) -> tuple[int, int]:
    """Columns per block, the fewest that hold a row within the limits, and warps for 16 columns a thread."""
    block = min(max(triton.next_power_of_2(columns), SMALLEST_BLOCK), LARGEST_BLOCK)
    return block, block // (32 * ELEMENTS_PER_THREAD)


def _vector(logits: Tensor, other: Tensor) -> int:
    """Elements of the logits that one instruction loads: 16 bytes if every row of both allows it, else one element.

    Strides go to the kernels in vectors, so that their alignment is known there without compiling for their values.
    """
    vector = VECTOR_BYTES // logits.element_size()
    aligned = all(rows.data_ptr() % VECTOR_BYTES == 0 and rows.stride(0) % vector == 0 for rows in (logits, other))
    return vector if aligned else 1


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def statistics_kernel(
    logits,
    labels,
    kept,
    result,
    row_vectors,
    kept_vectors,
    rows,
    vocab_start,
    columns,
    scale,
    TILES: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    BLOCK: tl.constexpr = TILES * THREADS * VECTOR
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_vectors * VECTOR
    local = tl.load(labels + row) - vocab_start
    found = (local >= 0) & (local < columns)
    # Before the first write to `kept`, which may be the same memory.
    label_logit = tl.load(logits + local, mask=found, other=0.0).to(tl.float32) * scale

    # [TILES, THREADS, VECTOR], so that dimensions 0 and 2 lie within a thread and reducing them costs no shuffle.
    tile = tl.arange(0, TILES)[:, None, None] * (THREADS * VECTOR)
    offsets = tile + tl.arange(0, THREADS)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    maximum = tl.full((THREADS,), float("-inf"), tl.float32)
    total = tl.zeros((THREADS,), tl.float32)
    weighted = tl.zeros((THREADS,), tl.float32)
    full = columns // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        values = tl.load(logits + start + offsets).to(tl.float32)
        maximum, total, weighted = _fold(values, maximum, total, weighted, scale)
    inside = full + offsets < columns
    if full < columns:
        values = tl.load(logits + full + offsets, mask=inside, other=float("-inf")).to(tl.float32)
        maximum, total, weighted = _fold(values, maximum, total, weighted, scale)
    maximum, total, weighted = _merge(maximum, total, weighted)

    result += row
    tl.store(result, tl.where(total == total, maximum, total))
    tl.store(result + rows, total)
    tl.store(result + 2 * rows.to(tl.int64), weighted)
    tl.store(result + 3 * rows.to(tl.int64), label_logit)
    if kept is not None:
        kept += row * kept_vectors * VECTOR
        reference = tl.where(maximum == float("-inf"), 0.0, maximum)
        for start in range(0, full, BLOCK):
            values = tl.load(logits + start + offsets).to(tl.float32)
            shifted = _clamped(values * scale - reference)
            tl.store(kept + start + offsets, shifted.to(kept.dtype.element_ty))
        if full < columns:
            values = tl.load(logits + full + offsets, mask=inside, other=0.0).to(tl.float32)
            shifted = _clamped(values * scale - reference)
            tl.store(kept + full + offsets, shifted.to(kept.dtype.element_ty), mask=inside)


@triton.jit
def _fold(values, maximum, total, weighted, scale):
    """Each thread's statistics with a block [TILES, THREADS, VECTOR] added."""
    raised = tl.maximum(maximum, tl.max(tl.max(values, axis=2), axis=0) * scale)
    reference = tl.where(raised == float("-inf"), 0.0, raised)  # exp(-inf - -inf) must be 0
    step = _clamped(maximum - reference)
    rescale = _exp(step)
    shifted = _clamped(values * scale - reference[None, :, None])
    exponentials = _exp(shifted)
    weighted = rescale * (weighted + step * total) + tl.sum(tl.sum(exponentials * shifted, axis=2), axis=0)
    total = rescale * total + tl.sum(tl.sum(exponentials, axis=2), axis=0)
    return raised, total, weighted


@triton.jit
def _merge(maxima, totals, weighted):
    """Statistics of the union of what the threads have seen."""
    maximum = tl.max(maxima, axis=0)
    shifts = _clamped(maxima - tl.where(maximum == float("-inf"), 0.0, maximum))
    scales = _exp(shifts)
    return maximum, tl.sum(scales * totals, axis=0), tl.sum(scales * (weighted + shifts * totals), axis=0)


@triton.jit
def _clamped(exponents):
    """Unlike the default maximum, this one lets NaN through."""
    return tl.maximum(exponents, EXP_IS_ZERO, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _exp(exponents):
    """exp that flushes subnormal results to 0; `tl.exp` spends three more instructions on every element for them."""
    if HAS_PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [exponents * LOG2_E], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp(exponents)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def gradient_kernel(
    logits,
    labels,
    coefficients,
    out,
    row_vectors,
    out_vectors,
    rows,
    vocab_start,
    columns,
    width,
    scale,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    logits += row * row_vectors * VECTOR
    out += row * out_vectors * VECTOR
    local = tl.load(labels + row) - vocab_start
    local = tl.where((local >= 0) & (local < columns), local, -1).to(tl.int32)  # 64 bits would cost every element
    coefficients += row
    reference = tl.load(coefficients)
    reference = tl.where(reference == float("-inf"), 0.0, reference)
    constant = tl.load(coefficients + rows)
    slope = tl.load(coefficients + 2 * rows.to(tl.int64))
    at_label = tl.load(coefficients + 3 * rows.to(tl.int64))
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= columns:
        values = tl.load(logits + offsets).to(tl.float32)
        gradient = _logit_gradient(values, scale, reference, constant, slope)
        gradient = tl.where(offsets == local, gradient + at_label, gradient)
        tl.store(out + offsets, gradient.to(out.dtype.element_ty))
    else:
        inside = offsets < columns
        values = tl.load(logits + offsets, mask=inside, other=0.0).to(tl.float32)
        gradient = _logit_gradient(values, scale, reference, constant, slope)
        gradient = tl.where(offsets == local, gradient + at_label, gradient)
        gradient = tl.where(inside, gradient, 0.0)
        tl.store(out + offsets, gradient.to(out.dtype.element_ty), mask=offsets < width)


@triton.jit
def _logit_gradient(values, scale, reference, constant, slope):
    exponents = _clamped(values * scale - reference)
    return _exp(exponents) * (constant + slope * exponents)
