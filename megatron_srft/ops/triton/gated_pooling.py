"""Gate and reward of hidden states, and their gated sums over packed sequences, in Triton.

A layer adds h W^T (two columns: gate first) to what a token has accumulated. With bias b, token t then has
a_t, r_t = accumulated_t + b and g_t = sigmoid(a_t), and a sequence gives sum_t g_t and sum_t g_t r_t. With gradients
G and Q of these two, dL/da_t = (G + Q r_t) g_t (1 - g_t) and dL/dr_t = Q g_t.

Hidden states are read once. Sums are float32, without atomics: their order depends on shapes alone, and that of a row
or a sequence on nothing but itself.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

VECTOR_BYTES = 16
LARGEST_BLOCK = 512
"""Columns that a program takes at once."""

ROWS = 4
"""Of the projection per program; they share what it reads of the weights."""

CHUNK_STEP = 4
"""Rows that the weight gradient takes at once."""

MOST_CHUNKS = 128
"""Of rows, each summed by its own program: the partial sums stay within a few percent of the hidden states."""

POOLING_BLOCK = 512

NOT_SPECIALISED = ("accumulated", "gradient", "sequences", "bias", "sums_gradient", "result_rows", "rows")
NOT_SPECIALISED += ("row_vectors", "width_vectors", "chunk_rows", "count", "halvings")
"""Arguments whose value or alignment must not compile a kernel again."""


def gated_projection(accumulated: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """accumulated [rows, 2] + hidden [rows, width] @ weight [2, width].T, float32."""
    rows, width = hidden.shape
    result = torch.empty_like(accumulated)
    if rows == 0:
        return result
    vector = _vector(hidden, weight)
    with torch.cuda.device_of(hidden):
        projection_kernel[(triton.cdiv(rows, ROWS),)](
            accumulated,
            hidden,
            weight,
            result,
            hidden.stride(0) // vector,
            rows,
            width // vector,
            ROWS=ROWS,
            BLOCK=_block(width),
            VECTOR=vector,
        )
    return result


def gated_projection_weight_gradient(gradient: Tensor, hidden: Tensor) -> Tensor:
    """gradient [rows, 2].T @ hidden [rows, width], float32."""
    rows, width = hidden.shape
    if rows == 0 or width == 0:
        return gradient.new_zeros(2, width)
    chunk_rows = CHUNK_STEP * triton.cdiv(rows, CHUNK_STEP * MOST_CHUNKS)
    chunks = triton.cdiv(rows, chunk_rows)
    partial = gradient.new_empty(chunks, 2, width)
    vector, block = _vector(hidden, partial), _block(width)
    with torch.cuda.device_of(hidden):
        weight_gradient_kernel[(chunks, triton.cdiv(width, block))](
            gradient,
            hidden,
            partial,
            hidden.stride(0) // vector,
            rows,
            width // vector,
            chunk_rows,
            ROWS=CHUNK_STEP,
            BLOCK=block,
            VECTOR=vector,
        )
    return partial.sum(dim=0)


def gated_projection_hidden_gradient(gradient: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    """gradient [rows, 2] @ weight [2, width] in the type of `like`."""
    rows, width = gradient.shape[0], weight.shape[1]
    result = like.new_empty(rows, width)
    if result.numel() == 0:
        return result
    vector, block = _vector(result, weight), _block(width)
    with torch.cuda.device_of(gradient):
        hidden_gradient_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(width, block))](
            gradient, weight, result, rows, width // vector, ROWS=ROWS, BLOCK=block, VECTOR=vector
        )
    return result


def gated_sums(accumulated: Tensor, sequences: Tensor, bias: Tensor) -> Tensor:
    """[count, 2]: sum of gates, sum of gate * reward, of the rows of each of the sequences [count, 2]."""
    result = accumulated.new_empty(len(sequences), 2)
    if len(sequences) > 0:
        with torch.cuda.device_of(accumulated):
            sums_kernel[(len(sequences),)](
                accumulated, sequences, bias, result, accumulated.shape[0], BLOCK=POOLING_BLOCK
            )
    return result


def gated_sums_gradient(gradient: Tensor, accumulated: Tensor, sequences: Tensor, bias: Tensor) -> Tensor:
    """Gradient of the accumulated [rows, 2] from that of the sums [count, 2]; 0 in rows of no sequence."""
    rows, count = accumulated.shape[0], len(sequences)
    result = torch.zeros_like(accumulated)
    if rows > 0 and count > 0:
        with torch.cuda.device_of(accumulated):
            sums_gradient_kernel[(triton.cdiv(rows, POOLING_BLOCK),)](
                accumulated,
                sequences,
                bias,
                gradient,
                result,
                rows,
                count,
                count.bit_length(),
                BLOCK=POOLING_BLOCK,
            )
    return result


def _block(width: int) -> int:
    return min(max(triton.next_power_of_2(width), 32), LARGEST_BLOCK)


def _vector(states: Tensor, others: Tensor) -> int:
    """Elements of the states that one instruction moves: 16 bytes if all rows of both allow it, else one element.

    Widths and strides go to the kernels in vectors, so that their alignment is known without compiling for values.
    """
    vector = VECTOR_BYTES // states.element_size()
    whole = states.shape[1] % vector == 0 and states.stride(0) % vector == 0
    return vector if whole and states.data_ptr() % VECTOR_BYTES == others.data_ptr() % VECTOR_BYTES == 0 else 1


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def projection_kernel(
    accumulated, hidden, weight, result, row_vectors, rows, width_vectors,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    width = width_vectors * VECTOR
    row, exists = _own_rows(rows, ROWS)
    hidden += row[:, None] * (row_vectors * VECTOR)
    gate = tl.zeros((ROWS, BLOCK), tl.float32)
    reward = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, width_vectors * VECTOR, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        values = tl.load(hidden + column[None, :], mask=exists[:, None] & inside[None, :], other=0.0).to(tl.float32)
        gate += values * tl.load(weight + column, mask=inside, other=0.0)[None, :]
        reward += values * tl.load(weight + width + column, mask=inside, other=0.0)[None, :]
    gate = tl.sum(gate, axis=1) + tl.load(accumulated + 2 * row, mask=exists)
    reward = tl.sum(reward, axis=1) + tl.load(accumulated + 2 * row + 1, mask=exists)
    tl.store(result + 2 * row, gate, mask=exists)
    tl.store(result + 2 * row + 1, reward, mask=exists)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def weight_gradient_kernel(
    gradient, hidden, partial, row_vectors, rows, width_vectors, chunk_rows,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    width = width_vectors * VECTOR
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.zeros((ROWS, BLOCK), tl.float32)
    reward = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(0, chunk_rows, ROWS):
        row = chunk * chunk_rows + step + tl.arange(0, ROWS)
        exists = row < rows
        of_row = hidden + row[:, None] * (row_vectors * VECTOR)
        values = tl.load(of_row + column[None, :], mask=exists[:, None] & inside[None, :], other=0.0).to(tl.float32)
        gate += values * tl.load(gradient + 2 * row, mask=exists, other=0.0)[:, None]
        reward += values * tl.load(gradient + 2 * row + 1, mask=exists, other=0.0)[:, None]
    partial += chunk * 2 * width
    tl.store(partial + column, tl.sum(gate, axis=0), mask=inside)
    tl.store(partial + width + column, tl.sum(reward, axis=0), mask=inside)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def hidden_gradient_kernel(
    gradient, weight, result, rows, width_vectors, ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr
):
    width = width_vectors * VECTOR
    row, exists = _own_rows(rows, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gradient + 2 * row, mask=exists, other=0.0)[:, None]
    reward = tl.load(gradient + 2 * row + 1, mask=exists, other=0.0)[:, None]
    values = gate * tl.load(weight + column, mask=inside, other=0.0)[None, :]
    values += reward * tl.load(weight + width + column, mask=inside, other=0.0)[None, :]
    to = result + row[:, None] * width + column[None, :]
    tl.store(to, values.to(result.dtype.element_ty), mask=exists[:, None] & inside[None, :])


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def sums_kernel(accumulated, sequences, bias, result, rows, BLOCK: tl.constexpr):
    sequence = tl.program_id(0).to(tl.int64)
    start = tl.maximum(tl.load(sequences + 2 * sequence), 0)
    end = tl.minimum(tl.load(sequences + 2 * sequence + 1), rows)
    gates = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, end, BLOCK):
        row = first + tl.arange(0, BLOCK)
        inside = row < end
        gate, _, reward = _gate_and_reward(accumulated, bias, row, inside)
        gate = tl.where(inside, gate, 0.0)
        gates += gate
        weighted += tl.where(inside, gate * reward, 0.0)
    tl.store(result + 2 * sequence, tl.sum(gates, axis=0))
    tl.store(result + 2 * sequence + 1, tl.sum(weighted, axis=0))


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def sums_gradient_kernel(
    accumulated, sequences, bias, sums_gradient, result, rows, count, halvings, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # The last sequence that starts at or before the row: those before `low` do, none from `high` on does.
    low = tl.zeros((BLOCK,), tl.int64)
    high = low + count
    for _ in range(0, halvings):
        middle = (low + high) // 2
        searching = low < high
        before = tl.load(sequences + 2 * middle, mask=searching, other=0) <= row
        low = tl.where(searching & before, middle + 1, low)
        high = tl.where(searching & (before == 0), middle, high)
    owner = tl.maximum(low - 1, 0)
    inside = (row < rows) & (low > 0) & (row < tl.load(sequences + 2 * owner + 1))
    gate, slope, reward = _gate_and_reward(accumulated, bias, row, inside)
    of_gate_sum = tl.load(sums_gradient + 2 * owner, mask=inside, other=0.0)
    of_weighted = tl.load(sums_gradient + 2 * owner + 1, mask=inside, other=0.0)
    tl.store(result + 2 * row, (of_gate_sum + of_weighted * reward) * slope, mask=inside)
    tl.store(result + 2 * row + 1, of_weighted * gate, mask=inside)


@triton.jit
def _own_rows(rows, ROWS: tl.constexpr):
    """The rows of this program, and which of them there are."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row, row < rows


@triton.jit
def _gate_and_reward(accumulated, bias, row, inside):
    """Gate, its slope, and reward of some rows. The slope is not gate (1 - gate), which loses an open gate's digits."""
    raw = tl.load(accumulated + 2 * row, mask=inside, other=0.0) + tl.load(bias)
    reward = tl.load(accumulated + 2 * row + 1, mask=inside, other=0.0) + tl.load(bias + 1)
    small = tl.exp(-tl.abs(raw))
    share = 1.0 / (1.0 + small)
    return tl.where(raw < 0, small * share, share), small * share * share, reward
