// The GPU that the emulator is, and what it has done.
#pragma once

#include "plan/gemm_schedule.h"

namespace awq_trt {

// Few SMs, so that small layers are divided as large ones are on a GPU. What is planned next is for it.
extern Device emulated_device;

// How often the kernel of a tile has run, and with tiles that are split.
struct EmulatedTile {
  int64_t launches, split;
};
extern EmulatedTile emulated_tiles[kGemmTileCount];
extern int64_t emulated_dequantizations;

}  // namespace awq_trt
