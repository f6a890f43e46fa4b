#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <unordered_set>
#include <vector>

#include "kernels/device.h"
#include "numbers.h"

namespace awq_trt {
namespace emulator {
namespace {

constexpr int32_t kLanes = kWarp;
constexpr size_t kStackBytes = 128 << 10;
constexpr int32_t kMaxRounds = 20'000'000;  // of scheduling, for a block: then it hangs

struct Range {
  char const* begin;
  char const* end;
  Memory kind;
};

struct Copy {
  void* shared;
  void const* global;
  int32_t bytes;
  bool valid;
};

// A multiplication of a warpgroup: the operands of one lane.
struct Multiplication {
  ElementType type;
  float (*d)[4];
  int32_t tiles;
  uint32_t const* a;
  char const* b;
};

struct BarrierState {
  int32_t count, pending;
  int64_t bytes;  // expected
  uint32_t phase;
};

// A fiber begins as a context; from then on it is left and resumed by _setjmp and _longjmp, which make no system call.
struct Thread {
  ucontext_t context;
  jmp_buf resume;
  bool started;
  std::unique_ptr<char[]> stack;
  int32_t index;
  bool done;
  bool waited;                           // for the kernel before
  std::vector<Copy> open;                // copies of the group that is not committed yet
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Multiplication> open_multiplications;
  std::deque<std::vector<Multiplication>> multiplications;
};

// One collective instruction of a warp or a warpgroup in flight: the lanes that have arrived, with their operands.
template <int32_t kSize>
struct Group {
  char const* instruction = nullptr;
  int32_t arrived = 0;
  uint64_t generation = 0;
  void* operands[kSize];
};

std::vector<Range> memory;
std::vector<std::unique_ptr<Thread>> threads;
std::vector<Group<kLanes>> warps;
std::vector<Group<kWarpgroup>> warpgroups;
Thread* current = nullptr;
jmp_buf scheduler;
int32_t block_index, block_row, block_threads, shared_bytes;
constexpr int32_t kMaxSharedBytes = 256 << 10;
alignas(1024) char shared_memory[kMaxSharedBytes + 1024];
char* dynamic_shared = shared_memory;  // of this block: anywhere that is aligned to 16 bytes
constexpr int32_t kNamedBarriers = 16;
int32_t barrier_arrived[kNamedBarriers];
uint64_t barrier_generation[kNamedBarriers], any_generation;
std::map<Shared, BarrierState> barriers;   // in shared memory
std::vector<std::function<void()>> later;  // what TMA does at a time of its own
std::unordered_set<void const*> stored;    // in this launch
int32_t counting_thread;                   // the one that has counted this block's arrival, -1 before
uint64_t counting_generation;              // of the barrier, then
std::mt19937 order(1);

[[noreturn]] void Fail(char const* format, ...) __attribute__((format(printf, 1, 2)));
void Fail(char const* format, ...) {
  std::fflush(stdout);
  std::fprintf(stderr, "emulator: block %d, row %d, thread %d: ", block_index, block_row,
               current != nullptr ? current->index : -1);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  std::_Exit(3);
}

void Yield() {
  if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
}

// Run a fiber until it yields.
[[gnu::noinline]] void Resume(Thread& thread) {
  if (_setjmp(scheduler) != 0) return;
  if (thread.started) _longjmp(thread.resume, 1);
  thread.started = true;
  setcontext(&thread.context);
}

Format const& FormatOf(ElementType type) { return type == ElementType::kHalf ? kHalfFormat : kBfloat16Format; }

// The values of all bit patterns.
std::vector<double> AllValues(Format const& format) {
  std::vector<double> values(1 << 16);
  for (int32_t bits = 0; bits < 1 << 16; ++bits) values[bits] = Decode(format, static_cast<uint16_t>(bits));
  return values;
}
std::vector<double> const half_values = AllValues(kHalfFormat), bfloat16_values = AllValues(kBfloat16Format);
double const* ValuesOf(ElementType type) {
  return type == ElementType::kHalf ? half_values.data() : bfloat16_values.data();
}

void CheckAccess(void const* p, int32_t bytes, bool write) {
  char const* const begin = static_cast<char const*>(p);
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    Fail("%s of %d bytes at %p is not aligned", write ? "store" : "load", bytes, p);
  }
  for (Range const& range : memory) {
    if (begin < range.begin || begin + bytes > range.end) continue;
    if (write && (range.kind == Memory::kConstant || range.kind == Memory::kProduced)) continue;
    if (current->waited || (!write && range.kind == Memory::kConstant)) return;
    Fail("%s at %p while the kernel before may be running", write ? "store" : "load", p);
  }
  Fail("%s of %d bytes at %p is outside every buffer", write ? "store" : "load", bytes, p);
}

// Every lane of the group brings its operands; the last to arrive computes for all, as the hardware does.
template <typename Operands, int32_t kSize, typename Compute>
void Collective(std::vector<Group<kSize>>& groups, char const* instruction, Operands& mine, Compute compute) {
  Group<kSize>& group = groups[current->index / kSize];
  if (group.arrived == 0) group.instruction = instruction;
  if (std::strcmp(group.instruction, instruction) != 0)
    Fail("%s while its warp is at %s", instruction, group.instruction);
  group.operands[current->index % kSize] = &mine;
  uint64_t const generation = group.generation;
  if (++group.arrived == kSize) {
    Operands* all[kSize];
    for (int32_t lane = 0; lane < kSize; ++lane) all[lane] = static_cast<Operands*>(group.operands[lane]);
    compute(all);
    group.arrived = 0;
    ++group.generation;
  }
  while (group.generation == generation) Yield();
}
template <typename Operands, typename Compute>
void Collective(char const* instruction, Operands& mine, Compute compute) {
  Collective(warps, instruction, mine, compute);
}

BarrierState& BarrierAt(Shared p) {
  auto const found = barriers.find(p);
  if (found == barriers.end()) Fail("no barrier at %p", static_cast<void*>(p));
  return found->second;
}
void EndPhase(BarrierState& barrier) {
  if (barrier.pending < 0 || barrier.bytes < 0) Fail("more arrivals or bytes at a barrier than it expects");
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.count;
  ++barrier.phase;
}

void ArriveAt(Shared p) {
  BarrierState& barrier = BarrierAt(p);
  --barrier.pending;
  EndPhase(barrier);
}

void Perform(std::vector<Copy> const& copies) {
  for (Copy const& copy : copies) {
    if (copy.valid) {
      std::memcpy(copy.shared, copy.global, copy.bytes);
    } else {
      std::memset(copy.shared, 0, copy.bytes);
    }
  }
}

// "Swizzling Modes" of 128 bytes: bits 4 to 6 of an address are changed by bits 7 to 9.
char* Swizzled(int64_t offset) { return shared_memory + (offset ^ (offset >> 7 & 7) << 4); }

// 64 x (8 * tiles), each warp 16 rows: "Register Fragments for wgmma.mma_async.m64nNk16".
void Multiply(Multiplication const* const (&all)[kWarpgroup]) {
  Multiplication const& first = *all[0];
  double const* const values = ValuesOf(first.type);
  int32_t const tokens = 8 * first.tiles;
  std::vector<double> b(tokens * 16);
  for (int32_t token = 0; token < tokens; ++token) {
    for (int32_t k = 0; k < 16; ++k) {
      char const* const p = Swizzled(first.b - shared_memory + token * 128 + k * 2);
      CheckShared(p, 2);
      uint16_t bits;
      std::memcpy(&bits, p, 2);
      b[token * 16 + k] = values[bits];
    }
  }
  for (int32_t warp = 0; warp < 4; ++warp) {
    double a[16][16];
    for (int32_t lane = 0; lane < kLanes; ++lane) {
      Multiplication const& mine = *all[warp * kLanes + lane];
      if (mine.b != first.b || mine.tiles != first.tiles) Fail("lanes of a warpgroup multiply different matrices");
      for (int32_t i = 0; i < 8; ++i) {
        int32_t const row = lane / 4 + (i / 2 % 2) * 8, column = lane % 4 * 2 + i % 2 + i / 4 * 8;
        a[row][column] = values[mine.a[i / 2] >> (16 * (i % 2)) & 0xffff];
      }
    }
    for (int32_t lane = 0; lane < kLanes; ++lane) {
      for (int32_t i = 0; i < 4 * first.tiles; ++i) {
        int32_t const row = lane / 4 + i / 2 % 2 * 8, token = i / 4 * 8 + lane % 4 * 2 + i % 2;
        float& d = all[warp * kLanes + lane]->d[i / 4][i % 4];
        double sum = d;
        for (int32_t k = 0; k < 16; ++k) sum += a[row][k] * b[token * 16 + k];
        d = static_cast<float>(sum);
      }
    }
  }
}

void (*thread_body)(void*);
void* thread_context;

void Enter() {
  thread_body(thread_context);
  current->done = true;
  Yield();
}

[[gnu::noinline]] void Prepare(Thread& thread) {
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.get();
  thread.context.uc_stack.ss_size = kStackBytes;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, Enter, 0);
}

}  // namespace

void RegisterMemory(void const* p, int64_t bytes, Memory kind) {
  memory.push_back({static_cast<char const*>(p), static_cast<char const*>(p) + bytes, kind});
}
void ForgetMemory() {
  auto const gone = [](Range const& range) { return range.kind != Memory::kOwn; };
  memory.erase(std::remove_if(memory.begin(), memory.end(), gone), memory.end());
}
void ForgetMemory(void const* p) {
  auto const gone = [p](Range const& range) { return range.begin == p; };
  memory.erase(std::remove_if(memory.begin(), memory.end(), gone), memory.end());
}

void CheckShared(void const* p, int32_t bytes) {
  char const* const begin = static_cast<char const*>(p);
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) Fail("access of %d bytes to shared %p is not aligned", bytes, p);
  bool const dynamic = begin >= dynamic_shared && begin < dynamic_shared + kMaxSharedBytes;
  if (dynamic && begin + bytes > dynamic_shared + shared_bytes) {
    Fail("access to byte %d of %d in shared memory", static_cast<int>(begin - dynamic_shared), shared_bytes);
  }
}

void CheckLoad(void const* p, int32_t bytes) { CheckAccess(p, bytes, false); }
void CheckStore(void const* p, int32_t bytes) {
  CheckAccess(p, bytes, true);
  // sums and results have one author; only counters, of 4 bytes, are written again
  if (bytes != 4 && !stored.insert(p).second) Fail("second store at %p in one launch", p);
  // others may have seen the arrival, and with it only what a barrier had ordered before it
  if (counting_thread >= 0 && counting_thread != current->index && counting_generation == any_generation) {
    Fail("store at %p after thread %d has counted the arrival of this block", p, counting_thread);
  }
}

void Run(Grid const& grid, void (*body)(void*), void* context) {
  int32_t const thread_count = grid.threads;
  block_threads = thread_count;
  shared_bytes = grid.shared_bytes;
  if (shared_bytes > kMaxSharedBytes) Fail("%d bytes of shared memory", shared_bytes);
  thread_body = body;
  thread_context = context;
  stored.clear();
  while (static_cast<int32_t>(threads.size()) < thread_count) {
    threads.push_back(std::make_unique<Thread>());
    threads.back()->stack = std::make_unique<char[]>(kStackBytes);
  }
  std::vector<int32_t> warp_order(thread_count / kLanes);
  std::vector<int64_t> block_order(grid.blocks * grid.rows);
  for (size_t i = 0; i < block_order.size(); ++i) block_order[i] = static_cast<int64_t>(i);
  std::shuffle(block_order.begin(), block_order.end(), order);
  for (int64_t block : block_order) {
    block_index = static_cast<int32_t>(block % grid.blocks);
    block_row = static_cast<int32_t>(block / grid.blocks);
    dynamic_shared = shared_memory + order() % 64 * 16;
    std::memset(dynamic_shared, 0xff, shared_bytes);
    warps.assign(thread_count / kLanes, {});
    warpgroups.assign((thread_count + kWarpgroup - 1) / kWarpgroup, {});
    barriers.clear();
    std::fill_n(barrier_arrived, kNamedBarriers, 0);
    counting_thread = -1;
    for (int32_t i = 0; i < thread_count; ++i) {
      Thread& thread = *threads[i];
      thread.index = i;
      thread.started = false;
      thread.done = false;
      thread.waited = !grid.early;
      thread.open.clear();
      thread.groups.clear();
      thread.open_multiplications.clear();
      thread.multiplications.clear();
      Prepare(thread);
    }
    for (size_t w = 0; w < warp_order.size(); ++w) warp_order[w] = static_cast<int32_t>(w);
    int32_t rounds = 0;
    for (bool running = true; running;) {
      running = false;
      if (++rounds > kMaxRounds) Fail("this block hangs");
      for (size_t i = 0; i < later.size();) {
        if (order() % 4 != 0) {
          ++i;
          continue;
        }
        later[i]();
        later.erase(later.begin() + static_cast<std::ptrdiff_t>(i));
      }
      std::shuffle(warp_order.begin(), warp_order.end(), order);
      for (int32_t w : warp_order) {
        bool const skip = order() % 4 == 0;  // so that warps drift apart and a missing barrier shows
        for (int32_t i = w * kLanes; i < (w + 1) * kLanes; ++i) {
          running |= !threads[i]->done;
          if (threads[i]->done || skip) continue;
          current = threads[i].get();
          Resume(*current);
        }
      }
    }
    current = nullptr;
    if (!later.empty()) Fail("%zu copies are in flight when the block ends", later.size());
    for (int32_t arrived : barrier_arrived) {
      if (arrived != 0) Fail("%d threads ended before a barrier that others wait at", thread_count);
    }
  }
}

uint32_t Fma2(ElementType type, uint32_t a, uint32_t b, uint32_t c) {
  double const* const values = ValuesOf(type);
  uint32_t d = 0;
  for (int32_t shift = 0; shift < 32; shift += 16) {
    double const value =
        std::fma(values[a >> shift & 0xffff], values[b >> shift & 0xffff], values[c >> shift & 0xffff]);
    d |= static_cast<uint32_t>(Encode(FormatOf(type), value)) << shift;
  }
  return d;
}

float ToFloat(ElementType type, uint16_t v) { return static_cast<float>(Decode(FormatOf(type), v)); }
uint16_t FromFloat(ElementType type, float v) { return Encode(FormatOf(type), v); }

void Mma(ElementType type, float (&d)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    float* d;
    uint32_t const* a;
    uint32_t b[2];
  } mine{d, a, {b0, b1}};
  Collective("mma", mine, [type](Operands** all) {
    double const* const values = ValuesOf(type);
    double a_matrix[16][16], b_matrix[16][8];
    for (int32_t lane = 0; lane < kLanes; ++lane) {
      int32_t const group = lane >> 2, in_group = lane & 3;
      for (int32_t i = 0; i < 8; ++i) {  // a0..a7 of the PTX ISA
        int32_t const row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
        int32_t const column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
        a_matrix[row][column] = values[all[lane]->a[i / 2] >> (16 * (i & 1)) & 0xffff];
      }
      for (int32_t i = 0; i < 4; ++i) {  // b0..b3
        int32_t const row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
        b_matrix[row][group] = values[all[lane]->b[i / 2] >> (16 * (i & 1)) & 0xffff];
      }
    }
    for (int32_t lane = 0; lane < kLanes; ++lane) {
      for (int32_t i = 0; i < 4; ++i) {  // c0..c3
        int32_t const row = i < 2 ? lane >> 2 : (lane >> 2) + 8, column = (lane & 3) * 2 + (i & 1);
        double sum = all[lane]->d[i];
        for (int32_t k = 0; k < 16; ++k) sum += a_matrix[row][k] * b_matrix[k][column];
        all[lane]->d[i] = static_cast<float>(sum);
      }
    }
  });
}

void WaitCopies(int32_t pending) {
  while (static_cast<int32_t>(current->groups.size()) > pending) {
    Perform(current->groups.front());
    current->groups.pop_front();
  }
}

void MultiplyAsync(ElementType type, float (*d)[4], int32_t tiles, uint32_t const* a, char const* b) {
  if ((b - shared_memory) % 1024 >= 128) Fail("B of wgmma begins inside of 8 rows");
  current->open_multiplications.push_back({type, d, tiles, a, b});
}

void WaitMultiplying(int32_t pending) {
  while (static_cast<int32_t>(current->multiplications.size()) > pending) {
    std::vector<Multiplication> mine = std::move(current->multiplications.front());
    current->multiplications.pop_front();
    Collective(warpgroups, "wgmma", mine, [](std::vector<Multiplication>** all) {
      for (size_t i = 0; i < all[0]->size(); ++i) {
        Multiplication const* lanes[kWarpgroup];
        for (int32_t lane = 0; lane < kWarpgroup; ++lane) {
          if (all[lane]->size() != all[0]->size()) Fail("lanes of a warpgroup have committed different groups");
          lanes[lane] = &(*all[lane])[i];
        }
        Multiply(lanes);
      }
    });
  }
}

TensorMap Encode(MatrixMap const& m) {
  if (reinterpret_cast<uintptr_t>(m.data) % 16 != 0 || m.row_bytes % 16 != 0) Fail("tensor map: not aligned");
  if (m.box_columns > 256 || m.box_rows > 256) Fail("tensor map: a box of %d x %d", m.box_columns, m.box_rows);
  int32_t const bytes = m.box_columns * m.element_bytes;
  if (bytes % 16 != 0 || (m.swizzled && bytes > 128)) Fail("tensor map: a box of %d bytes", bytes);
  TensorMap map{};
  static_assert(sizeof(MatrixMap) <= sizeof(TensorMap));
  std::memcpy(&map, &m, sizeof(m));
  return map;
}

}  // namespace emulator

int32_t ThreadIndex() { return emulator::current->index; }
int32_t BlockIndex() { return emulator::block_index; }
int32_t BlockRow() { return emulator::block_row; }
int32_t BlockThreads() { return emulator::block_threads; }

void SyncThreads() { SyncThreads(0, emulator::block_threads); }

void SyncThreads(int32_t id, int32_t threads) {
  using namespace emulator;
  uint64_t const generation = barrier_generation[id];
  if (++barrier_arrived[id] == threads) {
    barrier_arrived[id] = 0;
    ++barrier_generation[id];
    ++any_generation;
  }
  while (barrier_generation[id] == generation) Yield();
}

void SyncWarp() {
  struct Operands {
  } mine;
  emulator::Collective("bar.warp.sync", mine, [](Operands**) {});
}

void WaitForPreviousKernel() { emulator::current->waited = true; }

Shared DynamicShared() { return emulator::dynamic_shared; }

namespace emulator {
void StartCopy(Shared shared, void const* global, int32_t bytes, bool valid) {
  CheckShared(shared, bytes);
  std::memset(shared, 0xff, bytes);  // not there before it is waited for
  if (valid) CheckLoad(global, bytes);
  current->open.push_back({shared, global, bytes, valid});
}
}  // namespace emulator
uint32_t CountArrival(uint32_t* p) {
  uint32_t const before = emulator::Load<uint32_t>(p);
  emulator::Store(p, before + 1);
  emulator::counting_thread = emulator::current->index;
  emulator::counting_generation = emulator::any_generation;
  return before;
}

void CopyAsync(Shared shared, void const* global, bool valid) { emulator::StartCopy(shared, global, 16, valid); }
void CopyAsync8(Shared shared, void const* global) { emulator::StartCopy(shared, global, 8, true); }
void CommitCopies() {
  emulator::current->groups.push_back(std::move(emulator::current->open));
  emulator::current->open.clear();
}

void InitBarrier(Shared barrier, int32_t count) {
  emulator::CheckShared(barrier, sizeof(Barrier));
  emulator::barriers[barrier] = {count, count, 0, 0};
}
void Arrive(Shared barrier) {
  emulator::ArriveAt(barrier);
  // others may go on while this thread has not come any further
  for (uint32_t pauses = emulator::order() % 2 * (emulator::order() % 32); pauses > 0; --pauses) emulator::Yield();
}
void ArriveExpecting(Shared barrier, int32_t bytes) {
  emulator::BarrierAt(barrier).bytes += bytes;
  Arrive(barrier);
}
void ArriveAfterCopies(Shared barrier) {
  emulator::BarrierAt(barrier);
  emulator::later.push_back([copies = std::move(emulator::current->open), barrier] {
    emulator::Perform(copies);
    emulator::ArriveAt(barrier);
  });
  emulator::current->open.clear();
}
void AwaitPhase(Shared barrier, uint32_t parity) {
  while (emulator::BarrierAt(barrier).phase % 2 == parity) emulator::Yield();
}

void CopyBox(Shared shared, TensorMap const& map, int32_t column, int32_t row, Shared barrier) {
  using namespace emulator;
  MatrixMap m;
  std::memcpy(&m, &map, sizeof(m));
  int64_t const offset = shared - shared_memory, row_bytes = m.box_columns * m.element_bytes;
  if (offset % (m.swizzled ? 1024 : 128) != 0) Fail("box at byte %d of shared memory", static_cast<int>(offset));
  std::vector<Copy> copies;
  for (int32_t r = 0; r < m.box_rows; ++r) {
    for (int64_t byte = 0; byte < row_bytes; byte += 16) {
      int64_t const to = offset + r * row_bytes + byte, from = static_cast<int64_t>(column) * m.element_bytes + byte;
      bool const inside = row + r < m.rows && from < m.columns * m.element_bytes;
      char* const target = m.swizzled ? Swizzled(to) : shared_memory + to;
      char const* const source = static_cast<char const*>(m.data) + (row + r) * m.row_bytes + from;
      CheckShared(target, 16);
      if (inside) CheckLoad(source, 16);
      std::memset(target, 0xff, 16);  // not there yet
      copies.push_back({target, source, 16, inside});
    }
  }
  BarrierAt(barrier);
  later.push_back([copies = std::move(copies), barrier] {
    Perform(copies);
    BarrierState& state = BarrierAt(barrier);
    state.bytes -= static_cast<int64_t>(copies.size()) * 16;
    EndPhase(state);
  });
}

void CommitMultiplying() {
  emulator::current->multiplications.push_back(std::move(emulator::current->open_multiplications));
  emulator::current->open_multiplications.clear();
}

void LoadMatrices(uint32_t (&r)[4], Shared shared_row) {
  struct Operands {
    uint32_t* r;
    char const* row;
  } mine{r, shared_row};
  emulator::CheckShared(shared_row, 16);
  emulator::Collective("ldmatrix", mine, [](Operands** all) {
    for (int32_t lane = 0; lane < emulator::kLanes; ++lane) {
      for (int32_t matrix = 0; matrix < 4; ++matrix) {
        std::memcpy(&all[lane]->r[matrix], all[8 * matrix + lane / 4]->row + 4 * (lane % 4), 4);
      }
    }
  });
}

}  // namespace awq_trt
