// Launches the CUDA kernels of the softmax statistics and their gradient on a stream (a cudaStream_t) of the
// current device. All pointers are the device's. The result is a cudaError_t, 0 for success.
#pragma once

#include "core/softmax_statistics.h"

namespace srft::cuda {

int softmax_statistics(const StatisticsArguments& arguments, void* stream);

int softmax_gradient(const GradientArguments& arguments, void* stream);

}  // namespace srft::cuda
