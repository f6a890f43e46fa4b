// The GPU that the emulator is.
#pragma once

#include "gpu.h"

namespace awq_trt {

// Few multiprocessors, so that small layers are divided as large ones are on a GPU. What is planned next is for it.
extern Device emulated_device;

}  // namespace awq_trt
