// The functions of kernels.h that need a GPU, on the emulator: the same kernel sources, plans, grids and policies.
#include "emulated_kernels.h"

#include <cstdio>
#include <cstdlib>

#include "kernels/decode_kernel.cuh"
#include "kernels/dequantize_kernel.cuh"
#include "kernels/gemm_kernel.cuh"
#include "kernels/wgmma_kernel.cuh"
#include "plan/kernels.h"

namespace awq_trt {
namespace {

// Run a kernel with these arguments in a grid.
template <typename... Arguments>
void RunKernel(emulator::Grid const& grid, void (*kernel)(Arguments...), Arguments const&... arguments) {
  auto call = [&] { kernel(arguments...); };
  emulator::Run(grid, [](void* context) { (*static_cast<decltype(call)*>(context))(); }, &call);
}

cudaError_t CheckCounters(GemmArgs const& args, int32_t count) {
  for (int32_t i = 0; i < count; ++i) {
    if (args.counters[i] == 0) continue;
    std::fprintf(stderr, "emulator: counter %d is %u after the kernel\n", i, args.counters[i]);
    std::_Exit(3);
  }
  return cudaSuccess;
}

// Note a launch, and look at the counters after it.
cudaError_t Done(GemmArgs const& args, GemmPlan const& plan) {
  ++emulated_tiles[plan.tile].launches;
  emulated_tiles[plan.tile].split += plan.split_tiles > 0;
  return CheckCounters(args, plan.split_tiles);
}

}  // namespace

EmulatedTile emulated_tiles[kGemmTileCount];
int64_t emulated_dequantizations = 0;

Device emulated_device{90, 2, 228 << 10, true};

cudaError_t QueryDevice(Device& device) {
  device = emulated_device;
  return cudaSuccess;
}
bool HasWgmma() { return true; }

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

cudaError_t LaunchDequantize(GemmArgs const& args, ActivationType type, int32_t first_strip, int32_t strips,
                             uint16_t* w, cudaStream_t) {
  WeightRows const rows{first_strip, strips, w};
  if (!CanDequantize(args, rows)) return cudaErrorInvalidValue;
  if (strips == 0) return cudaSuccess;
  ++emulated_dequantizations;
  RunKernel({DequantizeBlocks(args, strips), 1, kDequantizeThreads, kDequantizeSharedBytes, false},
            DequantizeKernelFor(type), args, rows);
  return cudaSuccess;
}

cudaError_t LaunchDecode(GemmArgs const& args, ActivationType type, DecodePlan const& plan, Device const&,
                         cudaStream_t) {
  RunKernel({plan.slices, plan.ranges, plan.warps() * kWarp, plan.shared_bytes, true},
            DecodeKernelFor(type, plan.token_tiles), args, plan);
  return CheckCounters(args, CeilDiv(args.n, kTileN));
}

cudaError_t LaunchGemm(GemmArgs const& args, ActivationType type, GemmPlan const& plan, Device const&, cudaStream_t) {
  GemmTile const& tile = kGemmTiles[plan.tile];
  RunKernel({plan.blocks, 1, tile.warps * kWarp, plan.shared_bytes, true}, GemmKernelFor(type, tile), args, plan);
  return Done(args, plan);
}

cudaError_t LaunchWgmma(GemmArgs const& args, ActivationType type, GemmPlan const& plan, Device const&, cudaStream_t) {
  GemmTile const& tile = kGemmTiles[plan.tile];
  int64_t const words = plan.units * kWarp * kSteps;
  WgmmaMaps maps;
  maps.x = emulator::Encode({args.x, args.k, args.tokens, 2 * args.k, 2, kTileK, tile.tokens, true});
  maps.q = emulator::Encode(
      {args.qweight, words, CeilDiv(args.n, kTileN), 4 * words, 4, kWarp * kSteps, tile.warps * tile.strips, false});
  RunKernel({plan.blocks, 1, kWgmmaThreads, plan.shared_bytes, true}, WgmmaKernelFor(type, tile), args, plan, maps);
  return Done(args, plan);
}

}  // namespace awq_trt
