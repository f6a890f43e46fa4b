// Many tokens, with mma.sync: every architecture, and what wgmma_kernel.cuh does not take.
//
// A block of kWarps warps computes tiles of 32 * kWarps output features x 8 * kTokenTiles tokens (gemm_plan.h). Units
// of W and X come through a ring of plan.stages stages, filled by cp.async across the ends of tiles: while one tile is
// stored, the next one's units are under way. A warp dequantizes its own 32 features in registers, no two warps the
// same; all warps read all tokens.
#pragma once

#include "kernels/gemm_tiles.cuh"

namespace awq_trt {

constexpr int32_t kWarpStrips = 2;                           // of 16 features
constexpr int32_t kChunk = 8, kRowChunks = kTileK / kChunk;  // elements in 16 bytes; chunks of a token in a unit

// What a thread copies next.
template <int kWarps, int kTokens>
struct GemmFetch {
  static constexpr int32_t kThreads = kWarps * kWarp, kStrips = kWarps * kWarpStrips;
  static constexpr int32_t kRowStep = kThreads / kRowChunks;  // tokens, a multiple of 8

  Piece piece;     // its unit `begin` is next
  char const* q;   // of the first strip
  char const* x;   // of the first token and chunk
  int32_t tokens;  // from that token on
  int32_t first_strip;

  AWQ_DEVICE GemmFetch(GemmArgs const& args, GemmPlan const& plan) : piece(FirstPiece(plan, BlockIndex())) {
    Begin(args, plan);
  }
  AWQ_DEVICE bool more(GemmPlan const& plan) const { return IsPiece(plan, piece); }

  AWQ_DEVICE void Begin(GemmArgs const& args, GemmPlan const& plan) {
    if (!more(plan)) return;
    TileAt const at = LocateTile(plan, piece.tile);
    int32_t const warp = ThreadIndex() / kWarp, lane = ThreadIndex() % kWarp;
    first_strip = at.row * kStrips;
    int64_t const tile = static_cast<int64_t>(first_strip + warp * kWarpStrips) * plan.units + piece.begin;
    q = reinterpret_cast<char const*>(args.qweight) + tile * (kWarp * 16) + lane * 16;
    int32_t const token = at.token * kTokens + ThreadIndex() / kRowChunks;
    int64_t const column = piece.begin * kTileK + ThreadIndex() % kRowChunks * kChunk;
    tokens = args.tokens - token;
    x = reinterpret_cast<char const*>(args.x) + 2 * (static_cast<int64_t>(token) * args.k + column);
  }

  AWQ_DEVICE void FillWeights(GemmArgs const& args, GemmPlan const& plan, Shared stage) const {
    StageLayout const layout(kStrips, kTokens);
    int32_t const warp = ThreadIndex() / kWarp, lane = ThreadIndex() % kWarp;
    int32_t const strips = CeilDiv(Opaque(args.n), kTileN) - first_strip - warp * kWarpStrips;  // zeros beyond
#pragma unroll
    for (int32_t i = 0; i < kWarpStrips; ++i) {
      CopyAsync(stage + layout.q + (warp * kWarpStrips + i) * (kWarp * 16) + lane * 16,
                q + static_cast<int64_t>(i) * Opaque(plan.units) * (kWarp * 16), i < strips);
    }
    if (lane < 2 * kWarpStrips) {
      CopyScales(args, layout, stage, first_strip, warp * kWarpStrips + lane / 2, piece.begin, lane % 2);
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

  AWQ_DEVICE void Advance(GemmArgs const& args, GemmPlan const& plan) {
    if (++piece.begin == piece.end) {
      piece = NextPiece(plan, BlockIndex(), piece.tile);
      return Begin(args, plan);
    }
    x += kTileK * 2;
    q += kWarp * 16;
  }
};

// acc += the unit in a stage. `copy` starts the copies of another one, once the tensor cores have something to do.
template <typename T, bool kPreScale, int kWarps, int kTokenTiles, typename Copy>
AWQ_DEVICE void MultiplyStage(GemmArgs const& args, Accumulators<kWarpStrips, kTokenTiles>& acc, Shared stage,
                              [[maybe_unused]] int32_t unit, Copy const& copy) {
  int32_t const warp = ThreadIndex() / kWarp, lane = ThreadIndex() % kWarp;
  StageLayout const layout(kWarps * kWarpStrips, kTokenTiles * kTokenTile);
  WeightTile weights[kWarpStrips];
#pragma unroll
  for (int32_t i = 0; i < kWarpStrips; ++i) weights[i] = LoadStageTile(layout, stage, warp * kWarpStrips + i, lane);
  Shared const row = stage + (lane / 16 * kTokenTile + lane % 8) * (kRowChunks * 16);
#pragma unroll
  for (int32_t step = 0; step < kSteps; ++step) {
    uint32_t a[kWarpStrips][4];
#pragma unroll
    for (int32_t i = 0; i < kWarpStrips; ++i) Dequantize<T>(a[i], weights[i], step);
    if constexpr (kPreScale) {
      ColumnScales const scales = LoadColumnScales(args, unit, step, lane);
#pragma unroll
      for (int32_t i = 0; i < kWarpStrips; ++i) MultiplyColumns<T>(a[i], scales);
    }
    int32_t const chunk = ((2 * step + lane / 8 % 2) ^ (lane % 8)) * 16;
#pragma unroll
    for (int32_t j = 0; j < kTokenTiles; j += 2) {  // two tiles of tokens, two chunks of 8 columns each
      uint32_t b[4];
      LoadMatrices(b, row + j * (kTokenTile * kRowChunks * 16) + chunk);
#pragma unroll
      for (int32_t i = 0; i < kWarpStrips; ++i) {
        Mma<T>(acc[i][j], a[i], b[0], b[1]);
        Mma<T>(acc[i][j + 1], a[i], b[2], b[3]);
      }
    }
    if (step == 0) copy();
  }
}

template <typename T, int kWarps, int kTokenTiles>
AWQ_KERNEL(kWarps* kWarp, 1)
GemmKernel(GemmArgs const args, GemmPlan const plan) {
  constexpr int32_t kTokens = kTokenTiles * kTokenTile, kStrips = kWarps * kWarpStrips;
  StageLayout const layout(kStrips, kTokens);
  Shared const ring = DynamicShared();
  auto ring_end = [&] { return ring + Opaque(plan.stages) * layout.bytes; };
  PrepareZeros(args, layout, ring, plan.stages, layout.bytes, kStrips, kWarps * kWarp);

  GemmFetch<kWarps, kTokens> fetch(args, plan);
  {  // weights do not depend on the kernel before this one, X does
    GemmFetch<kWarps, kTokens> weights = fetch;
    for (Shared stage = ring; stage < ring_end() - layout.bytes && weights.more(plan); stage += layout.bytes) {
      weights.FillWeights(args, plan, stage);
      weights.Advance(args, plan);
    }
  }
  LetNextKernelStart();
  WaitForPreviousKernel();
  for (Shared stage = ring; stage < ring_end() - layout.bytes; stage += layout.bytes) {
    if (fetch.more(plan)) {
      fetch.FillTokens(args, stage);
      fetch.Advance(args, plan);
    }
    CommitCopies();
  }

  Shared stage = ring;
#pragma unroll 1
  for (Piece piece = FirstPiece(plan, BlockIndex()); IsPiece(plan, piece);
       piece = NextPiece(plan, BlockIndex(), piece.tile)) {
    Accumulators<kWarpStrips, kTokenTiles> acc;
    ClearSums<kWarpStrips, kTokenTiles>(acc);
#pragma unroll 1
    for (; piece.begin < piece.end; ++piece.begin) {
      if (plan.stages == kMmaStages) {
        WaitCopies<kMmaStages - 2>();
      } else {
        WaitCopies<kMmaStages - 3>();
      }
      SyncThreads();  // the unit has arrived for every thread, and nobody reads the one before any more
      auto copy = [&] {
        if (fetch.more(plan)) {
          Shared const free_stage = (stage == ring ? ring_end() : stage) - layout.bytes;  // of the unit before
          fetch.FillWeights(args, plan, free_stage);
          fetch.FillTokens(args, free_stage);
          fetch.Advance(args, plan);
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
    FinishPiece<T, kWarps, kWarpStrips, kTokenTiles>(args, plan, piece.tile, acc, ring_end(), Opaque(ThreadIndex()));
  }
}

using GemmFunction = void (*)(GemmArgs, GemmPlan);

// nullptr where `tile` is not for these kernels.
template <typename T>
GemmFunction GemmKernelFor(GemmTile const& tile) {
  if (tile.wgmma || tile.strips != kWarpStrips) return nullptr;
  if (tile.tokens == 64) return tile.warps == 4 ? GemmKernel<T, 4, 8> : GemmKernel<T, 8, 8>;
  return tile.warps == 4 ? GemmKernel<T, 4, 16> : GemmKernel<T, 8, 16>;
}
inline GemmFunction GemmKernelFor(ActivationType type, GemmTile const& tile) {
  return type == ActivationType::kHalf ? GemmKernelFor<Half>(tile) : GemmKernelFor<Bfloat16>(tile);
}

}  // namespace awq_trt
