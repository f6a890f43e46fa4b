// Many tokens: tensor cores with the weights straight from memory to registers.
//
// A block of 4 warps computes 128 output features x 8 * kTokenTiles tokens. Each warp owns 32 of the features, so no
// two warps need the same weight: weights never pass through shared memory, one tile is prefetched in registers. All
// warps need all tokens: X goes through a ring of kStages shared tiles, filled by cp.async two tiles ahead.
//
// A row of an X tile is 64 columns = 8 chunks of 16 bytes; chunk c of row m lies at c ^ (m % 8), so that the 8 rows
// that one ldmatrix phase reads fall into different banks.
#pragma once

#include "fragments.h"

namespace awq_trt {

constexpr int32_t kGemmWarps = 4, kGemmThreads = kGemmWarps * kWarp;
constexpr int32_t kWarpTilesN = 2;                             // tiles of 16 output features per warp
constexpr int32_t kGemmN = kGemmWarps * kWarpTilesN * kTileN;  // output features per block
constexpr int32_t kStages = 3;                                 // 3 * 16 KB at 128 tokens: the static limit of 48 KB
constexpr int32_t kChunk = 8, kRowChunks = kTileK / kChunk;    // elements per 16 bytes, chunks per row
constexpr int32_t kOutputStride = kGemmN + kChunk;             // of a staged row of Y, padded against bank conflicts

// Fill one X tile: rows first_token.., columns tile_k * 64..; zeros beyond the last token and the last column.
template <int kTokens>
AWQ_DEVICE void FillTokenTile(GemmArgs const& args, Words* tile, int32_t first_token, int32_t tile_k) {
#pragma unroll 1  // addresses of all rows at once would cost the accumulators' registers
  for (int32_t i = 0; i < kTokens * kRowChunks / kGemmThreads; ++i) {
    int32_t const index = i * kGemmThreads + ThreadIndex();
    int32_t const row = index / kRowChunks, chunk = index % kRowChunks;
    int32_t const column = tile_k * kTileK + chunk * kChunk;
    bool const valid = first_token + row < args.tokens && column < args.k;
    uint16_t const* source = args.x + (valid ? static_cast<int64_t>(first_token + row) * args.k + column : 0);
    Words* target = tile + row * kRowChunks + (chunk ^ (row % 8));
    if (args.x_aligned) {
      CopyAsync(SharedOf(target), source, valid);
      continue;
    }
    Words words = {};
    if (valid) {
#pragma unroll
      for (int32_t e = 0; e < kChunk; ++e) {
        words.w[e / 2] |= static_cast<uint32_t>(Load16(source + e)) << (16 * (e % 2));
      }
    }
    *target = words;
  }
}

// Write the accumulators of a block, plus bias, as rows of Y: through shared memory, so that stores are 16 bytes.
template <typename T, int kTokenTiles>
AWQ_DEVICE void StoreOutput(GemmArgs const& args, float const (&acc)[kWarpTilesN][kTokenTiles][4], uint16_t* staged,
                            int32_t first_token, int32_t first_n) {
  int32_t const warp = ThreadIndex() / kWarp, lane = ThreadIndex() % kWarp;
#pragma unroll
  for (int32_t i = 0; i < kWarpTilesN; ++i) {
#pragma unroll
    for (int32_t h = 0; h < 2; ++h) {
      int32_t const row = (warp * kWarpTilesN + i) * kTileN + lane / 4 + 8 * h;
      bool const add = args.bias != nullptr && first_n + row < args.n;
      float const bias = add ? ToFloat<T>(Load16(args.bias + first_n + row)) : 0.0f;
#pragma unroll
      for (int32_t j = 0; j < kTokenTiles; ++j) {
#pragma unroll
        for (int32_t e = 0; e < 2; ++e) {
          int32_t const token = j * kTokenTile + 2 * (lane % 4) + e;
          staged[token * kOutputStride + row] = FromFloat<T>(acc[i][j][2 * h + e] + bias);
        }
      }
    }
  }
  SyncThreads();
  constexpr int32_t kOutputChunks = kGemmN / kChunk;
  for (int32_t i = ThreadIndex(); i < kTokenTiles * kTokenTile * kOutputChunks; i += kGemmThreads) {
    int32_t const token = i / kOutputChunks, row = i % kOutputChunks * kChunk;
    if (first_token + token >= args.tokens || first_n + row >= args.n) continue;  // N is a multiple of the chunk
    uint16_t const* source = staged + token * kOutputStride + row;
    Output const output = OutputOf(args, first_n + row);  // an output has whole chunks of rows
    uint16_t* target = output.y + static_cast<int64_t>(first_token + token) * output.stride;
    if (args.y_aligned) {
      StoreWords(target, *reinterpret_cast<Words const*>(source));
    } else {
      for (int32_t e = 0; e < kChunk; ++e) Store16(target + e, source[e]);
    }
  }
}

template <typename T, int kTokenTiles>
AWQ_KERNEL(kGemmThreads, 1)
GemmKernel(GemmArgs const args) {
  constexpr int32_t kTokens = kTokenTile * kTokenTiles;
  constexpr int32_t kStageWords = kTokens * kRowChunks;
  AWQ_SHARED Words shared[kStages * kStageWords];
  static_assert(kTokens * kOutputStride * 2 <= kStages * kStageWords * 16, "Y is staged where X was");

  int32_t const warp = ThreadIndex() / kWarp, lane = ThreadIndex() % kWarp;
  int32_t const n_blocks = CeilDiv(args.n, kGemmN), n_tiles = CeilDiv(args.n, kTileN);
  int32_t const k_tiles = CeilDiv(args.k, kTileK);
  int32_t const first_n = BlockIndex() % n_blocks * kGemmN, first_token = BlockIndex() / n_blocks * kTokens;

  int32_t tile_n[kWarpTilesN];  // beyond N the last tile is computed once more and not stored
#pragma unroll
  for (int32_t i = 0; i < kWarpTilesN; ++i) {
    int32_t const tile = first_n / kTileN + warp * kWarpTilesN + i;
    tile_n[i] = tile < n_tiles ? tile : n_tiles - 1;
  }

  WeightTile next[kWarpTilesN];
#pragma unroll
  for (int32_t i = 0; i < kWarpTilesN; ++i) next[i] = LoadWeightTile(args, tile_n[i], 0, lane);
#pragma unroll
  for (int32_t stage = 0; stage < kStages - 1; ++stage) {
    if (stage < k_tiles) FillTokenTile<kTokens>(args, shared + stage * kStageWords, first_token, stage);
    CommitCopies();
  }

  float acc[kWarpTilesN][kTokenTiles][4] = {};
  for (int32_t tile_k = 0; tile_k < k_tiles; ++tile_k) {
    WaitCopies<kStages - 2>();  // X tile tile_k has arrived
    SyncThreads();              // for every thread, and nobody reads tile_k - 1 any more
    int32_t const ahead = tile_k + kStages - 1;
    if (ahead < k_tiles) FillTokenTile<kTokens>(args, shared + ahead % kStages * kStageWords, first_token, ahead);
    CommitCopies();

    WeightTile weights[kWarpTilesN];
#pragma unroll
    for (int32_t i = 0; i < kWarpTilesN; ++i) {
      weights[i] = next[i];
      if (tile_k + 1 < k_tiles) next[i] = LoadWeightTile(args, tile_n[i], tile_k + 1, lane);
    }

    Words const* tokens = shared + tile_k % kStages * kStageWords;
#pragma unroll
    for (int32_t step = 0; step < kSteps; ++step) {
      int32_t const column = tile_k * kTileK + step * kStepK + 2 * (lane % 4);
      bool const scaled = args.pre_scale != nullptr;
      uint32_t const low = scaled ? LoadPreScale(args, column) : 0, high = scaled ? LoadPreScale(args, column + 8) : 0;
      uint32_t a[kWarpTilesN][4];
#pragma unroll
      for (int32_t i = 0; i < kWarpTilesN; ++i) Dequantize<T>(a[i], weights[i], step);
#pragma unroll
      for (int32_t j = 0; j < kTokenTiles; j += 2) {  // two token tiles, two chunks of 8 columns each
        int32_t const row = (j + lane / 16) * kTokenTile + lane % 8, chunk = 2 * step + lane / 8 % 2;
        uint32_t b[4];
        LoadMatrices(b, SharedOf(tokens + row * kRowChunks + (chunk ^ (row % 8))));
        if (scaled) {
          b[0] = Multiply<T>(b[0], low), b[1] = Multiply<T>(b[1], high);
          b[2] = Multiply<T>(b[2], low), b[3] = Multiply<T>(b[3], high);
        }
#pragma unroll
        for (int32_t i = 0; i < kWarpTilesN; ++i) {
          Mma<T>(acc[i][j], a[i], b[0], b[1]);
          Mma<T>(acc[i][j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }
  WaitCopies<0>();
  SyncThreads();  // the last X tile has been read: its place takes Y
  StoreOutput<T, kTokenTiles>(args, acc, reinterpret_cast<uint16_t*>(shared), first_token, first_n);
}

inline int64_t GemmBlocks(GemmArgs const& args, int32_t token_tiles) {
  int64_t const token_blocks =
      (static_cast<int64_t>(args.tokens) + kTokenTile * token_tiles - 1) / (kTokenTile * token_tiles);
  return token_blocks * CeilDiv(args.n, kGemmN);
}

using GemmFunction = void (*)(GemmArgs);

// nullptr where token_tiles is not 4, 8 or 16.
template <typename T>
GemmFunction GemmKernelFor(int32_t token_tiles) {
  switch (token_tiles) {
    case 4:
      return GemmKernel<T, 4>;
    case 8:
      return GemmKernel<T, 8>;
    case 16:
      return GemmKernel<T, 16>;
    default:
      return nullptr;
  }
}
inline GemmFunction GemmKernelFor(ActivationType type, int32_t token_tiles) {
  return type == ActivationType::kHalf ? GemmKernelFor<Half>(token_tiles) : GemmKernelFor<Bfloat16>(token_tiles);
}

}  // namespace awq_trt
