#include "kernels.h"

namespace awq_trt {

Tactic const* FindTactic(int32_t id) {
  if (id == 0) return &kTactics[0];
  for (Tactic const& tactic : kTactics) {
    if (tactic.id == id) return &tactic;
  }
  return nullptr;
}

cudaError_t Launch(GemmArgs const& args, ActivationType type, Tactic const& tactic, cudaStream_t stream) {
  if (args.tokens == 0) return cudaSuccess;
  if (args.tokens > kDecodeMaxTokens) return LaunchGemm(args, type, tactic.token_tiles, stream);
  return LaunchDecode(args, type, args.tokens > 8 ? 2 : 1, tactic.decode_warps, stream);
}

}  // namespace awq_trt
