// What both tensor-core kernels do alike: walk through a block's tiles, add partial sums, store Y.
//
// A warp has 16 * kStrips output features of a tile and all its tokens: acc[strip][tile of 8 tokens] are accumulators
// as in fragments.h, which those of wgmma are, too (PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16").
#pragma once

#include "kernels/fragments.h"
#include "plan/gemm_plan.h"

namespace awq_trt {

template <int kStrips, int kTokenTiles>
using Accumulators = float[kStrips][kTokenTiles][4];

// Units begin .. end - 1 of a tile.
struct Piece {
  int32_t tile, begin, end;
};

// The pieces of a block, in the order in which it computes them:
//
//   for (Piece piece = FirstPiece(plan, block); IsPiece(plan, piece); piece = NextPiece(plan, block, piece.tile))
//
// The next one follows from the tile of the last one alone, as registers are scarce.
AWQ_DEVICE Piece WholeTile(GemmPlan const& plan, int32_t tile) { return {tile, 0, plan.units}; }
AWQ_DEVICE Piece PartOfTile(GemmPlan const& plan, int32_t block, int32_t tile) {
  int32_t const first = tile * plan.units, begin = plan.segments.Begin(block) - first;
  int32_t const end = begin + plan.segments.Size(block);
  return {tile, begin > 0 ? begin : 0, end < plan.units ? end : plan.units};
}
AWQ_DEVICE Piece PieceOf(GemmPlan const& plan, int32_t block, int32_t tile) {
  return tile < plan.split_tiles ? PartOfTile(plan, block, tile) : WholeTile(plan, tile);
}
AWQ_DEVICE Piece FirstPiece(GemmPlan const& plan, int32_t block) {
  if (block >= plan.split_blocks) return WholeTile(plan, plan.split_tiles + block);
  return PartOfTile(plan, block, plan.segments.Begin(block) / plan.units);
}
AWQ_DEVICE Piece NextPiece(GemmPlan const& plan, int32_t block, int32_t tile) {
  if (tile >= plan.split_tiles) return WholeTile(plan, tile + plan.blocks);
  bool const more = (tile + 1) * plan.units < plan.segments.Begin(block) + plan.segments.Size(block);
  return more ? PartOfTile(plan, block, tile + 1) : WholeTile(plan, plan.split_tiles + block);
}
AWQ_DEVICE bool IsPiece(GemmPlan const& plan, Piece const& piece) { return piece.tile < plan.tiles; }

// Where a tile lies in Y, in tiles: bands of `plan.band` tiles of tokens, in each one row of tiles after the other.
struct TileAt {
  int32_t row, token;
};
AWQ_DEVICE TileAt LocateTile(GemmPlan const& plan, int32_t tile) {
  int32_t const band_tiles = plan.band * plan.row_tiles;
  int32_t const first = tile / band_tiles * plan.band, left = plan.token_tiles - first;
  int32_t const band = left < plan.band ? left : plan.band, inside = tile % band_tiles;
  return {inside / band, first + inside % band};
}

AWQ_DEVICE bool IsWhole(GemmPlan const& plan, Piece const& piece) {
  return piece.begin == 0 && piece.end == plan.units;
}

// Where a block leaves its sums of a tile that is not its own as a whole: a block has two such tiles at most, the one
// in which its segment begins and the one in which it ends.
AWQ_DEVICE Words* PartialTile(GemmArgs const& args, GemmPlan const& plan, int32_t sum_bytes, int32_t tile,
                              int32_t block) {
  bool const begins_here = plan.segments.Begin(block) > tile * plan.units;
  int64_t const slot = 2 * block + (begins_here ? 0 : 1);
  return static_cast<Words*>(args.workspace) + slot * (sum_bytes / 16);
}

template <int kStrips, int kTokenTiles>
AWQ_DEVICE void ClearSums(Accumulators<kStrips, kTokenTiles>& acc) {
#pragma unroll
  for (int32_t i = 0; i < kStrips; ++i) {
#pragma unroll
    for (int32_t j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int32_t e = 0; e < 4; ++e) acc[i][j][e] = 0;
    }
  }
}

// Leave the partial sums of a tile; true in the block that comes last, whose acc are the sums of all then. `warp` of
// kWarps; barrier 1 is theirs.
template <int kWarps, int kStrips, int kTokenTiles>
AWQ_DEVICE bool AddPartials(GemmArgs const& args, GemmPlan const& plan, int32_t tile,
                            Accumulators<kStrips, kTokenTiles>& acc, int32_t warp, int32_t lane) {
  AWQ_SHARED uint32_t arrived;
  constexpr int32_t kSumBytes = kWarps * kStrips * kTokenTiles * kWarp * 16;
  int32_t const first_unit = tile * plan.units, lane_offset = warp * (kStrips * kTokenTiles * kWarp) + lane;
  Words* const mine = PartialTile(args, plan, kSumBytes, tile, BlockIndex()) + lane_offset;
#pragma unroll
  for (int32_t i = 0; i < kStrips; ++i) {
#pragma unroll
    for (int32_t j = 0; j < kTokenTiles; ++j) {
      float const(&sum)[4] = acc[i][j];
      StoreWords(mine + (i * kTokenTiles + j) * kWarp,
                 {{BitsOf(sum[0]), BitsOf(sum[1]), BitsOf(sum[2]), BitsOf(sum[3])}});
    }
  }
  int32_t const first = plan.segments.PartOf(first_unit), last = plan.segments.PartOf(first_unit + plan.units - 1);
  SyncThreads(1, kWarps * kWarp);  // all sums of this block are in the workspace
  if (warp == 0 && lane == 0) arrived = CountArrival(args.counters + tile);
  SyncThreads(1, kWarps * kWarp);
  if (arrived != static_cast<uint32_t>(last - first)) return false;
  if (warp == 0 && lane == 0) Store32(args.counters + tile, 0);  // for the next call
  ClearSums<kStrips, kTokenTiles>(acc);
#pragma unroll 1
  for (int32_t block = first; block <= last; ++block) {
    Words const* const part = PartialTile(args, plan, kSumBytes, tile, block) + lane_offset;
#pragma unroll
    for (int32_t i = 0; i < kStrips; ++i) {
#pragma unroll
      for (int32_t j = 0; j < kTokenTiles; ++j) {
        Words const sum = LoadWords(part + (i * kTokenTiles + j) * kWarp);
#pragma unroll
        for (int32_t e = 0; e < 4; ++e) acc[i][j][e] += FloatOf(sum.w[e]);
      }
    }
  }
  return true;
}

// Y of a warp's features and a tile's tokens, through `scratch`, shared memory of this warp, where kScratchTokens at a
// time are brought into rows: stores are 16 bytes.
template <typename T, int kStrips, int kTokenTiles>
AWQ_DEVICE void StoreTile(GemmArgs const& args, Accumulators<kStrips, kTokenTiles> const& acc, Shared scratch,
                          int32_t first_n, int32_t first_token, int32_t lane) {
  constexpr int32_t kRowBytes = kStrips * kTileN * 2 + kScratchPad;
  constexpr int32_t kChunks = kStrips * 2, kRows = kWarp / kChunks;  // 16 bytes: 8 features of a token
  float bias[kStrips][2] = {};
  if (args.bias != nullptr) {
#pragma unroll
    for (int32_t i = 0; i < 2 * kStrips; ++i) {
      int32_t const n = first_n + i * 8 + lane / 4;
      if (n < args.n) bias[i / 2][i % 2] = ToFloat<T>(Load16(args.bias + n));
    }
  }
  int32_t const chunk = lane % kChunks, n = first_n + chunk * 8;
  Output const output = OutputOf(args, n);  // an output has whole chunks of features
#pragma unroll
  for (int32_t pass = 0; pass < kTokenTiles; pass += kScratchTokens / kTokenTile) {
#pragma unroll
    for (int32_t j = 0; j < kScratchTokens / kTokenTile; ++j) {
#pragma unroll
      for (int32_t i = 0; i < kStrips; ++i) {
#pragma unroll
        for (int32_t e = 0; e < 4; ++e) {
          int32_t const token = j * kTokenTile + 2 * (lane % 4) + e % 2, row = i * kTileN + e / 2 * 8 + lane / 4;
          StoreShared16(scratch + token * kRowBytes + row * 2, FromFloat<T>(acc[i][pass + j][e] + bias[i][e / 2]));
        }
      }
    }
    SyncWarp();
#pragma unroll
    for (int32_t i = 0; i < kScratchTokens / kRows; ++i) {
      int32_t const row = i * kRows + lane / kChunks, token = first_token + pass * kTokenTile + row;
      if (token >= args.tokens || n >= args.n) continue;  // N is a multiple of 8
      Words const words = LoadShared(scratch + row * kRowBytes + chunk * 16);
      uint16_t* const y = output.y + static_cast<int64_t>(token) * output.stride;
      if (args.y_aligned) {
        StoreWords(y, words);
        continue;
      }
#pragma unroll
      for (int32_t e = 0; e < 8; ++e) Store16(y + e, static_cast<uint16_t>(words.w[e / 2] >> (16 * (e % 2))));
    }
    SyncWarp();
  }
}

// The block's piece of a tile has been computed: store it, or leave it to whoever completes its tile. `thread` of
// kWarps warps.
template <typename T, int kWarps, int kStrips, int kTokenTiles>
AWQ_DEVICE void FinishPiece(GemmArgs const& args, GemmPlan const& plan, int32_t tile,
                            Accumulators<kStrips, kTokenTiles>& acc, Shared scratch, int32_t thread) {
  int32_t const warp = thread / kWarp, lane = thread % kWarp;
  if (!IsWhole(plan, PieceOf(plan, BlockIndex(), tile)) &&
      !AddPartials<kWarps, kStrips, kTokenTiles>(args, plan, tile, acc, warp, lane)) {
    return;
  }
  TileAt const at = LocateTile(plan, tile);
  int32_t const first_n = (at.row * kWarps + warp) * (kStrips * kTileN);
  StoreTile<T, kStrips, kTokenTiles>(args, acc,
                                     scratch + warp * (kScratchTokens * (kStrips * kTileN * 2 + kScratchPad)), first_n,
                                     at.token * (kTokenTiles * kTokenTile), lane);
}

// A lane's weights of a strip in a stage; `stage` + the strip's offsets.
AWQ_DEVICE WeightTile LoadStageTile(StageLayout const& layout, Shared stage, int32_t strip, int32_t lane) {
  WeightTile tile;
  tile.q = LoadShared(stage + layout.q + strip * (kWarp * 16) + lane * 16);
#pragma unroll
  for (int32_t half = 0; half < 2; ++half) {
    tile.scales[half] = LoadShared32(stage + layout.scales + (strip * 2 + half) * 32 + lane / 4 * 4);
    tile.zeros[half] = LoadShared8(stage + layout.zeros + (strip * 2 + half) * 8 + lane / 4);
  }
  return tile;
}

// pre_scale of the columns of a lane's A fragment: registers 0 and 1, registers 2 and 3.
struct ColumnScales {
  uint32_t low, high;
};
AWQ_DEVICE ColumnScales LoadColumnScales(GemmArgs const& args, int32_t unit, int32_t step, int32_t lane) {
  int32_t const column = unit * kTileK + step * kStepK + 2 * (lane % 4);
  return {LoadPreScale(args, column), LoadPreScale(args, column + 8)};
}
template <typename T>
AWQ_DEVICE void MultiplyColumns(uint32_t (&a)[4], ColumnScales const& scales) {
  a[0] = Multiply<T>(a[0], scales.low), a[1] = Multiply<T>(a[1], scales.low);
  a[2] = Multiply<T>(a[2], scales.high), a[3] = Multiply<T>(a[3], scales.high);
}

// Start the copies of the scales and zeros of half a unit of a strip; strips beyond N repeat the last one, so that
// their values are numbers.
AWQ_DEVICE void CopyScales(GemmArgs const& args, StageLayout const& layout, Shared stage, int32_t first_strip,
                           int32_t strip, int32_t unit, int32_t half) {
  int32_t const last = CeilDiv(args.n, kTileN) - 1;
  int32_t const row = first_strip + strip < last ? first_strip + strip : last;
  int64_t const entry = static_cast<int64_t>(row) * args.groups + GroupOf(args, unit * kTileK + half * (kTileK / 2));
  Shared const scales = stage + layout.scales + (strip * 2 + half) * 32;
  CopyAsync(scales, args.scales + entry * 16, true);
  CopyAsync(scales + 16, args.scales + entry * 16 + 8, true);
  if (args.zeros != nullptr) CopyAsync8(stage + layout.zeros + (strip * 2 + half) * 8, args.zeros + entry * 8);
}

// The zeros of layers that have none, in all stages: called by `threads` threads, a barrier before the first use.
AWQ_DEVICE void PrepareZeros(GemmArgs const& args, StageLayout const& layout, Shared stages, int32_t count,
                             int32_t stage_bytes, int32_t strips, int32_t threads) {
  if (args.zeros != nullptr) return;
  for (int32_t i = ThreadIndex(); i < count * strips; i += threads) {
    StoreShared(stages + i / strips * stage_bytes + layout.zeros + i % strips * 16,
                {{0x88888888u, 0x88888888u, 0x88888888u, 0x88888888u}});
  }
}

}  // namespace awq_trt
