#include "decode_kernel.cuh"
#include "kernels.h"

namespace awq_trt {
cudaError_t LaunchDecode(GemmArgs const& args, ActivationType type, DecodePlan const& plan, Device const& device,
                         cudaStream_t stream) {
  DecodeFunction const kernel = DecodeKernelFor(type, plan.token_tiles);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  if (error != cudaSuccess) return error;
  // all of it: the next layer's blocks are to fit beside these
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<uint32_t>(plan.slices), static_cast<uint32_t>(plan.ranges));
  config.blockDim = dim3(static_cast<uint32_t>(plan.warps() * kWarp));
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = device.sm >= 90 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args, plan);
}

}  // namespace awq_trt
