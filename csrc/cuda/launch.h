// What all CUDA kernels share. With SRFT_EMULATION the same sources are compiled by g++ and run on a CPU, see
// tests/ops/emulation/cuda_emulation.h.
#pragma once

#include "core/portable.h"

#ifdef SRFT_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>

// SRFT_LAUNCH((kernel<A, B>), blocks, threads, stream, arguments...): the kernel's name in parentheses.
#define SRFT_LAUNCH(kernel, blocks, threads, stream, ...)                                                    \
  do {                                                                                                       \
    auto* const launched = kernel;                                                                           \
    launched<<<(blocks), (threads), 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);                    \
  } while (false)

// An array in the block's shared memory; its content is undefined until written.
#define SRFT_SHARED(type, name, size) __shared__ type name[size]
#endif

namespace srft::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

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

SRFT_HD int64_t divide_up(int64_t dividend, int64_t divisor) { return (dividend + divisor - 1) / divisor; }

}  // namespace srft::cuda
