#include "plan/decode_schedule.h"

#include <algorithm>

namespace awq_trt {
namespace {

constexpr int32_t kLeastSharedBytes = 100 << 10, kLeastWarps = 8;  // of an SM: sm_86, sm_89, sm_120
constexpr int32_t kMostWaves = 4;                                  // of blocks that fit at once
constexpr double kSplitNanoseconds = 1100;                         // fence, addition and one more trip to L2
constexpr double kWaveNanoseconds = 1000;                          // until a new block's rings are full

int32_t SharedBytes(int32_t warps, int32_t token_tiles, int32_t rows, int32_t row_bytes) {
  return warps * PackedRows(token_tiles) * (kDecodeStages * kStageBytes + token_tiles * kSumsBytes) + rows * row_bytes;
}

int32_t Log2(int32_t power) {
  int32_t shift = 0;
  while (1 << shift < power) ++shift;
  return shift;
}

uint32_t Reciprocal(int32_t divisor) {  // 0 for 1, whose quotients are the dividends
  return static_cast<uint32_t>(((int64_t{1} << 32) + divisor - 1) / divisor);
}

// A row of X: an odd number of 16-byte chunks, so that the 8 rows of one ldmatrix phase fall into different banks.
int32_t RowBytes(int32_t k_blocks) { return k_blocks * kBlockK * 2 + 16; }

// Slices beyond which nobody gains: enough for X to fit where shared memory is least, or for about a thousand blocks,
// but partial sums (written and read) at most as many bytes as the weights.
int32_t MostSlices(int32_t n, int32_t k, int32_t tokens) {
  int32_t const k_blocks = CeilDiv(k, kBlockK), token_tiles = CeilDiv(tokens, kTokenTile);
  int32_t const room = SharedRoom(kLeastSharedBytes, kStaticBytes) -
                       SharedBytes(kLeastWarps / PackedRows(token_tiles), token_tiles, 0, 0);
  int32_t const fitting = std::max(1, (room / tokens - 16) / (2 * kBlockK));
  int32_t const wanted = std::max(CeilDiv(k_blocks, fitting), CeilDiv(1024, CeilDiv(n, kTileN)));
  return std::clamp(wanted, 1, std::max(1, k_blocks / token_tiles));
}

}  // namespace

bool ScheduleDecode(GemmArgs const& args, DecodePolicy const& policy, Device const& device, DecodeSchedule& schedule) {
  if (args.tokens < 1 || args.tokens > kDecodeMaxTokens) return false;
  int32_t const token_tiles = CeilDiv(args.tokens, kTokenTile), packed_rows = PackedRows(token_tiles);
  int32_t const row_tiles = CeilDiv(CeilDiv(args.n, kTileN), packed_rows), k_blocks = CeilDiv(args.k, kBlockK);
  int32_t const most = MostSlices(args.n, args.k, args.tokens);
  int32_t const room = SharedRoom(device.shared_bytes / policy.blocks_per_sm, kStaticBytes);
  int32_t const at_once = device.sm_count * policy.blocks_per_sm;  // blocks
  Architecture const& architecture = ArchitectureOf(device.sm);
  double const bandwidth = architecture.bandwidth / policy.blocks_per_sm;  // of one block
  int32_t const warps = architecture.decode_warps / policy.blocks_per_sm / packed_rows;

  DecodeSchedule base{};
  base.token_tiles = token_tiles;
  base.warp_shift = Log2(warps);
  base.part_shift = args.group_shift < 7 ? args.group_shift - 5 : 2;
  base.part_step = args.groups == 1 ? 0 : kBlockKMaxGroups >> base.part_shift;
  base.last_k_block = k_blocks - 1;
  base.last_parts = args.groups == 1 ? 1 : args.groups - base.last_k_block * base.part_step;

  // False where a block would need more shared memory than there is.
  auto make = [&](int32_t slices, int32_t waves, DecodeSchedule& made) {
    made = base;
    made.slices = slices;
    made.ranges = std::clamp(at_once * waves / slices, 1, row_tiles);
    made.row_tiles_of_range = {row_tiles / made.ranges, row_tiles % made.ranges};
    made.k_blocks_of_slice = {k_blocks / slices, k_blocks % slices};
    made.reciprocal = Reciprocal(made.k_blocks_of_slice.base);
    made.larger_reciprocal = Reciprocal(made.k_blocks_of_slice.base + 1);
    int32_t const slice_k_blocks = CeilDiv(k_blocks, slices);
    made.row_bytes = RowBytes(slice_k_blocks);
    if (made.row_bytes > room) return false;  // also: no overflow below
    made.shared_bytes = SharedBytes(warps, token_tiles, args.tokens, made.row_bytes);
    // the kernel's quotients by reciprocals are exact up to here
    bool const exact =
        static_cast<int64_t>(CeilDiv(row_tiles, made.ranges)) * slice_k_blocks * slice_k_blocks < UINT32_MAX;
    return exact && made.shared_bytes <= room;
  };
  auto nanoseconds = [&](DecodeSchedule const& p) {
    double const block_rows = CeilDiv(row_tiles, p.ranges) * packed_rows, block_k_blocks = CeilDiv(k_blocks, p.slices);
    double const weights = block_rows * block_k_blocks * (kBlockKTiles * kTileBytes),
                 x = args.tokens * block_k_blocks * kBlockK * 2;
    double const sums = block_rows * token_tiles * kSumsBytes;
    double const block = weights / bandwidth + x / (kL2Ratio * bandwidth);
    double const last = p.slices > 1 ? kSplitNanoseconds + sums * (p.slices + 1) / (kL2Ratio * bandwidth) : 0;
    int32_t const waves = CeilDiv(p.ranges * p.slices, at_once);
    return waves * block + (waves - 1) * kWaveNanoseconds + last;
  };

  bool found = false;
  int32_t best_waves = 1;
  for (int32_t slices = 1; slices <= most; ++slices) {
    bool fits = false;
    for (int32_t waves = 1; waves <= kMostWaves; ++waves) {
      DecodeSchedule candidate;
      if (!make(slices, waves, candidate)) continue;
      fits = true;
      if (found && nanoseconds(candidate) >= nanoseconds(schedule)) continue;
      schedule = candidate, best_waves = waves, found = true;
    }
    if (fits && policy.split == Split::kFewest) break;
  }
  DecodeSchedule twice;
  if (found && policy.split == Split::kDouble && 2 * schedule.slices <= most &&
      make(2 * schedule.slices, best_waves, twice)) {
    schedule = twice;
  }
  return found;
}

size_t DecodeWorkspaceBytes(int32_t n, int32_t k, int64_t tokens) {
  size_t bytes = 0;
  for (int32_t m = 1; m <= std::min<int64_t>(tokens, kDecodeMaxTokens); ++m) {
    size_t const slices = MostSlices(n, k, m);
    if (slices > 1) bytes = std::max(bytes, slices * CeilDiv(n, kTileN) * CeilDiv(m, kTokenTile) * kSumsBytes);
  }
  return bytes;
}

}  // namespace awq_trt
