#include "cuda/errors.h"

#include "cuda/launch.h"

namespace srft::cuda {

const char* error_text(int cuda_error) { return cudaGetErrorString(static_cast<cudaError_t>(cuda_error)); }

}  // namespace srft::cuda
