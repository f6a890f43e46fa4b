#include "plan/cublas_lt.h"

#include <dlfcn.h>
#include <library_types.h>

#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>

namespace awq_trt {
namespace {

// What is used of cublasLt.h and cublas_api.h. All values and layouts are the same in cuBLAS 12.0.1, 12.9.1 and 13.1.1;
// descriptors are made by the library, as their size is not. An enum is an int.
using Status = int32_t;  // cublasStatus_t
constexpr Status kSuccess = 0, kNotInitialized = 1, kAllocFailed = 3, kInvalidValue = 7, kArchMismatch = 8,
                 kExecutionFailed = 13, kNotSupported = 15;
constexpr int32_t kMajorVersion = 0;  // libraryPropertyType
constexpr int32_t kCompute32F = 68;   // CUBLAS_COMPUTE_32F
constexpr int32_t kTransposed = 1;    // CUBLAS_OP_T
// cublasLtMatmulDescAttributes_t: TRANSA (int32_t), EPILOGUE (uint32_t), BIAS_POINTER (void const*)
constexpr int32_t kTransposeA = 3, kEpilogue = 7, kBiasPointer = 8;
constexpr uint32_t kEpilogueBias = 4;  // CUBLASLT_EPILOGUE_BIAS
// cublasLtMatmulPreferenceAttributes_t: MAX_WORKSPACE_BYTES (uint64_t), REDUCTION_SCHEME_MASK (uint32_t),
// MIN_ALIGNMENT_A_BYTES, .._B_, .._C_, .._D_ (uint32_t)
constexpr int32_t kMaxWorkspaceBytes = 1, kReductionSchemes = 3, kMinAlignmentA = 5, kMinAlignmentB = 6,
                  kMinAlignmentC = 7, kMinAlignmentD = 8;
// CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE: where K is split, partial sums are fp32. The others round them to 16 bits.
constexpr uint32_t kReduceInFp32 = 2;
constexpr uint32_t kMaxAlignment = 256;  // that a preference can ask for, and that the workspace needs

struct Algorithm {  // cublasLtMatmulAlgo_t: plain data, good for this version of the library
  uint64_t data[8];
};
struct HeuristicResult {  // cublasLtMatmulHeuristicResult_t
  Algorithm algorithm;
  size_t workspace_bytes;
  Status status;
  float waves;
  int32_t reserved[4];
};
static_assert(sizeof(HeuristicResult) == 96 && offsetof(HeuristicResult, status) == 72, "as in cublasLt.h");

using Handle = struct cublasLtContext*;
using Operation = struct cublasLtMatmulDesc*;
using Layout = struct cublasLtMatrixLayout*;
using Preference = struct cublasLtMatmulPreference*;

struct Library {
  Status (*create)(Handle*);
  Status (*get_property)(int32_t type, int32_t* value);
  char const* (*get_status_name)(Status);
  Status (*operation_create)(Operation*, int32_t compute_type, cudaDataType scale_type);
  Status (*operation_destroy)(Operation);
  Status (*operation_set)(Operation, int32_t attribute, void const* value, size_t bytes);
  Status (*layout_create)(Layout*, cudaDataType type, uint64_t rows, uint64_t columns, int64_t leading_dimension);
  Status (*layout_destroy)(Layout);
  Status (*preference_create)(Preference*);
  Status (*preference_destroy)(Preference);
  Status (*preference_set)(Preference, int32_t attribute, void const* value, size_t bytes);
  Status (*get_heuristic)(Handle, Operation, Layout a, Layout b, Layout c, Layout d, Preference, int32_t wanted,
                          HeuristicResult* results, int32_t* found);
  Status (*matmul)(Handle, Operation, void const* alpha, void const* a, Layout a_layout, void const* b, Layout b_layout,
                   void const* beta, void const* c, Layout c_layout, void* d, Layout d_layout, Algorithm const*,
                   void* workspace, size_t workspace_bytes, cudaStream_t);

  bool loaded;
  char problem[768];  // where it is not
};

void Note(Library& library, char const* format, ...) __attribute__((format(printf, 2, 3)));
void Note(Library& library, char const* format, ...) {
  size_t used = 0;
  while (library.problem[used] != '\0') ++used;
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(library.problem + used, sizeof(library.problem) - used, format, arguments);
  va_end(arguments);
}

template <typename Function>
bool Find(Library& library, char const* path, void* opened, Function& function, char const* name) {
  function = reinterpret_cast<Function>(dlsym(opened, name));
  if (function == nullptr) Note(library, "%s has no %s; ", path, name);
  return function != nullptr;
}

bool FindAll(Library& library, char const* path, void* opened) {
  auto find = [&](auto& function, char const* name) { return Find(library, path, opened, function, name); };
  return find(library.create, "cublasLtCreate") && find(library.get_property, "cublasLtGetProperty") &&
         find(library.get_status_name, "cublasLtGetStatusName") &&
         find(library.operation_create, "cublasLtMatmulDescCreate") &&
         find(library.operation_destroy, "cublasLtMatmulDescDestroy") &&
         find(library.operation_set, "cublasLtMatmulDescSetAttribute") &&
         find(library.layout_create, "cublasLtMatrixLayoutCreate") &&
         find(library.layout_destroy, "cublasLtMatrixLayoutDestroy") &&
         find(library.preference_create, "cublasLtMatmulPreferenceCreate") &&
         find(library.preference_destroy, "cublasLtMatmulPreferenceDestroy") &&
         find(library.preference_set, "cublasLtMatmulPreferenceSetAttribute") &&
         find(library.get_heuristic, "cublasLtMatmulAlgoGetHeuristic") && find(library.matmul, "cublasLtMatmul");
}

// `in_process`: only if the process has loaded it already; its absence is no problem then.
bool Open(Library& library, char const* path, bool in_process) {
  void* const opened = dlopen(path, RTLD_NOW | RTLD_LOCAL | (in_process ? RTLD_NOLOAD : 0));
  if (opened == nullptr) {
    if (!in_process) Note(library, "%s; ", dlerror());
    return false;
  }
  if (FindAll(library, path, opened)) {
    int32_t version = 0;
    library.get_property(kMajorVersion, &version);
    library.loaded = version == 12 || version == 13;
    if (!library.loaded) Note(library, "%s is of CUDA %d, need 12 or 13; ", path, version);
  }
  if (!library.loaded) dlclose(opened);
  return library.loaded;
}

// cuBLASLt brings a CUDA runtime of its own, as we do: what passes between us are device addresses and streams, which
// are the driver's. So either major version goes with ours; the one we are built for is known to suit the driver.
Library Load() {
  Library library{};
  constexpr bool k13 = CUDART_VERSION >= 13000;
  constexpr char const* kNames[] = {k13 ? "libcublasLt.so.13" : "libcublasLt.so.12",
                                    k13 ? "libcublasLt.so.12" : "libcublasLt.so.13"};
  char const* const path = std::getenv("AWQ_TRT_CUBLASLT");
  if (path != nullptr && path[0] != '\0') {
    Open(library, path, false);
  } else {
    static_cast<void>(Open(library, kNames[0], true) || Open(library, kNames[1], true) ||
                      Open(library, kNames[0], false) || Open(library, kNames[1], false) ||
                      Open(library, "libcublasLt.so", false));
  }
  if (!library.loaded) Note(library, "set AWQ_TRT_CUBLASLT to the path of cuBLASLt (pip install nvidia-cublas)");
  return library;
}

Library const& GetLibrary() {
  static Library const library = Load();
  return library;
}

thread_local char last_problem[256];

cudaError_t Fail(cudaError_t error, char const* format, ...) __attribute__((format(printf, 2, 3)));
cudaError_t Fail(cudaError_t error, char const* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_problem, sizeof(last_problem), format, arguments);
  va_end(arguments);
  return error;
}

// Of cublasLtMatmul. Whatever fails before it is cudaErrorNotSupported: nothing has been launched.
cudaError_t ErrorOf(Status status) {
  switch (status) {
    case kSuccess:
      return cudaSuccess;
    case kArchMismatch:
    case kNotSupported:
      return cudaErrorNotSupported;
    case kNotInitialized:
      return cudaErrorInitializationError;
    case kAllocFailed:
      return cudaErrorMemoryAllocation;
    case kInvalidValue:
      return cudaErrorInvalidValue;
    case kExecutionFailed:
      return cudaErrorLaunchFailure;
    default:
      return cudaErrorUnknown;
  }
}

cudaError_t FailedCall(cudaError_t error, char const* call, Status status, MatMul const& p) {
  return Fail(error, "%s: %s (%d), %d tokens, %d rows, k=%d, stride %d%s, x %p, w %p, y %p", call,
              GetLibrary().get_status_name(status), status, p.tokens, p.rows, p.k, p.y_stride,
              p.bias != nullptr ? ", bias" : "", static_cast<void const*>(p.x), static_cast<void const*>(p.w),
              static_cast<void const*>(p.y));
}

// cuBLASLt's matrices go down their columns: a row-major [m, k] is its [k, m]. So its D = A^T B is our Y^T = W X^T, and
// the bias, one for each row of D, is one for each feature.
struct Descriptors {
  Operation operation = nullptr;
  Layout w = nullptr, x = nullptr, y = nullptr;

  Descriptors() = default;
  Descriptors(Descriptors const&) = delete;
  ~Descriptors() {
    Library const& library = GetLibrary();
    for (Layout layout : {w, x, y}) {
      if (layout != nullptr) library.layout_destroy(layout);
    }
    if (operation != nullptr) library.operation_destroy(operation);
  }

  Status Create(MatMul const& p) {
    Library const& library = GetLibrary();
    Status status = library.operation_create(&operation, kCompute32F, CUDA_R_32F);
    auto set = [&](int32_t attribute, auto const& value) {
      if (status == kSuccess) status = library.operation_set(operation, attribute, &value, sizeof(value));
    };
    set(kTransposeA, kTransposed);
    if (p.bias != nullptr) {
      set(kEpilogue, kEpilogueBias);
      set(kBiasPointer, p.bias);
    }
    auto create = [&](Layout& layout, int32_t rows, int32_t columns, int32_t leading_dimension) {
      cudaDataType const type = p.type == ActivationType::kHalf ? CUDA_R_16F : CUDA_R_16BF;
      if (status == kSuccess) status = library.layout_create(&layout, type, rows, columns, leading_dimension);
    };
    create(w, p.k, p.rows, p.k);
    create(x, p.k, p.tokens, p.k);
    create(y, p.rows, p.tokens, p.y_stride);
    return status;
  }
};

// The largest power of two up to kMaxAlignment that divides an address.
uint32_t AlignmentOf(void const* p) {
  uintptr_t const address = reinterpret_cast<uintptr_t>(p) | kMaxAlignment;
  return static_cast<uint32_t>(address & (~address + 1));
}

struct Workspace {
  void* memory = nullptr;
  size_t bytes = 0;
  explicit Workspace(MatMul const& p) {
    size_t const skip = -reinterpret_cast<uintptr_t>(p.workspace) % kMaxAlignment;
    if (p.workspace != nullptr && p.workspace_bytes > skip) {
      memory = static_cast<char*>(p.workspace) + skip, bytes = p.workspace_bytes - skip;
    }
  }
};

Status AskForAlgorithm(Handle handle, Descriptors const& descriptors, MatMul const& p, Algorithm& algorithm) {
  Library const& library = GetLibrary();
  Preference preference = nullptr;
  Status status = library.preference_create(&preference);
  auto set = [&](int32_t attribute, auto value) {
    if (status == kSuccess) status = library.preference_set(preference, attribute, &value, sizeof(value));
  };
  set(kMaxWorkspaceBytes, static_cast<uint64_t>(Workspace(p).bytes));
  set(kReductionSchemes, kReduceInFp32);
  set(kMinAlignmentA, AlignmentOf(p.w));
  set(kMinAlignmentB, AlignmentOf(p.x));
  set(kMinAlignmentC, AlignmentOf(p.y));
  set(kMinAlignmentD, AlignmentOf(p.y));
  HeuristicResult result{};
  int32_t found = 0;
  if (status == kSuccess) {
    status = library.get_heuristic(handle, descriptors.operation, descriptors.w, descriptors.x, descriptors.y,
                                   descriptors.y, preference, 1, &result, &found);
  }
  if (preference != nullptr) library.preference_destroy(preference);
  if (status == kSuccess) status = found > 0 ? result.status : kNotSupported;
  algorithm = result.algorithm;
  return status;
}

// All that the choice of an algorithm depends on.
using Key = std::array<int64_t, 11>;
Key KeyOf(int32_t device, MatMul const& p) {
  return {device,
          static_cast<int64_t>(p.type),
          p.tokens,
          p.rows,
          p.k,
          p.y_stride,
          p.bias != nullptr ? AlignmentOf(p.bias) : 0,
          AlignmentOf(p.x),
          AlignmentOf(p.w),
          AlignmentOf(p.y),
          static_cast<int64_t>(Workspace(p).bytes)};
}

struct OfDevice {
  Status status;  // of cublasLtCreate: it is asked once
  Handle handle;
};
struct Choice {
  Status status;  // kSuccess, or kNotSupported: there is no algorithm
  Algorithm algorithm;
};

// Of the process, and never given back: at its end the CUDA context may be gone before.
struct State {
  std::mutex mutex;
  std::map<int32_t, OfDevice> devices;
  std::map<Key, Choice> choices;
};
constexpr size_t kMaxChoices = 4096;  // 700 KB; then they are forgotten

State& GetState() {
  static State& state = *new State;
  return state;
}

bool IsCapturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaError_t const error = cudaStreamIsCapturing(stream, &status);
  if (error == cudaSuccess) return status != cudaStreamCaptureStatusNone;
  static_cast<void>(cudaGetLastError());  // no device, say: cublasLtCreate will tell
  return error == cudaErrorStreamCaptureImplicit;
}

// While it lives, this thread may take device memory although another thread is capturing.
class AllowAllocation {
 public:
  AllowAllocation() { Exchange(); }
  ~AllowAllocation() { Exchange(); }
  AllowAllocation(AllowAllocation const&) = delete;

 private:
  void Exchange() {
    if (usable_ && cudaThreadExchangeStreamCaptureMode(&mode_) != cudaSuccess) {
      usable_ = false;
      static_cast<void>(cudaGetLastError());
    }
  }
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
  bool usable_ = true;
};

int32_t CurrentDevice() {
  int32_t device = 0;
  if (cudaGetDevice(&device) == cudaSuccess) return device;
  static_cast<void>(cudaGetLastError());
  return 0;
}

cudaError_t FindAlgorithm(MatMul const& p, Descriptors const& descriptors, cudaStream_t stream, Handle& handle,
                          Algorithm& algorithm) {
  int32_t const device = CurrentDevice();
  Key const key = KeyOf(device, p);
  State& state = GetState();
  std::lock_guard<std::mutex> const lock(state.mutex);
  auto found = state.choices.find(key);
  if (found == state.choices.end()) {
    // cuBLAS 13.3 fails in cublasLtMatmulAlgoGetHeuristic then, and cublasLtCreate may take device memory
    if (IsCapturing(stream)) {
      return Fail(cudaErrorNotSupported,
                  "the stream is being captured, and cuBLASLt has not met this before: %d tokens, %d rows, k=%d",
                  p.tokens, p.rows, p.k);
    }
    AllowAllocation const allow;
    if (state.devices.count(device) == 0) {
      OfDevice created{};
      created.status = GetLibrary().create(&created.handle);
      state.devices[device] = created;
    }
    OfDevice const& of_device = state.devices[device];
    if (of_device.status != kSuccess) {
      return FailedCall(cudaErrorNotSupported, "cublasLtCreate", of_device.status, p);
    }
    Choice choice{};
    choice.status = AskForAlgorithm(of_device.handle, descriptors, p, choice.algorithm);
    if (choice.status != kSuccess && choice.status != kNotSupported) {  // it may be another time
      return FailedCall(cudaErrorNotSupported, "cublasLtMatmulAlgoGetHeuristic", choice.status, p);
    }
    if (state.choices.size() >= kMaxChoices) state.choices.clear();
    found = state.choices.emplace(key, choice).first;
  }
  Choice const& choice = found->second;
  if (choice.status != kSuccess) {
    return FailedCall(cudaErrorNotSupported, "cublasLtMatmulAlgoGetHeuristic", choice.status, p);
  }
  handle = state.devices[device].handle;
  algorithm = choice.algorithm;
  return cudaSuccess;
}

cudaError_t CheckProblem(MatMul const& p) {
  if (!CublasLtAvailable()) return cudaErrorNotSupported;
  bool const known = p.type == ActivationType::kHalf || p.type == ActivationType::kBfloat16;
  if (!known || p.tokens < 0 || p.rows < 1 || p.k < 1 || p.y_stride < p.rows) {
    return Fail(cudaErrorInvalidValue, "type %d, %d tokens, %d rows, k=%d, stride %d", static_cast<int32_t>(p.type),
                p.tokens, p.rows, p.k, p.y_stride);
  }
  for (void const* pointer : {static_cast<void const*>(p.x), static_cast<void const*>(p.w),
                              static_cast<void const*>(p.y), static_cast<void const*>(p.bias)}) {
    if (!IsAligned(pointer, sizeof(uint16_t))) return Fail(cudaErrorInvalidValue, "a matrix at address %p", pointer);
  }
  if (p.x == nullptr || p.w == nullptr || p.y == nullptr) return Fail(cudaErrorInvalidValue, "x, w or y is missing");
  return cudaSuccess;
}

cudaError_t Multiply(MatMul const& p, cudaStream_t stream, bool launch) {
  last_problem[0] = '\0';
  cudaError_t error = CheckProblem(p);
  if (error != cudaSuccess || p.tokens == 0) return error;
  Descriptors descriptors;
  Status status = descriptors.Create(p);
  if (status != kSuccess) return FailedCall(cudaErrorNotSupported, "descriptors of cuBLASLt", status, p);
  Handle handle = nullptr;
  Algorithm algorithm;
  try {
    error = FindAlgorithm(p, descriptors, stream, handle, algorithm);
  } catch (std::bad_alloc const&) {
    return Fail(cudaErrorMemoryAllocation, "out of host memory");
  }
  if (error != cudaSuccess || !launch) return error;
  float const one = 1, zero = 0;
  Workspace const workspace(p);
  status =
      GetLibrary().matmul(handle, descriptors.operation, &one, p.w, descriptors.w, p.x, descriptors.x, &zero, p.y,
                          descriptors.y, p.y, descriptors.y, &algorithm, workspace.memory, workspace.bytes, stream);
  if (status != kSuccess) return FailedCall(ErrorOf(status), "cublasLtMatmul", status, p);
  return cudaSuccess;
}

}  // namespace

bool CublasLtAvailable() { return GetLibrary().loaded; }

char const* CublasLtProblem() { return CublasLtAvailable() ? last_problem : GetLibrary().problem; }

cudaError_t PrepareCublasLt(MatMul const& problem, cudaStream_t stream) { return Multiply(problem, stream, false); }

cudaError_t RunCublasLt(MatMul const& problem, cudaStream_t stream) { return Multiply(problem, stream, true); }

}  // namespace awq_trt
