// Very many tokens: a product whose weights are dequantized costs hardly more than one in 16 bits, which cuBLASLt does
// as well as can be.
#include <algorithm>

#include "plan/cublas_lt.h"
#include "plan/kernels.h"

namespace awq_trt {
namespace {

constexpr int64_t kCublasLtBytes = 32 << 20;  // what NVIDIA recommends for Hopper
constexpr int32_t kLeastRows = 1024;          // of a piece: with fewer, cuBLASLt leaves SMs idle
constexpr int32_t kRowStep = 128;             // of pieces: its tiles

// Rows of W that the workspace holds at once; 0 if that is too few.
int32_t PieceRows(GemmArgs const& args) {
  int64_t const bytes = (static_cast<int64_t>(args.workspace_mib) << 20) - kCublasLtBytes, row_bytes = 2LL * args.k;
  if (bytes < row_bytes * std::min(args.n, kLeastRows)) return 0;
  int32_t const most = static_cast<int32_t>(std::min<int64_t>(bytes / row_bytes, args.n));
  if (most == args.n) return args.n;
  int32_t const pieces = CeilDiv(args.n, most / kRowStep * kRowStep);
  return CeilDiv(CeilDiv(args.n, pieces), kRowStep) * kRowStep;
}

size_t PieceBytes(GemmArgs const& args) {  // up to a multiple of what cuBLASLt likes its workspace to be aligned to
  return (static_cast<size_t>(PieceRows(args)) * args.k * 2 + 255) / 256 * 256;
}

}  // namespace

size_t DequantizedWorkspaceBytes(GemmArgs const& args) {
  return PieceRows(args) == 0 ? 0 : PieceBytes(args) + kCublasLtBytes;
}

cudaError_t LaunchDequantized(GemmArgs const& args, ActivationType type, cudaStream_t stream) {
  int32_t const rows = PieceRows(args);
  if (rows == 0) return cudaErrorNotSupported;
  uint16_t* const w = static_cast<uint16_t*>(args.workspace);
  for (bool launch : {false, true}) {  // ask for all products before anything is launched
    for (int32_t begin = 0; begin < args.n; begin += rows) {
      int32_t const end = std::min(args.n, begin + rows);
      if (launch) {
        cudaError_t const error = LaunchDequantize(args, type, begin / kTileN, CeilDiv(end - begin, kTileN), w, stream);
        if (error != cudaSuccess) return error;
      }
      for (int32_t i = 0, output_begin = 0; i < kMaxOutputs && output_begin < args.n; output_begin = args.ends[i++]) {
        int32_t const from = std::max(begin, output_begin), to = std::min(end, args.ends[i]);
        if (from >= to) continue;
        MatMul const product{type,
                             args.tokens,
                             to - from,
                             args.k,
                             args.x,
                             w + static_cast<int64_t>(from - begin) * args.k,
                             args.bias != nullptr ? args.bias + from : nullptr,
                             args.y[i] + (from - output_begin),
                             args.ends[i] - output_begin,
                             static_cast<char*>(args.workspace) + PieceBytes(args),
                             kCublasLtBytes};
        cudaError_t const error = launch ? RunCublasLt(product, stream) : PrepareCublasLt(product, stream);
        if (error != cudaSuccess) return launch ? error : cudaErrorNotSupported;
      }
    }
  }
  return cudaSuccess;
}

}  // namespace awq_trt
