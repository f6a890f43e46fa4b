#include "kernels/dequantize_kernel.cuh"
#include "plan/kernels.h"

namespace awq_trt {

cudaError_t LaunchDequantize(GemmArgs const& args, ActivationType type, int32_t first_strip, int32_t strips,
                             uint16_t* w, cudaStream_t stream) {
  WeightRows const rows{first_strip, strips, w};
  if (!CanDequantize(args, rows)) return cudaErrorInvalidValue;
  int32_t const blocks = DequantizeBlocks(args, strips);
  if (blocks == 0) return cudaSuccess;
  DequantizeKernelFor(type)<<<blocks, kDequantizeThreads, kDequantizeSharedBytes, stream>>>(args, rows);
  return cudaGetLastError();
}

}  // namespace awq_trt
