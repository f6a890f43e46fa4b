#include "kernels/gemm_kernel.cuh"
#include "plan/kernels.h"
#include "plan/launch.h"

namespace awq_trt {

cudaError_t LaunchGemm(GemmArgs const& args, ActivationType type, GemmSchedule const& schedule, Device const& device,
                       cudaStream_t stream) {
  GemmTile const& tile = kGemmTiles[schedule.tile];
  LaunchShape const shape{dim3(schedule.blocks), tile.warps * kWarp, schedule.shared_bytes};
  return LaunchEarly(GemmKernelFor(type, tile), shape, device, stream, args, schedule);
}

}  // namespace awq_trt
