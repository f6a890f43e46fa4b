// Multiplying by cuBLASLt, with a library that stands in for it and works in host memory.
#pragma once

#include "report.h"

namespace awq_trt {

// Make that library, which lies beside this program, the one of this process: before anything else asks for cuBLASLt.
bool LoadFakeCublasLt();

// Before LoadFakeCublasLt, which it calls: what it checks first is how libraries are found.
void CheckCublasLt(uint64_t seed, Report& report);

}  // namespace awq_trt
