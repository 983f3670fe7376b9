// The gradient of the softmax statistics in CUDA C++: each logit is read and each gradient written once, 16
// bytes an access where both rows' starts allow it.
#include "cuda/launch.h"
#include "cuda/softmax_statistics.h"

namespace srft::cuda {
namespace {

constexpr int kGradientThreads = 256;

struct RowGradient {
  float scale, r, a, b, c;
  int64_t label, columns;

  // In place, for neighbouring columns.
  template <int kSize>
  __device__ __forceinline__ void apply(float (&values)[kSize], int64_t first) const {
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const float t = larger(kExponentLow, values[e] * scale - r);
      values[e] = exponential(t) * (a + b * t);
    }
    if (label >= first && label < first + kSize) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) values[e] += first + e == label ? c : 0.0f;
    }
    if (first + kSize > columns) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) values[e] = first + e < columns ? values[e] : 0.0f;
    }
  }
};

template <bool kAligned, int kSize, typename T>
__device__ __forceinline__ void write_gradient(const RowGradient& row, const T* logits, T* gradient,
                                               int64_t begin, int64_t end) {
  const int64_t step = blockDim.x * kSize;
  for (int64_t first = begin + threadIdx.x * kSize; first < end; first += kInFlight * step) {
    float values[kInFlight][kSize];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (first + k * step < end) load_floats<kAligned, kSize>(logits + first + k * step, values[k]);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (first + k * step >= end) break;
      row.apply(values[k], first + k * step);
      store_floats<kAligned, kSize>(gradient + first + k * step, values[k]);
    }
  }
}

// Each block writes `tile` columns (a multiple of a vector) of one row.
template <typename T>
__global__ void __launch_bounds__(kGradientThreads)
    gradient_tiles(const GradientArguments arguments, int64_t tiles_per_row, int64_t tile) {
  constexpr int kSize = Vector<T>::kSize;
  const int64_t rows = arguments.rows, n = blockIdx.x / tiles_per_row;
  const float r = arguments.coefficients[n];
  const RowGradient row = {arguments.scale,
                           r == -kInfinity ? 0.0f : r,
                           arguments.coefficients[rows + n],
                           arguments.coefficients[2 * rows + n],
                           arguments.coefficients[3 * rows + n],
                           arguments.labels[n] - arguments.vocab_start,
                           arguments.columns};
  const T* const logits = static_cast<const T*>(arguments.logits) + n * arguments.row_stride;
  T* const gradient = static_cast<T*>(arguments.gradient) + n * arguments.gradient_stride;
  const int64_t begin = (blockIdx.x - n * tiles_per_row) * tile;
  const int64_t end = begin + tile < arguments.width ? begin + tile : arguments.width;
  int64_t done = begin;
  if (is_aligned(logits) && is_aligned(gradient)) {
    done = end / kSize * kSize;
    write_gradient<true, kSize>(row, logits, gradient, begin, done);
  }
  write_gradient<false, 1>(row, logits, gradient, done, end);
}

template <typename T>
int launch_gradient(const GradientArguments& arguments, void* stream) {
  const int64_t per_thread = kInFlight * Vector<T>::kSize;
  const int64_t warps = divide_up(arguments.width, per_thread * kWarp);
  const int64_t threads = warps * kWarp < kGradientThreads ? warps * kWarp : kGradientThreads;
  const int64_t tiles_per_row = divide_up(arguments.width, per_thread * threads);
  if (arguments.rows > kMostBlocks / tiles_per_row) return cudaErrorInvalidConfiguration;
  SRFT_LAUNCH((gradient_tiles<T>), arguments.rows * tiles_per_row, threads, stream, arguments, tiles_per_row,
              per_thread * threads);
  return cudaGetLastError();
}

}  // namespace

int softmax_gradient(const GradientArguments& arguments, void* stream) {
  if (arguments.rows == 0 || arguments.width == 0) return cudaSuccess;
  switch (arguments.type) {
    case ElementType::kFloat32:
      return launch_gradient<float>(arguments, stream);
    case ElementType::kBFloat16:
      return launch_gradient<BFloat16>(arguments, stream);
    case ElementType::kFloat16:
      return launch_gradient<Float16>(arguments, stream);
  }
  return cudaErrorInvalidConfiguration;
}

}  // namespace srft::cuda
