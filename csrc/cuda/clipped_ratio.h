// Policy losses on a GPU: one kernel over the rows, one that adds up its blocks' partial figures in fixed order.
#pragma once

#include "core/clipped_ratio.h"

namespace srft::cuda {

// How many blocks of rows there are; `partial` is [figure_count, blocks].
int64_t clipped_ratio_blocks(int64_t rows);

// Returns a cudaError_t. `stream` is a cudaStream_t.
int clipped_ratio(const ClippedRatioArguments& call, float* partial, void* stream);

}  // namespace srft::cuda
