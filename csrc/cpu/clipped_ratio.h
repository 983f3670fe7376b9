// Policy losses on a CPU. Rows go in chunks of fixed size, each with partial sums of its own, so that the
// result depends neither on the threads nor on how chunks are shared among them.
#pragma once

#include "core/clipped_ratio.h"

namespace srft::cpu {

// Gradients of some chunks' rows, and their partial figures: partial is [chunks, figure_count].
int64_t clipped_ratio_chunks(int64_t rows);
void clipped_ratio_rows(const ClippedRatioArguments& call, double* partial, int64_t first_chunk, int64_t end_chunk);

// Loss and figures from the partial ones of all chunks.
void clipped_ratio_total(const ClippedRatioArguments& call, const double* partial);

}  // namespace srft::cpu
