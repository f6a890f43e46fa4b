#include "cublas_lt_checks.h"

#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

#include "plan/cublas_lt.h"
#include "reference.h"

namespace awq_trt {
namespace {

constexpr uint16_t kPoison = 0xffff;  // NaN
constexpr char kVariable[] = "AWQ_TRT_CUBLASLT";

std::string FakePath() {
  char self[4096];
  ssize_t const length = readlink("/proc/self/exe", self, sizeof(self));
  std::string const path(self, length > 0 ? length : 0);
  return path.substr(0, path.rfind('/') + 1) + "libawq_trt_fake_cublas_lt.so";
}

// An environment variable while it lives.
class Variable {
 public:
  Variable(char const* name, std::string const& value) : name_(name), was_(std::getenv(name) != nullptr) {
    if (was_) old_ = std::getenv(name);
    setenv(name, value.c_str(), 1);
  }
  ~Variable() { was_ ? setenv(name_, old_.c_str(), 1) : unsetenv(name_); }
  Variable(Variable const&) = delete;

 private:
  char const* name_;
  bool was_;
  std::string old_;
};

// What `run` says in a process of its own: libraries are looked for once per process.
std::string InChild(std::function<std::string()> const& run) {
  int ends[2];
  if (pipe(ends) != 0) return "no pipe";
  std::fflush(stdout);
  pid_t const child = fork();
  if (child == 0) {
    std::string const text = run();
    ssize_t const written = write(ends[1], text.data(), text.size());
    _exit(written == static_cast<ssize_t>(text.size()) ? 0 : 1);
  }
  close(ends[1]);
  std::string said;
  char buffer[1024];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof(buffer))) > 0;) said.append(buffer, n);
  close(ends[0]);
  int status = -1;
  waitpid(child, &status, 0);
  return status == 0 ? said : "the process failed: " + said;
}

std::string ProblemWith(std::string const& path) {
  return InChild([&path] {
    Variable const variable(kVariable, path);
    return CublasLtAvailable() ? std::string("available") : std::string(CublasLtProblem());
  });
}

bool Has(std::string const& text, char const* part) { return text.find(part) != std::string::npos; }

// Operands in host memory, each `offset` elements beyond a multiple of 256 bytes.
struct Operands {
  MatMul problem{};
  std::vector<uint16_t> x, w, bias, y;
  std::vector<char> workspace;

  static uint16_t* Aligned(std::vector<uint16_t>& v, size_t size, size_t offset) {
    v.assign(size + offset + 256, kPoison);
    uintptr_t const address = reinterpret_cast<uintptr_t>(v.data());
    return v.data() + (-address % 256) / 2 + offset;
  }

  Operands(ActivationType type, int32_t tokens, int32_t rows, int32_t k, int32_t y_stride, bool has_bias, size_t offset,
           size_t workspace_bytes, uint64_t seed)
      : workspace(workspace_bytes + 256) {
    Format const& format = FormatOf(type);
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    auto fill = [&](std::vector<uint16_t>& v, size_t size, size_t skip) {
      uint16_t* const p = Aligned(v, size, skip);
      for (size_t i = 0; i < size; ++i) p[i] = Encode(format, normal(random));
      return p;
    };
    problem.type = type, problem.tokens = tokens, problem.rows = rows, problem.k = k;
    problem.x = fill(x, static_cast<size_t>(tokens) * k, offset);
    problem.w = fill(w, static_cast<size_t>(rows) * k, 0);
    problem.bias = has_bias ? fill(bias, rows, 8 * offset) : nullptr;
    problem.y_stride = y_stride;
    problem.y = Aligned(y, static_cast<size_t>(tokens) * y_stride, offset);
    uintptr_t const address = reinterpret_cast<uintptr_t>(workspace.data());
    problem.workspace = workspace_bytes > 0 ? workspace.data() + -address % 256 : nullptr;
    problem.workspace_bytes = workspace_bytes;
  }
  Operands(Operands const&) = delete;

  // Nothing, or what is wrong with Y.
  std::string Wrong() const {
    MatMul const& p = problem;
    Format const& format = FormatOf(p.type);
    double const half_unit = std::ldexp(1.0, -format.mantissa_bits - 1);
    for (int32_t token = 0; token < p.tokens; ++token) {
      for (int32_t row = 0; row < p.rows; ++row) {
        double sum = p.bias != nullptr ? Decode(format, p.bias[row]) : 0, magnitude = std::fabs(sum);
        for (int32_t i = 0; i < p.k; ++i) {
          double const product = Decode(format, p.x[static_cast<size_t>(token) * p.k + i]) *
                                 Decode(format, p.w[static_cast<size_t>(row) * p.k + i]);
          sum += product, magnitude += std::fabs(product);
        }
        double const value = Decode(format, p.y[static_cast<size_t>(token) * p.y_stride + row]);
        if (std::fabs(value - sum) <= half_unit * std::fabs(sum) + 1e-5 * magnitude) continue;
        char text[120];
        std::snprintf(text, sizeof(text), "Y[%d, %d] is %g, should be %g", token, row, value, sum);
        return text;
      }
    }
    size_t written = 0;
    for (uint16_t value : y) written += value != kPoison;
    return written == static_cast<size_t>(p.tokens) * p.rows ? "" : "wrote outside of Y";
  }
};

struct Fake {
  void (*counts)(int*, int*, int*) = nullptr;
  void (*answer)(int, int) = nullptr;
  int creates = 0, heuristics = 0, matmuls = 0;

  Fake() {
    void* const library = dlopen(FakePath().c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return;
    counts = reinterpret_cast<void (*)(int*, int*, int*)>(dlsym(library, "FakeCublasLtCounts"));
    answer = reinterpret_cast<void (*)(int, int)>(dlsym(library, "FakeCublasLtAnswer"));
  }
  // Whether there have been so many calls since the last time.
  bool Called(int create_calls, int heuristic_calls, int matmul_calls) {
    int const before[3] = {creates, heuristics, matmuls};
    counts(&creates, &heuristics, &matmuls);
    return creates - before[0] == create_calls && heuristics - before[1] == heuristic_calls &&
           matmuls - before[2] == matmul_calls;
  }
};

void CheckFinding(Report& report) {
  auto check = [&report](char const* name, std::string const& said, bool ok) {
    report.Check(name, ok, "\"said\": " + Quote(said));
  };
  std::string said = ProblemWith("/nowhere/libcublasLt.so");
  check("cuBLASLt that is missing", said, Has(said, "/nowhere/libcublasLt.so") && Has(said, kVariable));
  said = ProblemWith("libm.so.6");
  check("a library that is not cuBLASLt", said, Has(said, "libm.so.6 has no cublasLtCreate"));
  {
    Variable const major("FAKE_CUBLAS_LT_MAJOR", "11");
    said = ProblemWith(FakePath());
    check("cuBLASLt of CUDA 11", said, Has(said, "of CUDA 11, need 12 or 13"));
  }
  {
    Variable const major("FAKE_CUBLAS_LT_MAJOR", "12");
    said = ProblemWith(FakePath());
    check("cuBLASLt of CUDA 12", said, said == "available");
  }
  said = InChild([] {
    Variable const path(kVariable, FakePath()), refuse("FAKE_CUBLAS_LT_CREATE", "1");
    Operands const operands(ActivationType::kHalf, 2, 8, 32, 8, false, 0, 0, 1);
    Fake fake;
    fake.Called(0, 0, 0);
    bool refused = true;
    for (int i = 0; i < 2; ++i) refused &= RunCublasLt(operands.problem, nullptr) == cudaErrorNotSupported;
    return refused && fake.Called(1, 0, 0) ? std::string(CublasLtProblem()) : std::string("not refused once");
  });
  check("a device that cuBLASLt does not take", said, Has(said, "cublasLtCreate: CUBLAS_STATUS_NOT_INITIALIZED"));
}

// One shape, with every alignment of x, y and bias and with every workspace.
std::string WrongProduct(ActivationType type, int32_t tokens, int32_t rows, int32_t k, int32_t y_stride, bool bias,
                         uint64_t seed) {
  for (size_t offset : {0, 1, 2, 4, 8, 64}) {  // elements
    for (size_t workspace : {0, 100, 4096}) {
      Operands const operands(type, tokens, rows, k, y_stride, bias, offset, workspace, ++seed);
      cudaError_t const error = RunCublasLt(operands.problem, nullptr);
      std::string const problem = error != cudaSuccess ? CublasLtProblem() : operands.Wrong();
      if (!problem.empty()) return problem + ", offset " + std::to_string(offset);
    }
  }
  return "";
}

void CheckProducts(uint64_t seed, Report& report) {
  struct Shape {
    int32_t tokens, rows, k, y_stride;
  };
  for (Shape const& shape : {Shape{1, 8, 32, 8}, {3, 24, 96, 24}, {17, 40, 64, 72}, {33, 16, 160, 4096}}) {
    for (ActivationType type : {ActivationType::kHalf, ActivationType::kBfloat16}) {
      for (bool bias : {false, true}) {
        std::string const problem =
            WrongProduct(type, shape.tokens, shape.rows, shape.k, shape.y_stride, bias, seed += 100);
        char name[120];
        std::snprintf(name, sizeof(name), "cuBLASLt tokens=%d rows=%d k=%d stride=%d bias=%d %s", shape.tokens,
                      shape.rows, shape.k, shape.y_stride, bias, type == ActivationType::kHalf ? "fp16" : "bf16");
        report.Check(name, problem.empty(), problem.empty() ? "" : "\"problem\": " + Quote(problem));
      }
    }
  }
}

void CheckPlans(Fake& fake, Report& report) {
  auto run = [](Operands const& operands, cudaError_t expected = cudaSuccess) {
    return RunCublasLt(operands.problem, nullptr) == expected;
  };
  fake.Called(0, 0, 0);
  Operands const first(ActivationType::kHalf, 5, 48, 64, 48, true, 0, 2048, 1);
  Operands const same(ActivationType::kHalf, 5, 48, 64, 48, true, 0, 2048, 2);
  bool ok = PrepareCublasLt(first.problem, nullptr) == cudaSuccess && fake.Called(0, 1, 0);
  ok &= run(first) && run(same) && run(first) && fake.Called(0, 0, 3) && first.Wrong().empty() && same.Wrong().empty();
  report.Check("cuBLASLt is asked once for a problem", ok);

  Operands const others[] = {{ActivationType::kBfloat16, 5, 48, 64, 48, true, 0, 2048, 1},
                             {ActivationType::kHalf, 6, 48, 64, 48, true, 0, 2048, 1},
                             {ActivationType::kHalf, 5, 40, 64, 48, true, 0, 2048, 1},
                             {ActivationType::kHalf, 5, 48, 96, 48, true, 0, 2048, 1},
                             {ActivationType::kHalf, 5, 48, 64, 56, true, 0, 2048, 1},
                             {ActivationType::kHalf, 5, 48, 64, 48, false, 0, 2048, 1},
                             {ActivationType::kHalf, 5, 48, 64, 48, true, 1, 2048, 1},
                             {ActivationType::kHalf, 5, 48, 64, 48, true, 0, 0, 1}};
  for (Operands const& other : others) ok &= run(other) && fake.Called(0, 1, 1) && other.Wrong().empty();
  for (size_t part = 0; part < 4; ++part) {  // alignments one by one, from first.problem's
    Operands moved(ActivationType::kHalf, 5, 48, 64, 48, true, 0, 2048, 1);
    std::vector<uint16_t> copy;
    auto move = [&copy](uint16_t const* from, size_t size) {
      uint16_t* const to = Operands::Aligned(copy, size, 4);
      for (size_t i = 0; i < size; ++i) to[i] = from[i];
      return to;
    };
    MatMul& p = moved.problem;
    if (part == 0) p.x = move(p.x, 5 * 64);
    if (part == 1) p.w = move(p.w, 48 * 64);
    if (part == 2) p.bias = move(p.bias, 48);
    if (part == 3) p.y = move(p.y, 5 * 48);
    ok &= run(moved) && fake.Called(0, 1, 1) && (part == 3 || moved.Wrong().empty());
  }
  report.Check("cuBLASLt is asked again for every other problem", ok);

  Operands odd(ActivationType::kHalf, 5, 48, 64, 48, true, 0, 2048, 1);
  odd.problem.workspace = static_cast<char*>(odd.problem.workspace) + 16;  // used from the next multiple of 256 on
  odd.problem.workspace_bytes = 2048;
  report.Check("cuBLASLt gets aligned workspace", run(odd) && odd.Wrong().empty());
  fake.Called(0, 0, 0);

  Operands const refused(ActivationType::kHalf, 7, 48, 64, 48, false, 0, 0, 1);
  fake.answer(15, 0);
  ok = PrepareCublasLt(refused.problem, nullptr) == cudaErrorNotSupported && run(refused, cudaErrorNotSupported);
  std::string const words = CublasLtProblem();
  ok &= fake.Called(0, 1, 0) && Has(words, "CUBLAS_STATUS_NOT_SUPPORTED") && Has(words, "7 tokens, 48 rows, k=64");
  report.Check("cuBLASLt refuses, and is not asked again", ok, "\"said\": " + Quote(words));

  Operands const later(ActivationType::kHalf, 8, 48, 64, 48, false, 0, 0, 1);
  fake.answer(14, 0);
  ok = run(later, cudaErrorNotSupported) && fake.Called(0, 1, 0) && run(later) && fake.Called(0, 1, 1) &&
       later.Wrong().empty() && CublasLtProblem()[0] == '\0';
  report.Check("cuBLASLt fails, and is asked again", ok);

  struct Failure {
    int status;
    cudaError_t error;
  };
  ok = true;
  for (Failure const& failure : {Failure{1, cudaErrorInitializationError},
                                 {3, cudaErrorMemoryAllocation},
                                 {7, cudaErrorInvalidValue},
                                 {8, cudaErrorNotSupported},
                                 {13, cudaErrorLaunchFailure},
                                 {14, cudaErrorUnknown},
                                 {15, cudaErrorNotSupported}}) {
    fake.answer(0, failure.status);
    ok &= run(later, failure.error) && Has(CublasLtProblem(), "cublasLtMatmul: CUBLAS_STATUS_");
  }
  report.Check("a launch that fails is a CUDA error", ok);
}

void CheckMistakes(Fake& fake, Report& report) {
  fake.Called(0, 0, 0);
  auto refused = [](std::function<void(MatMul&)> const& change) {
    Operands operands(ActivationType::kHalf, 4, 16, 32, 16, true, 0, 0, 1);
    change(operands.problem);
    return RunCublasLt(operands.problem, nullptr) == cudaErrorInvalidValue && CublasLtProblem()[0] != '\0';
  };
  auto odd = [](auto*& p) { p = reinterpret_cast<std::decay_t<decltype(p)>>(reinterpret_cast<uintptr_t>(p) + 1); };
  bool ok = refused([](MatMul& p) { p.y_stride = 15; }) && refused([](MatMul& p) { p.tokens = -1; }) &&
            refused([](MatMul& p) { p.rows = 0; }) && refused([](MatMul& p) { p.k = 0; }) &&
            refused([](MatMul& p) { p.type = static_cast<ActivationType>(2); }) &&
            refused([](MatMul& p) { p.x = nullptr; }) && refused([](MatMul& p) { p.w = nullptr; }) &&
            refused([](MatMul& p) { p.y = nullptr; }) && refused([&odd](MatMul& p) { odd(p.x); }) &&
            refused([&odd](MatMul& p) { odd(p.w); }) && refused([&odd](MatMul& p) { odd(p.y); }) &&
            refused([&odd](MatMul& p) { odd(p.bias); });
  report.Check("cuBLASLt: mistakes of the caller", ok && fake.Called(0, 0, 0));
  Operands const nothing(ActivationType::kHalf, 0, 16, 32, 16, true, 0, 0, 1);
  report.Check("cuBLASLt: no tokens", RunCublasLt(nothing.problem, nullptr) == cudaSuccess && fake.Called(0, 0, 0));
}

// Problems that are new to all threads at once.
void CheckThreads(Fake& fake, Report& report) {
  constexpr int kThreads = 8, kProblems = 16;
  fake.Called(0, 0, 0);
  std::vector<std::thread> threads;
  std::vector<int> right(kThreads);
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([t, &right] {
      for (int i = 0; i < kProblems; ++i) {
        Operands const operands(ActivationType::kBfloat16, 2 + (i + t) % kProblems, 8, 64, 8, true, 0, 2048, t);
        right[t] += RunCublasLt(operands.problem, nullptr) == cudaSuccess && operands.Wrong().empty();
      }
    });
  }
  bool ok = true;
  for (int t = 0; t < kThreads; ++t) {
    threads[t].join();
    ok &= right[t] == kProblems;
  }
  report.Check("cuBLASLt from several threads", ok && fake.Called(0, kProblems, kThreads * kProblems));
}

}  // namespace

bool LoadFakeCublasLt() {
  Variable const variable(kVariable, FakePath());
  return CublasLtAvailable();
}

void CheckCublasLt(uint64_t seed, Report& report) {
  CheckFinding(report);
  Fake fake;
  bool const loaded = LoadFakeCublasLt() && fake.counts != nullptr && fake.answer != nullptr;
  report.Check("the library that stands in for cuBLASLt", loaded,
               loaded ? "" : "\"said\": " + Quote(CublasLtProblem()));
  if (!loaded) return;
  CheckProducts(seed, report);
  fake.Called(0, 0, 0);
  report.Check("one handle for a device", fake.creates == 1);
  CheckPlans(fake, report);
  CheckMistakes(fake, report);
  CheckThreads(fake, report);
}

}  // namespace awq_trt
