// What is used of cuBLASLt, in host memory: written from its documentation ("Using the cuBLASLt API") and cublasLt.h,
// not from cublas_lt.cpp. It takes nothing that the documentation does not promise: attributes of another size,
// matrices that do not fit each other, less alignment or workspace than an algorithm was chosen for are errors.
//
//   FAKE_CUBLAS_LT_MAJOR         the version that it claims to be; 13 without it
//   FAKE_CUBLAS_LT_CREATE        the status that cublasLtCreate answers
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "numbers.h"

#define FAKE_API extern "C" __attribute__((visibility("default")))

namespace {

using awq_trt::Decode;
using awq_trt::Encode;
using awq_trt::Format;

enum Status { kOk = 0, kNotInitialized = 1, kInvalidValue = 7, kNotSupported = 15 };
enum DataType { kFloat = 0, kHalf = 2, kBfloat16 = 14 };
enum Epilogue { kNone = 1, kBias = 4 };
constexpr int kComputeFloat = 68;
constexpr uint64_t kLive = 0x6b6d6a6c68676664;  // in every object that has not been destroyed

struct Context {
  uint64_t live;
};
struct MatmulDesc {
  uint64_t live;
  int32_t compute_type, scale_type, pointer_mode, transpose_a, transpose_b;
  uint32_t epilogue;
  void const* bias;
};
struct MatrixLayout {
  uint64_t live;
  int32_t type;
  uint64_t rows, columns;
  int64_t leading;
};
struct Preference {
  uint64_t live;
  uint64_t workspace;
  uint32_t reductions;
  uint32_t alignment[4];  // of A, B, C, D
};

// All that an algorithm was chosen for; its data are this, and cublasLtMatmul compares.
struct Chosen {
  int32_t m, n, k;
  int32_t lda, ldb, ldd;
  uint32_t type_and_epilogue;
  uint16_t alignment[4], bias_alignment;
  uint16_t workspace;  // bytes that it needs, and writes
  uint64_t padding[2];
};
static_assert(sizeof(Chosen) <= 64, "cublasLtMatmulAlgo_t");
struct Algorithm {
  uint64_t data[8];
};
struct Result {
  Algorithm algorithm;
  size_t workspace;
  int32_t state;
  float waves;
  int32_t reserved[4];
};

std::mutex mutex;
int creates, heuristics, matmuls;
int next_heuristic, next_matmul;  // statuses to answer, once

int Take(int& status) {
  int const taken = status;
  status = kOk;
  return taken;
}

uint32_t AlignmentOf(void const* p) {
  uint32_t alignment = 256;
  while (reinterpret_cast<uintptr_t>(p) % alignment != 0) alignment /= 2;
  return alignment;
}

template <typename T>
bool IsLive(T const* p) {
  return p != nullptr && p->live == kLive;
}

template <typename T>
int Destroy(T* p) {
  if (!IsLive(p)) return kInvalidValue;
  p->live = 0;
  delete p;
  return kOk;
}

template <typename T>
int Set(T& attribute, void const* value, size_t bytes) {
  if (value == nullptr || bytes != sizeof(T)) return kInvalidValue;
  std::memcpy(&attribute, value, bytes);
  return kOk;
}

// D = A^T B or A B of this shape, from the layouts; an error where they do not fit each other.
int Describe(MatmulDesc const* operation, MatrixLayout const* a, MatrixLayout const* b, MatrixLayout const* c,
             MatrixLayout const* d, Chosen& chosen) {
  if (!IsLive(operation) || !IsLive(a) || !IsLive(b) || !IsLive(c) || !IsLive(d)) return kInvalidValue;
  if (operation->compute_type != kComputeFloat || operation->scale_type != kFloat) return kNotSupported;
  if (operation->pointer_mode != 0 || operation->transpose_b != 0) return kNotSupported;
  if (operation->transpose_a != 0 && operation->transpose_a != 1) return kInvalidValue;
  bool const transposed = operation->transpose_a == 1;
  if (a->type != b->type || a->type != c->type || a->type != d->type) return kNotSupported;
  if (a->type != kHalf && a->type != kBfloat16) return kNotSupported;
  uint64_t const m = transposed ? a->columns : a->rows, k = transposed ? a->rows : a->columns;
  if (b->rows != k || d->rows != m || d->columns != b->columns || c->rows != d->rows || c->columns != d->columns) {
    return kInvalidValue;
  }
  for (MatrixLayout const* layout : {a, b, c, d}) {
    if (layout->rows < 1 || layout->columns < 1 || layout->leading < static_cast<int64_t>(layout->rows)) {
      return kInvalidValue;
    }
  }
  if (operation->epilogue != kNone && operation->epilogue != kBias) return kNotSupported;
  if ((operation->epilogue == kBias) != (operation->bias != nullptr)) return kInvalidValue;
  if (c->leading != d->leading) return kNotSupported;
  chosen = {};
  chosen.m = static_cast<int32_t>(m), chosen.n = static_cast<int32_t>(d->columns), chosen.k = static_cast<int32_t>(k);
  chosen.lda = static_cast<int32_t>(a->leading), chosen.ldb = static_cast<int32_t>(b->leading);
  chosen.ldd = static_cast<int32_t>(d->leading);
  chosen.type_and_epilogue = static_cast<uint32_t>(a->type) << 16 | operation->epilogue << 1 | (transposed ? 1 : 0);
  if (operation->bias != nullptr) chosen.bias_alignment = static_cast<uint16_t>(AlignmentOf(operation->bias));
  return kOk;
}

}  // namespace

// For tests: what has been called so far, and what is to be answered next.
FAKE_API void FakeCublasLtCounts(int* create_calls, int* heuristic_calls, int* matmul_calls) {
  std::lock_guard<std::mutex> const lock(mutex);
  *create_calls = creates, *heuristic_calls = heuristics, *matmul_calls = matmuls;
}
FAKE_API void FakeCublasLtAnswer(int heuristic_status, int matmul_status) {
  std::lock_guard<std::mutex> const lock(mutex);
  next_heuristic = heuristic_status, next_matmul = matmul_status;
}

FAKE_API int cublasLtGetProperty(int type, int* value) {
  if (value == nullptr || type < 0 || type > 2) return kInvalidValue;
  char const* const major = std::getenv("FAKE_CUBLAS_LT_MAJOR");
  *value = type != 0 ? 0 : major != nullptr ? std::atoi(major) : 13;
  return kOk;
}

FAKE_API char const* cublasLtGetStatusName(int status) {
  switch (status) {
    case kOk:
      return "CUBLAS_STATUS_SUCCESS";
    case kNotInitialized:
      return "CUBLAS_STATUS_NOT_INITIALIZED";
    case kInvalidValue:
      return "CUBLAS_STATUS_INVALID_VALUE";
    case kNotSupported:
      return "CUBLAS_STATUS_NOT_SUPPORTED";
    default:
      return "CUBLAS_STATUS_OTHER";
  }
}

FAKE_API int cublasLtCreate(Context** handle) {
  if (handle == nullptr) return kInvalidValue;
  std::lock_guard<std::mutex> const lock(mutex);
  ++creates;
  char const* const status = std::getenv("FAKE_CUBLAS_LT_CREATE");
  if (status != nullptr) return std::atoi(status);
  *handle = new Context{kLive};
  return kOk;
}

FAKE_API int cublasLtMatmulDescCreate(MatmulDesc** operation, int compute_type, int scale_type) {
  *operation = new MatmulDesc{kLive, compute_type, scale_type, 0, 0, 0, kNone, nullptr};
  return kOk;
}
FAKE_API int cublasLtMatmulDescDestroy(MatmulDesc* operation) { return Destroy(operation); }
FAKE_API int cublasLtMatmulDescSetAttribute(MatmulDesc* operation, int attribute, void const* value, size_t bytes) {
  if (!IsLive(operation)) return kInvalidValue;
  switch (attribute) {
    case 2:
      return Set(operation->pointer_mode, value, bytes);
    case 3:
      return Set(operation->transpose_a, value, bytes);
    case 4:
      return Set(operation->transpose_b, value, bytes);
    case 7:
      return Set(operation->epilogue, value, bytes);
    case 8:
      return Set(operation->bias, value, bytes);
    default:
      return kInvalidValue;
  }
}

FAKE_API int cublasLtMatrixLayoutCreate(MatrixLayout** layout, int type, uint64_t rows, uint64_t columns,
                                        int64_t leading) {
  *layout = new MatrixLayout{kLive, type, rows, columns, leading};
  return kOk;
}
FAKE_API int cublasLtMatrixLayoutDestroy(MatrixLayout* layout) { return Destroy(layout); }

FAKE_API int cublasLtMatmulPreferenceCreate(Preference** preference) {
  *preference = new Preference{kLive, 0, 7, {256, 256, 256, 256}};
  return kOk;
}
FAKE_API int cublasLtMatmulPreferenceDestroy(Preference* preference) { return Destroy(preference); }
FAKE_API int cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, void const* value,
                                                  size_t bytes) {
  if (!IsLive(preference)) return kInvalidValue;
  switch (attribute) {
    case 1:
      return Set(preference->workspace, value, bytes);
    case 3:
      return Set(preference->reductions, value, bytes);
    case 5:
    case 6:
    case 7:
    case 8:
      return Set(preference->alignment[attribute - 5], value, bytes);
    default:
      return kInvalidValue;
  }
}

FAKE_API int cublasLtMatmulAlgoGetHeuristic(Context* handle, MatmulDesc* operation, MatrixLayout* a, MatrixLayout* b,
                                            MatrixLayout* c, MatrixLayout* d, Preference* preference, int wanted,
                                            Result* results, int* found) {
  std::lock_guard<std::mutex> const lock(mutex);
  ++heuristics;
  if (!IsLive(handle)) return kNotInitialized;
  if (!IsLive(preference) || wanted < 1 || results == nullptr || found == nullptr) return kInvalidValue;
  *found = 0;
  if (int const status = Take(next_heuristic)) return status;
  Chosen chosen;
  if (int const status = Describe(operation, a, b, c, d, chosen)) return status;
  if ((preference->reductions & ~2u) != 0) return kNotSupported;  // sums in 16 bits are not what we are tested for
  for (int i = 0; i < 4; ++i) {
    uint32_t const alignment = preference->alignment[i];
    if (alignment < 2 || alignment > 256 || (alignment & (alignment - 1)) != 0) return kInvalidValue;
    chosen.alignment[i] = static_cast<uint16_t>(alignment);
  }
  chosen.workspace = preference->workspace < 1024 ? 0 : 1024;
  results[0] = {};
  std::memcpy(&results[0].algorithm, &chosen, sizeof(chosen));
  results[0].workspace = chosen.workspace;
  *found = 1;
  return kOk;
}

FAKE_API int cublasLtMatmul(Context* handle, MatmulDesc* operation, float const* alpha, uint16_t const* a,
                            MatrixLayout* a_layout, uint16_t const* b, MatrixLayout* b_layout, float const* beta,
                            uint16_t const* c, MatrixLayout* c_layout, uint16_t* d, MatrixLayout* d_layout,
                            Algorithm const* algorithm, void* workspace, size_t workspace_bytes, void*) {
  if (!IsLive(handle)) return kNotInitialized;
  {
    std::lock_guard<std::mutex> const lock(mutex);
    ++matmuls;
    if (int const status = Take(next_matmul)) return status;
  }
  if (alpha == nullptr || beta == nullptr || a == nullptr || b == nullptr || d == nullptr || algorithm == nullptr) {
    return kInvalidValue;
  }
  if (*alpha != 1.0f || *beta != 0.0f || c != d) return kNotSupported;  // C is not read then
  Chosen shape, chosen;
  if (int const status = Describe(operation, a_layout, b_layout, c_layout, d_layout, shape)) return status;
  std::memcpy(&chosen, algorithm, sizeof(chosen));
  std::memcpy(shape.alignment, chosen.alignment, sizeof(chosen.alignment));
  shape.workspace = chosen.workspace;
  if (shape.bias_alignment >= chosen.bias_alignment) shape.bias_alignment = chosen.bias_alignment;
  if (std::memcmp(&shape, &chosen, sizeof(chosen)) != 0) return kInvalidValue;
  void const* const matrices[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) {
    if (AlignmentOf(matrices[i]) < chosen.alignment[i]) return kInvalidValue;
  }
  if (workspace_bytes < chosen.workspace || AlignmentOf(workspace) < 256) return kInvalidValue;
  if (chosen.workspace > 0) std::memset(workspace, 0xff, chosen.workspace);

  Format const& format = a_layout->type == kHalf ? awq_trt::kHalfFormat : awq_trt::kBfloat16Format;
  int64_t const a_row = operation->transpose_a == 1 ? chosen.lda : 1,
                a_column = operation->transpose_a == 1 ? 1 : chosen.lda;
  for (int64_t column = 0; column < chosen.n; ++column) {
    for (int64_t row = 0; row < chosen.m; ++row) {
      double sum = operation->bias != nullptr ? Decode(format, static_cast<uint16_t const*>(operation->bias)[row]) : 0;
      for (int64_t i = 0; i < chosen.k; ++i) {
        sum += Decode(format, a[row * a_row + i * a_column]) * Decode(format, b[i + column * chosen.ldb]);
      }
      d[row + column * chosen.ldd] = Encode(format, sum);
    }
  }
  return kOk;
}
