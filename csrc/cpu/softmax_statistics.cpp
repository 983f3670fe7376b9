// Softmax statistics and their gradient in C++: one pass over memory each.
//
// A row is read in blocks that stay in the first-level cache, where one loop finds the block's maximum and a
// second one adds up exp(t) and t exp(t) relative to the row's maximum so far, while the block after next is
// fetched; sums of earlier blocks are scaled when the maximum moves. A block is summed in floats, in
// independent lanes, the row in doubles, so that long rows lose nothing.
#include "cpu/softmax_statistics.h"

#include <algorithm>
#include <limits>

#include "cpu/vectors.h"

namespace srft::cpu {
namespace {

constexpr int64_t kBlock = 1024;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct RowStatistics {
  float maximum = -kInfinity;
  double sum = 0, weighted = 0;

  SRFT_HD float reference() const {
    return maximum == -kInfinity ? 0.0f : maximum;
  }  // exp(-inf - -inf) must be 0
};

SRFT_HD int64_t padded(int64_t count) { return (count + kPair - 1) / kPair * kPair; }

// The block as floats in any order: in place if they are floats already and whole pairs of vectors, else in
// `buffer`, followed by -inf up to whole pairs.
template <typename T>
SRFT_HD const float* as_floats(const T* block, int64_t count, float* buffer) {
  int64_t j = 0;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (count % kPair == 0) return block;
  }
  for (; j + kPair <= count; j += kPair) {
    Floats pair[2];
    load_pair(block + j, pair);
    store_pair(buffer + j, pair);
  }
  for (; j < count; ++j) buffer[j] = to_float(block[j]);
  for (; j % kPair != 0; ++j) buffer[j] = -kInfinity;
  return buffer;
}

SRFT_HD float largest(const float* values, int64_t count) {
  Floats lanes[2] = {all(-kInfinity), all(-kInfinity)};
  for (int64_t j = 0; j < count; j += kPair) {
    Floats pair[2];
    load_pair(values + j, pair);
    for (int k = 0; k < 2; ++k) lanes[k] = larger(pair[k], lanes[k]);
  }
  lanes[0] = larger(lanes[1], lanes[0]);
  float result = lanes[0][0];
  for (int lane = 1; lane < kLength; ++lane) result = std::max(result, lanes[0][lane]);
  return result;
}

SRFT_HD void raise_maximum(RowStatistics& row, float maximum) {
  if (row.sum != 0) {
    const double shift = static_cast<double>(row.maximum) - maximum, scale = std::exp(shift);
    row.weighted = scale * (row.weighted + shift * row.sum);
    row.sum *= scale;
  }
  row.maximum = maximum;
}

// Adds whole pairs of vectors to the row; fetches `ahead_per_pair` bytes of what comes later for each.
SRFT_HD void add_block(RowStatistics& row, const float* logits, int64_t count, float inverse_temperature,
                       const char* ahead, int64_t ahead_per_pair) {
  const float maximum = largest(logits, count) * inverse_temperature;
  if (maximum > row.maximum) raise_maximum(row, maximum);
  const float reference = row.reference();
  const Floats low = hidden(kExponentLow);
  Floats sums[2] = {}, weighted[2] = {};
  for (int64_t j = 0; j < count; j += kPair, ahead += ahead_per_pair) {
    __builtin_prefetch(ahead);
    Floats pair[2];
    load_pair(logits + j, pair);
    for (int k = 0; k < 2; ++k) {
      const Floats t = larger(low, pair[k] * inverse_temperature - reference);
      const Floats exponential = exponential_in_range(t);
      sums[k] += exponential;
      weighted[k] += t * exponential;
    }
  }
  row.sum += total(sums[0] + sums[1]);
  row.weighted += total(weighted[0] + weighted[1]);
}

template <typename T>
SRFT_HD RowStatistics row_statistics(const T* logits, int64_t columns, float inverse_temperature) {
  alignas(64) float buffer[kBlock];
  RowStatistics row;
  for (int64_t start = 0; start < columns; start += kBlock) {
    const int64_t count = std::min(kBlock, columns - start);
    const float* const block = as_floats(logits + start, count, buffer);
    const char* const ahead = reinterpret_cast<const char*>(logits + start + 2 * kBlock);
    add_block(row, block, padded(count), inverse_temperature, ahead, kPair * sizeof(T));
  }
  return row;
}

struct Shift {
  float inverse_temperature, reference;
  Floats smallest;

  SRFT_HD Floats operator()(const Floats& logits) const {
    return larger(smallest, logits * inverse_temperature - reference);
  }
};

template <typename T>
SRFT_HD void keep(const StatisticsArguments& arguments, const T* logits, int64_t n, float reference) {
  const Shift shift{arguments.inverse_temperature, reference, hidden(kSmallest)};
  const int64_t start = n * arguments.kept_stride;
  switch (arguments.kept_type) {
    case ElementType::kFloat32:
      return transform(logits, static_cast<float*>(arguments.kept) + start, arguments.columns, shift);
    case ElementType::kBFloat16:
      return transform(logits, static_cast<BFloat16*>(arguments.kept) + start, arguments.columns, shift);
    case ElementType::kFloat16:
      return transform(logits, static_cast<Float16*>(arguments.kept) + start, arguments.columns, shift);
  }
}

template <typename T>
SRFT_HD void statistics_rows(const StatisticsArguments& arguments, int64_t begin, int64_t end) {
  const int64_t rows = arguments.rows;
  for (int64_t n = begin; n < end; ++n) {
    const T* const logits = static_cast<const T*>(arguments.logits) + n * arguments.row_stride;
    const RowStatistics row = row_statistics(logits, arguments.columns, arguments.inverse_temperature);
    const int64_t label = arguments.labels[n] - arguments.vocab_start;
    const bool found = label >= 0 && label < arguments.columns;
    float* const statistics = arguments.statistics + n;
    statistics[0] = row.sum == row.sum ? row.maximum : static_cast<float>(row.sum);  // comparisons miss NaN
    statistics[rows] = static_cast<float>(row.sum);
    statistics[2 * rows] = static_cast<float>(row.weighted);
    statistics[3 * rows] = found ? to_float(logits[label]) * arguments.inverse_temperature : 0.0f;
    if (arguments.kept != nullptr) keep(arguments, logits, n, row.reference());
  }
}

struct RowGradient {
  float scale, r, a, b;
  Floats low, high;

  SRFT_HD Floats operator()(const Floats& logits) const {
    const Floats t = smaller(high, larger(low, logits * scale - r));
    return exponential_in_range(t) * (t * b + a);
  }
};

template <typename T>
SRFT_HD void gradient_rows(const GradientArguments& arguments, int64_t begin, int64_t end) {
  const int64_t columns = arguments.columns, rows = arguments.rows;
  for (int64_t n = begin; n < end; ++n) {
    const T* const logits = static_cast<const T*>(arguments.logits) + n * arguments.row_stride;
    T* const gradient = static_cast<T*>(arguments.gradient) + n * arguments.gradient_stride;
    const float* const of_row = arguments.coefficients + n;
    const RowGradient row{arguments.scale,      of_row[0] == -kInfinity ? 0.0f : of_row[0],
                          of_row[rows],         of_row[2 * rows],
                          hidden(kExponentLow), hidden(kExponentHigh)};
    const int64_t label = arguments.labels[n] - arguments.vocab_start;
    const bool found = label >= 0 && label < columns;
    const float label_logit = found ? to_float(logits[label]) : 0.0f;  // read before it may be overwritten
    transform(logits, gradient, columns, row);
    std::fill(gradient + columns, gradient + arguments.width, T{});
    if (found) gradient[label] = from_float<T>(row(all(label_logit))[0] + of_row[3 * rows]);
  }
}

SRFT_CLONES void statistics_float32(const StatisticsArguments& arguments, int64_t begin, int64_t end) {
  statistics_rows<float>(arguments, begin, end);
}

SRFT_CLONES void statistics_bfloat16(const StatisticsArguments& arguments, int64_t begin, int64_t end) {
  statistics_rows<BFloat16>(arguments, begin, end);
}

SRFT_CLONES void statistics_float16(const StatisticsArguments& arguments, int64_t begin, int64_t end) {
  statistics_rows<Float16>(arguments, begin, end);
}

SRFT_CLONES void gradient_float32(const GradientArguments& arguments, int64_t begin, int64_t end) {
  gradient_rows<float>(arguments, begin, end);
}

SRFT_CLONES void gradient_bfloat16(const GradientArguments& arguments, int64_t begin, int64_t end) {
  gradient_rows<BFloat16>(arguments, begin, end);
}

SRFT_CLONES void gradient_float16(const GradientArguments& arguments, int64_t begin, int64_t end) {
  gradient_rows<Float16>(arguments, begin, end);
}

}  // namespace

void softmax_statistics(const StatisticsArguments& arguments, int64_t begin, int64_t end) {
  switch (arguments.type) {
    case ElementType::kFloat32:
      return statistics_float32(arguments, begin, end);
    case ElementType::kBFloat16:
      return statistics_bfloat16(arguments, begin, end);
    case ElementType::kFloat16:
      return statistics_float16(arguments, begin, end);
  }
}

void softmax_gradient(const GradientArguments& arguments, int64_t begin, int64_t end) {
  switch (arguments.type) {
    case ElementType::kFloat32:
      return gradient_float32(arguments, begin, end);
    case ElementType::kBFloat16:
      return gradient_bfloat16(arguments, begin, end);
    case ElementType::kFloat16:
      return gradient_float16(arguments, begin, end);
  }
}

}  // namespace srft::cpu
