// How the decode kernel divides a layer over blocks and warps: made by the host, read by the kernel.
//
//   strip   16 output features, 32 with more than 16 tokens: so many read X from shared memory once
//   unit    128 columns of a strip: 2 or 4 tiles, 1 or 2 KiB of weights
//
//            K ─────────────────────────────►
//          ┌────────────┬────────────┬──────────┐
//   N      │ strip 0    │            │          │   blocks   strips are cut into `ranges`, units into `slices`; block
//   │      │ strip 1    │            │          │            (slice, range) has one rectangle. Slices of a range
//   │      ├────────────┼────────────┼──────────┤            start together
//   ▼      │ strip 2    │            │          │   warps    the rectangle's units, strip after strip, are cut into
//          └────────────┴────────────┴──────────┘            one segment of consecutive units for each warp
//             slice 0      slice 1     slice 2
//
// Slices of X have to fit into shared memory; more of them use more multiprocessors where there are few strips. Where
// that makes many, there are more blocks than fit at once, so that sums are added while others stream. A segment that
// ends inside a strip leaves a partial sum, added in shared memory in the order of the warps; slices of a range leave
// theirs in the workspace, added in the order of the slices by the block that arrives last.
#pragma once

#include "plan/gpu.h"
#include "plan/problem.h"

namespace awq_trt {

constexpr int32_t kDecodeMaxTokenTiles = 4, kDecodeMaxTokens = kDecodeMaxTokenTiles * kTokenTile;
constexpr int32_t kUnitTiles = 2, kUnitK = kUnitTiles * kTileK;
constexpr int32_t kUnitMaxGroups = kUnitK / 32;  // groups of a unit, at most
constexpr int32_t kDecodeStages = 4;             // units of a warp in shared memory: one in use, the others under way
constexpr int32_t kDecodeMaxWarps = 16;

// 16 features of a unit as they lie in shared memory, in bytes: q [tile][lane][16], scales [part][i][4] (rows i and
// i + 8), zeros [part][i] of 8 bytes in every 32. A part is what has one scale: a group, or the unit if that is
// smaller.
constexpr int32_t kTileBytes = kTileN * kTileK / 2;
constexpr int32_t kStageScales = kUnitTiles * kTileBytes, kStageZeros = kStageScales + kUnitMaxGroups * 32;
constexpr int32_t kStageBytes = kStageZeros + kUnitMaxGroups * 32;
constexpr int32_t kSumsBytes = kTileN * kTokenTile * 4;  // of 16 features and a tile of tokens, fp32

// Rows of 16 features in a strip.
AWQ_HOST_DEVICE int32_t StripTiles(int32_t token_tiles) { return token_tiles > 2 ? 2 : 1; }

struct DecodePlan {
  int32_t token_tiles;  // ceil(tokens / 8)
  int32_t warp_shift;   // warps per block: 1 << warp_shift
  int32_t ranges, slices;
  Cut strips_of_range, units_of_slice;
  uint32_t reciprocal, larger_reciprocal;  // ceil(2^32 / units) of a slice: kernels do not divide
  int32_t part_shift;             // a unit is scaled in parts of 32 << part_shift columns: groups, or the whole unit
  int32_t part_step;              // from the scales of a unit to the next one's in the same strip: parts, or 0
  int32_t last_unit, last_parts;  // of a strip, and how many of that unit's parts are not beyond K
  int32_t row_bytes;              // of one token of X in shared memory
  int32_t shared_bytes;           // of a block

  AWQ_HOST_DEVICE int32_t warps() const { return 1 << warp_shift; }
};

// One way to divide a layer; the best one depends on layer, tokens and GPU, so TensorRT times them.
enum class Split { kFewest, kEstimated, kDouble };
struct DecodePolicy {
  int32_t blocks_per_multiprocessor;  // that share its warps: 1 or 2
  Split split;                        // slices: as few as fit, as estimated to be fastest, twice that
};

// False where the decode kernel is not for this call: too many tokens, or not even a unit of X fits into shared memory.
bool PlanDecode(GemmArgs const& args, DecodePolicy const& policy, Device const& device, DecodePlan& plan);

// The workspace of the most slices that any plan has, on any GPU, for this many tokens or fewer.
size_t DecodeWorkspaceBytes(int32_t n, int32_t k, int64_t tokens);

}  // namespace awq_trt
