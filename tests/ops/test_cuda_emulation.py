"""The emulation of CUDA on a CPU itself: what CUDA leaves undefined does not pass for a result."""

import ctypes

import emulated
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler (g++)")

KERNEL = """
#include "cuda/launch.h"

using namespace srft::cuda;

enum Fault { kNone, kNoBarrier, kDivergentBarrier, kOutsideShared, kMisaligned, kLaneLeft, kMasksDiffer };

__global__ void sum_of_block(const float* in, float* out, int fault) {
  SRFT_SHARED(float, sums, 2);
  float sum = in[threadIdx.x];
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  if (fault != kNoBarrier) __syncthreads();
  if (fault == kDivergentBarrier && threadIdx.x >= 32) __syncthreads();
  if (fault == kDivergentBarrier && threadIdx.x < 32) sum += __shfl_sync(kAllLanes, sum, threadIdx.x == 7 ? 0 : 1);
  if (fault == kDivergentBarrier && threadIdx.x == 7) __syncthreads();
  if (fault == kDivergentBarrier && threadIdx.x < 32) __syncwarp();
  if (fault == kOutsideShared) sums[2] = 0.0f;
  if (fault == kMisaligned && threadIdx.x == 5) out[0] = load_vector(in + 1).elements[0];
  if (fault == kLaneLeft && threadIdx.x == 5) return;
  if (fault == kLaneLeft) sum = __shfl_down_sync(kAllLanes, sum, 1);
  if (fault == kMasksDiffer) __syncwarp(threadIdx.x % 2 == 0 ? 0xffffffffu : 0xfffffffeu);
  out[threadIdx.x] = sums[0] + sums[1];
}

__global__ void exchanges(int* out) {
  const int lane = threadIdx.x % 32;
  out[threadIdx.x] = __shfl_down_sync(kAllLanes, lane, 3) + 100 * __shfl_sync(kAllLanes, lane, 7);
  out[threadIdx.x] += 10000 * (__ballot_sync(kAllLanes, lane < 4) == 15u);
}

SRFT_EXPORT int launch_sum(const float* in, float* out, int fault, int threads) {
  SRFT_LAUNCH((sum_of_block), 1, threads, nullptr, in, out, fault);
  return cudaGetLastError();
}

SRFT_EXPORT int launch_exchanges(int* out) {
  SRFT_LAUNCH((exchanges), 1, 64, nullptr, out);
  return cudaGetLastError();
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    source = tmp_path_factory.mktemp("emulation") / "faults.cpp"
    source.write_text(KERNEL)
    return ctypes.CDLL(str(emulated.compile_source(source)))


@pytest.fixture(params=[0, 1], ids=["in order", "reversed"])
def ordered(request, library):
    library.emulation_set_reversed(request.param)
    yield
    library.emulation_set_reversed(0)


def launch(library: ctypes.CDLL, fault: int, threads: int = 64) -> np.ndarray:
    numbers, result = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (numbers, result)]
    emulated.check(library, library.launch_sum(*pointers, fault, threads))
    return result


def test_sum_of_a_block(library, ordered):
    assert (launch(library, 0) == 2016).all()


def test_exchanges_between_lanes(library, ordered):
    result = np.zeros(64, np.int32)
    emulated.check(library, library.launch_exchanges(ctypes.c_void_p(result.ctypes.data)))
    lanes = np.arange(32)
    expected = np.where(lanes + 3 < 32, lanes + 3, lanes) + 700 + 10000
    np.testing.assert_array_equal(result.reshape(2, 32), np.stack([expected, expected]))


def test_shared_memory_read_before_it_is_written_is_nan(library, ordered):
    assert np.isnan(launch(library, 1)).any()


@pytest.mark.parametrize(
    "fault,message",
    [
        (2, "divergent barrier: thread 0 waits for ever"),
        (3, "outside shared memory: 2"),
        (4, "misaligned vector.* 4"),
        (5, "names lane 5, which has left"),
        (6, "outside its own mask|different masks"),
    ],
)
def test_faults_fail_the_launch(library, ordered, fault, message):
    with pytest.raises(RuntimeError, match=message):
        launch(library, fault)
    assert (launch(library, 0) == 2016).all()  # and leave nothing behind


def test_lanes_that_the_block_does_not_have(library):
    with pytest.raises(RuntimeError, match="lane 16 of a warp of 16"):
        launch(library, 0, threads=48)


@pytest.mark.parametrize("threads", [0, 1025])
def test_launches_beyond_cuda_limits_fail(library, threads):
    with pytest.raises(RuntimeError, match="CUDA error 9"):
        launch(library, 0, threads)
