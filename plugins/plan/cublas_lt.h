// A product of plain 16-bit matrices by cuBLASLt, which is found when it is first needed: to build the plugin and to
// load it, neither its library nor its headers are.
#pragma once

#include <cuda_runtime_api.h>

#include "plan/problem.h"

namespace awq_trt {

// Y[t, r] = sum_k X[t, k] * W[r, k] + bias[r], sums in fp32. Pointers are device memory.
struct MatMul {
  ActivationType type;
  int32_t tokens, rows, k;
  uint16_t const* x;     // [tokens, k]
  uint16_t const* w;     // [rows, k]
  uint16_t const* bias;  // [rows] or nullptr
  uint16_t* y;           // row 0 of [tokens, y_stride]
  int32_t y_stride;      // elements from one token to the next, at least `rows`
  void* workspace;       // scratch for cuBLASLt, best aligned to 256 bytes; or nullptr
  size_t workspace_bytes;
};

// Whether the library has been found, with all that is used of it; the first call looks for it, once per process. The
// environment variable AWQ_TRT_CUBLASLT is the path of the library to take, and of no other. Otherwise it is what the
// process has already loaded, or what the loader finds, of CUDA 13 or 12.
bool CublasLtAvailable();

// Why the library is not available, else what was wrong with this thread's last call below.
char const* CublasLtProblem();

// What the first RunCublasLt of a problem does before it launches anything. cudaErrorNotSupported: cuBLASLt cannot
// multiply this, take another kernel. That also is the answer during a stream capture for a problem that has not been
// prepared before, as cuBLASLt cannot be asked then; a problem is the shape, the strides and alignments, and the
// device.
cudaError_t PrepareCublasLt(MatMul const& problem, cudaStream_t stream);

// Launch it: no memory of the device is taken and nothing is waited for, microseconds for a problem seen before.
// cudaErrorNotSupported as above, nothing has been launched then.
cudaError_t RunCublasLt(MatMul const& problem, cudaStream_t stream);

}  // namespace awq_trt
