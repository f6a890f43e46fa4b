// Launching a kernel that brings its own weights before the kernel before it has ended (griddepcontrol in device.h).
#pragma once

#include <cuda_runtime_api.h>

#include "plan/gpu.h"

namespace awq_trt {

struct LaunchShape {
  dim3 blocks;
  int32_t threads, shared_bytes;  // of a block
};

template <typename... Arguments>
cudaError_t LaunchEarly(void (*kernel)(Arguments...), LaunchShape const& shape, Device const& device,
                        cudaStream_t stream, Arguments... arguments) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes);
  if (error != cudaSuccess) return error;
  // all of it: the next layer's blocks are to fit beside these
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.blocks;
  config.blockDim = dim3(static_cast<uint32_t>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = device.sm >= 90 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace awq_trt
