// Softmax statistics in CUDA C++: memory is read once (twice to keep the shifted logits),
// 16 bytes a load where the row's start allows it, several loads in flight per thread. Reductions have a
// fixed order.
#include "cuda/launch.h"
#include "cuda/softmax_statistics.h"

namespace srft::cuda {
namespace {

constexpr int kMostColumns = 1 << 30;  // indices within a row are 32 bits, which takes fewer registers
constexpr int kMostFolded = 16;        // logits that a thread adds up at once, limited by its registers
constexpr int kRowsPerBlock = 4;       // of the kernel with a warp per row
constexpr int kMostThreads = 512;      // per row of the kernel with a block per row
constexpr int kMostWarps = kMostThreads / kWarp;

// Statistics of some columns: m, s, u of core/softmax_statistics.h.
struct Partial {
  float maximum, sum, weighted;
};

SRFT_HD float reference_of(float maximum) { return maximum == -kInfinity ? 0.0f : maximum; }

// The partial relative to a maximum that is not below its own.
__device__ __forceinline__ Partial moved_to(const Partial& partial, float maximum) {
  const float shift = larger(kExponentLow, partial.maximum - reference_of(maximum));
  const float scale = exponential_in_range(shift);
  return {maximum, scale * partial.sum, scale * (partial.weighted + shift * partial.sum)};
}

__device__ __forceinline__ Partial merged(const Partial& left, const Partial& right) {
  const float maximum = fmaxf(left.maximum, right.maximum);
  const Partial a = moved_to(left, maximum), b = moved_to(right, maximum);
  return {maximum, a.sum + b.sum, a.weighted + b.weighted};
}

template <int kCount>
__device__ __forceinline__ void fold(Partial& partial, const float* logits, float inverse_temperature) {
  float maximum = logits[0];
#pragma unroll
  for (int k = 1; k < kCount; ++k) maximum = fmaxf(maximum, logits[k]);
  partial = moved_to(partial, fmaxf(partial.maximum, maximum * inverse_temperature));
  const float reference = reference_of(partial.maximum);
  float sum = 0.0f, weighted = 0.0f;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const float t = larger(kExponentLow, logits[k] * inverse_temperature - reference);
    const float exponential = exponential_in_range(t);
    sum += exponential;
    weighted += t * exponential;
  }
  partial.sum += sum;
  partial.weighted += weighted;
}

// This thread's share of a row: groups of kSize elements, kInFlight of them at a time.
template <bool kAligned, int kSize, typename T>
__device__ __forceinline__ void fold_groups(Partial& partial, const T* logits, int groups,
                                            float inverse_temperature, int thread, int threads) {
  constexpr int kFold = kInFlight * kSize < kMostFolded ? kInFlight * kSize : kMostFolded;
  int i = thread;
  for (; i < groups - (kInFlight - 1) * threads; i += kInFlight * threads) {
    float values[kInFlight * kSize];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      load_floats<kAligned, kSize>(logits + static_cast<int64_t>(i + k * threads) * kSize,
                                   values + k * kSize);
    }
#pragma unroll
    for (int start = 0; start < kInFlight * kSize; start += kFold) {
      fold<kFold>(partial, values + start, inverse_temperature);
    }
  }
  for (; i < groups; i += threads) {
    float values[kSize];
    load_floats<kAligned, kSize>(logits + static_cast<int64_t>(i) * kSize, values);
    fold<kSize>(partial, values, inverse_temperature);
  }
}

// An unaligned row is shared and added up in the same order, lest its sums depend on where it lies.
template <typename T>
__device__ __forceinline__ Partial fold_row(const T* logits, int columns, float inverse_temperature,
                                            int thread, int threads) {
  constexpr int kSize = Vector<T>::kSize;
  const int groups = columns / kSize, done = groups * kSize;
  Partial partial = {-kInfinity, 0.0f, 0.0f};
  if (is_aligned(logits)) {
    fold_groups<true, kSize>(partial, logits, groups, inverse_temperature, thread, threads);
  } else {
    fold_groups<false, kSize>(partial, logits, groups, inverse_temperature, thread, threads);
  }
  fold_groups<false, 1>(partial, logits + done, columns - done, inverse_temperature, thread, threads);
  return partial;
}

__device__ __forceinline__ Partial merged_over_warp(Partial partial) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const Partial other = {__shfl_xor_sync(kAllLanes, partial.maximum, distance),
                           __shfl_xor_sync(kAllLanes, partial.sum, distance),
                           __shfl_xor_sync(kAllLanes, partial.weighted, distance)};
    partial = merged(partial, other);
  }
  return partial;
}

template <typename T>
__device__ __forceinline__ float label_logit(const StatisticsArguments& arguments, const T* logits,
                                             int64_t n) {
  const int64_t label = arguments.labels[n] - arguments.vocab_start;
  if (label < 0 || label >= arguments.columns) return 0.0f;
  return to_float(logits[label]) * arguments.inverse_temperature;
}

__device__ __forceinline__ void write_statistics(const StatisticsArguments& arguments, int64_t n,
                                                 const Partial& partial, float z) {
  const int64_t rows = arguments.rows;
  const bool is_number = partial.sum == partial.sum;  // maxima leave NaN out
  arguments.statistics[n] = is_number ? partial.maximum : partial.sum;
  arguments.statistics[rows + n] = partial.sum;
  arguments.statistics[2 * rows + n] = partial.weighted;
  arguments.statistics[3 * rows + n] = z;
}

// Writes x/T - m of groups of kSize elements, each read and written by the same thread, as both may be one
// memory.
template <bool kAligned, int kSize, int kLoads, typename T, typename Kept>
__device__ __forceinline__ void keep_groups(const T* logits, Kept* kept, int64_t groups,
                                            float inverse_temperature, float reference, int thread,
                                            int threads) {
  for (int64_t i = thread; i < groups; i += kLoads * threads) {
    float values[kLoads][kSize];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      if (i + k * threads < groups)
        load_floats<kAligned, kSize>(logits + (i + k * threads) * kSize, values[k]);
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      if (i + k * threads >= groups) break;
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        values[k][e] = larger(kSmallest, values[k][e] * inverse_temperature - reference);
      }
      store_floats<kAligned, kSize>(kept + (i + k * threads) * kSize, values[k]);
    }
  }
}

template <typename T, typename Kept>
__device__ __forceinline__ void keep_row(const T* logits, Kept* kept, int64_t columns,
                                         float inverse_temperature, float reference, int thread,
                                         int threads) {
  constexpr int kSize = Vector<T>::kSize > Vector<Kept>::kSize ? Vector<T>::kSize : Vector<Kept>::kSize;
  int64_t done = 0;
  if (is_aligned(logits) && is_aligned(kept)) {
    done = columns / kSize * kSize;
    keep_groups<true, kSize, 2>(logits, kept, columns / kSize, inverse_temperature, reference, thread,
                                threads);
  }
  keep_groups<false, 1, kInFlight>(logits + done, kept + done, columns - done, inverse_temperature, reference,
                                   thread, threads);
}

template <typename T>
__device__ __forceinline__ void keep(const StatisticsArguments& arguments, const T* logits, int64_t n,
                                     float maximum, int thread, int threads) {
  const float reference = reference_of(maximum), factor = arguments.inverse_temperature;
  const int64_t start = n * arguments.kept_stride, columns = arguments.columns;
  switch (arguments.kept_type) {
    case ElementType::kFloat32:
      return keep_row(logits, static_cast<float*>(arguments.kept) + start, columns, factor, reference, thread,
                      threads);
    case ElementType::kBFloat16:
      return keep_row(logits, static_cast<BFloat16*>(arguments.kept) + start, columns, factor, reference,
                      thread, threads);
    case ElementType::kFloat16:
      return keep_row(logits, static_cast<Float16*>(arguments.kept) + start, columns, factor, reference,
                      thread, threads);
  }
}

// A warp per row, for rows that would leave a block's threads little to do.
template <typename T>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock)
    statistics_by_warp(const StatisticsArguments arguments) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (n >= arguments.rows) return;
  const T* const logits = static_cast<const T*>(arguments.logits) + n * arguments.row_stride;
  const float z = lane == 0 ? label_logit(arguments, logits, n) : 0.0f;
  const Partial partial = merged_over_warp(
      fold_row(logits, static_cast<int>(arguments.columns), arguments.inverse_temperature, lane, kWarp));
  if (lane == 0) write_statistics(arguments, n, partial, z);
  if (arguments.kept == nullptr) return;
  __syncwarp();  // all that may be overwritten has been read
  keep(arguments, logits, n, partial.maximum, lane, kWarp);
}

// A block per row.
template <typename T>
__global__ void __launch_bounds__(kMostThreads, 2) statistics_by_block(const StatisticsArguments arguments) {
  SRFT_SHARED(float, maxima, kMostWarps);
  SRFT_SHARED(float, sums, kMostWarps);
  SRFT_SHARED(float, weighted_sums, kMostWarps);
  const int64_t n = blockIdx.x;
  const int thread = threadIdx.x, threads = blockDim.x, lane = thread % kWarp, warp = thread / kWarp;
  const T* const logits = static_cast<const T*>(arguments.logits) + n * arguments.row_stride;
  const float z = thread == 0 ? label_logit(arguments, logits, n) : 0.0f;
  Partial partial = merged_over_warp(
      fold_row(logits, static_cast<int>(arguments.columns), arguments.inverse_temperature, thread, threads));
  if (lane == 0) {
    maxima[warp] = partial.maximum;
    sums[warp] = partial.sum;
    weighted_sums[warp] = partial.weighted;
  }
  __syncthreads();
  partial = {-kInfinity, 0.0f, 0.0f};
  if (lane < threads / kWarp) partial = {maxima[lane], sums[lane], weighted_sums[lane]};
  partial = merged_over_warp(partial);
  if (thread == 0) write_statistics(arguments, n, partial, z);
  if (arguments.kept != nullptr) keep(arguments, logits, n, partial.maximum, thread, threads);
}

template <typename T>
int launch_statistics(const StatisticsArguments& arguments, void* stream) {
  const int64_t vectors = divide_up(arguments.columns, Vector<T>::kSize);
  if (vectors <= 4 * kInFlight * kWarp) {
    const int64_t blocks = divide_up(arguments.rows, kRowsPerBlock);
    SRFT_LAUNCH((statistics_by_warp<T>), blocks, kWarp * kRowsPerBlock, stream, arguments);
  } else {
    int threads = 4 * kWarp;
    while (threads < kMostThreads && vectors > 4 * kInFlight * threads) threads *= 2;
    SRFT_LAUNCH((statistics_by_block<T>), arguments.rows, threads, stream, arguments);
  }
  return cudaGetLastError();
}

}  // namespace

int softmax_statistics(const StatisticsArguments& arguments, void* stream) {
  if (arguments.rows == 0) return cudaSuccess;
  if (arguments.rows > kMostBlocks || arguments.columns > kMostColumns) return cudaErrorInvalidConfiguration;
  switch (arguments.type) {
    case ElementType::kFloat32:
      return launch_statistics<float>(arguments, stream);
    case ElementType::kBFloat16:
      return launch_statistics<BFloat16>(arguments, stream);
    case ElementType::kFloat16:
      return launch_statistics<Float16>(arguments, stream);
  }
  return cudaErrorInvalidConfiguration;
}

}  // namespace srft::cuda
