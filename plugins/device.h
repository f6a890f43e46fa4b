// The machine the kernels are written for: a handful of primitives, each one instruction of PTX.
//
// Kernels use nothing else of CUDA. Compiled by a C++ compiler instead of nvcc, emulator.h stands in for this machine,
// so that the very same kernel source runs, bounds-checked, on a CPU.
#pragma once

#include <cstdint>

namespace awq_trt {

// Element types. `kExponent` is the bit pattern that turns a 4-bit integer in the low mantissa bits into
// kOffset + integer: 1024 in fp16, 128 in bf16, where the unit in the last place is 1.
struct Half {
  static constexpr uint32_t kExponent = 0x64006400, kOne = 0x3c003c00;
};
struct Bfloat16 {
  static constexpr uint32_t kExponent = 0x43004300, kOne = 0x3f803f80;
};

constexpr uint32_t kSignBits = 0x80008000;  // also: a pair of -0.0, the neutral addend of a product

struct alignas(16) Words {
  uint32_t w[4];
};

}  // namespace awq_trt

#ifdef __CUDACC__

#define AWQ_DEVICE __device__ __forceinline__
#define AWQ_HOST_DEVICE __host__ __device__ constexpr
#define AWQ_KERNEL(max_threads) __global__ void __launch_bounds__(max_threads)
#define AWQ_SHARED __shared__

namespace awq_trt {

AWQ_DEVICE int32_t ThreadIndex() { return static_cast<int32_t>(threadIdx.x); }
AWQ_DEVICE int32_t BlockIndex() { return static_cast<int32_t>(blockIdx.x); }
AWQ_DEVICE int32_t BlockThreads() { return static_cast<int32_t>(blockDim.x); }
AWQ_DEVICE void SyncThreads() { __syncthreads(); }

// Read-only data in global memory. Weights pass through once, so they do not evict the activations from L1.
AWQ_DEVICE Words LoadStreaming(void const* p) {
  Words r;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.w[0]), "=r"(r.w[1]), "=r"(r.w[2]), "=r"(r.w[3])
               : "l"(p));
  return r;
}
AWQ_DEVICE uint32_t Load32(void const* p) { return __ldg(static_cast<uint32_t const*>(p)); }
AWQ_DEVICE uint16_t Load16(void const* p) { return __ldg(static_cast<uint16_t const*>(p)); }
AWQ_DEVICE uint8_t Load8(void const* p) { return __ldg(static_cast<uint8_t const*>(p)); }

AWQ_DEVICE void StoreWords(void* p, Words const& v) {
  *static_cast<uint4*>(p) = make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]);
}
AWQ_DEVICE void Store16(void* p, uint16_t v) { *static_cast<uint16_t*>(p) = v; }

// Asynchronous copy of 16 bytes from global to shared memory; zeros where `valid` is false (nothing is read then).
AWQ_DEVICE void CopyAsync(void* shared, void const* global, bool valid) {
  uint32_t const address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
AWQ_DEVICE void CommitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until at most kPending of this thread's committed groups are under way.
template <int kPending>
AWQ_DEVICE void WaitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements from shared memory; lane i passes the address of row i % 8 of matrix i / 8 and
// receives, of each matrix, row lane / 4, columns 2 (lane % 4) and the next.
AWQ_DEVICE void LoadMatrices(uint32_t (&r)[4], void const* shared_row) {
  uint32_t const address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Two elements at once: a * b + c, rounded once.
template <typename T>
AWQ_DEVICE uint32_t Fma2(uint32_t a, uint32_t b, uint32_t c);
template <>
AWQ_DEVICE uint32_t Fma2<Half>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
template <>
AWQ_DEVICE uint32_t Fma2<Bfloat16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

template <typename T>
AWQ_DEVICE float ToFloat(uint16_t v);
template <>
AWQ_DEVICE float ToFloat<Half>(uint16_t v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
}
template <>
AWQ_DEVICE float ToFloat<Bfloat16>(uint16_t v) {
  return __uint_as_float(static_cast<uint32_t>(v) << 16);
}

template <typename T>
AWQ_DEVICE uint16_t FromFloat(float v);
template <>
AWQ_DEVICE uint16_t FromFloat<Half>(float v) {
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
  return h;
}
template <>
AWQ_DEVICE uint16_t FromFloat<Bfloat16>(float v) {
  uint16_t h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(v));
  return h;
}

// d[16 x 8] += a[16 x 16] * b[16 x 8], fp32 accumulation; fragments as drawn in fragments.h.
template <typename T>
AWQ_DEVICE void Mma(float (&d)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1);
template <>
AWQ_DEVICE void Mma<Half>(float (&d)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
AWQ_DEVICE void Mma<Bfloat16>(float (&d)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace awq_trt

#else
#include "host_check/emulator.h"
#endif
