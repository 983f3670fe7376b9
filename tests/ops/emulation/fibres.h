// Threads of a CUDA block as fibres of one CPU thread, and the scheduler that runs them from barrier to
// barrier.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 << 10, kGuardBytes = 4 << 10;

enum class State { kRuns, kAtBlockBarrier, kAtWarpBarrier, kDone, kFailed };
enum class Exchange { kBarrier, kShuffle, kBallot };

struct Thread {
  dim3 thread_index;
  int lane = 0, source = 0;  // source: the lane whose value it wants
  State state = State::kDone;
  Exchange exchange = Exchange::kBarrier;
  uint32_t mask = 0;
  uint64_t given = 0, received = 0;
  ucontext_t context;
  char* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

struct SharedArray {
  void* memory;
  size_t bytes;
};

inline Thread* current = nullptr;
inline std::vector<Thread> threads;             // of the block that runs
inline std::vector<SharedArray> shared_arrays;  // those of all kernels that have run
inline std::function<void()> kernel_call;
inline dim3 block_index, block_size, grid_size;
inline ucontext_t scheduler;
inline bool reversed = false;
inline char failure[256] = "";  // what the last launch did wrong

__attribute__((format(printf, 1, 2))) inline void record(const char* format, ...) {
  if (failure[0] != '\0') return;
  std::va_list arguments;
  va_start(arguments, format);
  int used = std::snprintf(failure, sizeof failure, "block %u: ", block_index.x);
  if (current != nullptr) {
    used += std::snprintf(failure + used, sizeof failure - used, "thread %u: ", current->thread_index.x);
  }
  std::vsnprintf(failure + used, sizeof failure - used, format, arguments);
  va_end(arguments);
}

// --- fibres ---

#ifdef __SANITIZE_ADDRESS__
inline const void* scheduler_stack;
inline size_t scheduler_stack_bytes;
#endif

inline void enter(Thread& thread) {
  current = &thread;
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, thread.stack, kStackBytes);
#endif
  swapcontext(&scheduler, &thread.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  current = nullptr;
}

inline void arrived() {  // on a fibre's own stack, after each switch to it
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(current->fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

inline void wait(State state) {
  current->state = state;
#ifdef __SANITIZE_ADDRESS__
  void** const kept = state == State::kDone ? nullptr : &current->fake_stack;
  __sanitizer_start_switch_fiber(kept, scheduler_stack, scheduler_stack_bytes);
#endif
  swapcontext(&current->context, &scheduler);
  arrived();
}

inline void fibre() {
  arrived();
  kernel_call();
  wait(State::kDone);
}

inline void* new_stack() {
  void* const memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) std::abort();
  return static_cast<char*>(memory) + kGuardBytes;
}

inline std::vector<char*> stacks;  // one for each thread of the largest block so far

inline void prepare(Thread& thread, unsigned index) {
  while (stacks.size() <= index) stacks.push_back(static_cast<char*>(new_stack()));
  thread.stack = stacks[index];
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(thread.stack, kStackBytes);  // of a fibre that was left in the middle
#endif
  const dim3& size = block_size;
  thread.thread_index = dim3(index % size.x, index / size.x % size.y, index / size.x / size.y);
  thread.lane = static_cast<int>(index % kWarp);
  thread.state = State::kRuns;
  thread.fake_stack = nullptr;
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack;
  thread.context.uc_stack.ss_size = kStackBytes;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, fibre, 0);
}

// --- scheduler ---

// Whether all lanes of `first`'s mask have come to the same exchange.
inline bool have_met(const Thread* warp, int lanes, const Thread& first) {
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(first.mask >> lane & 1)) continue;
    if (lane >= lanes) return record("a mask names lane %d of a warp of %d", lane, lanes), false;
    const Thread& thread = warp[lane];
    if (thread.state == State::kDone) return record("a mask names lane %d, which has left", lane), false;
    if (thread.state != State::kAtWarpBarrier) return false;
    if (thread.mask != first.mask) return record("lanes meet with different masks"), false;
    if (thread.exchange != first.exchange) return record("lanes meet in different functions"), false;
    if (!(first.mask >> thread.source & 1)) return record("lane %d reads one outside its mask", lane), false;
  }
  return true;
}

inline void exchange_values(Thread* warp, uint32_t mask) {
  uint32_t ballot = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) ballot |= static_cast<uint32_t>(warp[lane].given != 0) << lane;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Thread& thread = warp[lane];
    thread.received = thread.exchange == Exchange::kBallot ? ballot : warp[thread.source].given;
    thread.state = State::kRuns;
  }
}

inline bool release_warps() {
  const int count = static_cast<int>(threads.size());
  bool released = false;
  for (int start = 0; start < count; start += kWarp) {
    const int lanes = count - start < kWarp ? count - start : kWarp;
    for (int lane = 0; lane < lanes; ++lane) {
      const Thread& thread = threads[start + lane];
      if (thread.state != State::kAtWarpBarrier || !have_met(&threads[start], lanes, thread)) continue;
      exchange_values(&threads[start], thread.mask);
      released = true;
    }
  }
  return released;
}

// The block's barrier waits for all threads that have not left the kernel.
inline bool release_block() {
  bool released = false;
  for (const Thread& thread : threads) {
    if (thread.state != State::kDone && thread.state != State::kAtBlockBarrier) return false;
  }
  for (Thread& thread : threads) {
    if (thread.state != State::kAtBlockBarrier) continue;
    thread.state = State::kRuns;
    released = true;
  }
  return released;
}

inline void run_block() {
  for (const SharedArray& array : shared_arrays) std::memset(array.memory, 0xff, array.bytes);
  const size_t count = threads.size();
  for (size_t index = 0; index < count; ++index) prepare(threads[index], static_cast<unsigned>(index));
  do {
    for (size_t step = 0; step < count && failure[0] == '\0'; ++step) {
      Thread& thread = threads[reversed ? count - 1 - step : step];
      if (thread.state == State::kRuns) enter(thread);
    }
  } while (failure[0] == '\0' && (release_warps() || release_block()));
  for (const Thread& thread : threads) {
    if (thread.state != State::kDone)
      record("divergent barrier: thread %u waits for ever", thread.thread_index.x);
  }
}

}  // namespace emulation
