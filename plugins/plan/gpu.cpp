#include "plan/gpu.h"

namespace awq_trt {
namespace {

constexpr Architecture kArchitectures[] = {
    {80, 18.0, 16, 1440, 0},     // A100 80 GB: 2039 GB/s, 312 TFLOPS, 108
    {86, 11.0, 8, 430, 0},       // RTX 3090: 936, 71, 82
    {89, 7.9, 8, 645, 0},        // RTX 4090: 1008, 165, 128
    {90, 25.0, 16, 2300, 3500},  // H100 SXM: 3350, 989, 132; mma.sync: 62 % of it (arXiv 2402.13499)
    {100, 54.0, 16, 2000, 0},    // B200: 8000, 148; mma.sync as in the A100, at its clock
    {120, 10.5, 8, 615, 0}};     // RTX 5090: 1792, 209, 170

}  // namespace

Architecture const& ArchitectureOf(int32_t sm) {
  Architecture const* found = &kArchitectures[0];
  for (Architecture const& row : kArchitectures) {
    if (row.sm <= sm) found = &row;
  }
  return *found;
}

}  // namespace awq_trt
