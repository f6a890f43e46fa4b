#include "kernels/gemm_kernel.cuh"
#include "plan/kernels.h"
#include "plan/launch.h"

namespace awq_trt {

cudaError_t LaunchGemm(GemmArgs const& args, ActivationType type, GemmPlan const& plan, Device const& device,
                       cudaStream_t stream) {
  GemmTile const& tile = kGemmTiles[plan.tile];
  LaunchShape const shape{dim3(plan.blocks), tile.warps * kWarp, plan.shared_bytes};
  return LaunchEarly(GemmKernelFor(type, tile), shape, device, stream, args, plan);
}

}  // namespace awq_trt
