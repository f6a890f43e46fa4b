// The functions of kernels.h that need a GPU, on the emulator: the same kernel sources, plans, grids and policies.
#include <cstdio>
#include <cstdlib>

#include "decode_kernel.cuh"
#include "gemm_kernel.cuh"
#include "kernels.h"

namespace awq_trt {
namespace {

struct DecodeCall {
  DecodeFunction kernel;
  GemmArgs args;
  DecodePlan plan;
};

struct GemmCall {
  GemmFunction kernel;
  GemmArgs args;
};

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
  DecodeCall call{DecodeKernelFor(type, plan.token_tiles), args, plan};
  auto body = [](void* context) {
    DecodeCall const& c = *static_cast<DecodeCall*>(context);
    c.kernel(c.args, c.plan);
  };
  emulator::Run({plan.slices, plan.ranges, plan.warps() * kWarp, plan.shared_bytes, true}, body, &call);
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
  GemmCall call{GemmKernelFor(type, token_tiles), args};
  if (call.kernel == nullptr) return cudaErrorInvalidValue;
  auto body = [](void* context) {
    GemmCall const& c = *static_cast<GemmCall*>(context);
    c.kernel(c.args);
  };
  emulator::Run({blocks, 1, kGemmThreads, 0, false}, body, &call);
  return cudaSuccess;
}

}  // namespace awq_trt
