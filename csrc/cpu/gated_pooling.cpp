// Gated pooling on a CPU. Memory is the limit: each kernel reads the hidden states once, in their own type.
#include "cpu/gated_pooling.h"

namespace srft::cpu {
namespace {

constexpr int kLanes = 16;    // independent sums that the compiler puts into vector registers
constexpr int kRows = 2;
constexpr int kChunkRows = 256;
constexpr int kMostChunks = 64;

SRFT_HD float sum_of_lanes(const float* lanes) {
  float half[kLanes / 2];
  for (int i = 0; i < kLanes / 2; ++i) half[i] = lanes[i] + lanes[i + kLanes / 2];
  for (int width = kLanes / 4; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) half[i] += half[i + width];
  }
  return half[0];
}

// kRows rows at a time, so that a piece of the weights is read once for all of them. An odd last row is its own
// neighbour: compiled for one row, the loop may round otherwise, and a row's sum must not depend on others.
template <typename T>
SRFT_HD void project_pair(const ProjectionArguments& call, int64_t row, int64_t rows) {
  const T* hidden = static_cast<const T*>(call.hidden) + row * call.row_stride;
  const int64_t step = rows < kRows ? 0 : call.row_stride;
  const float* of_gate = call.weight;
  const float* of_reward = call.weight + call.width;
  float gate[kRows][kLanes] = {};
  float reward[kRows][kLanes] = {};
  const int64_t whole = call.width / kLanes * kLanes;
  for (int64_t column = 0; column < whole; column += kLanes) {
    for (int r = 0; r < kRows; ++r) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const float value = to_float(hidden[r * step + column + lane]);
        gate[r][lane] += value * of_gate[column + lane];
        reward[r][lane] += value * of_reward[column + lane];
      }
    }
  }
  for (int64_t column = whole; column < call.width; ++column) {
    for (int r = 0; r < kRows; ++r) {
      const float value = to_float(hidden[r * step + column]);
      gate[r][column - whole] += value * of_gate[column];
      reward[r][column - whole] += value * of_reward[column];
    }
  }
  for (int r = 0; r < rows; ++r) {
    const int64_t at = 2 * (row + r);
    call.result[at] = call.accumulated[at] + sum_of_lanes(gate[r]);
    call.result[at + 1] = call.accumulated[at + 1] + sum_of_lanes(reward[r]);
  }
}

template <typename T>
SRFT_HD void project_rows(const ProjectionArguments& call, int64_t row, int64_t end_row) {
  for (; row < end_row; row += kRows) {
    project_pair<T>(call, row, end_row - row < kRows ? end_row - row : kRows);
  }
}

// Adds kCount rows to one chunk's sums.
template <int kCount, typename T>
SRFT_HD void add_rows(const WeightGradientArguments& call, int64_t row, float* __restrict__ of_gate,
                      float* __restrict__ of_reward) {
  const T* __restrict__ hidden = static_cast<const T*>(call.hidden) + row * call.row_stride;
  const float* gradient = call.gradient + 2 * row;
  for (int64_t column = 0; column < call.width; ++column) {
    float gate = of_gate[column];
    float reward = of_reward[column];
    for (int r = 0; r < kCount; ++r) {
      const float value = to_float(hidden[r * call.row_stride + column]);
      gate += gradient[2 * r] * value;
      reward += gradient[2 * r + 1] * value;
    }
    of_gate[column] = gate;
    of_reward[column] = reward;
  }
}

template <typename T>
SRFT_HD void sum_chunks(const WeightGradientArguments& call, int64_t chunk, int64_t end_chunk) {
  const int64_t chunk_rows = rows_per_chunk(call.rows, kChunkRows, kMostChunks);
  for (; chunk < end_chunk; ++chunk) {
    float* of_gate = call.partial + chunk * 2 * call.width;
    float* of_reward = of_gate + call.width;
    for (int64_t i = 0; i < 2 * call.width; ++i) of_gate[i] = 0.0f;
    int64_t row = chunk * chunk_rows;
    const int64_t end = row + chunk_rows < call.rows ? row + chunk_rows : call.rows;
    for (; row + 4 <= end; row += 4) add_rows<4, T>(call, row, of_gate, of_reward);
    for (; row < end; ++row) add_rows<1, T>(call, row, of_gate, of_reward);
  }
}

template <typename T>
SRFT_HD void spread(const HiddenGradientArguments& call, int64_t row, int64_t end_row) {
  const float* __restrict__ of_gate = call.weight;
  const float* __restrict__ of_reward = call.weight + call.width;
  for (; row < end_row; ++row) {
    T* __restrict__ result = static_cast<T*>(call.result) + row * call.width;
    const float gate = call.gradient[2 * row];
    const float reward = call.gradient[2 * row + 1];
    for (int64_t column = 0; column < call.width; ++column) {
      result[column] = from_float<T>(gate * of_gate[column] + reward * of_reward[column]);
    }
  }
}

SRFT_HD void pool(const PoolingArguments& call, int64_t sequence) {
  int64_t row, end;
  cut_to_rows(call.sequences + 2 * sequence, call.rows, row, end);
  float gates[kLanes] = {};
  float weighted[kLanes] = {};
  for (; row < end; row += kLanes) {
    const int64_t lanes = end - row < kLanes ? end - row : kLanes;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const float gate = gate_of(call.accumulated[2 * (row + lane)] + call.bias[0]).value;
      gates[lane] += gate;
      weighted[lane] += gate * (call.accumulated[2 * (row + lane) + 1] + call.bias[1]);
    }
  }
  call.result[2 * sequence] = sum_of_lanes(gates);
  call.result[2 * sequence + 1] = sum_of_lanes(weighted);
}

// One function per type, as SRFT_CLONES wants plain ones.
#define SRFT_FOR_EACH_TYPE(name, Arguments, body)                                                   \
  SRFT_CLONES void name##_float(const Arguments& call, int64_t first, int64_t end) {                \
    body<float>(call, first, end);                                                                  \
  }                                                                                                 \
  SRFT_CLONES void name##_bfloat16(const Arguments& call, int64_t first, int64_t end) {             \
    body<BFloat16>(call, first, end);                                                               \
  }                                                                                                 \
  SRFT_CLONES void name##_float16(const Arguments& call, int64_t first, int64_t end) {              \
    body<Float16>(call, first, end);                                                                \
  }                                                                                                 \
  void name##_any(const Arguments& call, int64_t first, int64_t end) {                              \
    switch (call.type) {                                                                            \
      case ElementType::kFloat32: return name##_float(call, first, end);                            \
      case ElementType::kBFloat16: return name##_bfloat16(call, first, end);                        \
      case ElementType::kFloat16: return name##_float16(call, first, end);                          \
    }                                                                                               \
  }

SRFT_FOR_EACH_TYPE(project, ProjectionArguments, project_rows)
SRFT_FOR_EACH_TYPE(sum, WeightGradientArguments, sum_chunks)
SRFT_FOR_EACH_TYPE(spread, HiddenGradientArguments, spread)
#undef SRFT_FOR_EACH_TYPE

}  // namespace

void gated_projection(const ProjectionArguments& call, int64_t first_row, int64_t end_row) {
  project_any(call, first_row, end_row);
}

int64_t weight_gradient_chunks(int64_t rows) {
  const int64_t chunk_rows = rows_per_chunk(rows, kChunkRows, kMostChunks);
  return (rows + chunk_rows - 1) / chunk_rows;
}

void weight_gradient_partials(const WeightGradientArguments& call, int64_t first_chunk, int64_t end_chunk) {
  sum_any(call, first_chunk, end_chunk);
}

void weight_gradient_total(const WeightGradientArguments& call) {
  const int64_t chunks = weight_gradient_chunks(call.rows);
  for (int64_t i = 0; i < 2 * call.width; ++i) call.result[i] = 0.0f;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const float* partial = call.partial + chunk * 2 * call.width;
    for (int64_t i = 0; i < 2 * call.width; ++i) call.result[i] += partial[i];
  }
}

void hidden_gradient(const HiddenGradientArguments& call, int64_t first_row, int64_t end_row) {
  spread_any(call, first_row, end_row);
}

SRFT_CLONES void gated_sums(const PoolingArguments& call, int64_t first_sequence, int64_t end_sequence) {
  for (int64_t sequence = first_sequence; sequence < end_sequence; ++sequence) pool(call, sequence);
}

SRFT_CLONES void gated_sums_gradient(const PoolingArguments& call, int64_t first_row, int64_t end_row) {
  for (int64_t row = first_row; row < end_row; ++row) pooling_gradient(call, row);
}

}  // namespace srft::cpu
