#include "decode_checks.h"

#include <cstdio>
#include <random>
#include <vector>

#include "kernels/decode_kernel.cuh"
#include "numbers.h"
#include "plan/kernels.h"

namespace awq_trt {
namespace {

// All 16 integers at all 8 places of a word, against all 16 zeros of its row: the A fragment is the exact difference.
template <typename T>
int32_t WrongIntegers(Format const& format) {
  int32_t wrong = 0;
  for (uint32_t zero = 0; zero < 16; ++zero) {
    for (uint32_t other_zero : {0u, 5u, 15u}) {
      for (uint32_t value = 0; value < 16; ++value) {
        for (int32_t place = 0; place < 8; ++place) {  // a_place of fragments.h: register place / 2, high half if odd
          int32_t const reg = place / 2, bit = 4 * reg + 16 * (place % 2), row_half = reg % 2;
          for (uint32_t noise : {0u, 0xffffffffu, 0x5a5a5a5au}) {  // what the other places hold
            uint32_t const word = (noise & ~(15u << bit)) | value << bit;
            uint32_t a[4], minus_zero[2];
            MinusZeros<T>(minus_zero, row_half == 0 ? zero | other_zero << 4 : other_zero | zero << 4);
            IntegerFragment<T>(a, word, minus_zero);
            double const found = Decode(format, static_cast<uint16_t>(a[reg] >> (16 * (place % 2))));
            if (found != static_cast<double>(value) - static_cast<double>(zero)) ++wrong;
          }
        }
      }
    }
  }
  return wrong;
}

// Nothing if every K-block of the layer belongs to exactly one warp of one block, and all of it fits; else what is
// wrong.
std::string ProblemOf(DecodeSchedule const& schedule, GemmArgs const& args, DecodePolicy const& policy,
                      Device const& device) {
  int32_t const packed_rows = PackedRows(schedule.token_tiles), rows = CeilDiv(args.n, kTileN);
  int32_t const row_tiles = CeilDiv(rows, packed_rows), k_blocks = CeilDiv(args.k, kBlockK);
  if (schedule.token_tiles * kTokenTile < args.tokens) return "tokens left out";
  if (schedule.ranges < 1 || schedule.ranges > row_tiles) return "more ranges than row tiles: counters would overflow";
  if (schedule.warps() * packed_rows > kDecodeMaxWarps) return "warps";
  constexpr int32_t kStaticBytes = 16;  // as tests/plugins/test_sass.py finds it
  int32_t const block_bytes = CeilDiv(schedule.shared_bytes + kStaticBytes, 128) * 128 + 1024;
  if (block_bytes * policy.blocks_per_sm > device.shared_bytes) return "shared memory";
  if (schedule.row_bytes % 32 != 16) return "rows of X fall into the same banks";
  int32_t const x_end =
      schedule.warps() * packed_rows * (kDecodeStages * kStageBytes + schedule.token_tiles * kSumsBytes) +
      args.tokens * schedule.row_bytes;
  if (x_end != schedule.shared_bytes) return "layout of shared memory";
  if (schedule.ranges > 65535) return "more rows of blocks than a launch may have";
  if (schedule.slices > 1) {
    int64_t const sums = static_cast<int64_t>(schedule.slices) * rows * schedule.token_tiles * kSumsBytes;
    if (sums > static_cast<int64_t>(DecodeWorkspaceBytes(args.n, args.k, args.tokens))) return "workspace";
  }
  std::vector<uint8_t> seen(static_cast<size_t>(row_tiles) * k_blocks);
  for (int32_t slice = 0; slice < schedule.slices; ++slice) {
    for (int32_t range = 0; range < schedule.ranges; ++range) {
      Rectangle const block = RectangleOf(schedule, range, slice);
      if (block.row_tiles < 1 || block.k_blocks < 1) return "an empty block";
      if (schedule.row_bytes < block.k_blocks * kBlockK * 2) return "rows of X are too short";
      Cut const segments = SegmentsOf(schedule, block);
      for (int32_t warp = 0; warp < schedule.warps(); ++warp) {
        int32_t const begin = segments.Begin(warp), end = begin + segments.Size(warp);
        if (end != segments.Begin(warp + 1)) return "segments that do not follow each other";
        for (int32_t i = begin; i < end; ++i) {
          if (RowTileOf(block, i) != i / block.k_blocks) return "a quotient";
          int32_t const row_tile = block.first_row_tile + i / block.k_blocks,
                        k_block = block.first_k_block + i % block.k_blocks;
          if (row_tile >= row_tiles || k_block >= k_blocks) return "a K-block outside of the layer";
          if (seen[static_cast<size_t>(row_tile) * k_blocks + k_block]++ != 0) return "a K-block twice";
        }
      }
    }
  }
  for (uint8_t s : seen) {
    if (s != 1) return "a K-block left out";
  }
  return "";
}

void CheckSchedules(uint64_t seed, Report& report) {
  constexpr int32_t kSchedules = 4000;
  constexpr Device kDevices[] = {{80, 108, 164 << 10}, {86, 82, 100 << 10}, {89, 128, 100 << 10},
                                 {90, 132, 228 << 10}, {90, 6, 228 << 10},  {100, 148, 228 << 10},
                                 {120, 170, 100 << 10}};
  std::mt19937_64 random(seed);
  auto below = [&random](int64_t bound) { return static_cast<int32_t>(random() % bound); };
  int32_t planned = 0, split = 0, waves = 0;
  std::string problem;
  for (int32_t i = 0; i < kSchedules && problem.empty(); ++i) {
    // every magnitude alike; K in 32s, N in 8s
    LayerConfig const layer{
        8 * (1 + below(8LL << below(11))), 32 * (1 + below(4LL << below(9))), 32, true, false, false};
    GemmArgs args = MakeArgs(layer);
    args.tokens = 1 + below(kDecodeMaxTokens);
    Device device = kDevices[below(sizeof(kDevices) / sizeof(kDevices[0]))];
    device.shared_bytes -= below(device.shared_bytes - (100 << 10) + 1);  // any, down to the least
    DecodePolicy const& policy = kTactics[below(kTacticCount)].decode;
    DecodeSchedule schedule;
    if (!ScheduleDecode(args, policy, device, schedule)) continue;
    ++planned;
    split += schedule.slices > 1;
    waves += schedule.slices * schedule.ranges > device.sm_count * policy.blocks_per_sm;
    problem = ProblemOf(schedule, args, policy, device);
    if (problem.empty()) continue;
    char text[200];
    std::snprintf(text, sizeof(text), ": n=%d k=%d tokens=%d sm=%d blocks=%d slices=%d ranges=%d", args.n, args.k,
                  args.tokens, device.sm, policy.blocks_per_sm, schedule.slices, schedule.ranges);
    problem += text;
  }
  char numbers[160];
  std::snprintf(numbers, sizeof(numbers), "\"shapes\": %d, \"planned\": %d, \"split\": %d, \"waves\": %d", kSchedules,
                planned, split, waves);
  report.Check("every K-block of a layer belongs to one warp",
               problem.empty() && planned > kSchedules / 2 && split > 100 && waves > 100,
               numbers + (problem.empty() ? "" : ", \"problem\": " + Quote(problem)));
}

// Layers of real models must not fall through to the other kernel on any GPU, with the tactic that needs no timing.
void CheckDefault(Report& report) {
  std::string missing;
  for (Device const& device : {Device{80, 108, 164 << 10}, Device{86, 82, 100 << 10}, Device{90, 132, 228 << 10},
                               Device{120, 170, 100 << 10}}) {
    for (int32_t n : {576, 960, 4096, 6144, 10240, 28672, 57344}) {
      for (int32_t k : {576, 1536, 4096, 8192, 12288, 14336, 28672}) {
        for (int32_t tokens : {1, 2, 4, 8, 16, 24, 32}) {
          GemmArgs args = MakeArgs({n, k, 32, true, false, false});
          args.tokens = tokens;
          DecodeSchedule schedule;
          if (ScheduleDecode(args, kTactics[0].decode, device, schedule)) continue;
          missing += " n=" + std::to_string(n) + " k=" + std::to_string(k) + " tokens=" + std::to_string(tokens) +
                     " sm=" + std::to_string(device.sm);
        }
      }
    }
  }
  report.Check("the default tactic decodes the layers of real models", missing.empty(),
               "\"missing\": " + Quote(missing));
}

}  // namespace

void CheckDecode(uint64_t seed, Report& report) {
  report.Check("integers of all words, fp16", WrongIntegers<Half>(kHalfFormat) == 0);
  report.Check("integers of all words, bf16", WrongIntegers<Bfloat16>(kBfloat16Format) == 0);
  CheckSchedules(seed, report);
  CheckDefault(report);
}

}  // namespace awq_trt
