#include "kernels/decode_kernel.cuh"
#include "plan/kernels.h"
#include "plan/launch.h"

namespace awq_trt {

cudaError_t LaunchDecode(GemmArgs const& args, ActivationType type, DecodeSchedule const& schedule,
                         Device const& device, cudaStream_t stream) {
  dim3 const blocks(static_cast<uint32_t>(schedule.slices), static_cast<uint32_t>(schedule.ranges));
  LaunchShape const shape{blocks, schedule.warps() * kWarp, schedule.shared_bytes};
  return LaunchEarly(DecodeKernelFor(type, schedule.token_tiles), shape, device, stream, args, schedule);
}

}  // namespace awq_trt
