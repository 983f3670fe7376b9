// The CUDA kernels of gated pooling on a CPU, with plain C arguments.
#include "../../../csrc/cuda/gated_pooling.cu"

using srft::ElementType;

extern "C" {

int gated_projection(int type, const void* hidden, int64_t row_stride, int64_t rows, int64_t width,
                     const float* accumulated, const float* weight, float* result) {
  return srft::cuda::gated_projection(
      {static_cast<ElementType>(type), hidden, row_stride, rows, width, accumulated, weight, result}, nullptr);
}

int64_t weight_gradient_chunks(int64_t rows) { return srft::cuda::weight_gradient_chunks(rows); }

int weight_gradient(int type, const void* hidden, int64_t row_stride, int64_t rows, int64_t width,
                    const float* gradient, float* partial, float* result) {
  return srft::cuda::weight_gradient(
      {static_cast<ElementType>(type), hidden, row_stride, rows, width, gradient, partial, result}, nullptr);
}

int hidden_gradient(int type, const float* gradient, const float* weight, int64_t rows, int64_t width, void* result) {
  return srft::cuda::hidden_gradient({static_cast<ElementType>(type), gradient, weight, rows, width, result},
                                     nullptr);
}

int gated_sums(const float* accumulated, int64_t rows, const int64_t* sequences, int64_t count, const float* bias,
               float* result) {
  return srft::cuda::gated_sums({accumulated, rows, sequences, count, bias, nullptr, result}, nullptr);
}

int gated_sums_gradient(const float* accumulated, int64_t rows, const int64_t* sequences, int64_t count,
                        const float* bias, const float* sums_gradient, float* result) {
  return srft::cuda::gated_sums_gradient({accumulated, rows, sequences, count, bias, sums_gradient, result}, nullptr);
}
}
