// What the bindings share: torch tensors as the kernels' plain pointers and sizes. Only the stable ABI of
// torch >= 2.11 is used, so that one build serves later versions too.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "core/portable.h"
#ifdef SRFT_CUDA
#include "cuda/errors.h"
#endif

namespace srft::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline ElementType element_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return ElementType::kFloat32;
    case ScalarType::BFloat16:
      return ElementType::kBFloat16;
    case ScalarType::Half:
      return ElementType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "srft_native takes float32, bfloat16 and float16 only");
  }
}

// A matrix whose rows have their elements side by side, at any distance from each other.
inline void check_matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must be a matrix");
  STD_TORCH_CHECK(tensor.numel() == 0 || tensor.size(1) == 1 || tensor.stride(1) == 1, name,
                  " must have its columns side by side");
}

// A tensor without gaps of the given type and number of elements.
inline void check_dense(const Tensor& tensor, ScalarType type, int64_t elements, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.is_contiguous() && tensor.numel() == elements, name,
                  " has the wrong type, size or layout");
}

inline Tensor empty(std::initializer_list<int64_t> shape, ScalarType type, const Tensor& on_device_of) {
  return torch::stable::new_empty(on_device_of, shape, type);
}

// Calls rows(begin, end) from torch's threads; each gets work enough to be worth waking it.
template <typename Function>
void over_rows(int64_t rows, int64_t elements_per_row, const Function& function) {
  constexpr int64_t kElementsPerThread = 1 << 15;
  const int64_t grain = kElementsPerThread / (elements_per_row > 0 ? elements_per_row : 1) + 1;
  torch::stable::parallel_for(0, rows, grain, function);
}

#ifdef SRFT_CUDA
// Weak: a torch without CUDA has no such symbol and needs none.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

// torch's stream of the tensor's device.
inline void* current_stream(const Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0,
                  "torch did not name its CUDA stream");
  return stream;
}

inline void check_launch(int cuda_error) {
  STD_TORCH_CHECK(cuda_error == 0, "a CUDA kernel of srft_native could not start: ", cuda::error_text(cuda_error));
}
#endif

}  // namespace srft::binding
