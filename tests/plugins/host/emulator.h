// The machine of device.h on a CPU: every thread of a block is a fiber, memory is bounds-checked, shared memory starts
// as garbage, blocks and warps run in random order, what the kernel before has written can be read only after waiting
// for it, and what is asynchronous happens late: copies when they are waited for or, where a barrier counts them, at a
// random time; multiplications of a warpgroup, with the operands as they are then, when they are waited for.
//
// What each primitive does is written from the PTX ISA, not from the kernels: "Matrix Fragments for mma.m16n8k16",
// "ldmatrix", "cp.async", "mbarrier", "cp.async.bulk.tensor", "Asynchronous Warpgroup Level Matrix Instructions".
// Included by device.h only.
#pragma once

#include <cstdint>
#include <cstring>

#define AWQ_DEVICE inline
#define AWQ_KERNEL(max_threads, min_blocks) inline void
#define AWQ_SHARED static
#define AWQ_GRID_CONSTANT

namespace awq_trt {
namespace emulator {

// Global memory is what has been registered; the kernels may touch nothing else. A constant may be read before the
// kernel before has ended. ForgetMemory forgets all but memory of the device's own (kOwn).
enum class Memory { kConstant, kProduced, kWritable, kOwn };
void RegisterMemory(void const* p, int64_t bytes, Memory kind);
void ForgetMemory();
void ForgetMemory(void const* p);

struct Grid {
  int64_t blocks;
  int32_t rows;  // of blocks: BlockRow() is below
  int32_t threads;
  int32_t shared_bytes;
  bool early;  // launched before the kernel before has ended
};
// Run body() for every thread of every block.
void Run(Grid const& grid, void (*body)(void*), void* context);

void CheckLoad(void const* p, int32_t bytes);
void CheckStore(void const* p, int32_t bytes);
void CheckShared(void const* p, int32_t bytes);

enum class ElementType { kHalf, kBfloat16 };
uint32_t Fma2(ElementType type, uint32_t a, uint32_t b, uint32_t c);
float ToFloat(ElementType type, uint16_t v);
uint16_t FromFloat(ElementType type, float v);
void Mma(ElementType type, float (&d)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1);
void WaitCopies(int32_t pending);
void MultiplyAsync(ElementType type, float (*d)[4], int32_t tiles, uint32_t const* a, char const* b);
void WaitMultiplying(int32_t pending);

// What cuTensorMapEncodeTiled makes of a matrix; fails where that would.
struct MatrixMap {
  void const* data;
  int64_t columns, rows, row_bytes;
  int32_t element_bytes, box_columns, box_rows;
  bool swizzled;  // by 128 bytes
};
TensorMap Encode(MatrixMap const& matrix);

template <typename T>
struct TypeOf;
template <>
struct TypeOf<Half> {
  static constexpr ElementType value = ElementType::kHalf;
};
template <>
struct TypeOf<Bfloat16> {
  static constexpr ElementType value = ElementType::kBfloat16;
};

template <typename V>
V Load(void const* p) {
  CheckLoad(p, sizeof(V));
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <typename V>
void Store(void* p, V const& v) {
  CheckStore(p, sizeof(V));
  std::memcpy(p, &v, sizeof(V));
}

}  // namespace emulator

int32_t ThreadIndex();
int32_t BlockIndex();
int32_t BlockRow();
int32_t BlockThreads();
void SyncThreads();
void SyncThreads(int32_t id, int32_t threads);
void SyncWarp();
void WaitForPreviousKernel();
inline void LetNextKernelStart() {}
template <typename V>
V Opaque(V v) {
  return v;
}

using Shared = char*;
inline Shared SharedOf(void const* p) { return static_cast<char*>(const_cast<void*>(p)); }
Shared DynamicShared();
inline Shared AlignShared(Shared p, uint32_t bytes) {
  return p + (bytes - reinterpret_cast<uintptr_t>(p) % bytes) % bytes;
}
template <typename V>
V LoadSharedAs(Shared p) {
  emulator::CheckShared(p, sizeof(V));
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
inline Words LoadShared(Shared p) { return LoadSharedAs<Words>(p); }
inline uint32_t LoadShared32(Shared p) { return LoadSharedAs<uint32_t>(p); }
inline uint32_t LoadShared8(Shared p) { return LoadSharedAs<uint8_t>(p); }
inline void StoreShared(Shared p, Words const& v) {
  emulator::CheckShared(p, sizeof(v));
  std::memcpy(p, &v, sizeof(v));
}
inline void StoreShared16(Shared p, uint16_t v) {
  emulator::CheckShared(p, sizeof(v));
  std::memcpy(p, &v, sizeof(v));
}

inline Words LoadStreaming(void const* p) { return emulator::Load<Words>(p); }
inline uint32_t Load32(void const* p) { return emulator::Load<uint32_t>(p); }
inline uint16_t Load16(void const* p) { return emulator::Load<uint16_t>(p); }
inline uint8_t Load8(void const* p) { return emulator::Load<uint8_t>(p); }
inline Words LoadWords(void const* p) { return emulator::Load<Words>(p); }
inline void StoreWords(void* p, Words const& v) { emulator::Store(p, v); }
inline void Store32(void* p, uint32_t v) { emulator::Store(p, v); }
inline void Store16(void* p, uint16_t v) { emulator::Store(p, v); }

uint32_t CountArrival(uint32_t* p);

void CopyAsync(Shared shared, void const* global, bool valid);
void CopyAsync8(Shared shared, void const* global);
void CommitCopies();
template <int kPending>
void WaitCopies() {
  emulator::WaitCopies(kPending);
}
void LoadMatrices(uint32_t (&r)[4], Shared row);

using Barrier = uint64_t;
void InitBarrier(Shared barrier, int32_t count);
inline void PublishBarriers() {}
void Arrive(Shared barrier);
void ArriveExpecting(Shared barrier, int32_t bytes);
void ArriveAfterCopies(Shared barrier);
void AwaitPhase(Shared barrier, uint32_t parity);
void CopyBox(Shared shared, TensorMap const& map, int32_t column, int32_t row, Shared barrier);
inline void PrefetchMap(TensorMap const&) {}
template <int kRegisters>
void GiveRegisters() {}
template <int kRegisters>
void TakeRegisters() {}
inline void StartMultiplying() {}
void CommitMultiplying();
template <int kPending>
void WaitMultiplying() {
  emulator::WaitMultiplying(kPending);
}
template <int kTiles>
void Settle(float (&)[kTiles][4]) {}

inline uint32_t MultiplyHigh(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}
inline uint32_t AndOr(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) | bits; }
inline uint32_t BitsOf(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  return bits;
}
inline float FloatOf(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

template <typename T>
uint32_t Fma2(uint32_t a, uint32_t b, uint32_t c) {
  return emulator::Fma2(emulator::TypeOf<T>::value, a, b, c);
}
template <typename T>
float ToFloat(uint16_t v) {
  return emulator::ToFloat(emulator::TypeOf<T>::value, v);
}
template <typename T>
uint16_t FromFloat(float v) {
  return emulator::FromFloat(emulator::TypeOf<T>::value, v);
}
template <typename T>
void Mma(float (&d)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::Mma(emulator::TypeOf<T>::value, d, a, b0, b1);
}
template <typename T, int kTiles>
void MultiplyAsync(float (&d)[kTiles][4], uint32_t const (&a)[4], Shared b) {
  emulator::MultiplyAsync(emulator::TypeOf<T>::value, d, kTiles, a, b);
}

}  // namespace awq_trt
