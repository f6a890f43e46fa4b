// Many tokens, with mma.sync: every architecture, and what wgmma_kernel.cuh does not take.
//
// A block of kWarps warps computes tiles of 32 * kWarps output features x 8 * kTokenTiles tokens (gemm_schedule.h).
// K-blocks of W and X come through a ring of schedule.stages stages, filled by cp.async across the ends of tiles: while
// one tile is stored, the next one's K-blocks are in flight. A warp dequantizes its own 32 features in registers, no
// two warps the same; all warps read all tokens.
#pragma once

#include "kernels/gemm_tiles.cuh"

namespace awq_trt {

constexpr int32_t kWarpRowTiles = 2;                         // of 16 features
constexpr int32_t kChunk = 8, kRowChunks = kTileK / kChunk;  // elements in 16 bytes; chunks of a token in a K-block

// The copies that a thread starts next.
template <int kWarps, int kTokens>
struct GemmFetch {
  static constexpr int32_t kThreads = kWarps * kWarp, kRowTiles = kWarps * kWarpRowTiles;
  static constexpr int32_t kRowStep = kThreads / kRowChunks;  // tokens, a multiple of 8

  Piece piece;     // its K-block `begin` is next
  char const* q;   // of the first row tile
  char const* x;   // of the first token and chunk
  int32_t tokens;  // from that token on
  int32_t first_row_tile;

  AWQ_DEVICE GemmFetch(GemmArgs const& args, GemmSchedule const& schedule) : piece(FirstPiece(schedule, BlockIndex())) {
    Begin(args, schedule);
  }
  AWQ_DEVICE bool more(GemmSchedule const& schedule) const { return IsPiece(schedule, piece); }

  AWQ_DEVICE void Begin(GemmArgs const& args, GemmSchedule const& schedule) {
    if (!more(schedule)) return;
    TileAt const at = LocateTile(schedule, piece.tile);
    int32_t const warp = ThreadIndex() / kWarp, lane = ThreadIndex() % kWarp;
    first_row_tile = at.row * kRowTiles;
    int64_t const tile = static_cast<int64_t>(first_row_tile + warp * kWarpRowTiles) * schedule.k_blocks + piece.begin;
    q = reinterpret_cast<char const*>(args.qweight) + tile * (kWarp * 16) + lane * 16;
    int32_t const token = at.token * kTokens + ThreadIndex() / kRowChunks;
    int64_t const column = piece.begin * kTileK + ThreadIndex() % kRowChunks * kChunk;
    tokens = args.tokens - token;
    x = reinterpret_cast<char const*>(args.x) + 2 * (static_cast<int64_t>(token) * args.k + column);
  }

  AWQ_DEVICE void FillWeights(GemmArgs const& args, GemmSchedule const& schedule, Shared stage) const {
    StageLayout const layout(kRowTiles, kTokens);
    int32_t const warp = ThreadIndex() / kWarp, lane = ThreadIndex() % kWarp;
    int32_t const row_tiles = CeilDiv(Opaque(args.n), kTileN) - first_row_tile - warp * kWarpRowTiles;  // zeros beyond
#pragma unroll
    for (int32_t i = 0; i < kWarpRowTiles; ++i) {
      CopyAsync(stage + layout.q + (warp * kWarpRowTiles + i) * (kWarp * 16) + lane * 16,
                q + static_cast<int64_t>(i) * Opaque(schedule.k_blocks) * (kWarp * 16), i < row_tiles);
    }
    if (lane < 2 * kWarpRowTiles) {
      CopyScales(args, layout, stage, first_row_tile, warp * kWarpRowTiles + lane / 2, piece.begin, lane % 2);
    }
  }

  AWQ_DEVICE void FillTokens(GemmArgs const& args, Shared stage) const {
    int32_t const row = ThreadIndex() / kRowChunks, chunk = ThreadIndex() % kRowChunks;
    bool const columns = piece.begin * kTileK + chunk * kChunk < args.k;
    Shared const target = stage + row * (kRowChunks * 16) + (chunk ^ (row % 8)) * 16;
    int64_t const step = static_cast<int64_t>(Opaque(args.k)) * (2 * kRowStep);
    char const* source = x;
#pragma unroll
    for (int32_t i = 0; i < kTokens / kRowStep; ++i, source += step) {
      bool const valid = columns && i * kRowStep < tokens;
      Shared const to = target + i * (kRowStep * kRowChunks * 16);
      if (args.x_aligned) {
        CopyAsync(to, source, valid);
        continue;
      }
      Words words = {};
      if (valid) {
#pragma unroll
        for (int32_t e = 0; e < kChunk; ++e) {
          words.w[e / 2] |= static_cast<uint32_t>(Load16(source + 2 * e)) << (16 * (e % 2));
        }
      }
      StoreShared(to, words);
    }
  }

  AWQ_DEVICE void Advance(GemmArgs const& args, GemmSchedule const& schedule) {
    if (++piece.begin == piece.end) {
      piece = NextPiece(schedule, BlockIndex(), piece.tile);
      return Begin(args, schedule);
    }
    x += kTileK * 2;
    q += kWarp * 16;
  }
};

// acc += the K-block in a stage. `copy` starts the copies of another one, once the tensor cores have something to do.
template <typename T, bool kPreScale, int kWarps, int kTokenTiles, typename Copy>
AWQ_DEVICE void MultiplyStage(GemmArgs const& args, Accumulators<kWarpRowTiles, kTokenTiles>& acc, Shared stage,
                              [[maybe_unused]] int32_t k_block, Copy const& copy) {
  int32_t const warp = ThreadIndex() / kWarp, lane = ThreadIndex() % kWarp;
  StageLayout const layout(kWarps * kWarpRowTiles, kTokenTiles * kTokenTile);
  WeightTile weights[kWarpRowTiles];
#pragma unroll
  for (int32_t i = 0; i < kWarpRowTiles; ++i) weights[i] = LoadStageTile(layout, stage, warp * kWarpRowTiles + i, lane);
  Shared const row = stage + (lane / 16 * kTokenTile + lane % 8) * (kRowChunks * 16);
#pragma unroll
  for (int32_t step = 0; step < kSteps; ++step) {
    uint32_t a[kWarpRowTiles][4];
#pragma unroll
    for (int32_t i = 0; i < kWarpRowTiles; ++i) Dequantize<T>(a[i], weights[i], step);
    if constexpr (kPreScale) {
      ColumnScales const scales = LoadColumnScales(args, k_block, step, lane);
#pragma unroll
      for (int32_t i = 0; i < kWarpRowTiles; ++i) MultiplyColumns<T>(a[i], scales);
    }
    int32_t const chunk = ((2 * step + lane / 8 % 2) ^ (lane % 8)) * 16;
#pragma unroll
    for (int32_t j = 0; j < kTokenTiles; j += 2) {  // two tiles of tokens, two chunks of 8 columns each
      uint32_t b[4];
      LoadMatrices(b, row + j * (kTokenTile * kRowChunks * 16) + chunk);
#pragma unroll
      for (int32_t i = 0; i < kWarpRowTiles; ++i) {
        Mma<T>(acc[i][j], a[i], b[0], b[1]);
        Mma<T>(acc[i][j + 1], a[i], b[2], b[3]);
      }
    }
    if (step == 0) copy();
  }
}

template <typename T, int kWarps, int kTokenTiles>
AWQ_KERNEL(kWarps* kWarp, 1)
GemmKernel(GemmArgs const args, GemmSchedule const schedule) {
  constexpr int32_t kTokens = kTokenTiles * kTokenTile, kRowTiles = kWarps * kWarpRowTiles;
  StageLayout const layout(kRowTiles, kTokens);
  Shared const ring = DynamicShared();
  auto ring_end = [&] { return ring + Opaque(schedule.stages) * layout.bytes; };
  PrepareZeros(args, layout, ring, schedule.stages, layout.bytes, kRowTiles, kWarps * kWarp);

  GemmFetch<kWarps, kTokens> fetch(args, schedule);
  {  // weights do not depend on the kernel before this one, X does
    GemmFetch<kWarps, kTokens> weights = fetch;
    for (Shared stage = ring; stage < ring_end() - layout.bytes && weights.more(schedule); stage += layout.bytes) {
      weights.FillWeights(args, schedule, stage);
      weights.Advance(args, schedule);
    }
  }
  LetNextKernelStart();
  WaitForPreviousKernel();
  for (Shared stage = ring; stage < ring_end() - layout.bytes; stage += layout.bytes) {
    if (fetch.more(schedule)) {
      fetch.FillTokens(args, stage);
      fetch.Advance(args, schedule);
    }
    CommitCopies();
  }

  Shared stage = ring;
#pragma unroll 1
  for (Piece piece = FirstPiece(schedule, BlockIndex()); IsPiece(schedule, piece);
       piece = NextPiece(schedule, BlockIndex(), piece.tile)) {
    Accumulators<kWarpRowTiles, kTokenTiles> acc;
    ClearSums<kWarpRowTiles, kTokenTiles>(acc);
#pragma unroll 1
    for (; piece.begin < piece.end; ++piece.begin) {
      if (schedule.stages == kMmaStages) {
        WaitCopies<kMmaStages - 2>();
      } else {
        WaitCopies<kMmaStages - 3>();
      }
      SyncThreads();  // the K-block has arrived for every thread, and nobody reads the one before any more
      auto copy = [&] {
        if (fetch.more(schedule)) {
          Shared const free_stage = (stage == ring ? ring_end() : stage) - layout.bytes;  // of the K-block before
          fetch.FillWeights(args, schedule, free_stage);
          fetch.FillTokens(args, free_stage);
          fetch.Advance(args, schedule);
        }
        CommitCopies();
      };
      if (args.pre_scale == nullptr) {
        MultiplyStage<T, false, kWarps, kTokenTiles>(args, acc, stage, piece.begin, copy);
      } else {
        MultiplyStage<T, true, kWarps, kTokenTiles>(args, acc, stage, piece.begin, copy);
      }
      stage += layout.bytes;
      if (stage == ring_end()) stage = ring;
    }
    FinishPiece<T, kWarps, kWarpRowTiles, kTokenTiles>(args, schedule, piece.tile, acc, ring_end(),
                                                       Opaque(ThreadIndex()));
  }
}

using GemmFunction = void (*)(GemmArgs, GemmSchedule);

// nullptr where `tile` is not for these kernels.
template <typename T>
GemmFunction GemmKernelFor(GemmTile const& tile) {
  if (tile.wgmma || tile.row_tiles != kWarpRowTiles) return nullptr;
  if (tile.tokens == 64) return tile.warps == 4 ? GemmKernel<T, 4, 8> : GemmKernel<T, 8, 8>;
  return tile.warps == 4 ? GemmKernel<T, 4, 16> : GemmKernel<T, 8, 16>;
}
inline GemmFunction GemmKernelFor(ActivationType type, GemmTile const& tile) {
  return type == ActivationType::kHalf ? GemmKernelFor<Half>(tile) : GemmKernelFor<Bfloat16>(tile);
}

}  // namespace awq_trt
