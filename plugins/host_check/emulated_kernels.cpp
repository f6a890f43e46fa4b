// The launch functions of kernels.h, run by the emulator: the same kernel sources, grids and policy as on a GPU.
#include "decode_kernel.cuh"
#include "gemm_kernel.cuh"
#include "kernels.h"

namespace awq_trt {
namespace {

template <void (*kKernel)(GemmArgs)>
void RunKernel(int64_t blocks, int32_t threads, GemmArgs args) {
  emulator::Run(blocks, threads, [](void* context) { kKernel(*static_cast<GemmArgs*>(context)); }, &args);
}

}  // namespace

cudaError_t LaunchDecode(GemmArgs const& args, ActivationType type, int32_t token_tiles, int32_t warps, cudaStream_t) {
  int64_t const blocks = DecodeBlocks(args, token_tiles);
  int32_t const threads = DecodeThreads(args, warps);
  if (blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  bool const half = type == ActivationType::kHalf;
  switch (token_tiles) {
    case 1:
      (half ? RunKernel<DecodeKernel<Half, 1>> : RunKernel<DecodeKernel<Bfloat16, 1>>)(blocks, threads, args);
      break;
    case 2:
      (half ? RunKernel<DecodeKernel<Half, 2>> : RunKernel<DecodeKernel<Bfloat16, 2>>)(blocks, threads, args);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t LaunchGemm(GemmArgs const& args, ActivationType type, int32_t token_tiles, cudaStream_t) {
  int64_t const blocks = GemmBlocks(args, token_tiles);
  if (blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  bool const half = type == ActivationType::kHalf;
  switch (token_tiles) {
    case 4:
      (half ? RunKernel<GemmKernel<Half, 4>> : RunKernel<GemmKernel<Bfloat16, 4>>)(blocks, kGemmThreads, args);
      break;
    case 8:
      (half ? RunKernel<GemmKernel<Half, 8>> : RunKernel<GemmKernel<Bfloat16, 8>>)(blocks, kGemmThreads, args);
      break;
    case 16:
      (half ? RunKernel<GemmKernel<Half, 16>> : RunKernel<GemmKernel<Bfloat16, 16>>)(blocks, kGemmThreads, args);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

}  // namespace awq_trt
