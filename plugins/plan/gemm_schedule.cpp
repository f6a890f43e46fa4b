#include "plan/gemm_schedule.h"

#include <algorithm>

namespace awq_trt {
namespace {

constexpr int64_t kMaxPartialBytes = 48 << 20;
constexpr int32_t kLeastKBlocks = 4;        // of a segment: fewer are not worth a partial sum
constexpr double kEfficiency = 0.85;        // of the tensor cores while a tile is computed
constexpr double kKBlockNanoseconds = 20;   // barriers and addresses
constexpr double kTileNanoseconds = 600;    // first and last K-block of a tile, which nothing overlaps
constexpr double kSplitNanoseconds = 2000;  // fence, count, and the first partial sum
constexpr double kOneReader = 80;           // bytes per nanosecond that one block reads from L2

int32_t StageBytes(GemmTile const& tile) {
  StageLayout const stage(tile.warps * tile.row_tiles, tile.tokens);
  return tile.wgmma ? CeilDiv(stage.bytes, kSwizzleBytes) * kSwizzleBytes : stage.bytes;
}
int32_t ScratchBytes(GemmTile const& tile) {
  return tile.warps * kScratchTokens * (tile.row_tiles * kTileN * 2 + kScratchPad);
}
int32_t SharedBytes(GemmTile const& tile, int32_t stages) {
  return stages * StageBytes(tile) + ScratchBytes(tile) + (tile.wgmma ? kSwizzleBytes : 0);
}

// Whether so many blocks of an SM have that many stages.
bool Fits(GemmTile const& tile, int32_t stages, int32_t blocks, Device const& device) {
  int32_t const static_bytes = tile.wgmma ? kWgmmaStaticBytes : kStaticBytes;
  return SharedBytes(tile, stages) <= SharedRoom(device.shared_bytes / blocks, static_bytes);
}
int32_t StagesOf(GemmTile const& tile, Device const& device) {
  if (tile.wgmma) return kWgmmaStages;
  return Fits(tile, kMmaStages, 1, device) ? kMmaStages : kMmaStages - 1;
}
int32_t BlocksAtOnce(GemmTile const& tile, Device const& device) {
  int32_t blocks = tile.resident;
  while (blocks > 1 && !Fits(tile, StagesOf(tile, device), blocks, device)) --blocks;
  return device.sm_count * blocks;
}

int64_t TileCount(GemmTile const& tile, int32_t n, int64_t tokens) {
  return CeilDiv(n, tile.rows()) * ((tokens + tile.tokens - 1) / tile.tokens);
}

// Partial sums: two of each block that has a segment.
int64_t PartialBytes(GemmTile const& tile, int32_t n, int32_t k, int64_t tokens) {
  int64_t const segments = TileCount(tile, n, tokens) * CeilDiv(k, kTileK) / kLeastKBlocks;
  return std::min(kMaxPartialBytes / (2 * tile.sum_bytes()), segments) * 2 * tile.sum_bytes();
}

// A schedule with that tile whose first `split_tiles` are split over so many blocks, or fewer if that is too many;
// false where it cannot be, or would split nothing.
bool MakeSchedule(GemmArgs const& args, Device const& device, int32_t kind, int32_t split_tiles, int32_t split_blocks,
                  GemmSchedule& schedule) {
  GemmTile const& tile = kGemmTiles[kind];
  int64_t const tiles = TileCount(tile, args.n, args.tokens);
  if (tiles > INT32_MAX / 2 || split_tiles > std::min<int64_t>(tiles, kMaxSplitTiles)) return false;
  schedule = {};
  schedule.tile = kind;
  schedule.grid_rows = CeilDiv(args.n, tile.rows());
  schedule.grid_tokens = CeilDiv(args.tokens, tile.tokens);
  schedule.k_blocks = CeilDiv(args.k, kTileK);
  schedule.raster_group = kRasterGroupTokens / tile.tokens;
  schedule.tiles = static_cast<int32_t>(tiles);
  schedule.stages = StagesOf(tile, device);
  schedule.shared_bytes = SharedBytes(tile, schedule.stages);
  int32_t const at_once = BlocksAtOnce(tile, device);
  schedule.blocks = std::min(at_once, schedule.tiles);
  if (split_tiles == 0) return true;
  int64_t const k_blocks = static_cast<int64_t>(split_tiles) * schedule.k_blocks;  // at most 2^10 * 2^14
  int64_t const slots = PartialBytes(tile, args.n, args.k, args.tokens) / (2 * tile.sum_bytes());
  schedule.split_tiles = split_tiles;
  schedule.split_blocks = static_cast<int32_t>(std::min<int64_t>({split_blocks, k_blocks / kLeastKBlocks, slots}));
  if (schedule.split_blocks <= std::min(split_tiles, at_once - 1)) return false;
  schedule.segments = {static_cast<int32_t>(k_blocks / schedule.split_blocks),
                       static_cast<int32_t>(k_blocks % schedule.split_blocks)};
  schedule.blocks = std::max(schedule.blocks, schedule.split_blocks);
  return true;
}

}  // namespace

double EstimateNanoseconds(GemmSchedule const& schedule, GemmArgs const& args, Device const& device) {
  GemmTile const& tile = kGemmTiles[schedule.tile];
  Architecture const& architecture = ArchitectureOf(device.sm);
  int32_t const resident = CeilDiv(schedule.blocks, device.sm_count);
  double const l2 = kL2Ratio * architecture.bandwidth / resident;
  double const rate = kEfficiency * (tile.wgmma ? architecture.wgmma : architecture.mma) / resident;
  double const k_block_bytes = tile.rows() * (kTileK / 2) + tile.tokens * (kTileK * 2);
  double const k_block = kKBlockNanoseconds + std::max(tile.rows() * tile.tokens * kTileK / rate, k_block_bytes / l2);
  double const store = kTileNanoseconds + tile.rows() * tile.tokens * 2 / l2;
  int32_t const segment = schedule.split_tiles > 0 ? schedule.segments.Size(0) : 0;
  int32_t const whole = CeilDiv(schedule.tiles - schedule.split_tiles, schedule.blocks);
  double const memory =
      (0.52 * args.n * args.k + 2.0 * args.tokens * (args.n + args.k)) / (architecture.bandwidth * device.sm_count);
  double total = std::max(memory, (segment + static_cast<double>(whole) * schedule.k_blocks) * k_block) +
                 (whole + CeilDiv(segment, schedule.k_blocks)) * store;
  if (segment > 0) {
    bool const aligned = schedule.segments.extra == 0 && schedule.k_blocks % segment == 0;
    int32_t const parts = CeilDiv(schedule.k_blocks, segment) + (aligned ? 0 : 1);
    total += kSplitNanoseconds + (parts + 1) * tile.sum_bytes() / std::min(kOneReader, 2 * l2);
  }
  return total;
}

bool ScheduleGemm(GemmArgs const& args, GemmPolicy const& policy, Device const& device, GemmSchedule& schedule) {
  // the best way to split with each tile
  GemmSchedule schedules[kGemmTileCount];
  int32_t count = 0, best = 0;
  double best_time = 0;
  for (int32_t kind = 0; kind < kGemmTileCount; ++kind) {
    if (kGemmTiles[kind].wgmma && !(device.wgmma && args.x_aligned)) continue;  // TMA needs X aligned
    int32_t const at_once = BlocksAtOnce(kGemmTiles[kind], device);
    GemmSchedule candidate;
    if (!MakeSchedule(args, device, kind, 0, 0, candidate)) continue;
    GemmSchedule& chosen = schedules[count++] = candidate;
    double time = EstimateNanoseconds(chosen, args, device);
    auto consider = [&](int32_t split_tiles, int32_t split_blocks) {
      if (policy.splitting == Splitting::kNever ||
          !MakeSchedule(args, device, kind, split_tiles, split_blocks, candidate))
        return;
      double const split_time = EstimateNanoseconds(candidate, args, device);
      bool const better = split_time < time || (policy.splitting == Splitting::kAlways && chosen.split_tiles == 0);
      if (better) chosen = candidate, time = split_time;
    };
    int32_t const tiles = chosen.tiles, rest = tiles % at_once;
    if (rest > 0) consider(rest, at_once);
    if (rest > 0) consider(rest + at_once, at_once);
    for (int32_t parts = 2; tiles * int64_t{parts} <= at_once;
         ++parts) {  // whole parts: one partial sum for each block
      if (chosen.k_blocks % parts == 0) consider(tiles, tiles * parts);
    }
    if (count == 1 || time < best_time) best = count - 1, best_time = time;
  }
  if (count == 0) return false;
  int32_t const other = std::clamp(best + policy.larger, 0, count - 1);
  schedule =
      schedules[kGemmTiles[schedules[other].tile].wgmma == kGemmTiles[schedules[best].tile].wgmma ? other : best];
  return true;
}

size_t GemmWorkspaceBytes(int32_t n, int32_t k, int64_t tokens) {
  int64_t bytes = 0;
  for (GemmTile const& tile : kGemmTiles) bytes = std::max(bytes, PartialBytes(tile, n, k, tokens));
  return static_cast<size_t>(bytes);
}

}  // namespace awq_trt
