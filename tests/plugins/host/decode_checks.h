// The decode kernel's arithmetic and its division of work, exhaustively and over thousands of shapes: no launch needed.
#pragma once

#include "report.h"

namespace awq_trt {

void CheckDecode(uint64_t seed, Report& report);

}  // namespace awq_trt
