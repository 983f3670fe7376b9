// What all CUDA kernels share. With SRFT_EMULATION the same sources are compiled by g++ and run on a CPU, see
// tests/ops/emulation/cuda_emulation.h.
#pragma once

#include "core/portable.h"

#ifdef SRFT_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>

// SRFT_LAUNCH((kernel<A, B>), blocks, threads, stream, arguments...): the kernel's name in parentheses.
#define SRFT_LAUNCH(kernel, blocks, threads, stream, ...)                                 \
  do {                                                                                    \
    auto* const launched = kernel;                                                        \
    launched<<<(blocks), (threads), 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__); \
  } while (false)

// An array in the block's shared memory; its content is undefined until written.
#define SRFT_SHARED(type, name, size) __shared__ type name[size]
#endif

namespace srft::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kMostBlocks = 0x7fffffff;  // of a grid, in x
constexpr int kInFlight = 4;                 // loads per thread before the first result is needed
constexpr float kInfinity = INFINITY;

// 16 bytes of elements, moved by one instruction. The address must be a multiple of 16.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T elements[kSize];
};

template <typename T>
SRFT_HD bool is_aligned(const T* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

template <typename T>
__device__ __forceinline__ Vector<T> load_vector(const T* address) {
#ifdef SRFT_EMULATION
  emulation::check_aligned(address, 16);
#endif
  const uint4 words = *reinterpret_cast<const uint4*>(address);
  Vector<T> vector;
  memcpy(&vector, &words, sizeof vector);
  return vector;
}

template <typename T>
__device__ __forceinline__ void store_vector(T* address, const Vector<T>& vector) {
#ifdef SRFT_EMULATION
  emulation::check_aligned(address, 16);
#endif
  uint4 words;
  memcpy(&words, &vector, sizeof words);
  *reinterpret_cast<uint4*>(address) = words;
}

// kCount elements as floats, by vectors if kAligned (the address is a multiple of 16), else one by one.
template <bool kAligned, int kCount, typename T>
__device__ __forceinline__ void load_floats(const T* from, float* values) {
  constexpr int kSize = kAligned ? Vector<T>::kSize : 1;
  static_assert(kCount % kSize == 0, "whole vectors");
#pragma unroll
  for (int start = 0; start < kCount; start += kSize) {
    if constexpr (kAligned) {
      const Vector<T> vector = load_vector(from + start);
#pragma unroll
      for (int k = 0; k < kSize; ++k) values[start + k] = to_float(vector.elements[k]);
    } else {
      values[start] = to_float(from[start]);
    }
  }
}

template <bool kAligned, int kCount, typename T>
__device__ __forceinline__ void store_floats(T* to, const float* values) {
  constexpr int kSize = kAligned ? Vector<T>::kSize : 1;
  static_assert(kCount % kSize == 0, "whole vectors");
#pragma unroll
  for (int start = 0; start < kCount; start += kSize) {
    if constexpr (kAligned) {
      Vector<T> vector;
#pragma unroll
      for (int k = 0; k < kSize; ++k) vector.elements[k] = from_float<T>(values[start + k]);
      store_vector(to + start, vector);
    } else {
      to[start] = from_float<T>(values[start]);
    }
  }
}

// The larger one, or NaN if one is NaN (fmaxf leaves NaN out).
__device__ __forceinline__ float larger(float left, float right) {
#ifdef __CUDA_ARCH__
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(left), "f"(right));
  return result;
#else
  return left != left || left > right ? left : right;
#endif
}

SRFT_HD int64_t divide_up(int64_t dividend, int64_t divisor) { return (dividend + divisor - 1) / divisor; }

}  // namespace srft::cuda
