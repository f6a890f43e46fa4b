#include "plan/kernels.h"

#ifdef AWQ_TRT_WGMMA  // this file is compiled for sm_90a

#include <cuda.h>

#include "kernels/wgmma_kernel.cuh"
#include "plan/launch.h"

namespace awq_trt {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// Of the driver: this library is not linked to it. nullptr where there is none.
Encode FindEncode() {
  static Encode const found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaError_t const error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  return found;
}

struct Matrix {
  void const* data;
  CUtensorMapDataType type;
  uint64_t columns, rows, row_bytes;
};

bool MakeMap(TensorMap& map, Matrix const& matrix, uint32_t box_columns, uint32_t box_rows,
             CUtensorMapSwizzle swizzle) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));
  Encode const encode = FindEncode();
  cuuint64_t const sizes[] = {matrix.columns, matrix.rows}, strides[] = {matrix.row_bytes};
  cuuint32_t const box[] = {box_columns, box_rows}, steps[] = {1, 1};
  return encode != nullptr &&
         encode(reinterpret_cast<CUtensorMap*>(&map), matrix.type, 2, const_cast<void*>(matrix.data), sizes, strides,
                box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace

bool HasWgmma() { return true; }

cudaError_t LaunchWgmma(GemmArgs const& args, ActivationType type, GemmSchedule const& schedule, Device const& device,
                        cudaStream_t stream) {
  GemmTile const& tile = kGemmTiles[schedule.tile];
  uint64_t const words = static_cast<uint64_t>(schedule.k_blocks) * kWarp * kSteps;
  Matrix const x{args.x,
                 type == ActivationType::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                 static_cast<uint64_t>(args.k), static_cast<uint64_t>(args.tokens), 2 * static_cast<uint64_t>(args.k)};
  Matrix const q{args.qweight, CU_TENSOR_MAP_DATA_TYPE_UINT32, words, static_cast<uint64_t>(CeilDiv(args.n, kTileN)),
                 4 * words};
  WgmmaMaps maps;
  bool const made = MakeMap(maps.x, x, kTileK, tile.tokens, CU_TENSOR_MAP_SWIZZLE_128B) &&
                    MakeMap(maps.q, q, kWarp * kSteps, tile.warps * tile.row_tiles, CU_TENSOR_MAP_SWIZZLE_NONE);
  if (!made) return cudaErrorNotSupported;
  LaunchShape const shape{dim3(schedule.blocks), kWgmmaThreads, schedule.shared_bytes};
  return LaunchEarly(WgmmaKernelFor(type, tile), shape, device, stream, args, schedule, maps);
}

}  // namespace awq_trt

#else

namespace awq_trt {

bool HasWgmma() { return false; }

cudaError_t LaunchWgmma(GemmArgs const&, ActivationType, GemmSchedule const&, Device const&, cudaStream_t) {
  return cudaErrorNotSupported;
}

}  // namespace awq_trt

#endif
