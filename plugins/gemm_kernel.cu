#include "gemm_kernel.cuh"
#include "kernels.h"

namespace awq_trt {

cudaError_t LaunchGemm(GemmArgs const& args, ActivationType type, int32_t token_tiles, cudaStream_t stream) {
  int64_t const blocks = GemmBlocks(args, token_tiles);
  if (blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  bool const half = type == ActivationType::kHalf;
  void (*kernel)(GemmArgs) = nullptr;
  switch (token_tiles) {
    case 4:
      kernel = half ? GemmKernel<Half, 4> : GemmKernel<Bfloat16, 4>;
      break;
    case 8:
      kernel = half ? GemmKernel<Half, 8> : GemmKernel<Bfloat16, 8>;
      break;
    case 16:
      kernel = half ? GemmKernel<Half, 16> : GemmKernel<Bfloat16, 16>;
      break;
    default:
      return cudaErrorInvalidValue;
  }
  kernel<<<static_cast<uint32_t>(blocks), kGemmThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace awq_trt
