// What the operator W4A16Gemm computes, as plain data: no CUDA call and no TensorRT in this header.
//
//   Y[m, n] = sum_k X[m, k] * pre_scale[k] * W[n, k] + bias[n]
//   W[n, k] = (q[n, k] - zero[n, k / group]) * scale[n, k / group]      zero = 8 where there are no zeros
//
// W may be rounded to the type of X, and either X * pre_scale or W * pre_scale is; sums are fp32. Layers that read the
// same X can be one: their rows follow each other in W, and Y is cut at `splits` into one output per layer.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define AWQ_HOST_DEVICE __host__ __device__ constexpr
#else
#define AWQ_HOST_DEVICE constexpr
#endif

namespace awq_trt {

enum class ActivationType : int32_t { kHalf, kBfloat16 };

inline bool IsAligned(void const* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

constexpr int32_t kMaxOutputs = 4;
constexpr int32_t kDefaultWorkspaceMib = 160;
constexpr int32_t kTileN = 16, kTileK = 64;  // of the packed layout, drawn in fragments.h
constexpr int32_t kTokenTile = 8;            // tokens of one mma

AWQ_HOST_DEVICE int32_t CeilDiv(int32_t a, int32_t b) { return (a + b - 1) / b; }

// `total` items cut into parts whose sizes differ by at most one, the larger ones first.
struct Cut {
  int32_t base, extra;
  AWQ_HOST_DEVICE int32_t Begin(int32_t part) const { return part * base + (part < extra ? part : extra); }
  AWQ_HOST_DEVICE int32_t Size(int32_t part) const { return base + (part < extra ? 1 : 0); }
  // The part of an item.
  AWQ_HOST_DEVICE int32_t PartOf(int32_t item) const {
    int32_t const larger = extra * (base + 1);
    return item < larger ? item / (base + 1) : extra + (item - larger) / base;
  }
};

// One layer: its shape and which optional inputs it has.
struct LayerConfig {
  int32_t out_features;  // N
  int32_t in_features;   // K
  int32_t group_size;    // 32, 64, 128 or K
  bool has_zeros;
  bool has_bias;
  bool has_pre_scale;
  int32_t outputs = 1;
  int32_t splits[kMaxOutputs] = {};              // out_features of each output where there is more than one
  int32_t workspace_mib = kDefaultWorkspaceMib;  // at most, for dequantized weights; 0: never dequantize a layer
};

// One call. N16 = ceil(N / 16), K64 = ceil(K / 64), G = K / group_size; the packed layout is drawn in fragments.h.
struct GemmArgs {
  uint16_t const* x;          // [tokens, K]
  uint32_t const* qweight;    // [N16, K64, 32, 4], 16-byte aligned
  uint16_t const* scales;     // [N16, G, 8, 2], 16-byte aligned
  uint8_t const* zeros;       // [N16, G, 8] or nullptr, 8-byte aligned
  uint16_t const* bias;       // [N] or nullptr
  uint16_t const* pre_scale;  // [K] or nullptr, 16-byte aligned
  uint16_t* y[kMaxOutputs];   // [tokens, rows of that output]
  int32_t ends[kMaxOutputs];  // the rows of output i are ends[i - 1] .. ends[i] - 1; N from the last output on
  void* workspace;            // WorkspaceBytes of scratch, 16-byte aligned; its content does not matter
  uint32_t* counters;         // [N16], 0 before and after every call
  int32_t tokens;
  int32_t n;
  int32_t k;
  int32_t groups;         // G
  int32_t group_shift;    // group of column c is min(c >> group_shift, G - 1)
  int32_t workspace_mib;  // of the layer
  bool x_aligned;         // x is 16-byte aligned: vector loads
  bool y_aligned;         // every y is 16-byte aligned: vector stores
};

// Everything of GemmArgs that follows from the layer; the pointers, `tokens` and alignments are the caller's.
GemmArgs MakeArgs(LayerConfig const& layer);

struct Reason {
  char text[256];  // empty where the layer is supported
  bool empty() const { return text[0] == '\0'; }
};

// The capability table, the same as awq_trt/layout.py: why the kernels cannot run this layer, or nothing.
// `sm` is the compute capability times ten.
Reason UnsupportedReason(int64_t n, int64_t k, int64_t group_size, ActivationType type, int32_t sm);

// Why Y [.., n] cannot be cut so, or nothing.
Reason UnsupportedSplitReason(int64_t n, int32_t outputs, int32_t const* splits);

}  // namespace awq_trt
