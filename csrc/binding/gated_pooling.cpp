// srft_native::gated_projection, gated_sums and their gradients. Schemas, fake tensors and autograd are declared in
// megatron_srft/ops/gated_pooling.py, which checks users' arguments too; the checks here keep kernels from reading
// outside of tensors.
#include "binding/tensors.h"
#include "cpu/gated_pooling.h"
#ifdef SRFT_CUDA
#include "cuda/gated_pooling.h"
#endif

namespace srft::binding {
namespace {

struct Cpu {
  static void projection(const ProjectionArguments& call, const Tensor&) {
    over_rows(call.rows, call.width,
              [&](int64_t begin, int64_t end) { cpu::gated_projection(call, begin, end); });
  }

  static int64_t weight_gradient_chunks(int64_t rows) { return cpu::weight_gradient_chunks(rows); }

  static void weight_gradient(const WeightGradientArguments& call, const Tensor&) {
    torch::stable::parallel_for(0, weight_gradient_chunks(call.rows), 1, [&](int64_t begin, int64_t end) {
      cpu::weight_gradient_partials(call, begin, end);
    });
    cpu::weight_gradient_total(call);
  }

  static void hidden_gradient(const HiddenGradientArguments& call, const Tensor&) {
    over_rows(call.rows, call.width, [&](int64_t begin, int64_t end) { cpu::hidden_gradient(call, begin, end); });
  }

  static void sums(const PoolingArguments& call, const Tensor&) {
    const int64_t rows_of_one = call.count > 0 ? call.rows / call.count : 0;
    over_rows(call.count, rows_of_one, [&](int64_t begin, int64_t end) { cpu::gated_sums(call, begin, end); });
  }

  static void sums_gradient(const PoolingArguments& call, const Tensor&) {
    over_rows(call.rows, 2, [&](int64_t begin, int64_t end) { cpu::gated_sums_gradient(call, begin, end); });
  }
};

#ifdef SRFT_CUDA
struct Cuda {
  template <typename Arguments>
  static void launch(int (*kernel)(const Arguments&, void*), const Arguments& call, const Tensor& on_device_of) {
    const torch::stable::accelerator::DeviceGuard guard(on_device_of.get_device_index());
    check_launch(kernel(call, current_stream(on_device_of)));
  }

  static void projection(const ProjectionArguments& call, const Tensor& hidden) {
    launch(cuda::gated_projection, call, hidden);
  }

  static int64_t weight_gradient_chunks(int64_t rows) { return cuda::weight_gradient_chunks(rows); }

  static void weight_gradient(const WeightGradientArguments& call, const Tensor& hidden) {
    launch(cuda::weight_gradient, call, hidden);
  }

  static void hidden_gradient(const HiddenGradientArguments& call, const Tensor& gradient) {
    launch(cuda::hidden_gradient, call, gradient);
  }

  static void sums(const PoolingArguments& call, const Tensor& accumulated) {
    launch(cuda::gated_sums, call, accumulated);
  }

  static void sums_gradient(const PoolingArguments& call, const Tensor& accumulated) {
    launch(cuda::gated_sums_gradient, call, accumulated);
  }
};
#endif

const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.data_ptr()); }

Tensor empty_floats(int64_t rows, int64_t columns, const Tensor& on_device_of) {
  return empty({rows, columns}, ScalarType::Float, on_device_of);
}

template <typename Device>
Tensor projection(const Tensor& accumulated, const Tensor& hidden, const Tensor& weight) {
  check_matrix(hidden, "hidden");
  const int64_t rows = hidden.size(0), width = hidden.size(1);
  check_dense(accumulated, ScalarType::Float, 2 * rows, "accumulated");
  check_dense(weight, ScalarType::Float, 2 * width, "weight");
  Tensor result = empty_floats(rows, 2, hidden);
  const ProjectionArguments call{
      .type = element_type(hidden),
      .hidden = hidden.data_ptr(),
      .row_stride = hidden.stride(0),
      .rows = rows,
      .width = width,
      .accumulated = floats(accumulated),
      .weight = floats(weight),
      .result = static_cast<float*>(result.data_ptr()),
  };
  Device::projection(call, hidden);
  return result;
}

template <typename Device>
Tensor projection_weight_gradient(const Tensor& gradient, const Tensor& hidden) {
  check_matrix(hidden, "hidden");
  const int64_t rows = hidden.size(0), width = hidden.size(1);
  check_dense(gradient, ScalarType::Float, 2 * rows, "gradient");
  Tensor partial = empty_floats(2 * Device::weight_gradient_chunks(rows), width, hidden);
  Tensor result = empty_floats(2, width, hidden);
  const WeightGradientArguments call{
      .type = element_type(hidden),
      .hidden = hidden.data_ptr(),
      .row_stride = hidden.stride(0),
      .rows = rows,
      .width = width,
      .gradient = floats(gradient),
      .partial = static_cast<float*>(partial.data_ptr()),
      .result = static_cast<float*>(result.data_ptr()),
  };
  Device::weight_gradient(call, hidden);
  return result;
}

template <typename Device>
Tensor projection_hidden_gradient(const Tensor& gradient, const Tensor& weight, const Tensor& like) {
  STD_TORCH_CHECK(weight.dim() == 2 && gradient.dim() == 2, "weight and gradient must be matrices");
  const int64_t rows = gradient.size(0), width = weight.size(1);
  check_dense(gradient, ScalarType::Float, 2 * rows, "gradient");
  check_dense(weight, ScalarType::Float, 2 * width, "weight");
  Tensor result = empty({rows, width}, like.scalar_type(), gradient);
  const HiddenGradientArguments call{
      .type = element_type(like),
      .gradient = floats(gradient),
      .weight = floats(weight),
      .rows = rows,
      .width = width,
      .result = result.data_ptr(),
  };
  Device::hidden_gradient(call, gradient);
  return result;
}

PoolingArguments pooling(const Tensor& accumulated, const Tensor& sequences, const Tensor& bias) {
  STD_TORCH_CHECK(accumulated.dim() == 2 && sequences.dim() == 2, "accumulated and sequences must be matrices");
  check_dense(accumulated, ScalarType::Float, 2 * accumulated.size(0), "accumulated");
  check_dense(sequences, ScalarType::Long, 2 * sequences.size(0), "sequences");
  check_dense(bias, ScalarType::Float, 2, "bias");
  return {
      .accumulated = floats(accumulated),
      .rows = accumulated.size(0),
      .sequences = static_cast<const int64_t*>(sequences.data_ptr()),
      .count = sequences.size(0),
      .bias = floats(bias),
      .sums_gradient = nullptr,
      .result = nullptr,
  };
}

template <typename Device>
Tensor sums(const Tensor& accumulated, const Tensor& sequences, const Tensor& bias) {
  PoolingArguments call = pooling(accumulated, sequences, bias);
  Tensor result = empty_floats(call.count, 2, accumulated);
  call.result = static_cast<float*>(result.data_ptr());
  Device::sums(call, accumulated);
  return result;
}

template <typename Device>
Tensor sums_gradient(const Tensor& gradient, const Tensor& accumulated, const Tensor& sequences,
                     const Tensor& bias) {
  PoolingArguments call = pooling(accumulated, sequences, bias);
  check_dense(gradient, ScalarType::Float, 2 * call.count, "gradient");
  Tensor result = empty_floats(call.rows, 2, accumulated);
  call.sums_gradient = floats(gradient);
  call.result = static_cast<float*>(result.data_ptr());
  Device::sums_gradient(call, accumulated);
  return result;
}

template <typename Device>
void register_kernels(torch::stable::detail::StableLibrary& library) {
  library.impl("gated_projection", TORCH_BOX(&projection<Device>));
  library.impl("gated_projection_weight_gradient", TORCH_BOX(&projection_weight_gradient<Device>));
  library.impl("gated_projection_hidden_gradient", TORCH_BOX(&projection_hidden_gradient<Device>));
  library.impl("gated_sums", TORCH_BOX(&sums<Device>));
  library.impl("gated_sums_gradient", TORCH_BOX(&sums_gradient<Device>));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(srft_native, CPU, library) { register_kernels<Cpu>(library); }

#ifdef SRFT_CUDA
STABLE_TORCH_LIBRARY_IMPL(srft_native, CUDA, library) { register_kernels<Cuda>(library); }
#endif

}  // namespace srft::binding
