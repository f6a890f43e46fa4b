// Running the plugin's enqueue and comparing Y with the reference: on a GPU, or on the emulator.
#pragma once

#include <string>

#include "report.h"
#include "tensorrt_side.h"

namespace awq_trt {

enum class Where { kGpu, kEmulator };

// The name and compute capability of the GPU, or nothing where there is none that can be used (`reason` says why).
std::string DescribeGpu(std::string& reason);

// Every layer of a list, every tactic, both types, all numbers of tokens; `few`: the short list, for the emulator, and
// for a GPU under a tool that slows it down.
void CheckLaunches(Library const& library, Where where, bool few, uint64_t seed, Report& report);

// How many checks CheckLaunches makes on a GPU.
int64_t CountGpuLaunches();

// Operands of one call as one file, in the order of the plugin's inputs without gaps; Y is written as raw 16-bit.
struct FileCase {
  LayerConfig layer;
  ActivationType type;
  int32_t tokens;
  int32_t tactic;
  std::string input, output;
};
int RunFileCase(Library const& library, Where where, FileCase const& file_case);

}  // namespace awq_trt
