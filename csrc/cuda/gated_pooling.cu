// Gated pooling on a GPU. Memory is the limit: hidden states are read once, 16 bytes a time where their layout
// allows it. No atomics: every sum has an order that the shape alone decides.
#include "cuda/gated_pooling.h"

#include "cuda/launch.h"

namespace srft::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRowsPerWarp = 2;        // of the projection, which share what they read of the weights
constexpr int kSteps = 2;              // pieces of a row, read before the first is used
constexpr int kRowsAhead = 4;          // of the weight gradient, read before the first is used
constexpr int kChunkRows = 16;         // of the weight gradient: at least
constexpr int kMostChunks = 128;       // keeps its partial sums to a few percent of the hidden states
constexpr int kRowsPerBlock = 16;      // of the hidden states' gradient
constexpr int kColumns = 32;           // of the weight gradient's total per block
constexpr int kParts = 8;              // of the chunks, each summed by its own threads
constexpr int kPoolingThreads = 512;

// kSize neighbours as floats; one access of 16 bytes where kSize elements are that many, or a multiple of it.
template <int kSize, typename T>
__device__ __forceinline__ void load_floats(const T* from, float (&to)[kSize]) {
  if constexpr (kSize == 1) {
    to[0] = to_float(*from);
  } else {
    constexpr int kStep = Vector<T>::kSize;
#pragma unroll
    for (int start = 0; start < kSize; start += kStep) {
      const Vector<T> vector = load_vector(from + start);
#pragma unroll
      for (int i = 0; i < kStep; ++i) to[start + i] = to_float(vector.elements[i]);
    }
  }
}

template <int kSize, typename T>
__device__ __forceinline__ void store_floats(T* to, const float (&from)[kSize]) {
  if constexpr (kSize == 1) {
    *to = from_float<T>(from[0]);
  } else {
    constexpr int kStep = Vector<T>::kSize;
#pragma unroll
    for (int start = 0; start < kSize; start += kStep) {
      Vector<T> vector;
#pragma unroll
      for (int i = 0; i < kStep; ++i) vector.elements[i] = from_float<T>(from[start + i]);
      store_vector(to + start, vector);
    }
  }
}

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// A warp for kRowsPerWarp rows.
template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads, 2) project(ProjectionArguments call) {  // 2: or sm_100 would spill
  const int lane = threadIdx.x % kWarp;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t first = warp * kRowsPerWarp;
  if (first >= call.rows) return;
  const T* hidden[kRowsPerWarp];
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const int64_t row = first + r < call.rows ? first + r : first;  // beyond the last: read, but not written
    hidden[r] = static_cast<const T*>(call.hidden) + row * call.row_stride;
  }
  float gate[kRowsPerWarp] = {};
  float reward[kRowsPerWarp] = {};
  constexpr int kStep = kWarp * kSize;
  for (int64_t start = lane * kSize; start < call.width; start += kSteps * kStep) {
    float values[kSteps][kRowsPerWarp][kSize] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (start + step * kStep >= call.width) break;
#pragma unroll
      for (int r = 0; r < kRowsPerWarp; ++r) load_floats(hidden[r] + start + step * kStep, values[step][r]);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int64_t column = start + step * kStep;
      if (column >= call.width) break;
      float of_gate[kSize], of_reward[kSize];
      load_floats(call.weight + column, of_gate);
      load_floats(call.weight + call.width + column, of_reward);
#pragma unroll
      for (int r = 0; r < kRowsPerWarp; ++r) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          gate[r] += values[step][r][i] * of_gate[i];
          reward[r] += values[step][r][i] * of_reward[i];
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const float gate_sum = sum_of_warp(gate[r]);
    const float reward_sum = sum_of_warp(reward[r]);
    if (lane == 0 && first + r < call.rows) {
      const int64_t at = 2 * (first + r);
      call.result[at] = call.accumulated[at] + gate_sum;
      call.result[at + 1] = call.accumulated[at + 1] + reward_sum;
    }
  }
}

// A block for one chunk of rows and kThreads * kSize columns; blocks of one chunk follow each other.
template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) sum_chunk(WeightGradientArguments call, int64_t chunk_rows, int tiles) {
  const int64_t chunk = blockIdx.x / tiles;
  const int64_t column = (static_cast<int64_t>(blockIdx.x % tiles) * kThreads + threadIdx.x) * kSize;
  if (column >= call.width) return;
  const int64_t first = chunk * chunk_rows;
  const int64_t end = first + chunk_rows < call.rows ? first + chunk_rows : call.rows;
  const T* hidden = static_cast<const T*>(call.hidden) + column;
  float gate[kSize] = {};
  float reward[kSize] = {};
  for (int64_t row = first; row < end; row += kRowsAhead) {
    float values[kRowsAhead][kSize] = {};
#pragma unroll
    for (int r = 0; r < kRowsAhead; ++r) {
      if (row + r < end) load_floats(hidden + (row + r) * call.row_stride, values[r]);
    }
#pragma unroll
    for (int r = 0; r < kRowsAhead; ++r) {
      if (row + r >= end) break;
      const float of_gate = call.gradient[2 * (row + r)];
      const float of_reward = call.gradient[2 * (row + r) + 1];
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        gate[i] += of_gate * values[r][i];
        reward[i] += of_reward * values[r][i];
      }
    }
  }
  float* partial = call.partial + chunk * 2 * call.width + column;
  store_floats(partial, gate);
  store_floats(partial + call.width, reward);
}

// The sum of the chunks. A block has kColumns of the 2 * width columns; thread (part, column) takes every
// kParts-th chunk, and the parts are then added in order.
__global__ void __launch_bounds__(kColumns * kParts) sum_partials(WeightGradientArguments call, int64_t chunks) {
  SRFT_SHARED(float, parts, kColumns * kParts);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x % kColumns;
  float sum = 0.0f;
  if (column < 2 * call.width) {
#pragma unroll 8
    for (int64_t chunk = threadIdx.x / kColumns; chunk < chunks; chunk += kParts) {
      sum += call.partial[chunk * 2 * call.width + column];
    }
  }
  parts[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x < kColumns && column < 2 * call.width) {
    for (int part = 1; part < kParts; ++part) sum += parts[part * kColumns + threadIdx.x];
    call.result[column] = sum;
  }
}

// A block for kRowsPerBlock rows and kThreads * kSize columns, whose weights stay in registers.
template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) spread(HiddenGradientArguments call, int tiles) {
  const int64_t first = static_cast<int64_t>(blockIdx.x / tiles) * kRowsPerBlock;
  const int64_t column = (static_cast<int64_t>(blockIdx.x % tiles) * kThreads + threadIdx.x) * kSize;
  if (column >= call.width) return;
  float of_gate[kSize], of_reward[kSize];
  load_floats(call.weight + column, of_gate);
  load_floats(call.weight + call.width + column, of_reward);
  const int64_t end = first + kRowsPerBlock < call.rows ? first + kRowsPerBlock : call.rows;
  for (int64_t row = first; row < end; ++row) {
    const float gate = call.gradient[2 * row];
    const float reward = call.gradient[2 * row + 1];
    float values[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = gate * of_gate[i] + reward * of_reward[i];
    store_floats(static_cast<T*>(call.result) + row * call.width + column, values);
  }
}

// A block for one sequence.
__global__ void __launch_bounds__(kPoolingThreads) pool(PoolingArguments call) {
  constexpr int kWarps = kPoolingThreads / kWarp;
  SRFT_SHARED(float, parts, 2 * kWarps);
  const int64_t sequence = blockIdx.x;
  int64_t start, end;
  cut_to_rows(call.sequences + 2 * sequence, call.rows, start, end);
  float gates = 0.0f;
  float weighted = 0.0f;
#pragma unroll 4
  for (int64_t row = start + threadIdx.x; row < end; row += kPoolingThreads) {
    const float gate = gate_of(call.accumulated[2 * row] + call.bias[0]).value;
    gates += gate;
    weighted += gate * (call.accumulated[2 * row + 1] + call.bias[1]);
  }
  gates = sum_of_warp(gates);
  weighted = sum_of_warp(weighted);
  if (threadIdx.x % kWarp == 0) {
    parts[threadIdx.x / kWarp] = gates;
    parts[kWarps + threadIdx.x / kWarp] = weighted;
  }
  __syncthreads();
  if (threadIdx.x < 2) {
    float sum = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) sum += parts[threadIdx.x * kWarps + warp];
    call.result[2 * sequence + threadIdx.x] = sum;
  }
}

__global__ void __launch_bounds__(kThreads) pool_gradient(PoolingArguments call) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row < call.rows) pooling_gradient(call, row);
}

// Whether every row of a matrix starts at, and consists of, whole vectors of 16 bytes.
template <typename T>
bool has_vectors(const void* matrix, int64_t row_stride, int64_t width) {
  return is_aligned(static_cast<const T*>(matrix)) && row_stride % Vector<T>::kSize == 0 &&
         width % Vector<T>::kSize == 0;
}

template <typename T, int kSize>
void launch_project(const ProjectionArguments& call, void* stream) {
  const int64_t blocks = divide_up(call.rows, kThreads / kWarp * kRowsPerWarp);
  SRFT_LAUNCH((project<T, kSize>), blocks, kThreads, stream, call);
}

template <typename T, int kSize>
void launch_sum_chunk(const WeightGradientArguments& call, void* stream) {
  const int64_t chunk_rows = rows_per_chunk(call.rows, kChunkRows, kMostChunks);
  const int64_t tiles = divide_up(call.width, kThreads * kSize);
  const int64_t blocks = weight_gradient_chunks(call.rows) * tiles;
  SRFT_LAUNCH((sum_chunk<T, kSize>), blocks, kThreads, stream, call, chunk_rows, static_cast<int>(tiles));
}

template <typename T, int kSize>
void launch_spread(const HiddenGradientArguments& call, void* stream) {
  const int64_t tiles = divide_up(call.width, kThreads * kSize);
  const int64_t blocks = divide_up(call.rows, kRowsPerBlock) * tiles;
  SRFT_LAUNCH((spread<T, kSize>), blocks, kThreads, stream, call, static_cast<int>(tiles));
}

// Calls function(T{}) with the element type.
template <typename Function>
void with_type(ElementType type, const Function& function) {
  switch (type) {
    case ElementType::kFloat32: return function(float{});
    case ElementType::kBFloat16: return function(BFloat16{});
    case ElementType::kFloat16: return function(Float16{});
  }
}

}  // namespace

int gated_projection(const ProjectionArguments& call, void* stream) {
  if (call.rows == 0) return 0;
  with_type(call.type, [&](auto element) {
    using T = decltype(element);
    const bool vectors = has_vectors<T>(call.hidden, call.row_stride, call.width) && is_aligned(call.weight);
    vectors ? launch_project<T, Vector<T>::kSize>(call, stream) : launch_project<T, 1>(call, stream);
  });
  return cudaGetLastError();
}

int64_t weight_gradient_chunks(int64_t rows) {
  return divide_up(rows, rows_per_chunk(rows, kChunkRows, kMostChunks));
}

int weight_gradient(const WeightGradientArguments& call, void* stream) {
  if (call.width == 0) return 0;
  if (call.rows > 0) {
    with_type(call.type, [&](auto element) {
      using T = decltype(element);
      const bool vectors = has_vectors<T>(call.hidden, call.row_stride, call.width) && is_aligned(call.partial);
      vectors ? launch_sum_chunk<T, Vector<T>::kSize>(call, stream) : launch_sum_chunk<T, 1>(call, stream);
    });
    if (const int error = cudaGetLastError()) return error;
  }
  SRFT_LAUNCH(sum_partials, divide_up(2 * call.width, kColumns), kColumns * kParts, stream, call,
              weight_gradient_chunks(call.rows));
  return cudaGetLastError();
}

int hidden_gradient(const HiddenGradientArguments& call, void* stream) {
  if (call.rows == 0 || call.width == 0) return 0;
  with_type(call.type, [&](auto element) {
    using T = decltype(element);
    const bool vectors = has_vectors<T>(call.result, call.width, call.width) && is_aligned(call.weight);
    vectors ? launch_spread<T, Vector<T>::kSize>(call, stream) : launch_spread<T, 1>(call, stream);
  });
  return cudaGetLastError();
}

int gated_sums(const PoolingArguments& call, void* stream) {
  if (call.count == 0) return 0;
  SRFT_LAUNCH(pool, call.count, kPoolingThreads, stream, call);
  return cudaGetLastError();
}

int gated_sums_gradient(const PoolingArguments& call, void* stream) {
  if (call.rows == 0) return 0;
  SRFT_LAUNCH(pool_gradient, divide_up(call.rows, kThreads), kThreads, stream, call);
  return cudaGetLastError();
}

}  // namespace srft::cuda
