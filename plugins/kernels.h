// Launching the kernels: what the TensorRT class knows of them.
#pragma once

#include <cuda_runtime_api.h>

#include "problem.h"

namespace awq_trt {

// A tactic is a policy over the number of tokens, not one kernel: TensorRT times one shape per optimization profile.
struct Tactic {
  int32_t id;            // what TensorRT stores: unique, never 0
  int32_t decode_warps;  // warps that share a block's K in the decode kernel
  int32_t token_tiles;   // tokens / 8 of a block of the tensor-core kernel: 4, 8 or 16
};

constexpr Tactic kTactics[] = {{1, 8, 8}, {2, 4, 4}, {3, 16, 16}};
constexpr int32_t kTacticCount = sizeof(kTactics) / sizeof(kTactics[0]);
constexpr int32_t kDecodeMaxTokens = 16;   // the decode kernel up to here, the tensor-core kernel beyond
constexpr int32_t kMaxTokens = 1 << 30;    // of one call
constexpr int64_t kMaxBlocks = INT32_MAX;  // of one launch

// The tactic of that id, or nullptr. Id 0 is TensorRT's default and means the first.
Tactic const* FindTactic(int32_t id);

// Launch the kernel that the tactic chooses for args.tokens; nothing to do for no tokens. Pointers are device memory.
// cudaErrorInvalidConfiguration where the launch needs more than kMaxBlocks blocks.
cudaError_t Launch(GemmArgs const& args, ActivationType type, Tactic const& tactic, cudaStream_t stream);

// The two kernels, each correct for every number of tokens. token_tiles: 1 or 2 for decode, 4, 8 or 16 for gemm.
cudaError_t LaunchDecode(GemmArgs const& args, ActivationType type, int32_t token_tiles, int32_t warps,
                         cudaStream_t stream);
cudaError_t LaunchGemm(GemmArgs const& args, ActivationType type, int32_t token_tiles, cudaStream_t stream);

}  // namespace awq_trt
