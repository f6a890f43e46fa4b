// What the operator W4A16Gemm computes, as plain data: no CUDA and no TensorRT in this header.
//
//   Y[m, n] = sum_k (X[m, k] * pre_scale[k]) * W[n, k] + bias[n]
//   W[n, k] = (q[n, k] - zero[n, k / group]) * scale[n, k / group]      zero = 8 where there are no zeros
//
// The products X * pre_scale and (q - zero) * scale are rounded to the type of X; sums are fp32.
#pragma once

#include <cstdint>

namespace awq_trt {

enum class ActivationType : int32_t { kHalf, kBfloat16 };

// One layer: its shape and which optional inputs it has.
struct LayerConfig {
  int32_t out_features;  // N
  int32_t in_features;   // K
  int32_t group_size;    // 32, 64, 128 or K
  bool has_zeros;
  bool has_bias;
  bool has_pre_scale;
};

// One call. N16 = ceil(N / 16), K64 = ceil(K / 64), G = K / group_size; the packed layout is drawn in fragments.h.
struct GemmArgs {
  uint16_t const* x;          // [tokens, K]
  uint32_t const* qweight;    // [N16, K64, 32, 4], 16-byte aligned
  uint16_t const* scales;     // [N16, G, 8, 2], 4-byte aligned
  uint8_t const* zeros;       // [N16, G, 8] or nullptr
  uint16_t const* bias;       // [N] or nullptr
  uint16_t const* pre_scale;  // [K] or nullptr, 4-byte aligned
  uint16_t* y;                // [tokens, N]
  int32_t tokens;
  int32_t n;
  int32_t k;
  int32_t groups;       // G
  int32_t group_shift;  // group of column c is min(c >> group_shift, G - 1)
  bool x_aligned;       // x is 16-byte aligned: vector loads
  bool y_aligned;       // y is 16-byte aligned: vector stores
};

// Everything of GemmArgs that follows from the layer; the pointers, `tokens` and alignments are the caller's.
GemmArgs MakeArgs(LayerConfig const& layer);

struct Reason {
  char text[256];  // empty where the layer is supported
  bool empty() const { return text[0] == '\0'; }
};

// The capability table, the same as awq_trt/layout.py: why the kernels cannot run this layer, or nothing.
// `sm` is the compute capability times ten.
Reason WhyNot(int64_t n, int64_t k, int64_t group_size, ActivationType type, int32_t sm);

}  // namespace awq_trt
