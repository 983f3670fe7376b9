// Gate and reward of hidden states, and their gated sums over packed sequences, for C++ and CUDA.
//
// A layer adds h W^T (two columns: gate first) to what a token has accumulated. With bias b, token t then has
//   a_t, r_t = accumulated_t + b    g_t = sigmoid(a_t)
// and a sequence gives sum_t g_t and sum_t g_t r_t. With gradients G and Q of these two,
//   dL/da_t = (G + Q r_t) g_t (1 - g_t)    dL/dr_t = Q g_t
#pragma once

#include "core/portable.h"

namespace srft {

struct ProjectionArguments {
  ElementType type;          // of hidden
  const void* hidden;        // [rows, width], unit column stride
  int64_t row_stride;        // of hidden, in elements
  int64_t rows;
  int64_t width;
  const float* accumulated;  // [rows, 2]
  const float* weight;       // [2, width]
  float* result;             // [rows, 2]
};

struct WeightGradientArguments {
  ElementType type;       // of hidden
  const void* hidden;     // [rows, width], unit column stride
  int64_t row_stride;     // of hidden, in elements
  int64_t rows;
  int64_t width;
  const float* gradient;  // [rows, 2], of the projection
  float* partial;         // [chunks, 2, width], one sum for every chunk of rows
  float* result;          // [2, width]
};

struct HiddenGradientArguments {
  ElementType type;       // of result
  const float* gradient;  // [rows, 2], of the projection
  const float* weight;    // [2, width]
  int64_t rows;
  int64_t width;
  void* result;           // [rows, width]
};

struct PoolingArguments {
  const float* accumulated;    // [rows, 2]
  int64_t rows;
  const int64_t* sequences;    // [count, 2]: first row and end of each; cut to the rows there are
  int64_t count;
  const float* bias;           // [2]
  const float* sums_gradient;  // [count, 2], for the gradient only
  float* result;               // sums [count, 2], or gradient [rows, 2]
};

struct Gate {
  float value;
  float slope;  // value (1 - value), whose digits the difference would lose for an open gate
};

SRFT_HD Gate gate_of(float raw) {
  const float small = exponential(raw < 0.0f ? raw : -raw);  // never above 1; NaN passes
  const float share = 1.0f / (1.0f + small);
  return {raw < 0.0f ? small * share : share, small * share * share};
}

// Range of a sequence's rows within the rows there are: no memory outside them is touched, whatever it says.
SRFT_HD void cut_to_rows(const int64_t* sequence, int64_t rows, int64_t& start, int64_t& end) {
  start = sequence[0] < 0 ? 0 : sequence[0];
  end = sequence[1] < rows ? sequence[1] : rows;
}

// The sequence that a row belongs to, or -1: the last that starts at or before it, if it reaches that far.
SRFT_HD int64_t owner_of(int64_t row, const int64_t* sequences, int64_t count) {
  int64_t low = 0;  // all sequences before `low` start at or before the row, none from `high` on does
  int64_t high = count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (sequences[2 * middle] <= row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low > 0 && row < sequences[2 * (low - 1) + 1] ? low - 1 : -1;
}

SRFT_HD void pooling_gradient(const PoolingArguments& call, int64_t row) {
  const int64_t sequence = owner_of(row, call.sequences, call.count);
  float of_gate = 0.0f;
  float of_reward = 0.0f;
  if (sequence >= 0) {
    const Gate gate = gate_of(call.accumulated[2 * row] + call.bias[0]);
    const float reward = call.accumulated[2 * row + 1] + call.bias[1];
    const float of_gate_sum = call.sums_gradient[2 * sequence];
    const float of_weighted_sum = call.sums_gradient[2 * sequence + 1];
    of_gate = (of_gate_sum + of_weighted_sum * reward) * gate.slope;
    of_reward = of_weighted_sum * gate.value;
  }
  call.result[2 * row] = of_gate;
  call.result[2 * row + 1] = of_reward;
}

// Rows of one chunk of the weight gradient, `most_chunks` of them at most: the order of its sums depends on
// the number of rows, never on that of threads.
SRFT_HD int64_t rows_per_chunk(int64_t rows, int64_t at_least, int64_t most_chunks) {
  const int64_t needed = (rows + most_chunks - 1) / most_chunks;
  return needed > at_least ? needed : at_least;
}

}  // namespace srft
