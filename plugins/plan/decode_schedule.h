// How the decode kernel divides a layer over blocks and warps: made by the host, read by the kernel.
//
//   packed row   16 output features: a row of tiles of the packed layout
//   row tile     one packed row, or two with more than 16 tokens: the rows that read X from shared memory together
//   K-block      128 columns of a row tile: 2 or 4 packed tiles, 1 or 2 KiB of weights
//
//            K ─────────────────────────────►
//          ┌────────────┬────────────┬──────────┐
//   N      │ row tile 0 │            │          │   blocks   row tiles are cut into `ranges`, K-blocks into `slices`;
//   │      │ row tile 1 │            │          │            block (slice, range) has one rectangle. Slices of a range
//   │      ├────────────┼────────────┼──────────┤            start together
//   ▼      │ row tile 2 │            │          │   warps    the rectangle's K-blocks, row tile after row tile, are cut
//          └────────────┴────────────┴──────────┘            into one segment of consecutive K-blocks for each warp
//             slice 0      slice 1     slice 2
//
// A slice of X has to fit into shared memory; more slices keep more SMs busy where there are few row tiles. Where that
// makes more blocks than fit at once, the sums of some are added while others still stream. A segment that ends inside
// a row tile leaves a partial sum, added in shared memory in the order of the warps; slices of a range leave theirs in
// the workspace, added in the order of the slices by the block that arrives last.
#pragma once

#include "plan/gpu.h"
#include "plan/problem.h"

namespace awq_trt {

constexpr int32_t kDecodeMaxTokenTiles = 4, kDecodeMaxTokens = kDecodeMaxTokenTiles * kTokenTile;
constexpr int32_t kBlockKTiles = 2, kBlockK = kBlockKTiles * kTileK;
constexpr int32_t kBlockKMaxGroups = kBlockK / 32;  // groups of a K-block, at most
constexpr int32_t kDecodeStages = 4;  // K-blocks of a warp in shared memory: one in use, the others in flight
constexpr int32_t kDecodeMaxWarps = 16;

// 16 features of a K-block as they lie in shared memory, in bytes: q [tile][lane][16], scales [part][i][4] (rows i and
// i + 8), zeros [part][i] of 8 bytes in every 32. A part is what has one scale: a group, or the K-block if that is
// smaller.
constexpr int32_t kTileBytes = kTileN * kTileK / 2;
constexpr int32_t kStageScales = kBlockKTiles * kTileBytes, kStageZeros = kStageScales + kBlockKMaxGroups * 32;
constexpr int32_t kStageBytes = kStageZeros + kBlockKMaxGroups * 32;
constexpr int32_t kSumsBytes = kTileN * kTokenTile * 4;  // of 16 features and a tile of tokens, fp32

// Packed rows in a row tile.
AWQ_HOST_DEVICE int32_t PackedRows(int32_t token_tiles) { return token_tiles > 2 ? 2 : 1; }

struct DecodeSchedule {
  int32_t token_tiles;  // ceil(tokens / 8)
  int32_t warp_shift;   // warps per block: 1 << warp_shift
  int32_t ranges, slices;
  Cut row_tiles_of_range, k_blocks_of_slice;
  uint32_t reciprocal, larger_reciprocal;  // ceil(2^32 / K-blocks) of a slice: kernels do not divide
  int32_t part_shift;  // a K-block is scaled in parts of 32 << part_shift columns: groups, or the whole K-block
  int32_t part_step;   // from the scales of a K-block to the next one's in the same row tile: parts, or 0
  int32_t last_k_block, last_parts;  // of a row tile, and how many of that K-block's parts are not beyond K
  int32_t row_bytes;                 // of one token of X in shared memory
  int32_t shared_bytes;              // of a block

  AWQ_HOST_DEVICE int32_t warps() const { return 1 << warp_shift; }
};

// One way to divide a layer; the best one depends on layer, tokens and GPU, so TensorRT times them.
enum class Split { kFewest, kEstimated, kDouble };
struct DecodePolicy {
  int32_t blocks_per_sm;  // that share its warps: 1 or 2
  Split split;            // slices: as few as fit, as estimated to be fastest, twice that
};

// False where the decode kernel is not for this call: too many tokens, or not even a K-block of X fits into shared
// memory.
bool ScheduleDecode(GemmArgs const& args, DecodePolicy const& policy, Device const& device, DecodeSchedule& schedule);

// The workspace of the most slices that any schedule has, on any GPU, for this many tokens or fewer.
size_t DecodeWorkspaceBytes(int32_t n, int32_t k, int64_t tokens);

}  // namespace awq_trt
