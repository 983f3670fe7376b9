// srft_native::softmax_statistics, softmax_statistics_keep, softmax_gradient and softmax_gradient_. Schemas, fake
// tensors and autograd are declared in megatron_srft/ops/softmax_statistics.py, which checks users' arguments too;
// the checks here keep kernels from reading outside of tensors.
#include "binding/tensors.h"
#include "cpu/softmax_statistics.h"
#ifdef SRFT_CUDA
#include "cuda/softmax_statistics.h"
#endif

namespace srft::binding {
namespace {

using StatisticsKernel = void (*)(const StatisticsArguments&, const Tensor& logits);
using GradientKernel = void (*)(const GradientArguments&, const Tensor& logits);

void check_rows(const Tensor& logits, const Tensor& labels, int64_t columns) {
  check_matrix(logits, "logits");
  check_dense(labels, ScalarType::Long, logits.size(0), "labels");
  STD_TORCH_CHECK(0 <= columns && columns <= logits.size(1), "columns must lie within the logits");
}

template <StatisticsKernel kernel>
Tensor statistics(const Tensor& logits, const Tensor& labels, int64_t vocab_start, int64_t columns,
                  double inverse_temperature, const Tensor* kept) {
  check_rows(logits, labels, columns);
  const int64_t rows = logits.size(0);
  Tensor result = empty({4, rows}, ScalarType::Float, logits);
  StatisticsArguments arguments{
      .type = element_type(logits),
      .logits = logits.data_ptr(),
      .row_stride = logits.stride(0),
      .labels = static_cast<const int64_t*>(labels.data_ptr()),
      .rows = rows,
      .columns = columns,
      .vocab_start = vocab_start,
      .inverse_temperature = static_cast<float>(inverse_temperature),
      .statistics = static_cast<float*>(result.data_ptr()),
      .kept_type = ElementType::kFloat32,
      .kept = nullptr,
      .kept_stride = 0,
  };
  if (kept != nullptr) {
    check_matrix(*kept, "kept");
    STD_TORCH_CHECK(kept->size(0) == rows && kept->size(1) >= columns, "kept must have the logits' shape");
    arguments.kept_type = element_type(*kept);
    arguments.kept = kept->data_ptr();
    arguments.kept_stride = kept->stride(0);
  }
  kernel(arguments, logits);
  return result;
}

template <StatisticsKernel kernel>
Tensor softmax_statistics(const Tensor& logits, const Tensor& labels, int64_t vocab_start, int64_t columns,
                          double inverse_temperature) {
  return statistics<kernel>(logits, labels, vocab_start, columns, inverse_temperature, nullptr);
}

template <StatisticsKernel kernel>
Tensor softmax_statistics_keep(const Tensor& logits, const Tensor& labels, int64_t vocab_start, int64_t columns,
                               double inverse_temperature, const Tensor& kept) {
  return statistics<kernel>(logits, labels, vocab_start, columns, inverse_temperature, &kept);
}

template <GradientKernel kernel>
void write_gradient(const Tensor& gradient, const Tensor& logits, const Tensor& labels, const Tensor& coefficients,
                    int64_t vocab_start, int64_t columns, double scale) {
  check_rows(logits, labels, columns);
  check_dense(coefficients, ScalarType::Float, 4 * logits.size(0), "coefficients");
  const GradientArguments arguments{
      .type = element_type(logits),
      .logits = logits.data_ptr(),
      .row_stride = logits.stride(0),
      .labels = static_cast<const int64_t*>(labels.data_ptr()),
      .coefficients = static_cast<const float*>(coefficients.data_ptr()),
      .rows = logits.size(0),
      .columns = columns,
      .width = logits.size(1),
      .vocab_start = vocab_start,
      .scale = static_cast<float>(scale),
      .gradient = gradient.data_ptr(),
      .gradient_stride = gradient.stride(0),
  };
  kernel(arguments, logits);
}

template <GradientKernel kernel>
Tensor softmax_gradient(const Tensor& logits, const Tensor& labels, const Tensor& coefficients, int64_t vocab_start,
                        int64_t columns, double scale) {
  Tensor gradient = empty({logits.size(0), logits.size(1)}, logits.scalar_type(), logits);
  write_gradient<kernel>(gradient, logits, labels, coefficients, vocab_start, columns, scale);
  return gradient;
}

template <GradientKernel kernel>
void softmax_gradient_in_place(const Tensor& logits, const Tensor& labels, const Tensor& coefficients,
                               int64_t vocab_start, int64_t columns, double scale) {
  write_gradient<kernel>(logits, logits, labels, coefficients, vocab_start, columns, scale);
}

void statistics_on_cpu(const StatisticsArguments& arguments, const Tensor&) {
  over_rows(arguments.rows, arguments.columns,
            [&](int64_t begin, int64_t end) { cpu::softmax_statistics(arguments, begin, end); });
}

void gradient_on_cpu(const GradientArguments& arguments, const Tensor&) {
  over_rows(arguments.rows, arguments.width,
            [&](int64_t begin, int64_t end) { cpu::softmax_gradient(arguments, begin, end); });
}

#ifdef SRFT_CUDA
void statistics_on_cuda(const StatisticsArguments& arguments, const Tensor& logits) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  check_launch(cuda::softmax_statistics(arguments, current_stream(logits)));
}

void gradient_on_cuda(const GradientArguments& arguments, const Tensor& logits) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  check_launch(cuda::softmax_gradient(arguments, current_stream(logits)));
}
#endif

template <StatisticsKernel statistics_kernel, GradientKernel gradient_kernel>
void register_kernels(torch::stable::detail::StableLibrary& library) {
  library.impl("softmax_statistics", TORCH_BOX(&softmax_statistics<statistics_kernel>));
  library.impl("softmax_statistics_keep", TORCH_BOX(&softmax_statistics_keep<statistics_kernel>));
  library.impl("softmax_gradient", TORCH_BOX(&softmax_gradient<gradient_kernel>));
  library.impl("softmax_gradient_", TORCH_BOX(&softmax_gradient_in_place<gradient_kernel>));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(srft_native, CPU, library) {
  register_kernels<statistics_on_cpu, gradient_on_cpu>(library);
}

#ifdef SRFT_CUDA
STABLE_TORCH_LIBRARY_IMPL(srft_native, CUDA, library) {
  register_kernels<statistics_on_cuda, gradient_on_cuda>(library);
}
#endif

}  // namespace srft::binding
