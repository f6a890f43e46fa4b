#include "decode_kernel.cuh"
#include "kernels.h"

namespace awq_trt {

cudaError_t LaunchDecode(GemmArgs const& args, ActivationType type, int32_t token_tiles, int32_t warps,
                         cudaStream_t stream) {
  int64_t const blocks = DecodeBlocks(args, token_tiles);
  if (blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  bool const half = type == ActivationType::kHalf;
  void (*kernel)(GemmArgs) = nullptr;
  switch (token_tiles) {
    case 1:
      kernel = half ? DecodeKernel<Half, 1> : DecodeKernel<Bfloat16, 1>;
      break;
    case 2:
      kernel = half ? DecodeKernel<Half, 2> : DecodeKernel<Bfloat16, 2>;
      break;
    default:
      return cudaErrorInvalidValue;
  }
  kernel<<<static_cast<uint32_t>(blocks), DecodeThreads(args, warps), 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace awq_trt
