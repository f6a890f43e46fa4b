#include <algorithm>

#include "plan/kernels.h"

namespace awq_trt {

Tactic const* FindTactic(int32_t id) {
  if (id == 0) return &kTactics[0];
  for (Tactic const& tactic : kTactics) {
    if (tactic.id == id) return &tactic;
  }
  return nullptr;
}

size_t WorkspaceBytes(LayerConfig const& layer, int64_t tokens) {
  int32_t const n = layer.out_features, k = layer.in_features;
  size_t const dequantized = tokens >= kDequantizeTokens ? DequantizedWorkspaceBytes(MakeArgs(layer)) : 0;
  return std::max({DecodeWorkspaceBytes(n, k, tokens), GemmWorkspaceBytes(n, k, tokens), dequantized});
}

size_t CounterBytes(LayerConfig const& layer) {
  return sizeof(uint32_t) * std::max(CeilDiv(layer.out_features, kTileN), kMaxSplitTiles);
}

cudaError_t Launch(GemmArgs const& args, ActivationType type, Tactic const& tactic, Device const& device,
                   cudaStream_t stream) {
  if (args.tokens == 0) return cudaSuccess;
  if (args.tokens >= tactic.dequantize_from) {
    cudaError_t const error = LaunchDequantized(args, type, stream);
    if (error != cudaErrorNotSupported) return error;
  }
  DecodeSchedule decode;
  if (ScheduleDecode(args, tactic.decode, device, decode)) return LaunchDecode(args, type, decode, device, stream);
  GemmSchedule gemm;
  if (!ScheduleGemm(args, tactic.gemm, device, gemm)) return cudaErrorInvalidConfiguration;
  return kGemmTiles[gemm.tile].wgmma ? LaunchWgmma(args, type, gemm, device, stream)
                                     : LaunchGemm(args, type, gemm, device, stream);
}

}  // namespace awq_trt
