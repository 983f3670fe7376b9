// srft_native::clipped_ratio. Schema, fake tensors and autograd are declared in
// megatron_srft/ops/clipped_ratio.py, which checks users' arguments too; the checks here keep kernels from reading
// outside of tensors.
#include <optional>
#include <tuple>
#include <vector>

#include "binding/tensors.h"
#include "cpu/clipped_ratio.h"
#ifdef SRFT_CUDA
#include "cuda/clipped_ratio.h"
#endif

namespace srft::binding {
namespace {

using Optional = std::optional<Tensor>;
using Kernel = void (*)(const ClippedRatioArguments&, const Tensor& logprobs);

const float* row_values(const Tensor& tensor, int64_t rows, const char* name) {
  check_dense(tensor, ScalarType::Float, rows, name);
  return static_cast<const float*>(tensor.data_ptr());
}

const float* row_values(const Optional& tensor, int64_t rows, const char* name) {
  return tensor ? row_values(*tensor, rows, name) : nullptr;
}

const float* matrix_values(const Optional& tensor, int64_t terms, int64_t rows, int64_t& stride, const char* name) {
  stride = 0;
  if (!tensor) return nullptr;
  check_matrix(*tensor, name);
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->size(0) == terms && tensor->size(1) == rows,
                  name, " has the wrong type or size");
  stride = tensor->stride(0);
  return static_cast<const float*>(tensor->data_ptr());
}

void add_terms(ClippedRatioArguments& call, const std::vector<int64_t>& losses, const std::vector<int64_t>& rows,
               const std::vector<double>& parameters, const std::vector<int64_t>& tokens) {
  const size_t terms = losses.size();
  STD_TORCH_CHECK(terms <= kMaxTerms && rows.size() == terms && parameters.size() == kParameters * terms &&
                      tokens.size() == 2,
                  "clipped_ratio: the numbers of terms do not fit together");
  for (size_t i = 0; i < terms; ++i) {
    STD_TORCH_CHECK(0 <= losses[i] && losses[i] < kLossCount, "clipped_ratio: no such loss: ", losses[i]);
    add_term(call, losses[i], rows[i], &parameters[kParameters * i], tokens.data());
  }
}

template <Kernel kernel>
std::tuple<Tensor, Tensor, Tensor> clipped_ratio(
    const Tensor& logprobs, const Tensor& entropy, const Tensor& is_demonstration, const Tensor& response_lengths,
    const Tensor& engine_logprobs, const Optional& old_logprobs, const Optional& importance_weights,
    const Optional& advantages, const Optional& weights, std::vector<int64_t> losses, std::vector<int64_t> rows,
    std::vector<double> parameters, std::vector<int64_t> tokens) {
  const int64_t count = logprobs.numel();
  check_dense(is_demonstration, ScalarType::Bool, count, "is_demonstration");
  ClippedRatioArguments call{};
  add_terms(call, losses, rows, parameters, tokens);
  call.rows = count;
  call.logprobs = row_values(logprobs, count, "logprobs");
  call.entropy = row_values(entropy, count, "entropy");
  call.is_demonstration = static_cast<const uint8_t*>(is_demonstration.data_ptr());
  call.response_lengths = row_values(response_lengths, count, "response_lengths");
  call.engine_logprobs = row_values(engine_logprobs, count, "engine_logprobs");
  call.old_logprobs = row_values(old_logprobs, count, "old_logprobs");
  call.importance_weights = row_values(importance_weights, count, "importance_weights");
  call.advantages = matrix_values(advantages, call.terms, count, call.advantages_stride, "advantages");
  call.weights = matrix_values(weights, call.terms, count, call.weights_stride, "weights");
  Tensor loss = empty({}, ScalarType::Float, logprobs);
  Tensor gradients = empty({call.entropy_gradient ? 2 : 1, count}, ScalarType::Float, logprobs);
  Tensor figures = empty({figure_count(call)}, ScalarType::Float, logprobs);
  call.loss = static_cast<float*>(loss.data_ptr());
  call.gradients = static_cast<float*>(gradients.data_ptr());
  call.figures = static_cast<float*>(figures.data_ptr());
  kernel(call, logprobs);
  return {loss, gradients, figures};
}

void on_cpu(const ClippedRatioArguments& call, const Tensor&) {
  const int64_t chunks = cpu::clipped_ratio_chunks(call.rows);
  std::vector<double> partial(static_cast<size_t>(chunks * figure_count(call)));
  over_rows(chunks, 1 << 13,
            [&](int64_t begin, int64_t end) { cpu::clipped_ratio_rows(call, partial.data(), begin, end); });
  cpu::clipped_ratio_total(call, partial.data());
}

#ifdef SRFT_CUDA
void on_cuda(const ClippedRatioArguments& call, const Tensor& logprobs) {
  const torch::stable::accelerator::DeviceGuard guard(logprobs.get_device_index());
  Tensor partial = empty({figure_count(call) * cuda::clipped_ratio_blocks(call.rows)}, ScalarType::Float, logprobs);
  check_launch(cuda::clipped_ratio(call, static_cast<float*>(partial.data_ptr()), current_stream(logprobs)));
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(srft_native, CPU, library) {
  library.impl("clipped_ratio", TORCH_BOX(&clipped_ratio<on_cpu>));
}

#ifdef SRFT_CUDA
STABLE_TORCH_LIBRARY_IMPL(srft_native, CUDA, library) {
  library.impl("clipped_ratio", TORCH_BOX(&clipped_ratio<on_cuda>));
}
#endif

}  // namespace srft::binding
