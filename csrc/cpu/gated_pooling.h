// Gated pooling on a CPU; functions over ranges, for the caller to give to threads. See core/gated_pooling.h.
#pragma once

#include "core/gated_pooling.h"

namespace srft::cpu {

void gated_projection(const ProjectionArguments& call, int64_t first_row, int64_t end_row);

// How many chunks of rows WeightGradientArguments::partial has room for.
int64_t weight_gradient_chunks(int64_t rows);
void weight_gradient_partials(const WeightGradientArguments& call, int64_t first_chunk, int64_t end_chunk);
void weight_gradient_total(const WeightGradientArguments& call);

void hidden_gradient(const HiddenGradientArguments& call, int64_t first_row, int64_t end_row);

void gated_sums(const PoolingArguments& call, int64_t first_sequence, int64_t end_sequence);
void gated_sums_gradient(const PoolingArguments& call, int64_t first_row, int64_t end_row);

}  // namespace srft::cpu
