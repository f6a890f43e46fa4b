#include "kernels/decode_kernel.cuh"
#include "plan/kernels.h"
#include "plan/launch.h"

namespace awq_trt {

cudaError_t LaunchDecode(GemmArgs const& args, ActivationType type, DecodePlan const& plan, Device const& device,
                         cudaStream_t stream) {
  dim3 const blocks(static_cast<uint32_t>(plan.slices), static_cast<uint32_t>(plan.ranges));
  LaunchShape const shape{blocks, plan.warps() * kWarp, plan.shared_bytes};
  return LaunchEarly(DecodeKernelFor(type, plan.token_tiles), shape, device, stream, args, plan);
}

}  // namespace awq_trt
