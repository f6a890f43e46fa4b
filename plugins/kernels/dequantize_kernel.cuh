// Weights as a plain matrix W [rows, K] of 16-bit elements, for a library that multiplies those. All that counts is the
// memory: 16-byte loads of packed weights, 16-byte stores of which 4 lanes write 64 consecutive bytes of a row.
//
// A warp turns half a tile, 16 rows x 32 columns, at a time. As fragments, lane 4g + t has of row g (and of row g + 8)
// columns 2t and 2t+1 of each of 4 chunks of 8 columns; it needs all 8 columns of chunk t. That is a transposition of 4
// lanes x 4 words: the lane stores its 4 words as one row of 16 bytes, and ldmatrix hands word t of the rows of lanes
// 4g .. 4g + 3 to lane 4g + t.
#pragma once

#include "kernels/fragments.h"

namespace awq_trt {

constexpr int32_t kDequantizeWarps = 8, kDequantizeThreads = kDequantizeWarps * kWarp;
constexpr int32_t kRunTiles = 4;                // of a warp, one after the other along K: loads at once
constexpr int32_t kHalfK = kTileK / 2;          // columns of half a tile
constexpr int32_t kExchangeBytes = kWarp * 16;  // for 8 rows x 32 columns
constexpr int32_t kDequantizeWarpBytes = 2 * 2 * kExchangeBytes;  // rows g and g + 8, in turn for the halves of a tile
constexpr int32_t kDequantizeSharedBytes = kDequantizeWarps * kDequantizeWarpBytes;

// The row tiles of 16 rows to write, and where the first one goes. Rows from N on are not written.
struct WeightRows {
  int32_t first_row_tile, row_tiles;
  uint16_t* w;  // [rows, K], 16-byte aligned
};

// Where lane 4 * row + t leaves its words: so that neither 8 lanes storing nor 8 rows read share a bank.
AWQ_DEVICE int32_t ExchangeByte(int32_t row, int32_t t) { return (t * 8 + (row + 2 * t) % 8) * 16; }

// Half a tile, from column `column` on. `mine` and `theirs`: where this lane stores, and reads for ldmatrix. `row`:
// this lane's place in the first of its two rows; the second one exists if `second`.
template <typename T>
AWQ_DEVICE void StoreHalfTile(GemmArgs const& args, WeightTile const& tile, int32_t half, Shared mine, Shared theirs,
                              int32_t column, uint16_t* row, bool second) {
  Words pre_scale = {};
  if (args.pre_scale != nullptr) pre_scale = LoadStreaming(args.pre_scale + column);
  uint32_t low[4], high[4];
  Dequantize<T>(low, tile, 2 * half);
  Dequantize<T>(high, tile, 2 * half + 1);
  StoreShared(mine, {{low[0], low[2], high[0], high[2]}});
  StoreShared(mine + kExchangeBytes, {{low[1], low[3], high[1], high[3]}});
  SyncWarp();
#pragma unroll
  for (int32_t i = 0; i < 2; ++i) {
    uint32_t w[4];
    LoadMatrices(w, theirs + i * kExchangeBytes);
    if (args.pre_scale != nullptr) {
#pragma unroll
      for (int32_t e = 0; e < 4; ++e) w[e] = Multiply<T>(w[e], pre_scale.w[e]);
    }
    uint16_t* const target = row + static_cast<int64_t>(i) * 8 * args.k + column;
    if (i == 0 || second) StoreWords(target, {{w[0], w[1], w[2], w[3]}});
  }
}

template <typename T>
AWQ_KERNEL(kDequantizeThreads, 4)
DequantizeKernel(GemmArgs const args, WeightRows const rows) {
  int32_t const warp = ThreadIndex() / kWarp, lane = ThreadIndex() % kWarp;
  int32_t const k_tiles = CeilDiv(args.k, kTileK), runs = CeilDiv(k_tiles, kRunTiles);
  int32_t const run = BlockIndex() * kDequantizeWarps + warp;
  int32_t const row_tile = rows.first_row_tile + run / runs, first_tile = run % runs * kRunTiles;
  if (run / runs >= rows.row_tiles) return;

  WeightTile tiles[kRunTiles];
#pragma unroll
  for (int32_t i = 0; i < kRunTiles; ++i) {
    if (first_tile + i < k_tiles) tiles[i] = LoadWeightTile(args, row_tile, first_tile + i, lane);
  }
  Shared const exchange = DynamicShared() + warp * kDequantizeWarpBytes;
  Shared const mine = exchange + ExchangeByte(lane / 4, lane % 4), theirs = exchange + ExchangeByte(lane % 8, lane / 8);
  uint16_t* const row = rows.w + (static_cast<int64_t>(run / runs) * kTileN + lane / 4) * args.k;
  bool const second = row_tile * kTileN + 8 < args.n;  // N is a multiple of 8
#pragma unroll
  for (int32_t i = 0; i < kRunTiles; ++i) {
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
      int32_t const column = (first_tile + i) * kTileK + half * kHalfK;
      if (column >= args.k) return;  // K is a multiple of 32
      // the halves take turns: what this one overwrites, every lane has read before the barrier of the half before
      int32_t const turn = half * 2 * kExchangeBytes;
      StoreHalfTile<T>(args, tiles[i], half, mine + turn, theirs + turn, column + lane % 4 * 8, row, second);
    }
  }
}

inline int32_t DequantizeBlocks(GemmArgs const& args, int32_t row_tiles) {
  int32_t const runs = row_tiles * CeilDiv(CeilDiv(args.k, kTileK), kRunTiles);  // 2^28 for the largest N and K
  return CeilDiv(runs, kDequantizeWarps);
}

// Whether there are such row tiles, and W can take 16-byte stores.
inline bool CanDequantize(GemmArgs const& args, WeightRows const& rows) {
  int32_t const all = CeilDiv(args.n, kTileN);
  return rows.first_row_tile >= 0 && rows.row_tiles >= 0 && rows.row_tiles <= all - rows.first_row_tile &&
         rows.w != nullptr && IsAligned(rows.w, 16);
}

using DequantizeFunction = void (*)(GemmArgs, WeightRows);
inline DequantizeFunction DequantizeKernelFor(ActivationType type) {
  return type == ActivationType::kHalf ? DequantizeKernel<Half> : DequantizeKernel<Bfloat16>;
}

}  // namespace awq_trt
