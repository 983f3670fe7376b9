// CUDA's built-ins for g++, so that the kernels of csrc/cuda run on a CPU as they are.
//
// Every thread of a block is a fibre with a stack of its own; blocks run one after another. A fibre runs
// until it meets a barrier or a shuffle, which lets its threads go once all that CUDA asks for have come.
// What CUDA leaves undefined makes the launch fail: a barrier that some threads never reach, lanes that are
// named but absent or elsewhere, misaligned vectors, indices outside shared memory. Shared memory holds NaN
// at a block's start. What is not here (atomics, plain __shared__, dynamic shared memory) does not compile.
// `emulation_set_reversed` turns the order of threads and blocks around, which shows races that one order
// hides; memory ordering is not modelled.
#pragma once

#include <type_traits>

#include "fibres.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define threadIdx (emulation::current->thread_index)
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block_size)
#define gridDim (emulation::grid_size)
#define SRFT_SHARED(type, name, size) static emulation::Shared<type, size> name
#define SRFT_LAUNCH(kernel, blocks, threads, stream, ...) \
  emulation::launch(blocks, threads, kernel, __VA_ARGS__)
#define SRFT_EXPORT extern "C" __attribute__((visibility("default"), used)) inline

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };

namespace emulation {

inline cudaError_t last_error = cudaSuccess;

// On a thread of a kernel: the launch has failed.
[[noreturn]] inline void fail(const char* what, long long value) {
  record("%s %lld", what, value);
  wait(State::kFailed);
  std::abort();
}

inline void check_aligned(const void* address, size_t alignment) {
  const size_t excess = reinterpret_cast<uintptr_t>(address) % alignment;
  if (excess != 0) fail("misaligned vector, bytes beyond its boundary:", static_cast<long long>(excess));
}

template <typename T, size_t kSize>
class Shared {
  static_assert(std::is_trivially_copyable_v<T>);
  alignas(16) T elements_[kSize];

 public:
  Shared() {
    shared_arrays.push_back({elements_, sizeof elements_});
    std::memset(elements_, 0xff, sizeof elements_);
  }
  template <typename Index>
  T& operator[](Index index) {
    if (static_cast<size_t>(index) >= kSize) fail("outside shared memory:", static_cast<long long>(index));
    return elements_[index];
  }
};

template <typename... Parameters, typename... Arguments>
void launch(dim3 blocks, dim3 block, void (*kernel)(Parameters...), Arguments... arguments) {
  const uint64_t count = uint64_t{block.x} * block.y * block.z;
  const bool fits = blocks.x - 1u < 0x7fffffffu && blocks.y - 1u < 65535u && blocks.z - 1u < 65535u;
  if (!fits || count == 0 || count > 1024 || block.z > 64) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  failure[0] = '\0';
  kernel_call = [=] { kernel(arguments...); };
  block_size = block, grid_size = blocks;
  threads.resize(count);
  const uint64_t total = uint64_t{blocks.x} * blocks.y * blocks.z;
  for (uint64_t step = 0; step < total && failure[0] == '\0'; ++step) {
    const uint64_t index = reversed ? total - 1 - step : step;
    block_index =
        dim3(static_cast<unsigned>(index % blocks.x), static_cast<unsigned>(index / blocks.x % blocks.y),
             static_cast<unsigned>(index / blocks.x / blocks.y));
    run_block();
  }
  if (failure[0] != '\0') last_error = cudaErrorLaunchFailure;
}

inline uint64_t exchange(Exchange kind, uint32_t mask, uint64_t given, int source) {
  if (!(mask >> current->lane & 1)) fail("a lane outside its own mask:", current->lane);
  current->exchange = kind, current->mask = mask, current->given = given, current->source = source;
  wait(State::kAtWarpBarrier);
  return current->received;
}

template <typename T>
T shuffle(uint32_t mask, T value, int source) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(Exchange::kShuffle, mask, bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulation

SRFT_EXPORT void emulation_set_reversed(int reversed) { emulation::reversed = reversed != 0; }

// What the last failed launch did wrong.
SRFT_EXPORT const char* emulation_failure() { return emulation::failure; }

inline void __syncthreads() { emulation::wait(emulation::State::kAtBlockBarrier); }

inline void __syncwarp(uint32_t mask = 0xffffffffu) {
  emulation::exchange(emulation::Exchange::kBarrier, mask, 0, emulation::current->lane);
}

template <typename T>
T __shfl_sync(uint32_t mask, T value, int lane) {
  return emulation::shuffle(mask, value, lane & 31);
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int distance) {
  return emulation::shuffle(mask, value, (emulation::current->lane ^ distance) & 31);
}

template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int distance) {
  const int lane = emulation::current->lane + distance;
  return emulation::shuffle(mask, value, lane < 32 ? lane : emulation::current->lane);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  return static_cast<uint32_t>(
      emulation::exchange(emulation::Exchange::kBallot, mask, predicate != 0, emulation::current->lane));
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulation::last_error;
  emulation::last_error = cudaSuccess;
  return error;
}
