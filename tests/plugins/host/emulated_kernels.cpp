// The functions of kernels.h that need a GPU, on the emulator: the same kernel sources, schedules, grids and policies.
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
cudaError_t Done(GemmArgs const& args, GemmSchedule const& schedule) {
  ++emulated_tiles[schedule.tile].launches;
  emulated_tiles[schedule.tile].split += schedule.split_tiles > 0;
  return CheckCounters(args, schedule.split_tiles);
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

cudaError_t LaunchDequantize(GemmArgs const& args, ActivationType type, int32_t first_row_tile, int32_t row_tiles,
                             uint16_t* w, cudaStream_t) {
  WeightRows const rows{first_row_tile, row_tiles, w};
  if (!CanDequantize(args, rows)) return cudaErrorInvalidValue;
  if (row_tiles == 0) return cudaSuccess;
  ++emulated_dequantizations;
  RunKernel({DequantizeBlocks(args, row_tiles), 1, kDequantizeThreads, kDequantizeSharedBytes, false},
            DequantizeKernelFor(type), args, rows);
  return cudaSuccess;
}

cudaError_t LaunchDecode(GemmArgs const& args, ActivationType type, DecodeSchedule const& schedule, Device const&,
                         cudaStream_t) {
  RunKernel({schedule.slices, schedule.ranges, schedule.warps() * kWarp, schedule.shared_bytes, true},
            DecodeKernelFor(type, schedule.token_tiles), args, schedule);
  return CheckCounters(args, CeilDiv(args.n, kTileN));
}

cudaError_t LaunchGemm(GemmArgs const& args, ActivationType type, GemmSchedule const& schedule, Device const&,
                       cudaStream_t) {
  GemmTile const& tile = kGemmTiles[schedule.tile];
  RunKernel({schedule.blocks, 1, tile.warps * kWarp, schedule.shared_bytes, true}, GemmKernelFor(type, tile), args,
            schedule);
  return Done(args, schedule);
}

cudaError_t LaunchWgmma(GemmArgs const& args, ActivationType type, GemmSchedule const& schedule, Device const&,
                        cudaStream_t) {
  GemmTile const& tile = kGemmTiles[schedule.tile];
  int64_t const words = schedule.k_blocks * kWarp * kSteps;
  WgmmaMaps maps;
  maps.x = emulator::Encode({args.x, args.k, args.tokens, 2 * args.k, 2, kTileK, tile.tokens, true});
  maps.q = emulator::Encode(
      {args.qweight, words, CeilDiv(args.n, kTileN), 4 * words, 4, kWarp * kSteps, tile.warps * tile.row_tiles, false});
  RunKernel({schedule.blocks, 1, kWgmmaThreads, schedule.shared_bytes, true}, WgmmaKernelFor(type, tile), args,
            schedule, maps);
  return Done(args, schedule);
}

}  // namespace awq_trt
