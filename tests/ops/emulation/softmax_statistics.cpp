// The kernels of the softmax statistics, C++ and (emulated) CUDA, as C functions.
#include "cpu/softmax_statistics.cpp"

#include "cuda/softmax_gradient.cu"
#include "cuda/softmax_statistics.cu"

SRFT_EXPORT int cuda_statistics(const srft::StatisticsArguments* arguments) {
  return srft::cuda::softmax_statistics(*arguments, nullptr);
}

SRFT_EXPORT int cuda_gradient(const srft::GradientArguments* arguments) {
  return srft::cuda::softmax_gradient(*arguments, nullptr);
}

SRFT_EXPORT int cpu_statistics(const srft::StatisticsArguments* arguments) {
  srft::cpu::softmax_statistics(*arguments, 0, arguments->rows);
  return 0;
}

SRFT_EXPORT int cpu_gradient(const srft::GradientArguments* arguments) {
  srft::cpu::softmax_gradient(*arguments, 0, arguments->rows);
  return 0;
}
