// CUDA's words for a cudaError_t, for callers without CUDA's headers.
#pragma once

namespace srft::cuda {

const char* error_text(int cuda_error);

}  // namespace srft::cuda
