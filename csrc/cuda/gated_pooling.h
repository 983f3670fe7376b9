// Launches the CUDA kernels of gated pooling on a stream (a cudaStream_t) of the current device. All pointers are
// the device's. The result is a cudaError_t, 0 for success.
#pragma once

#include "core/gated_pooling.h"

namespace srft::cuda {

int gated_projection(const ProjectionArguments& arguments, void* stream);

// How many chunks of rows WeightGradientArguments::partial has room for.
int64_t weight_gradient_chunks(int64_t rows);
int weight_gradient(const WeightGradientArguments& arguments, void* stream);

int hidden_gradient(const HiddenGradientArguments& arguments, void* stream);

int gated_sums(const PoolingArguments& arguments, void* stream);
int gated_sums_gradient(const PoolingArguments& arguments, void* stream);

}  // namespace srft::cuda
