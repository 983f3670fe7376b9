// Policy losses: a thread for each row. What a row adds to a figure is summed within its warp, then over the block's
// warps, then over blocks by the second kernel, always in the same order; no atomics.
#include "cuda/clipped_ratio.h"

#include "cuda/launch.h"

namespace srft::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTotalThreads = 1024;
constexpr int kNobody = 2;  // population of the threads beyond the last row

// Sum (or largest) of a value over a warp, in lane 0. All its lanes must come.
template <typename T>
__device__ __forceinline__ T over_warp(T value, bool largest) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const T other = __shfl_down_sync(kAllLanes, value, distance);
    value = !largest ? value + other : value > other || value != value ? value : other;
  }
  return value;
}

// Where a block's threads put what their rows add to the figures.
struct Sums {
  float* of_warps;  // [kMaxFigures, kWarps] in shared memory

  __device__ __forceinline__ void add(int figure, float value) const {
    const float total = over_warp(value, is_maximum(figure));
    if (threadIdx.x % kWarp == 0) of_warps[figure * kWarps + threadIdx.x / kWarp] = total;
  }
};

__global__ void __launch_bounds__(kThreads) rows_kernel(const ClippedRatioArguments call, float* partial) {
  SRFT_SHARED(float, of_warps, kMaxFigures * kWarps);
  const Sums sums{&of_warps[0]};
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const bool exists = row < call.rows;
  const int population = exists ? call.is_demonstration[row] != 0 : kNobody;
  const auto value_of = [&](const float* values, float otherwise) {
    return exists && values != nullptr ? values[row] : otherwise;
  };

  const float logprob = value_of(call.logprobs, 0.0f);
  const float entropy = value_of(call.entropy, 0.0f);
  const float old = value_of(call.old_logprobs, logprob);
  const float engine = value_of(call.engine_logprobs, 0.0f);
  const ClampedRatio policy = clamped_ratio(logprob - old);
  const ClampedRatio behaviour = clamped_ratio(population == 0 ? old - engine : 0.0f);
  const float importance = value_of(call.importance_weights, 1.0f);

  float by_logprob = 0.0f, by_entropy = 0.0f, clipped_low = 0.0f, clipped_high = 0.0f;
  for (int index = 0; index < call.terms; ++index) {
    const PolicyTerm& term = call.term[index];
    const float advantage = value_of(advantages_of(call, index), 1.0f);
    const float weight = value_of(weights_of(call, index), 1.0f);
    float factor = term.scale * weight;
    if (term.rows & kPerLength) factor /= value_of(call.response_lengths, 1.0f);
    if (term.rows & kCorrected) factor *= importance;
    const TokenLoss<float> loss = token_loss(term.loss, term, logprob, entropy, policy.value, policy.slope, advantage);
    const bool chosen = (term.rows & kind_of_row(population, advantage)) != 0;
    by_logprob += chosen ? factor * loss.by_logprob : 0.0f;
    by_entropy += chosen ? factor * loss.by_entropy : 0.0f;
    clipped_low += chosen ? loss.clipped_low : 0.0f;
    clipped_high += chosen ? loss.clipped_high : 0.0f;
    const int figures = 2 * kPopulationFigures + index * kTermFigures;
    const float counted = in_population_of(term.rows, population) ? weight : 0.0f;
    sums.add(figures + kTermLoss, chosen ? factor * loss.value : 0.0f);
    sums.add(figures + kWeight, counted);
    sums.add(figures + kMaxWeight, counted);
  }

  const bool corrected = call.importance_weights != nullptr &&
                         fabsf(importance - behaviour.value) > kRounding * behaviour.value;
  for (int kind = 0; kind < 2; ++kind) {
    const bool counts = population == kind;
    const auto add = [&](Figure figure, float value) {
      sums.add(kind * kPopulationFigures + figure, counts ? value : 0.0f);
    };
    add(kNllFigure, -logprob);
    add(kEntropyFigure, entropy);
    add(kRatioFigure, policy.value);
    add(kK1, -policy.log);
    add(kK3, policy.value - 1.0f - policy.log);
    add(kClippedLow, clipped_low);
    add(kClippedHigh, clipped_high);
    add(kMismatch, fabsf(behaviour.log));
    add(kMismatchK3, behaviour.value - 1.0f - behaviour.log);
    add(kCorrectedShare, corrected ? 1.0f : 0.0f);
    add(kMaxRatio, policy.value);
    add(kMaxMismatch, fabsf(behaviour.log));
  }

  if (exists) call.gradients[row] = by_logprob;
  if (exists && call.entropy_gradient) call.gradients[call.rows + row] = by_entropy;

  __syncthreads();
  const int figure = static_cast<int>(threadIdx.x);
  if (figure >= figure_count(call)) return;
  float total = 0.0f;
  for (int warp = 0; warp < kWarps; ++warp) {
    const float value = of_warps[figure * kWarps + warp];
    total = is_maximum(figure) ? larger(value, total) : total + value;
  }
  partial[figure * gridDim.x + blockIdx.x] = total;
}

__global__ void __launch_bounds__(kTotalThreads)
    total_kernel(const ClippedRatioArguments call, const float* partial, int64_t blocks) {
  SRFT_SHARED(double, losses, kMaxTerms);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int count = figure_count(call);
  for (int figure = static_cast<int>(threadIdx.x) / kWarp; figure < count; figure += kTotalThreads / kWarp) {
    const bool largest = is_maximum(figure);
    double total = 0.0;
    for (int64_t block = lane; block < blocks; block += kWarp) {
      const float value = partial[figure * blocks + block];
      total = !largest ? total + value : value > total || value != value ? value : total;
    }
    total = over_warp(total, largest);
    const int after = figure - 2 * kPopulationFigures;
    if (lane == 0) {
      call.figures[figure] = static_cast<float>(total * figure_share(call, figure));
      if (after >= 0 && after % kTermFigures == kTermLoss) losses[after / kTermFigures] = total;
    }
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  double loss = 0.0;
  for (int index = 0; index < call.terms; ++index) loss += losses[index];
  *call.loss = static_cast<float>(loss);
}

}  // namespace

int64_t clipped_ratio_blocks(int64_t rows) { return divide_up(rows, kThreads); }

int clipped_ratio(const ClippedRatioArguments& call, float* partial, void* stream) {
  const int64_t blocks = clipped_ratio_blocks(call.rows);
  if (blocks > 0) {
    SRFT_LAUNCH((rows_kernel), static_cast<unsigned>(blocks), kThreads, stream, call, partial);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  SRFT_LAUNCH((total_kernel), 1, kTotalThreads, stream, call, partial, blocks);
  return cudaGetLastError();
}

}  // namespace srft::cuda
