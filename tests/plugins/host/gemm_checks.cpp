#include "gemm_checks.h"

#include <algorithm>
#include <cstdio>
#include <random>
#include <set>
#include <vector>

#include "kernels/gemm_tiles.cuh"
#include "plan/kernels.h"

namespace awq_trt {
namespace {

// Nothing if every K-block of every tile belongs to exactly one block, and all of it fits; else what is wrong.
std::string ProblemOf(GemmSchedule const& schedule, GemmArgs const& args, Device const& device) {
  GemmTile const& tile = kGemmTiles[schedule.tile];
  if (tile.wgmma && !(device.wgmma && args.x_aligned)) return "a kernel that cannot run here";
  if (schedule.grid_rows * tile.rows() < args.n || (schedule.grid_rows - 1) * tile.rows() >= args.n) return "features";
  if (static_cast<int64_t>(schedule.grid_tokens) * tile.tokens < args.tokens) return "tokens";
  if (schedule.k_blocks * kTileK < args.k || (schedule.k_blocks - 1) * kTileK >= args.k) return "columns";
  if (schedule.tiles != schedule.grid_rows * schedule.grid_tokens) return "tiles";
  int32_t const resident = CeilDiv(schedule.blocks, device.sm_count);
  if (resident > tile.resident) return "more blocks than fit at once";
  int32_t const static_bytes = tile.wgmma ? 128 : 16;  // as tests/plugins/test_sass.py finds it
  int32_t const block_bytes = CeilDiv(schedule.shared_bytes + static_bytes, 128) * 128 + 1024;
  if (resident * block_bytes > device.shared_bytes) return "shared memory";
  if (schedule.split_blocks > schedule.blocks || schedule.split_tiles > kMaxSplitTiles) return "blocks or counters";
  int64_t const slots = 2LL * schedule.split_blocks * tile.sum_bytes();
  if (slots > static_cast<int64_t>(GemmWorkspaceBytes(args.n, args.k, args.tokens))) return "workspace";

  std::vector<int32_t> seen(static_cast<size_t>(schedule.tiles), 0);  // K-blocks of each tile
  std::vector<int32_t> arrivals(static_cast<size_t>(schedule.split_tiles), 0);
  std::set<Words const*> places;
  for (int32_t block = 0; block < schedule.blocks; ++block) {
    int32_t count = 0;
    for (Piece piece = FirstPiece(schedule, block); IsPiece(schedule, piece);
         piece = NextPiece(schedule, block, piece.tile)) {
      ++count;
      if (piece.tile < 0 || piece.tile >= schedule.tiles) return "a tile that is not there";
      if (piece.begin < 0 || piece.begin >= piece.end || piece.end > schedule.k_blocks) return "an empty piece";
      // pieces of a tile come in the order of the blocks, so they follow each other
      if (seen[piece.tile] != piece.begin) return "a K-block twice, or left out";
      seen[piece.tile] = piece.end;
      if (IsWhole(schedule, piece)) continue;
      if (piece.tile >= schedule.split_tiles) return "a part of a tile that is not split";
      ++arrivals[piece.tile];
      if (!places.insert(PartialTile(args, schedule, tile.sum_bytes(), piece.tile, block)).second)
        return "a place twice";
      int32_t const first = piece.tile * schedule.k_blocks, part = schedule.segments.PartOf(first + piece.begin);
      if (part != block || schedule.segments.PartOf(first + piece.end - 1) != block) return "the block of a K-block";
    }
    if (count == 0) return "an idle block";
  }
  for (int32_t k_blocks : seen) {
    if (k_blocks != schedule.k_blocks) return "a tile left out";
  }
  for (int32_t i = 0; i < schedule.split_tiles; ++i) {
    int32_t const first = schedule.segments.PartOf(i * schedule.k_blocks),
                  last = schedule.segments.PartOf((i + 1) * schedule.k_blocks - 1);
    if (arrivals[i] != (first == last ? 0 : last - first + 1)) return "arrivals";
  }
  std::set<std::pair<int32_t, int32_t>> located;
  for (int32_t i = 0; i < schedule.tiles; ++i) {
    TileAt const at = LocateTile(schedule, i);
    if (at.row < 0 || at.row >= schedule.grid_rows || at.token < 0 || at.token >= schedule.grid_tokens)
      return "a place in Y";
    if (!located.insert({at.row, at.token}).second) return "a place in Y twice";
  }
  return "";
}

void CheckSchedules(uint64_t seed, Report& report) {
  constexpr int32_t kSchedules = 6000;
  constexpr Device kDevices[] = {
      {80, 108, 164 << 10},       {86, 82, 100 << 10},   {89, 128, 100 << 10},
      {90, 132, 228 << 10, true}, {90, 132, 228 << 10},  {90, 6, 228 << 10, true},
      {100, 148, 228 << 10},      {120, 170, 100 << 10}, {100, 600, 228 << 10}};  // larger than any: limits are reached
  std::mt19937_64 random(seed);
  auto below = [&random](int64_t bound) { return static_cast<int32_t>(random() % bound); };
  int32_t planned = 0, split = 0, hybrid = 0, used[kGemmTileCount] = {};
  std::string problem;
  while (planned < kSchedules && problem.empty()) {
    // every magnitude alike; K in 32s, N in 8s
    LayerConfig const layer{
        8 * (1 + below(8LL << below(11))), 32 * (1 + below(4LL << below(9))), 32, true, false, false};
    GemmArgs args = MakeArgs(layer);
    args.tokens = 1 + below(32LL << below(9));
    args.x_aligned = below(8) != 0;
    Device device = kDevices[below(sizeof(kDevices) / sizeof(kDevices[0]))];
    if (!device.wgmma) device.shared_bytes -= below(device.shared_bytes - (100 << 10) + 1);  // any, down to the least
    GemmPolicy const& policy = kTactics[below(kTacticCount)].gemm;
    GemmSchedule schedule;
    if (!ScheduleGemm(args, policy, device, schedule)) {
      problem = "no schedule";
    } else {
      if (schedule.tiles > 20000) continue;  // seconds
      problem = ProblemOf(schedule, args, device);
    }
    ++planned, ++used[schedule.tile];
    split += schedule.split_tiles > 0;
    hybrid += schedule.split_tiles > 0 && schedule.tiles > schedule.split_tiles;
    if (problem.empty()) continue;
    char text[200];
    std::snprintf(text, sizeof(text), ": n=%d k=%d tokens=%d sm=%d tile=%d split_tiles=%d blocks=%d", args.n, args.k,
                  args.tokens, device.sm, schedule.tile, schedule.split_tiles, schedule.blocks);
    problem += text;
  }
  int32_t const least_used = *std::min_element(used, used + kGemmTileCount);
  char numbers[160];
  std::snprintf(numbers, sizeof(numbers),
                "\"shapes\": %d, \"split\": %d, \"split_and_whole\": %d, \"least_used_tile\": %d", planned, split,
                hybrid, least_used);
  report.Check("every K-block of a product belongs to one block",
               problem.empty() && split > 1000 && hybrid > 200 && least_used > 20,
               numbers + (problem.empty() ? "" : ", \"problem\": " + Quote(problem)));
}

// A call with fewer tokens never needs more than what was reserved for more of them, and that stays below a limit.
void CheckWorkspace(Report& report) {
  bool ok = true;
  for (int32_t n : {8, 576, 4096, 57344, 1 << 20}) {
    for (int32_t k : {32, 576, 4096, 28672, 1 << 20}) {
      size_t before = 0;
      for (int64_t tokens = 1; tokens <= kMaxTokens; tokens *= 2) {
        size_t const bytes = WorkspaceBytes({n, k, 32, true, false, false}, tokens);
        ok &= bytes >= before && GemmWorkspaceBytes(n, k, tokens) <= size_t{48} << 20;
        before = bytes;
      }
    }
  }
  report.Check("the workspace grows with the tokens, partial sums up to a limit", ok);
}

}  // namespace

void CheckGemm(uint64_t seed, Report& report) {
  CheckSchedules(seed, report);
  CheckWorkspace(report);
}

}  // namespace awq_trt
