#include "gemm_kernel.cuh"
#include "kernels.h"

namespace awq_trt {

cudaError_t LaunchGemm(GemmArgs const& args, ActivationType type, int32_t token_tiles, cudaStream_t stream) {
  int64_t const blocks = GemmBlocks(args, token_tiles);
  if (blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  GemmFunction const kernel = GemmKernelFor(type, token_tiles);
  if (kernel == nullptr) return cudaErrorInvalidValue;
  kernel<<<static_cast<uint32_t>(blocks), kGemmThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace awq_trt
