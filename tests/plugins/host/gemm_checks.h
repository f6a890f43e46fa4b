// What can be checked of the tensor-core kernels without running them: how products are divided.
#pragma once

#include <cstdint>

#include "report.h"

namespace awq_trt {

void CheckGemm(uint64_t seed, Report& report);

}  // namespace awq_trt
