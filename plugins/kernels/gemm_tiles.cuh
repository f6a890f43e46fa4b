// What both tensor-core kernels do alike: walk through a block's tiles, add partial sums, store Y.
//
// A warp has 16 * kRowTiles output features of a tile and all its tokens: acc[row tile][tile of 8 tokens] are
// accumulators as in fragments.h, which those of wgmma are, too (PTX ISA, "Register Fragments for
// wgmma.mma_async.m64nNk16").
#pragma once

#include "kernels/fragments.h"
#include "plan/gemm_schedule.h"

namespace awq_trt {

template <int kRowTiles, int kTokenTiles>
using Accumulators = float[kRowTiles][kTokenTiles][4];

// K-blocks begin .. end - 1 of a tile.
struct Piece {
  int32_t tile, begin, end;
};

// The pieces of a block, in the order in which it computes them:
//
//   for (Piece piece = FirstPiece(schedule, block); IsPiece(schedule, piece);
//        piece = NextPiece(schedule, block, piece.tile))
//
// The next one follows from the tile of the last one alone, as registers are scarce.
AWQ_DEVICE Piece WholeTile(GemmSchedule const& schedule, int32_t tile) { return {tile, 0, schedule.k_blocks}; }
AWQ_DEVICE Piece PartOfTile(GemmSchedule const& schedule, int32_t block, int32_t tile) {
  int32_t const first = tile * schedule.k_blocks, begin = schedule.segments.Begin(block) - first;
  int32_t const end = begin + schedule.segments.Size(block);
  return {tile, begin > 0 ? begin : 0, end < schedule.k_blocks ? end : schedule.k_blocks};
}
AWQ_DEVICE Piece PieceOf(GemmSchedule const& schedule, int32_t block, int32_t tile) {
  return tile < schedule.split_tiles ? PartOfTile(schedule, block, tile) : WholeTile(schedule, tile);
}
AWQ_DEVICE Piece FirstPiece(GemmSchedule const& schedule, int32_t block) {
  if (block >= schedule.split_blocks) return WholeTile(schedule, schedule.split_tiles + block);
  return PartOfTile(schedule, block, schedule.segments.Begin(block) / schedule.k_blocks);
}
AWQ_DEVICE Piece NextPiece(GemmSchedule const& schedule, int32_t block, int32_t tile) {
  if (tile >= schedule.split_tiles) return WholeTile(schedule, tile + schedule.blocks);
  bool const more = (tile + 1) * schedule.k_blocks < schedule.segments.Begin(block) + schedule.segments.Size(block);
  return more ? PartOfTile(schedule, block, tile + 1) : WholeTile(schedule, schedule.split_tiles + block);
}
AWQ_DEVICE bool IsPiece(GemmSchedule const& schedule, Piece const& piece) { return piece.tile < schedule.tiles; }

// The position of a tile in Y, counted in tiles. Raster groups of `schedule.raster_group` tiles along the tokens follow
// each other; within one, tiles run along the tokens first, then along the features.
struct TileAt {
  int32_t row, token;
};
AWQ_DEVICE TileAt LocateTile(GemmSchedule const& schedule, int32_t tile) {
  int32_t const group_tiles = schedule.raster_group * schedule.grid_rows;
  int32_t const first = tile / group_tiles * schedule.raster_group, left = schedule.grid_tokens - first;
  int32_t const raster_group = left < schedule.raster_group ? left : schedule.raster_group, inside = tile % group_tiles;
  return {inside / raster_group, first + inside % raster_group};
}

AWQ_DEVICE bool IsWhole(GemmSchedule const& schedule, Piece const& piece) {
  return piece.begin == 0 && piece.end == schedule.k_blocks;
}

// Where a block leaves its sums of a tile that is not its own as a whole: a block has two such tiles at most, the one
// in which its segment begins and the one in which it ends.
AWQ_DEVICE Words* PartialTile(GemmArgs const& args, GemmSchedule const& schedule, int32_t sum_bytes, int32_t tile,
                              int32_t block) {
  bool const begins_here = schedule.segments.Begin(block) > tile * schedule.k_blocks;
  int64_t const slot = 2 * block + (begins_here ? 0 : 1);
  return static_cast<Words*>(args.workspace) + slot * (sum_bytes / 16);
}

template <int kRowTiles, int kTokenTiles>
AWQ_DEVICE void ClearSums(Accumulators<kRowTiles, kTokenTiles>& acc) {
#pragma unroll
  for (int32_t i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int32_t j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int32_t e = 0; e < 4; ++e) acc[i][j][e] = 0;
    }
  }
}

// Leave the partial sums of a tile; true in the block that comes last, whose acc are the sums of all then. `warp` of
// kWarps; barrier 1 is theirs.
template <int kWarps, int kRowTiles, int kTokenTiles>
AWQ_DEVICE bool AddPartials(GemmArgs const& args, GemmSchedule const& schedule, int32_t tile,
                            Accumulators<kRowTiles, kTokenTiles>& acc, int32_t warp, int32_t lane) {
  AWQ_SHARED uint32_t arrived;
  constexpr int32_t kSumBytes = kWarps * kRowTiles * kTokenTiles * kWarp * 16;
  int32_t const first_k_block = tile * schedule.k_blocks, lane_offset = warp * (kRowTiles * kTokenTiles * kWarp) + lane;
  Words* const mine = PartialTile(args, schedule, kSumBytes, tile, BlockIndex()) + lane_offset;
#pragma unroll
  for (int32_t i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int32_t j = 0; j < kTokenTiles; ++j) {
      float const(&sum)[4] = acc[i][j];
      StoreWords(mine + (i * kTokenTiles + j) * kWarp,
                 {{BitsOf(sum[0]), BitsOf(sum[1]), BitsOf(sum[2]), BitsOf(sum[3])}});
    }
  }
  int32_t const first = schedule.segments.PartOf(first_k_block),
                last = schedule.segments.PartOf(first_k_block + schedule.k_blocks - 1);
  SyncThreads(1, kWarps * kWarp);  // all sums of this block are in the workspace
  if (warp == 0 && lane == 0) arrived = CountArrival(args.counters + tile);
  SyncThreads(1, kWarps * kWarp);
  if (arrived != static_cast<uint32_t>(last - first)) return false;
  if (warp == 0 && lane == 0) Store32(args.counters + tile, 0);  // for the next call
  ClearSums<kRowTiles, kTokenTiles>(acc);
#pragma unroll 1
  for (int32_t block = first; block <= last; ++block) {
    Words const* const part = PartialTile(args, schedule, kSumBytes, tile, block) + lane_offset;
#pragma unroll
    for (int32_t i = 0; i < kRowTiles; ++i) {
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
template <typename T, int kRowTiles, int kTokenTiles>
AWQ_DEVICE void StoreTile(GemmArgs const& args, Accumulators<kRowTiles, kTokenTiles> const& acc, Shared scratch,
                          int32_t first_n, int32_t first_token, int32_t lane) {
  constexpr int32_t kRowBytes = kRowTiles * kTileN * 2 + kScratchPad;
  constexpr int32_t kChunks = kRowTiles * 2, kRows = kWarp / kChunks;  // 16 bytes: 8 features of a token
  float bias[kRowTiles][2] = {};
  if (args.bias != nullptr) {
#pragma unroll
    for (int32_t i = 0; i < 2 * kRowTiles; ++i) {
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
      for (int32_t i = 0; i < kRowTiles; ++i) {
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
template <typename T, int kWarps, int kRowTiles, int kTokenTiles>
AWQ_DEVICE void FinishPiece(GemmArgs const& args, GemmSchedule const& schedule, int32_t tile,
                            Accumulators<kRowTiles, kTokenTiles>& acc, Shared scratch, int32_t thread) {
  int32_t const warp = thread / kWarp, lane = thread % kWarp;
  if (!IsWhole(schedule, PieceOf(schedule, BlockIndex(), tile)) &&
      !AddPartials<kWarps, kRowTiles, kTokenTiles>(args, schedule, tile, acc, warp, lane)) {
    return;
  }
  TileAt const at = LocateTile(schedule, tile);
  int32_t const first_n = (at.row * kWarps + warp) * (kRowTiles * kTileN);
  StoreTile<T, kRowTiles, kTokenTiles>(args, acc,
                                       scratch + warp * (kScratchTokens * (kRowTiles * kTileN * 2 + kScratchPad)),
                                       first_n, at.token * (kTokenTiles * kTokenTile), lane);
}

// A lane's weights of a row tile in a stage; `stage` is the stage's address.
AWQ_DEVICE WeightTile LoadStageTile(StageLayout const& layout, Shared stage, int32_t row_tile, int32_t lane) {
  WeightTile tile;
  tile.q = LoadShared(stage + layout.q + row_tile * (kWarp * 16) + lane * 16);
#pragma unroll
  for (int32_t half = 0; half < 2; ++half) {
    tile.scales[half] = LoadShared32(stage + layout.scales + (row_tile * 2 + half) * 32 + lane / 4 * 4);
    tile.zeros[half] = LoadShared8(stage + layout.zeros + (row_tile * 2 + half) * 8 + lane / 4);
  }
  return tile;
}

// pre_scale of the columns of a lane's A fragment: registers 0 and 1, registers 2 and 3.
struct ColumnScales {
  uint32_t low, high;
};
AWQ_DEVICE ColumnScales LoadColumnScales(GemmArgs const& args, int32_t k_block, int32_t step, int32_t lane) {
  int32_t const column = k_block * kTileK + step * kStepK + 2 * (lane % 4);
  return {LoadPreScale(args, column), LoadPreScale(args, column + 8)};
}
template <typename T>
AWQ_DEVICE void MultiplyColumns(uint32_t (&a)[4], ColumnScales const& scales) {
  a[0] = Multiply<T>(a[0], scales.low), a[1] = Multiply<T>(a[1], scales.low);
  a[2] = Multiply<T>(a[2], scales.high), a[3] = Multiply<T>(a[3], scales.high);
}

// Start the copies of the scales and zeros of half a K-block of a row tile; row tiles beyond N repeat the last one, so
// that their values are numbers.
AWQ_DEVICE void CopyScales(GemmArgs const& args, StageLayout const& layout, Shared stage, int32_t first_row_tile,
                           int32_t row_tile, int32_t k_block, int32_t half) {
  int32_t const last = CeilDiv(args.n, kTileN) - 1;
  int32_t const row = first_row_tile + row_tile < last ? first_row_tile + row_tile : last;
  int64_t const entry = static_cast<int64_t>(row) * args.groups + GroupOf(args, k_block * kTileK + half * (kTileK / 2));
  Shared const scales = stage + layout.scales + (row_tile * 2 + half) * 32;
  CopyAsync(scales, args.scales + entry * 16, true);
  CopyAsync(scales + 16, args.scales + entry * 16 + 8, true);
  if (args.zeros != nullptr) CopyAsync8(stage + layout.zeros + (row_tile * 2 + half) * 8, args.zeros + entry * 8);
}

// The zeros of layers that have none, in all stages: called by `threads` threads, a barrier before the first use.
AWQ_DEVICE void PrepareZeros(GemmArgs const& args, StageLayout const& layout, Shared stages, int32_t count,
                             int32_t stage_bytes, int32_t row_tiles, int32_t threads) {
  if (args.zeros != nullptr) return;
  for (int32_t i = ThreadIndex(); i < count * row_tiles; i += threads) {
    StoreShared(stages + i / row_tiles * stage_bytes + layout.zeros + i % row_tiles * 16,
                {{0x88888888u, 0x88888888u, 0x88888888u, 0x88888888u}});
  }
}

}  // namespace awq_trt
