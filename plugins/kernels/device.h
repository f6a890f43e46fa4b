// The machine the kernels are written for: a handful of primitives, each one instruction of PTX.
//
// Kernels use nothing else of CUDA. Compiled by a C++ compiler instead of nvcc, emulator.h stands in for this machine,
// so that the very same kernel source runs, bounds-checked, on a CPU.
#pragma once

#include <cstdint>

namespace awq_trt {

// Element types. `kExponent` is the bit pattern that turns a 4-bit integer in the low mantissa bits into
// kOffset + integer: 1024 in fp16, 128 in bf16, where a unit in the last place is 1.
struct Half {
  static constexpr uint32_t kExponent = 0x64006400, kOne = 0x3c003c00;
  static constexpr uint32_t kExponentOver16 = 0x54005400, kSixteenth = 0x2c002c00;  // 1024 / 16 and 1 / 16
  static constexpr int32_t kMantissaBits = 10;
};
struct Bfloat16 {
  static constexpr uint32_t kExponent = 0x43004300, kOne = 0x3f803f80;
  static constexpr int32_t kMantissaBits = 7;
};

constexpr uint32_t kSignBits = 0x80008000;  // also: a pair of -0.0, the neutral addend of a product
constexpr int32_t kWarp = 32, kWarpgroup = 4 * kWarp;

// What TMA of sm_90 knows of a matrix in global memory: CUtensorMap of the driver, made by the host.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

struct alignas(16) Words {
  uint32_t w[4];
};

}  // namespace awq_trt

#ifdef __CUDACC__

#define AWQ_DEVICE __device__ __forceinline__
#define AWQ_KERNEL(max_threads, min_blocks) __global__ void __launch_bounds__(max_threads, min_blocks)
#define AWQ_SHARED __shared__
#define AWQ_GRID_CONSTANT __grid_constant__

namespace awq_trt {

AWQ_DEVICE int32_t ThreadIndex() {
  int32_t i;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(i));  // each use reads it anew and holds no register until the next
  return i;
}
AWQ_DEVICE int32_t BlockIndex() { return static_cast<int32_t>(blockIdx.x); }
AWQ_DEVICE int32_t BlockRow() { return static_cast<int32_t>(blockIdx.y); }
AWQ_DEVICE int32_t BlockThreads() { return static_cast<int32_t>(blockDim.x); }
AWQ_DEVICE void SyncThreads() { __syncthreads(); }
AWQ_DEVICE void SyncWarp() { __syncwarp(); }
// Barrier `id`, 1 to 15, for so many threads of the block.
AWQ_DEVICE void SyncThreads(int32_t id, int32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// An address in shared memory.
using Shared = uint32_t;
AWQ_DEVICE Shared SharedOf(void const* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
// The shared memory whose size the launch says; 16-byte aligned.
AWQ_DEVICE Shared DynamicShared() {
  extern __shared__ Words dynamic_shared[];
  return SharedOf(dynamic_shared);
}
AWQ_DEVICE Shared AlignShared(Shared p, uint32_t bytes) { return (p + bytes - 1) / bytes * bytes; }
AWQ_DEVICE Words LoadShared(Shared p) {
  Words r;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.w[0]), "=r"(r.w[1]), "=r"(r.w[2]), "=r"(r.w[3])
               : "r"(p)
               : "memory");
  return r;
}
AWQ_DEVICE uint32_t LoadShared32(Shared p) {
  uint32_t r;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"(p) : "memory");
  return r;
}
AWQ_DEVICE uint32_t LoadShared8(Shared p) {
  uint32_t r;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(r) : "r"(p) : "memory");
  return r;
}
AWQ_DEVICE void StoreShared(Shared p, Words const& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(p), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3])
               : "memory");
}
AWQ_DEVICE void StoreShared16(Shared p, uint16_t v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(p), "h"(v) : "memory");
}

// Programmatic dependent launch (sm_90 and newer; elsewhere a kernel starts when the one before it has ended). Before
// WaitForPreviousKernel only constants may be read and nothing written; it returns when all that the previous kernel
// wrote is visible.
AWQ_DEVICE void WaitForPreviousKernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
AWQ_DEVICE void LetNextKernelStart() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The same value, about which the compiler knows nothing: it neither takes the sum apart that it is, to add the parts
// anew in every iteration, nor keeps what follows from it in registers to use it a second time later.
AWQ_DEVICE char const* Opaque(char const* p) {
  asm volatile("" : "+l"(p));
  return p;
}
template <typename V>
AWQ_DEVICE V Opaque(V v) {
  asm volatile("" : "+r"(v));
  return v;
}

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

// 16 bytes that another block or the kernel before has written: past L1, which does not know of it.
AWQ_DEVICE Words LoadWords(void const* p) {
  Words r;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.w[0]), "=r"(r.w[1]), "=r"(r.w[2]), "=r"(r.w[3])
               : "l"(p)
               : "memory");
  return r;
}

// In one instruction: the compiler makes four of an assignment where registers are scarce.
AWQ_DEVICE void StoreWords(void* p, Words const& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3])
               : "memory");
}
AWQ_DEVICE void Store32(void* p, uint32_t v) { *static_cast<uint32_t*>(p) = v; }
AWQ_DEVICE void Store16(void* p, uint16_t v) { *static_cast<uint16_t*>(p) = v; }

// *p += 1; what it was. Stores of this block before (a barrier between) are seen by whoever sees the new value, and
// what others stored before their additions is seen after this one.
AWQ_DEVICE uint32_t CountArrival(uint32_t* p) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(p) : "memory");
  return before;
}

// Asynchronous copy of 16 bytes from global to shared memory; zeros where `valid` is false (nothing is read then).
AWQ_DEVICE void CopyAsync(Shared shared, void const* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
// The same with 8 bytes.
AWQ_DEVICE void CopyAsync8(Shared shared, void const* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared), "l"(global) : "memory");
}
AWQ_DEVICE void CommitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until at most kPending of this thread's committed groups are in flight.
template <int kPending>
AWQ_DEVICE void WaitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements from shared memory; lane i passes the address of row i % 8 of matrix i / 8 and
// receives, of each matrix, row lane / 4, columns 2 (lane % 4) and the next.
AWQ_DEVICE void LoadMatrices(uint32_t (&r)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// sm_90, down to PrefetchMap. A barrier in shared memory, 8 bytes, that also counts bytes (PTX ISA, "mbarrier"). It is
// in phase 0, then 1, 0, ..; a phase ends when `count` arrivals and all expected bytes are there.
using Barrier = uint64_t;
AWQ_DEVICE void InitBarrier(Shared barrier, int32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// After the last InitBarrier: TMA sees them, too.
AWQ_DEVICE void PublishBarriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
AWQ_DEVICE void Arrive(Shared barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// One arrival, and so many bytes more are expected in this phase.
AWQ_DEVICE void ArriveExpecting(Shared barrier, int32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// An arrival of this thread as soon as all its asynchronous copies have come that it has started.
AWQ_DEVICE void ArriveAfterCopies(Shared barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// Until the phase of this parity has ended; at once if the barrier is in the next one.
AWQ_DEVICE void AwaitPhase(Shared barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Copy the box of a tensor map at (column, row) to shared memory; its bytes count for `barrier`. Elements outside of
// the matrix come as zeros, and count.
AWQ_DEVICE void CopyBox(Shared shared, TensorMap const& map, int32_t column, int32_t row, Shared barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
      "[%4];" ::"r"(shared),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
AWQ_DEVICE void PrefetchMap(TensorMap const& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

// sm_90a. The registers of each thread of this warpgroup from here on.
template <int kRegisters>
AWQ_DEVICE void GiveRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
AWQ_DEVICE void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The high half of a * b.
AWQ_DEVICE uint32_t MultiplyHigh(uint32_t a, uint32_t b) { return __umulhi(a, b); }

// (a & mask) | bits, in one instruction.
AWQ_DEVICE uint32_t AndOr(uint32_t a, uint32_t mask, uint32_t bits) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
  return d;
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

AWQ_DEVICE uint32_t BitsOf(float v) { return __float_as_uint(v); }
AWQ_DEVICE float FloatOf(uint32_t bits) { return __uint_as_float(bits); }

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

// sm_90a. The multiplication of a warpgroup: 64 rows of A from registers times 8 * kTiles tokens of B in shared memory,
// sums in registers, asynchronous. Each warp brings the A fragment of 16 rows and gets their sums, both as for Mma. B:
// tokens as rows of 128 bytes, aligned to 1024 bytes and swizzled by 128 (chunks of 16 bytes at chunk ^ (row % 8)); `b`
// points to the 16 columns in the first row. From StartMultiplying until the wait that covers it, neither a nor d may
// be touched. PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".
AWQ_DEVICE void StartMultiplying() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
AWQ_DEVICE void CommitMultiplying() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending committed groups are in flight.
template <int kPending>
AWQ_DEVICE void WaitMultiplying() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// d is read or written next: not before the wait above.
template <int kTiles>
AWQ_DEVICE void Settle(float (&d)[kTiles][4]) {
#pragma unroll
  for (int32_t j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int32_t e = 0; e < 4; ++e) asm volatile("" : "+f"(d[j][e])::"memory");
  }
}

AWQ_DEVICE uint64_t SwizzledMatrix(Shared b) {  // "Matrix Descriptor Format": 1024 bytes from 8 rows to the next 8
  return static_cast<uint64_t>((b & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

#define AWQ_SUMS(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define AWQ_SUMS_4(j) AWQ_SUMS(j), AWQ_SUMS(j + 1), AWQ_SUMS(j + 2), AWQ_SUMS(j + 3)
#define AWQ_WGMMA_64(type)                                                                   \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                   \
               " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "    \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, " \
               "%31}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"                                \
               : AWQ_SUMS_4(0), AWQ_SUMS_4(4)                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(SwizzledMatrix(b))          \
               : "memory")
#define AWQ_WGMMA_128(type)                                                                  \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                  \
               " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "    \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, " \
               "%31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, " \
               "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, " \
               "%61, %62, %63}, {%64, %65, %66, %67}, %68, 1, 1, 1, 0;"                      \
               : AWQ_SUMS_4(0), AWQ_SUMS_4(4), AWQ_SUMS_4(8), AWQ_SUMS_4(12)                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(SwizzledMatrix(b))          \
               : "memory")

template <typename T>
AWQ_DEVICE void MultiplyAsync(float (&d)[8][4], uint32_t const (&a)[4], Shared b) {
  if constexpr (T::kMantissaBits == 10) {
    AWQ_WGMMA_64("f16");
  } else {
    AWQ_WGMMA_64("bf16");
  }
}
template <typename T>
AWQ_DEVICE void MultiplyAsync(float (&d)[16][4], uint32_t const (&a)[4], Shared b) {
  if constexpr (T::kMantissaBits == 10) {
    AWQ_WGMMA_128("f16");
  } else {
    AWQ_WGMMA_128("bf16");
  }
}
#undef AWQ_SUMS
#undef AWQ_SUMS_4
#undef AWQ_WGMMA_64
#undef AWQ_WGMMA_128

}  // namespace awq_trt

#else
#include "emulator.h"
#endif
