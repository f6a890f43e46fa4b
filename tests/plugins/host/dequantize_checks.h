// The kernel that writes plain weights, on the emulator, bit for bit.
#pragma once

#include "report.h"

namespace awq_trt {

void CheckDequantize(uint64_t seed, Report& report);

}  // namespace awq_trt
