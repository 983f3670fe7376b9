// Softmax statistics and their gradient on a CPU: rows begin to end, so that the caller can share rows among
// threads. A row's result depends neither on the other rows nor on the sharing.
#pragma once

#include "core/softmax_statistics.h"

namespace srft::cpu {

void softmax_statistics(const StatisticsArguments& arguments, int64_t begin, int64_t end);

void softmax_gradient(const GradientArguments& arguments, int64_t begin, int64_t end);

}  // namespace srft::cpu
