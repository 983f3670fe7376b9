// Softmax statistics of one row and the gradient they give, for C++ and CUDA.
//
// With logits x, temperature T and label y, the columns of a shard give
//   m = max_j x_j/T    s = sum_j exp(x_j/T - m)    u = sum_j (x_j/T - m) exp(x_j/T - m)    z = x_y/T, or 0
//   elsewhere
// A logit of -inf contributes nothing; without a finite one the result is (-inf, 0, 0, 0). NaN and +inf give
// NaN. The gradient of one logit is exp(t) (a + b t), plus c at the label's column, with t = scale x - r and
// numbers r, a, b, c of the row.
#pragma once

#include "core/portable.h"

namespace srft {

struct StatisticsArguments {
  ElementType type;       // of logits
  const void* logits;     // [rows, at least columns], unit column stride
  int64_t row_stride;     // of logits, in elements
  const int64_t* labels;  // [rows], ids of the whole vocabulary
  int64_t rows;
  int64_t columns;      // only these are read
  int64_t vocab_start;  // id of the first column
  float inverse_temperature;
  float* statistics;  // [4, rows]: m, s, u, z
  ElementType kept_type;
  void* kept;           // [rows, at least columns], gets x_j/T - m, kSmallest at least; null: not wanted.
  int64_t kept_stride;  // May be the memory of logits, if type and stride are the same.
};

struct GradientArguments {
  ElementType type;           // of logits and gradient
  const void* logits;         // [rows, width], unit column stride
  int64_t row_stride;         // of logits, in elements
  const int64_t* labels;      // [rows]
  const float* coefficients;  // [4, rows]: r, a, b, c
  int64_t rows;
  int64_t columns;  // real ones; from here to width the gradient is 0
  int64_t width;
  int64_t vocab_start;
  float scale;
  void* gradient;  // [rows, width]; may be the memory of logits, if the stride is the same
  int64_t gradient_stride;
};

// exp of this is 0. Exponents are kept from falling below it, lest -inf * 0 gets into the sums.
constexpr float kSmallest = -1e4f;

}  // namespace srft
