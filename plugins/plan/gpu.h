// What is known of a GPU before anything is measured: schedules are made from it.
#pragma once

#include <cstdint>

namespace awq_trt {

struct Device {
  int32_t sm;            // compute capability times ten
  int32_t sm_count;      // SMs
  int32_t shared_bytes;  // of an SM that its blocks may use together
  bool wgmma = false;    // this is sm_90, and its kernels are in this library
};

// Of shared memory: what the system takes for every block, the unit that a block gets (CUDA's occupancy calculator),
// and what a kernel declares beside what its schedule asks for.
constexpr int32_t kReservedBytes = 1024, kSharedUnit = 128, kStaticBytes = 16, kWgmmaStaticBytes = 128;

// What a schedule may ask for where an SM has so many bytes for each of its blocks.
constexpr int32_t SharedRoom(int32_t bytes, int32_t static_bytes) {
  return (bytes - kReservedBytes) / kSharedUnit * kSharedUnit - static_bytes;
}

constexpr double kL2Ratio = 2;  // bandwidth of L2 over that of device memory

// A generation. Rates are those of datasheets, over the SMs of the GPU that is named.
struct Architecture {
  int32_t sm;            // this one and newer, up to the next row
  double bandwidth;      // bytes per nanosecond for one SM
  int32_t decode_warps;  // of one SM: what keeps bandwidth * 1 us in flight, if shared memory allows
  double mma;            // multiply-adds per nanosecond of one SM: mma.sync in 16 bits with fp32 sums
  double wgmma;          // the same for wgmma; 0 where there is none
};
Architecture const& ArchitectureOf(int32_t sm);

}  // namespace awq_trt
