// How the tensor-core kernels divide a product over blocks: made by the host, read by the kernels.
//
//   tile           rows() output features x `tokens` tokens, computed by one block
//   row tile       16 output features of a tile; each warp has one or two
//   K-block        64 columns of a tile: one stage of shared memory
//   raster group   tiles of kRasterGroupTokens tokens: all of them come before the next group, so that their X stays in
//   L2
//
// As many blocks as fit run until nothing is left. Whole tiles, one after the other, are best, except that the last
// ones are rarely as many as there are blocks: so the K-blocks of the first `split_tiles` tiles are cut into segments
// of consecutive K-blocks, one for each block, which begins with it (stream-K, Osama et al. 2023, arXiv 2301.03598).
// Where a segment covers a part of a tile only, its block leaves a partial sum in the workspace; the block that arrives
// last adds them, in the order of the K-blocks. No block waits for another.
#pragma once

#include <cstddef>

#include "plan/gpu.h"
#include "plan/problem.h"

namespace awq_trt {

// A kernel of gemm_kernel.cuh or wgmma_kernel.cuh.
struct GemmTile {
  bool wgmma;
  int32_t warps;      // that multiply
  int32_t row_tiles;  // of 16 features, of each warp
  int32_t tokens;
  int32_t resident;  // blocks of an SM, at most

  AWQ_HOST_DEVICE int32_t rows() const { return warps * row_tiles * kTileN; }
  AWQ_HOST_DEVICE int32_t sum_bytes() const { return rows() * tokens * 4; }
};
constexpr GemmTile kGemmTiles[] = {
    {false, 4, 2, 64, 2}, {false, 8, 2, 64, 1}, {false, 4, 2, 128, 1}, {false, 8, 2, 128, 1},
    {true, 8, 1, 128, 1}, {true, 8, 2, 64, 1},  {true, 8, 2, 128, 1},
};
constexpr int32_t kGemmTileCount = sizeof(kGemmTiles) / sizeof(kGemmTiles[0]);

constexpr int32_t kRasterGroupTokens = 1024;
constexpr int32_t kMaxSplitTiles = 1024;  // counters
constexpr int32_t kMmaStages = 4;         // of gemm_kernel.cuh: 3 where 4 do not fit into shared memory
constexpr int32_t kWgmmaStages = 7;       // of wgmma_kernel.cuh
constexpr int32_t kScratchTokens = 32;    // of Y that a warp brings into order at once
constexpr int32_t kScratchPad = 16;       // bytes, so that tokens fall into different banks
constexpr int32_t kSwizzleBytes = 1024;   // what the stages of wgmma must be aligned to

// A stage in shared memory, in bytes: X [token][64 columns], its chunks of 16 bytes at chunk ^ (token % 8); q
// [row tile][lane][16]; scales [row tile][half][i][4], zeros [row tile][half][i] for the two halves of a K-block.
struct StageLayout {
  int32_t q, scales, zeros, bytes;
  AWQ_HOST_DEVICE explicit StageLayout(int32_t row_tiles, int32_t tokens)
      : q(tokens * kTileK * 2),
        scales(q + row_tiles * kTileN * kTileK / 2),
        zeros(scales + row_tiles * 64),
        bytes(zeros + row_tiles * 16) {}
};

struct GemmSchedule {
  int32_t tile;                    // of kGemmTiles
  int32_t grid_rows, grid_tokens;  // tiles of Y
  int32_t k_blocks;                // of a tile
  int32_t raster_group;            // kRasterGroupTokens, in tiles
  int32_t tiles;
  int32_t split_tiles;
  Cut segments;  // of the K-blocks of split_tiles over split_blocks
  int32_t split_blocks, blocks;
  int32_t stages;
  int32_t shared_bytes;  // of a block
};

// One way to divide a product; the best one depends on layer, tokens and GPU, so TensorRT times them.
enum class Splitting { kNever, kEstimated, kAlways };  // kAlways: if it can be
struct GemmPolicy {
  int32_t larger;  // the tile that is estimated to be fastest, or the next smaller (-1) or larger one (1)
  Splitting splitting;
};

// False where no launch can do it: more tiles than blocks can count.
bool ScheduleGemm(GemmArgs const& args, GemmPolicy const& policy, Device const& device, GemmSchedule& schedule);

// What tiles are compared by; assumptions, not measurements.
double EstimateNanoseconds(GemmSchedule const& schedule, GemmArgs const& args, Device const& device);

// What partial sums need, on any GPU, for this many tokens or fewer.
size_t GemmWorkspaceBytes(int32_t n, int32_t k, int64_t tokens);

}  // namespace awq_trt
