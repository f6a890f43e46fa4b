#include "kernels.h"

namespace awq_trt {

Tactic const* FindTactic(int32_t id) {
  if (id == 0) return &kTactics[0];
  for (Tactic const& tactic : kTactics) {
    if (tactic.id == id) return &tactic;
  }
  return nullptr;
}

size_t WorkspaceBytes(LayerConfig const& layer, int64_t tokens) {
  return DecodeWorkspaceBytes(layer.out_features, layer.in_features, tokens);
}

size_t CounterBytes(LayerConfig const& layer) { return sizeof(uint32_t) * CeilDiv(layer.out_features, kTileN); }

cudaError_t Launch(GemmArgs const& args, ActivationType type, Tactic const& tactic, Device const& device,
                   cudaStream_t stream) {
  if (args.tokens == 0) return cudaSuccess;
  DecodePlan plan;
  if (PlanDecode(args, tactic.decode, device, plan)) return LaunchDecode(args, type, plan, device, stream);
  return LaunchGemm(args, type, tactic.token_tiles, stream);
}

}  // namespace awq_trt
