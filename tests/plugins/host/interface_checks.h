// Everything of the plugin interface that needs no GPU.
#pragma once

#include "report.h"
#include "tensorrt_side.h"

namespace awq_trt {

void CheckInterface(Library const& library, Report& report);

}  // namespace awq_trt
