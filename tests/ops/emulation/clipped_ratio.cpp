// The CUDA kernels of clipped_ratio on a CPU, with plain C arguments.
#include "../../../csrc/cuda/clipped_ratio.cu"

extern "C" int clipped_ratio(int64_t rows, const float* logprobs, const float* entropy, const uint8_t* is_demonstration,
                             const float* response_lengths, const float* engine_logprobs, const float* old_logprobs,
                             const float* importance_weights, const float* advantages, int64_t advantages_stride,
                             const float* weights, int64_t weights_stride, int64_t terms, const int64_t* losses,
                             const int64_t* row_bits, const double* parameters, const int64_t* tokens, float* partial,
                             float* loss, float* gradients, float* figures) {
  srft::ClippedRatioArguments call{};
  call.rows = rows;
  call.logprobs = logprobs;
  call.entropy = entropy;
  call.is_demonstration = is_demonstration;
  call.response_lengths = response_lengths;
  call.engine_logprobs = engine_logprobs;
  call.old_logprobs = old_logprobs;
  call.importance_weights = importance_weights;
  call.advantages = advantages;
  call.advantages_stride = advantages_stride;
  call.weights = weights;
  call.weights_stride = weights_stride;
  for (int64_t i = 0; i < terms; ++i) {
    srft::add_term(call, losses[i], row_bits[i], parameters + srft::kParameters * i, tokens);
  }
  call.loss = loss;
  call.gradients = gradients;
  call.figures = figures;
  return srft::cuda::clipped_ratio(call, partial, nullptr);
}
