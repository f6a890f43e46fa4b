#include "gemm_checks.h"

#include <cstdio>
#include <random>
#include <set>
#include <vector>

#include "kernels/gemm_tiles.cuh"
#include "plan/kernels.h"

namespace awq_trt {
namespace {

// Nothing if every unit of every tile belongs to exactly one block, and all of it fits; else what is wrong.
std::string ProblemOf(GemmPlan const& plan, GemmArgs const& args, Device const& device) {
  GemmTile const& tile = kGemmTiles[plan.tile];
  if (tile.wgmma && !(device.wgmma && args.x_aligned)) return "a kernel that cannot run here";
  if (plan.row_tiles * tile.rows() < args.n || (plan.row_tiles - 1) * tile.rows() >= args.n) return "features";
  if (static_cast<int64_t>(plan.token_tiles) * tile.tokens < args.tokens) return "tokens";
  if (plan.units * kTileK < args.k || (plan.units - 1) * kTileK >= args.k) return "columns";
  if (plan.tiles != plan.row_tiles * plan.token_tiles) return "tiles";
  int32_t const resident = CeilDiv(plan.blocks, device.multiprocessors);
  if (resident > tile.resident) return "more blocks than fit at once";
  int32_t const static_bytes = tile.wgmma ? 128 : 16;  // as tests/plugins/test_sass.py finds it
  if (resident * (plan.shared_bytes + static_bytes + kReservedBytes) > device.shared_bytes) return "shared memory";
  if (plan.split_blocks > plan.blocks || plan.split_tiles > kMaxSplitTiles) return "blocks or counters";
  int64_t const slots = 2LL * plan.split_blocks * tile.sum_bytes();
  if (slots > static_cast<int64_t>(GemmWorkspaceBytes(args.n, args.k, args.tokens))) return "workspace";

  std::vector<int32_t> seen(static_cast<size_t>(plan.tiles), 0);  // units of each tile
  std::vector<int32_t> arrivals(static_cast<size_t>(plan.split_tiles), 0);
  std::set<Words const*> places;
  for (int32_t block = 0; block < plan.blocks; ++block) {
    int32_t count = 0;
    for (Piece piece = FirstPiece(plan, block); IsPiece(plan, piece); piece = NextPiece(plan, block, piece.tile)) {
      ++count;
      if (piece.tile < 0 || piece.tile >= plan.tiles) return "a tile that is not there";
      if (piece.begin < 0 || piece.begin >= piece.end || piece.end > plan.units) return "an empty piece";
      // pieces of a tile come in the order of the blocks, so they follow each other
      if (seen[piece.tile] != piece.begin) return "a unit twice, or left out";
      seen[piece.tile] = piece.end;
      if (IsWhole(plan, piece)) continue;
      if (piece.tile >= plan.split_tiles) return "a part of a tile that is not split";
      ++arrivals[piece.tile];
      if (!places.insert(PartialTile(args, plan, tile.sum_bytes(), piece.tile, block)).second) return "a place twice";
      int32_t const first = piece.tile * plan.units, part = plan.segments.PartOf(first + piece.begin);
      if (part != block || plan.segments.PartOf(first + piece.end - 1) != block) return "the block of a unit";
    }
    if (count == 0) return "an idle block";
  }
  for (int32_t units : seen) {
    if (units != plan.units) return "a tile left out";
  }
  for (int32_t i = 0; i < plan.split_tiles; ++i) {
    int32_t const first = plan.segments.PartOf(i * plan.units), last = plan.segments.PartOf((i + 1) * plan.units - 1);
    if (arrivals[i] != (first == last ? 0 : last - first + 1)) return "arrivals";
  }
  std::set<std::pair<int32_t, int32_t>> located;
  for (int32_t i = 0; i < plan.tiles; ++i) {
    TileAt const at = LocateTile(plan, i);
    if (at.row < 0 || at.row >= plan.row_tiles || at.token < 0 || at.token >= plan.token_tiles) return "a place in Y";
    if (!located.insert({at.row, at.token}).second) return "a place in Y twice";
  }
  return "";
}

void CheckPlans(uint64_t seed, Report& report) {
  constexpr int32_t kPlans = 6000;
  constexpr Device kDevices[] = {
      {80, 108, 164 << 10},       {86, 82, 100 << 10},   {89, 128, 100 << 10},
      {90, 132, 228 << 10, true}, {90, 132, 228 << 10},  {90, 6, 228 << 10, true},
      {100, 148, 228 << 10},      {120, 170, 100 << 10}, {100, 600, 228 << 10}};  // larger than any: limits are reached
  std::mt19937_64 random(seed);
  auto below = [&random](int64_t bound) { return static_cast<int32_t>(random() % bound); };
  int32_t planned = 0, split = 0, hybrid = 0, used[kGemmTileCount] = {};
  std::string problem;
  while (planned < kPlans && problem.empty()) {
    // every magnitude alike; K in 32s, N in 8s
    LayerConfig const layer{
        8 * (1 + below(8LL << below(11))), 32 * (1 + below(4LL << below(9))), 32, true, false, false};
    GemmArgs args = MakeArgs(layer);
    args.tokens = 1 + below(32LL << below(9));
    args.x_aligned = below(8) != 0;
    Device device = kDevices[below(sizeof(kDevices) / sizeof(kDevices[0]))];
    if (!device.wgmma) device.shared_bytes -= below(device.shared_bytes - (100 << 10) + 1);  // any, down to the least
    GemmPolicy const& policy = kTactics[below(kTacticCount)].gemm;
    GemmPlan plan;
    if (!PlanGemm(args, policy, device, plan)) {
      problem = "no plan";
    } else {
      if (plan.tiles > 20000) continue;  // seconds
      problem = ProblemOf(plan, args, device);
    }
    ++planned, ++used[plan.tile];
    split += plan.split_tiles > 0;
    hybrid += plan.split_tiles > 0 && plan.tiles > plan.split_tiles;
    if (problem.empty()) continue;
    char text[200];
    std::snprintf(text, sizeof(text), ": n=%d k=%d tokens=%d sm=%d tile=%d split_tiles=%d blocks=%d", args.n, args.k,
                  args.tokens, device.sm, plan.tile, plan.split_tiles, plan.blocks);
    problem += text;
  }
  bool every_tile = true;
  for (int32_t count : used) every_tile &= count > 20;
  char numbers[160];
  std::snprintf(numbers, sizeof(numbers), "\"shapes\": %d, \"split\": %d, \"split_and_whole\": %d", planned, split,
                hybrid);
  report.Check("every unit of a product belongs to one block",
               problem.empty() && split > 1000 && hybrid > 200 && every_tile,
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
  CheckPlans(seed, report);
  CheckWorkspace(report);
}

}  // namespace awq_trt
