// The kernels without TensorRT, as a library of plain C functions: for benchmarks, and for tests on a GPU. Pointers are
// device memory, packed as awq_trt/layout.py packs.
#include <initializer_list>

#include "plan/kernels.h"

using namespace awq_trt;

#define AWQ_API extern "C" __attribute__((visibility("default")))

namespace {

LayerConfig LayerOf(int32_t n, int32_t k, int32_t group_size) { return {n, k, group_size, false, false, false}; }

}  // namespace

// The number of tactics; up to `capacity` of their ids.
AWQ_API int awq_trt_tactics(int* ids, int capacity) {
  for (int i = 0; i < kTacticCount && i < capacity; ++i) ids[i] = kTactics[i].id;
  return kTacticCount;
}

// Scratch for a call of up to `tokens` tokens, whatever the tactic; its content does not matter.
AWQ_API size_t awq_trt_workspace_bytes(int tokens, int n, int k) { return WorkspaceBytes(LayerOf(n, k, k), tokens); }

// Zero before the first call, and again after every call.
AWQ_API size_t awq_trt_counter_bytes(int n) { return CounterBytes(LayerOf(n, 0, 0)); }

// y [tokens, n] = x [tokens, k] times the weights. zeros, bias and pre_scale may be nullptr. 0, or a cudaError_t;
// cudaErrorInvalidValue for a layer or a tactic that there is not, or memory that is not aligned to 16 bytes.
AWQ_API int awq_trt_gemm(void const* x, void const* qweight, void const* scales, void const* zeros, void const* bias,
                         void const* pre_scale, void* y, int tokens, int n, int k, int group_size, int is_bfloat16,
                         int tactic, void* workspace, void* counters, void* stream) {
  ActivationType const type = is_bfloat16 != 0 ? ActivationType::kBfloat16 : ActivationType::kHalf;
  Device device;
  cudaError_t const error = QueryDevice(device);
  if (error != cudaSuccess) return error;
  Tactic const* const found = FindTactic(tactic);
  if (found == nullptr || tokens < 0 || !UnsupportedReason(n, k, group_size, type, device.sm).empty())
    return cudaErrorInvalidValue;
  for (void const* p : {x, qweight, scales, zeros, pre_scale, static_cast<void const*>(y),
                        static_cast<void const*>(workspace), static_cast<void const*>(counters)}) {
    if (!IsAligned(p, 16)) return cudaErrorInvalidValue;
  }
  GemmArgs args = MakeArgs(LayerOf(n, k, group_size));
  args.x = static_cast<uint16_t const*>(x);
  args.qweight = static_cast<uint32_t const*>(qweight);
  args.scales = static_cast<uint16_t const*>(scales);
  args.zeros = static_cast<uint8_t const*>(zeros);
  args.bias = static_cast<uint16_t const*>(bias);
  args.pre_scale = static_cast<uint16_t const*>(pre_scale);
  args.y[0] = static_cast<uint16_t*>(y);
  args.workspace = workspace;
  args.counters = static_cast<uint32_t*>(counters);
  args.tokens = tokens;
  args.x_aligned = args.y_aligned = true;
  return Launch(args, type, *found, device, static_cast<cudaStream_t>(stream));
}

AWQ_API char const* awq_trt_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
