// Launching the kernels: what the TensorRT class knows of them.
#pragma once

#include <cuda_runtime_api.h>

#include "decode_plan.h"
#include "problem.h"

namespace awq_trt {

// A tactic is a policy over the number of tokens, not one kernel: TensorRT times one shape per optimization profile.
struct Tactic {
  int32_t id;           // what TensorRT stores: unique, never 0
  DecodePolicy decode;  // up to kDecodeMaxTokens
  int32_t token_tiles;  // tokens / 8 of a block of the tensor-core kernel, beyond: 4, 8 or 16
};

constexpr Tactic kTactics[] = {{1, {1, Split::kEstimated}, 8},
                               {2, {2, Split::kEstimated}, 4},
                               {3, {1, Split::kFewest}, 16},
                               {4, {2, Split::kDouble}, 8}};
constexpr int32_t kTacticCount = sizeof(kTactics) / sizeof(kTactics[0]);
constexpr int32_t kMaxTokens = 1 << 30;    // of one call
constexpr int64_t kMaxBlocks = INT32_MAX;  // of one launch

// The tactic of that id, or nullptr. Id 0 is TensorRT's default and means the first.
Tactic const* FindTactic(int32_t id);

// The current device. cudaErrorNoDevice and the like where there is none.
cudaError_t QueryDevice(Device& device);

// Memory of the current device, zeroed; and giving it back.
cudaError_t AllocateZeroed(void** p, size_t bytes);
cudaError_t Free(void* p);

// What args.workspace needs for calls of up to `tokens` tokens, and args.counters always: whatever the tactic and GPU.
size_t WorkspaceBytes(LayerConfig const& layer, int64_t tokens);
size_t CounterBytes(LayerConfig const& layer);

// Launch the kernel that the tactic chooses for args.tokens; nothing to do for no tokens. Pointers are device memory.
// cudaErrorInvalidConfiguration where the launch needs more than kMaxBlocks blocks.
cudaError_t Launch(GemmArgs const& args, ActivationType type, Tactic const& tactic, Device const& device,
                   cudaStream_t stream);

// The two kernels. Decode runs what PlanDecode planned for these args; gemm is correct for every number of tokens,
// token_tiles is 4, 8 or 16.
cudaError_t LaunchDecode(GemmArgs const& args, ActivationType type, DecodePlan const& plan, Device const& device,
                         cudaStream_t stream);
cudaError_t LaunchGemm(GemmArgs const& args, ActivationType type, int32_t token_tiles, cudaStream_t stream);

}  // namespace awq_trt
