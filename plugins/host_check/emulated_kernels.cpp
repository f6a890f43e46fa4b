// The functions of kernels.h that need a GPU, on the emulator: the same kernel sources, plans, grids and policies.
#include <cstdio>
#include <cstdlib>

#include "decode_kernel.cuh"
#include "gemm_kernel.cuh"
#include "kernels.h"

namespace awq_trt {
namespace {

struct DecodeCall {
  GemmArgs args;
  DecodePlan plan;
};
template <void (*kKernel)(GemmArgs, DecodePlan)>
void RunDecode(DecodeCall call) {
  DecodePlan const& plan = call.plan;
  emulator::Grid const grid{plan.slices, plan.ranges, plan.warps() * kWarp, plan.shared_bytes, true};
  auto body = [](void* context) {
    DecodeCall const& c = *static_cast<DecodeCall*>(context);
    kKernel(c.args, c.plan);
  };
  emulator::Run(grid, body, &call);
}

template <void (*kKernel)(GemmArgs)>
void RunGemm(int64_t blocks, GemmArgs args) {
  auto body = [](void* context) { kKernel(*static_cast<GemmArgs*>(context)); };
  emulator::Run({blocks, 1, kGemmThreads, 0, false}, body, &args);
}

}  // namespace

// Few multiprocessors, so that small layers are divided as large ones are on a GPU.
cudaError_t QueryDevice(Device& device) {
  device = {90, 2, 228 << 10};
  return cudaSuccess;
}

cudaError_t AllocateZeroed(void** p, size_t bytes) {
  *p = std::calloc(1, bytes);
  emulator::RegisterMemory(*p, static_cast<int64_t>(bytes), emulator::Memory::kOwn);
  return cudaSuccess;
}
cudaError_t Free(void* p) {
  emulator::ForgetMemory(p);
  std::free(p);
  return cudaSuccess;
}

cudaError_t LaunchDecode(GemmArgs const& args, ActivationType type, DecodePlan const& plan, Device const&,
                         cudaStream_t) {
  DecodeCall const call{args, plan};
  bool const half = type == ActivationType::kHalf;
  switch (plan.token_tiles) {
    case 1:
      (half ? RunDecode<DecodeKernel<Half, 1>> : RunDecode<DecodeKernel<Bfloat16, 1>>)(call);
      break;
    case 2:
      (half ? RunDecode<DecodeKernel<Half, 2>> : RunDecode<DecodeKernel<Bfloat16, 2>>)(call);
      break;
    case 3:
      (half ? RunDecode<DecodeKernel<Half, 3>> : RunDecode<DecodeKernel<Bfloat16, 3>>)(call);
      break;
    default:
      (half ? RunDecode<DecodeKernel<Half, 4>> : RunDecode<DecodeKernel<Bfloat16, 4>>)(call);
  }
  for (int32_t i = 0; i < CeilDiv(args.n, kTileN); ++i) {
    if (args.counters[i] == 0) continue;
    std::fprintf(stderr, "emulator: counter %d is %u after the kernel\n", i, args.counters[i]);
    std::_Exit(3);
  }
  return cudaSuccess;
}

cudaError_t LaunchGemm(GemmArgs const& args, ActivationType type, int32_t token_tiles, cudaStream_t) {
  int64_t const blocks = GemmBlocks(args, token_tiles);
  if (blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  bool const half = type == ActivationType::kHalf;
  switch (token_tiles) {
    case 4:
      (half ? RunGemm<GemmKernel<Half, 4>> : RunGemm<GemmKernel<Bfloat16, 4>>)(blocks, args);
      break;
    case 8:
      (half ? RunGemm<GemmKernel<Half, 8>> : RunGemm<GemmKernel<Bfloat16, 8>>)(blocks, args);
      break;
    case 16:
      (half ? RunGemm<GemmKernel<Half, 16>> : RunGemm<GemmKernel<Bfloat16, 16>>)(blocks, args);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

}  // namespace awq_trt
