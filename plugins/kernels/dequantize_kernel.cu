#include "kernels/dequantize_kernel.cuh"
#include "plan/kernels.h"

namespace awq_trt {

cudaError_t LaunchDequantize(GemmArgs const& args, ActivationType type, int32_t first_row_tile, int32_t row_tiles,
                             uint16_t* w, cudaStream_t stream) {
  WeightRows const rows{first_row_tile, row_tiles, w};
  if (!CanDequantize(args, rows)) return cudaErrorInvalidValue;
  int32_t const blocks = DequantizeBlocks(args, row_tiles);
  if (blocks == 0) return cudaSuccess;
  DequantizeKernelFor(type)<<<blocks, kDequantizeThreads, kDequantizeSharedBytes, stream>>>(args, rows);
  return cudaGetLastError();
}

}  // namespace awq_trt
