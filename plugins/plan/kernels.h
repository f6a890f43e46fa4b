// Launching the kernels: what the TensorRT class knows of them.
#pragma once

#include <cuda_runtime_api.h>

#include "plan/decode_schedule.h"
#include "plan/gemm_schedule.h"
#include "plan/problem.h"

namespace awq_trt {

constexpr int32_t kMaxTokens = 1 << 30;      // of one call
constexpr int32_t kDequantizeTokens = 1024;  // fewer are not worth it

// A tactic is a policy over the number of tokens, not one kernel: TensorRT times one shape per optimization profile.
struct Tactic {
  int32_t id;                                // what TensorRT stores: unique, never 0
  DecodePolicy decode;                       // up to kDecodeMaxTokens
  GemmPolicy gemm;                           // beyond
  int32_t dequantize_from = kMaxTokens + 1;  // from so many on: the layer is dequantized, cuBLASLt multiplies
};

constexpr Tactic kTactics[] = {{1, {1, Split::kEstimated}, {0, Splitting::kEstimated}},
                               {2, {2, Split::kEstimated}, {0, Splitting::kNever}},
                               {3, {1, Split::kFewest}, {1, Splitting::kAlways}},
                               {4, {2, Split::kDouble}, {-1, Splitting::kAlways}},
                               {5, {1, Split::kEstimated}, {0, Splitting::kEstimated}, kDequantizeTokens}};
constexpr int32_t kTacticCount = sizeof(kTactics) / sizeof(kTactics[0]);

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
// cudaErrorInvalidConfiguration where there are more tiles than can be counted.
cudaError_t Launch(GemmArgs const& args, ActivationType type, Tactic const& tactic, Device const& device,
                   cudaStream_t stream);

// Dequantize the layer piece by piece into the workspace, each piece multiplied by cuBLASLt. cudaErrorNotSupported, and
// nothing has been launched, where that cannot be: no cuBLASLt (CublasLtProblem says why), workspace_mib is too little.
cudaError_t LaunchDequantized(GemmArgs const& args, ActivationType type, cudaStream_t stream);
size_t DequantizedWorkspaceBytes(GemmArgs const& args);  // 0 where it cannot be

// The kernels: each runs what was planned for these args. Decode and Gemm are for every GPU, Wgmma for sm_90, where
// HasWgmma says that it is in this library.
cudaError_t LaunchDecode(GemmArgs const& args, ActivationType type, DecodeSchedule const& schedule,
                         Device const& device, cudaStream_t stream);
cudaError_t LaunchGemm(GemmArgs const& args, ActivationType type, GemmSchedule const& schedule, Device const& device,
                       cudaStream_t stream);
cudaError_t LaunchWgmma(GemmArgs const& args, ActivationType type, GemmSchedule const& schedule, Device const& device,
                        cudaStream_t stream);
bool HasWgmma();

// Rows 16 * first_row_tile .. of the layer, 16 * row tiles of them, cut at N, as w [rows, K], 16-byte aligned: weights
// times pre_scale where there is one.
cudaError_t LaunchDequantize(GemmArgs const& args, ActivationType type, int32_t first_row_tile, int32_t row_tiles,
                             uint16_t* w, cudaStream_t stream);

}  // namespace awq_trt
