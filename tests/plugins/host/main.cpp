// The test program of the plugin library: TensorRT's side of the plugin interface, without TensorRT.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <string>

#include "cublas_lt_checks.h"
#include "decode_checks.h"
#include "dequantize_checks.h"
#include "emulated_kernels.h"
#include "gemm_checks.h"
#include "interface_checks.h"
#include "launch_checks.h"
#include "loggers.h"
#include "plan/kernels.h"
#include "report.h"
#include "tensorrt_side.h"
#include "version.h"

namespace awq_trt {
namespace {

constexpr char kUsage[] =
    "Test program of the awq_trt plugin library %s.\n\n"
    "  %s check LIBRARY [--seed S]     the plugin interface, the kernels on an emulated GPU, and on a GPU where there\n"
    "                                  is one; one JSON line per check, exit code 1 where one failed\n"
    "  %s gpu LIBRARY [--seed S]       the interface and the GPU only\n"
    "  %s few LIBRARY [--seed S]       the same with few layers, for a GPU that is watched by compute-sanitizer\n"
    "  %s supports LIBRARY             reads lines `n k group_size float16|bfloat16 sm`, answers each with the\n"
    "                                  capability table's and the plugin creator's `yes` or reason, between tabs\n"
    "  %s emulate TOKENS N K GROUP float16|bfloat16 TACTIC zeros,bias,pre_scale|none INPUT OUTPUT\n"
    "                                  one call on the emulated GPU: INPUT holds the plugin's inputs one after the\n"
    "                                  other, Y is written to OUTPUT\n";

ActivationType TypeOf(std::string const& name) {
  if (name == "float16") return ActivationType::kHalf;
  return name == "bfloat16" ? ActivationType::kBfloat16 : static_cast<ActivationType>(-1);
}

int Check(Library const& library, bool emulate, bool few, uint64_t seed) {
  Report report;
  CheckCublasLt(seed, report);  // first: it chooses the library that stands in for cuBLASLt
  CheckInterface(library, report);
  CheckDecode(seed, report);
  CheckGemm(seed, report);
  if (emulate) CheckDequantize(seed, report);
  if (emulate) {
    CheckLaunches(EmulatedLibrary(), Where::kEmulator, true, seed, report);
    bool every_tile = true;
    for (EmulatedTile const& tile : emulated_tiles) every_tile &= tile.launches > 0 && tile.split > 0;
    report.Check("every tile has run on the emulator, whole and split", every_tile);
    report.Check("layers have been dequantized for cuBLASLt, in one piece and in several",
                 emulated_dequantizations >= 8);
  }
  std::string reason;
  std::string const gpu = DescribeGpu(reason);
  if (gpu.empty()) {
    Log10 log;
    library.set_logger_finder(log.AsFinder());
    Plugin const plugin = CreatePlugin(library, FieldsOf({64, 64, 64, false, false, false}));
    bool const refused = RuntimeOf(*plugin)->attachToContext(nullptr) == nullptr;
    std::string const message = log.Take();
    report.Check("without a GPU, attachToContext says so",
                 refused && message.find("no usable GPU") != std::string::npos, "\"message\": " + Quote(message));
    library.set_logger_finder(nullptr);
    report.Skip("launch checks", CountGpuLaunches(), "no GPU: launch checks skipped (" + reason + ")");
  } else {
    CheckLaunches(library, Where::kGpu, few, seed, report);
  }
  report.PrintSummary(gpu);
  return report.failed() == 0 ? 0 : 1;
}

int Supports(Library const& library) {
  long long n, k, group;
  int sm;
  std::string type;
  Log10 log;
  library.set_logger_finder(log.AsFinder());
  while (std::cin >> n >> k >> group >> type >> sm) {
    Reason const reason = UnsupportedReason(n, k, group, TypeOf(type), sm);
    Plugin const plugin = CreatePlugin(library, {{"out_features", n}, {"in_features", k}, {"group_size", group}});
    std::string message = log.Take();
    while (!message.empty() && message.back() == '\n') message.pop_back();
    std::printf("%s\t%s\n", reason.empty() ? "yes" : reason.text, plugin != nullptr ? "yes" : message.c_str());
  }
  library.set_logger_finder(nullptr);
  return 0;
}

int Emulate(char** arguments) {
  if (!LoadFakeCublasLt()) return 1;
  std::string const options = arguments[6];
  auto has = [&options](char const* name) { return options.find(name) != std::string::npos; };
  FileCase const file_case{{std::atoi(arguments[1]), std::atoi(arguments[2]), std::atoi(arguments[3]), has("zeros"),
                            has("bias"), has("pre_scale")},
                           TypeOf(arguments[4]),
                           std::atoi(arguments[0]),
                           std::atoi(arguments[5]),
                           arguments[7],
                           arguments[8]};
  return RunFileCase(EmulatedLibrary(), Where::kEmulator, file_case);
}

}  // namespace
}  // namespace awq_trt

int main(int count, char** arguments) {
  using namespace awq_trt;
  std::string const command = count > 1 ? arguments[1] : "";
  uint64_t seed = 1;
  if (count == 5 && std::strcmp(arguments[3], "--seed") == 0) seed = std::strtoull(arguments[4], nullptr, 10);
  bool const known = count == 3 || count == 5;
  if (known && command == "check") return Check(OpenLibrary(arguments[2]), true, false, seed);
  if (known && (command == "gpu" || command == "few")) {
    return Check(OpenLibrary(arguments[2]), false, command == "few", seed);
  }
  if (count == 3 && command == "supports") return Supports(OpenLibrary(arguments[2]));
  if (count == 11 && command == "emulate") return Emulate(arguments + 2);
  char const* const self = arguments[0];
  std::fprintf(stderr, kUsage, AWQ_TRT_VERSION, self, self, self, self, self);
  return 2;
}
