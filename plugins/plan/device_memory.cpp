#include "plan/kernels.h"

namespace awq_trt {

cudaError_t QueryDevice(Device& device) {
  int32_t index = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&index);
  auto get = [&](int32_t& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, index);
  };
  get(major, cudaDevAttrComputeCapabilityMajor);
  get(minor, cudaDevAttrComputeCapabilityMinor);
  get(device.sm_count, cudaDevAttrMultiProcessorCount);
  get(device.shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  device.sm = 10 * major + minor;
  device.wgmma = device.sm == 90 && HasWgmma();
  return error;
}

cudaError_t AllocateZeroed(void** p, size_t bytes) {
  cudaError_t const error = cudaMalloc(p, bytes);
  return error != cudaSuccess ? error : cudaMemset(*p, 0, bytes);
}

cudaError_t Free(void* p) { return cudaFree(p); }

}  // namespace awq_trt
