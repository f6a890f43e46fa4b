#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <unordered_set>
#include <vector>

#include "device.h"
#include "numbers.h"

namespace awq_trt {
namespace emulator {
namespace {

constexpr int32_t kLanes = 32;
constexpr size_t kStackBytes = 128 << 10;

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
};

// One collective instruction of a warp under way: the lanes that have arrived, with their operands.
struct Warp {
  char const* instruction = nullptr;
  int32_t arrived = 0;
  uint64_t generation = 0;
  void* operands[kLanes];
};

std::vector<Range> memory;
std::vector<std::unique_ptr<Thread>> threads;
std::vector<Warp> warps;
Thread* current = nullptr;
jmp_buf scheduler;
int32_t block_index, block_row, block_threads, shared_bytes;
constexpr int32_t kMaxSharedBytes = 256 << 10;
alignas(16) char dynamic_shared[kMaxSharedBytes];
int32_t barrier_arrived;
uint64_t barrier_generation;
std::unordered_set<void const*> stored;  // in this launch
int32_t counting_thread;                 // the one that has counted this block's arrival, -1 before
uint64_t counting_generation;            // of the barrier, then
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

// Every lane of the warp brings its operands; the last to arrive computes for all, as the hardware does.
template <typename Operands, typename Compute>
void Collective(char const* instruction, Operands& mine, Compute compute) {
  Warp& warp = warps[current->index / kLanes];
  if (warp.arrived == 0) warp.instruction = instruction;
  if (std::strcmp(warp.instruction, instruction) != 0)
    Fail("%s while its warp is at %s", instruction, warp.instruction);
  warp.operands[current->index % kLanes] = &mine;
  uint64_t const generation = warp.generation;
  if (++warp.arrived == kLanes) {
    Operands* all[kLanes];
    for (int32_t lane = 0; lane < kLanes; ++lane) all[lane] = static_cast<Operands*>(warp.operands[lane]);
    compute(all);
    warp.arrived = 0;
    ++warp.generation;
  }
  while (warp.generation == generation) Yield();
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
  if (counting_thread >= 0 && counting_thread != current->index && counting_generation == barrier_generation) {
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
    std::memset(dynamic_shared, 0xff, shared_bytes);
    warps.assign(thread_count / kLanes, Warp{});
    barrier_arrived = 0;
    counting_thread = -1;
    for (int32_t i = 0; i < thread_count; ++i) {
      Thread& thread = *threads[i];
      thread.index = i;
      thread.started = false;
      thread.done = false;
      thread.waited = !grid.early;
      thread.open.clear();
      thread.groups.clear();
      Prepare(thread);
    }
    for (size_t w = 0; w < warp_order.size(); ++w) warp_order[w] = static_cast<int32_t>(w);
    for (bool running = true; running;) {
      running = false;
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
    if (barrier_arrived != 0) Fail("%d threads ended before a barrier that others wait at", thread_count);
  }
}

uint32_t Fma2(ElementType type, uint32_t a, uint32_t b, uint32_t c) {
  Format const& f = FormatOf(type);
  uint32_t d = 0;
  for (int32_t shift = 0; shift < 32; shift += 16) {
    double const value =
        std::fma(Decode(f, static_cast<uint16_t>(a >> shift)), Decode(f, static_cast<uint16_t>(b >> shift)),
                 Decode(f, static_cast<uint16_t>(c >> shift)));
    d |= static_cast<uint32_t>(Encode(f, value)) << shift;
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
    Format const& f = FormatOf(type);
    double a_matrix[16][16], b_matrix[16][8];
    for (int32_t lane = 0; lane < kLanes; ++lane) {
      int32_t const group = lane >> 2, in_group = lane & 3;
      for (int32_t i = 0; i < 8; ++i) {  // a0..a7 of the PTX ISA
        int32_t const row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
        int32_t const column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
        a_matrix[row][column] = Decode(f, static_cast<uint16_t>(all[lane]->a[i / 2] >> (16 * (i & 1))));
      }
      for (int32_t i = 0; i < 4; ++i) {  // b0..b3
        int32_t const row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
        b_matrix[row][group] = Decode(f, static_cast<uint16_t>(all[lane]->b[i / 2] >> (16 * (i & 1))));
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
    for (Copy const& copy : current->groups.front()) {
      if (copy.valid) {
        CheckLoad(copy.global, copy.bytes);
        std::memcpy(copy.shared, copy.global, copy.bytes);
      } else {
        std::memset(copy.shared, 0, copy.bytes);
      }
    }
    current->groups.pop_front();
  }
}

}  // namespace emulator

int32_t ThreadIndex() { return emulator::current->index; }
int32_t BlockIndex() { return emulator::block_index; }
int32_t BlockRow() { return emulator::block_row; }
int32_t BlockThreads() { return emulator::block_threads; }

void SyncThreads() {
  using namespace emulator;
  uint64_t const generation = barrier_generation;
  if (++barrier_arrived == block_threads) {
    barrier_arrived = 0;
    ++barrier_generation;
  }
  while (barrier_generation == generation) Yield();
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
  emulator::counting_generation = emulator::barrier_generation;
  return before;
}

void CopyAsync(Shared shared, void const* global, bool valid) { emulator::StartCopy(shared, global, 16, valid); }
void CopyAsync8(Shared shared, void const* global) { emulator::StartCopy(shared, global, 8, true); }
void CommitCopies() {
  emulator::current->groups.push_back(std::move(emulator::current->open));
  emulator::current->open.clear();
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
