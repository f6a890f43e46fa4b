// Few tokens: every weight is read once and used a handful of times, so memory bandwidth is all that counts.
//
// A block owns one tile of 16 output features and up to 8 * kTokenTiles tokens. Its warps take the k-tiles in turn
// (so that the block streams contiguous memory), each accumulates its share in registers, and the shares are added in
// shared memory in the order of the warps: the result does not depend on timing.
#pragma once

#include "fragments.h"

namespace awq_trt {

constexpr int32_t kDecodeMaxWarps = 16;
constexpr int32_t kDecodeUnroll = 4;  // 16-byte loads in flight per lane

// Columns `column` and the next of one token; 0 beyond the last token and the last column.
AWQ_DEVICE uint32_t LoadTokenPair(GemmArgs const& args, int32_t token, int32_t column) {
  if (token >= args.tokens || column >= args.k) return 0u;
  uint16_t const* p = args.x + static_cast<int64_t>(token) * args.k + column;
  if (args.x_aligned) return Load32(p);
  return Load16(p) | static_cast<uint32_t>(Load16(p + 1)) << 16;
}

template <typename T, int kTokenTiles>
AWQ_KERNEL(kDecodeMaxWarps* kWarp)
DecodeKernel(GemmArgs const args) {
  constexpr int32_t kOutputs = kTileN * kTokenTile * kTokenTiles;
  AWQ_SHARED float partial[kDecodeMaxWarps][kOutputs];  // [warp][token][row]

  int32_t const warp = ThreadIndex() / kWarp, lane = ThreadIndex() % kWarp;
  int32_t const warps = BlockThreads() / kWarp;
  int32_t const n_tiles = CeilDiv(args.n, kTileN), k_tiles = CeilDiv(args.k, kTileK);
  int32_t const tile_n = BlockIndex() % n_tiles;
  int32_t const first_token = BlockIndex() / n_tiles * (kTokenTile * kTokenTiles);

  float acc[kTokenTiles][4] = {};
  for (int32_t first = warp; first < k_tiles; first += warps * kDecodeUnroll) {
    WeightTile tiles[kDecodeUnroll] = {};
#pragma unroll
    for (int32_t u = 0; u < kDecodeUnroll; ++u) {
      if (first + u * warps < k_tiles) tiles[u] = LoadWeightTile(args, tile_n, first + u * warps, lane);
    }
#pragma unroll
    for (int32_t u = 0; u < kDecodeUnroll; ++u) {
      if (first + u * warps >= k_tiles) break;
#pragma unroll
      for (int32_t step = 0; step < kSteps; ++step) {
        int32_t const column = (first + u * warps) * kTileK + step * kStepK + 2 * (lane % 4);
        uint32_t a[4];
        Dequantize<T>(a, tiles[u], step);
#pragma unroll
        for (int32_t j = 0; j < kTokenTiles; ++j) {
          int32_t const token = first_token + j * kTokenTile + lane / 4;
          uint32_t b0 = LoadTokenPair(args, token, column), b1 = LoadTokenPair(args, token, column + 8);
          if (args.pre_scale != nullptr) {
            b0 = Multiply<T>(b0, LoadPreScale(args, column));
            b1 = Multiply<T>(b1, LoadPreScale(args, column + 8));
          }
          Mma<T>(acc[j], a, b0, b1);
        }
      }
    }
  }

#pragma unroll
  for (int32_t j = 0; j < kTokenTiles; ++j) {
#pragma unroll
    for (int32_t e = 0; e < 4; ++e) {
      int32_t const token = j * kTokenTile + 2 * (lane % 4) + (e & 1), row = lane / 4 + 8 * (e >> 1);
      partial[warp][token * kTileN + row] = acc[j][e];
    }
  }
  SyncThreads();
  for (int32_t i = ThreadIndex(); i < kOutputs; i += BlockThreads()) {
    int32_t const token = first_token + i / kTileN, n = tile_n * kTileN + i % kTileN;
    if (token >= args.tokens || n >= args.n) continue;
    float sum = 0.0f;
    for (int32_t w = 0; w < warps; ++w) sum += partial[w][i];
    if (args.bias != nullptr) sum += ToFloat<T>(Load16(args.bias + n));
    Store16(args.y + static_cast<int64_t>(token) * args.n + n, FromFloat<T>(sum));
  }
}

// Blocks of one launch, and warps per block: more than one warp per k-tile would have nothing to do.
inline int64_t DecodeBlocks(GemmArgs const& args, int32_t token_tiles) {
  int64_t const token_blocks =
      (static_cast<int64_t>(args.tokens) + kTokenTile * token_tiles - 1) / (kTokenTile * token_tiles);
  return token_blocks * CeilDiv(args.n, kTileN);
}
inline int32_t DecodeThreads(GemmArgs const& args, int32_t warps) {
  int32_t const k_tiles = CeilDiv(args.k, kTileK);
  return kWarp * (warps < k_tiles ? warps : k_tiles);
}

}  // namespace awq_trt
