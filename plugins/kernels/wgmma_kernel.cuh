// Many tokens on sm_90: a producer warpgroup and two that multiply.
//
// The producer's first lane has the copy engine (TMA) bring X and the weights, its second warp brings scales and zeros;
// kWgmmaStages units are under way, across the ends of tiles. In the other warpgroups each warp dequantizes 16 *
// kStrips features of its own in registers: they are the A operand of wgmma, X in shared memory is B. Operands are
// swapped, so that what is converted goes from registers to the tensor cores and never back to shared memory. While one
// step of 16 columns is multiplied, the next one is dequantized.
//
// A stage is full when the bytes of the copy engine and the copies of 32 lanes have come, and free when the 8 warps
// that multiply have said so.
#pragma once

#include "kernels/gemm_tiles.cuh"

namespace awq_trt {

constexpr int32_t kConsumerWarps = 8, kWgmmaThreads = kWarpgroup + kConsumerWarps * kWarp;
constexpr int32_t kProducerRegisters = 40, kConsumerRegisters = 232;  // of 168 for each at the start

struct WgmmaMaps {
  TensorMap x;  // [tokens, K], box of one unit of a tile
  TensorMap q;  // [N16, 128 * K64] words, box of one unit of a tile
};

template <int kStrips, int kTokens>
struct WgmmaStages {
  static constexpr int32_t kTileStrips = kConsumerWarps * kStrips;
  StageLayout layout{kTileStrips, kTokens};
  int32_t stage_bytes = CeilDiv(layout.bytes, kSwizzleBytes) * kSwizzleBytes;
  Shared ring, full, empty;

  AWQ_DEVICE Shared Stage(int32_t i) const { return ring + i * stage_bytes; }
  AWQ_DEVICE Shared Full(int32_t i) const { return full + i * static_cast<int32_t>(sizeof(Barrier)); }
  AWQ_DEVICE Shared Empty(int32_t i) const { return empty + i * static_cast<int32_t>(sizeof(Barrier)); }
  AWQ_DEVICE Shared Scratch() const { return Stage(kWgmmaStages); }
};

// The place of a unit in the ring, and how often the ring has been gone round, modulo two.
struct RingPlace {
  int32_t stage = 0;
  uint32_t parity = 0;
  AWQ_DEVICE void Advance() {
    if (++stage == kWgmmaStages) stage = 0, parity ^= 1;
  }
};

// The units of a block, one after the other.
struct Units {
  Piece piece;  // the unit is its `begin`
  TileAt at;

  AWQ_DEVICE explicit Units(GemmPlan const& plan)
      : piece(FirstPiece(plan, BlockIndex())), at(LocateTile(plan, piece.tile)) {}
  AWQ_DEVICE bool more(GemmPlan const& plan) const { return IsPiece(plan, piece); }
  AWQ_DEVICE void Advance(GemmPlan const& plan) {
    if (++piece.begin < piece.end) return;
    piece = NextPiece(plan, BlockIndex(), piece.tile);
    at = LocateTile(plan, piece.tile);
  }
};

// One lane: X and the weights. The first units' weights do not wait for the kernel before this one.
template <int kStrips, int kTokens>
AWQ_DEVICE void CopyTiles(GemmPlan const& plan, WgmmaMaps const& maps, WgmmaStages<kStrips, kTokens> const& stages) {
  constexpr int32_t kBytes = kTokens * kTileK * 2 + stages.kTileStrips * kTileN * kTileK / 2;
  auto copy_weights = [&](Units const& units, int32_t i) {
    ArriveExpecting(stages.Full(i), kBytes);
    CopyBox(stages.Stage(i) + stages.layout.q, maps.q, units.piece.begin * (kWarp * kSteps),
            units.at.row * stages.kTileStrips, stages.Full(i));
  };
  PrefetchMap(maps.q);
  PrefetchMap(maps.x);
  Units ahead(plan);
  for (int32_t i = 0; i < kWgmmaStages && ahead.more(plan); ++i, ahead.Advance(plan)) copy_weights(ahead, i);
  WaitForPreviousKernel();
  RingPlace place;
  bool first_round = true;
#pragma unroll 1
  for (Units units(plan); units.more(plan); units.Advance(plan)) {
    if (!first_round) {
      AwaitPhase(stages.Empty(place.stage), place.parity ^ 1);
      copy_weights(units, place.stage);
    }
    CopyBox(stages.Stage(place.stage), maps.x, units.piece.begin * kTileK, units.at.token * kTokens,
            stages.Full(place.stage));
    place.Advance();
    if (place.stage == 0) first_round = false;
  }
}

// One warp: scales and zeros.
template <int kStrips, int kTokens>
AWQ_DEVICE void CopyAllScales(GemmArgs const& args, GemmPlan const& plan, WgmmaStages<kStrips, kTokens> const& stages,
                              int32_t lane) {
  RingPlace place;
#pragma unroll 1
  for (Units units(plan); units.more(plan); units.Advance(plan)) {
    AwaitPhase(stages.Empty(place.stage), place.parity ^ 1);  // at once in the first round
    if (lane < 2 * stages.kTileStrips) {
      CopyScales(args, stages.layout, stages.Stage(place.stage), units.at.row * stages.kTileStrips, lane / 2,
                 units.piece.begin, lane % 2);
    }
    ArriveAfterCopies(stages.Full(place.stage));
    place.Advance();
  }
}

// acc += the unit in a stage; the last step is under way when this returns. `release` is called once the unit before
// has been multiplied.
template <typename T, bool kPreScale, int kStrips, int kTokenTiles, typename Release>
AWQ_DEVICE void MultiplyUnit([[maybe_unused]] GemmArgs const& args, Accumulators<kStrips, kTokenTiles>& acc,
                             uint32_t (&a)[2][kStrips][4], StageLayout const& layout, Shared stage,
                             [[maybe_unused]] int32_t unit, int32_t warp, int32_t lane, Release const& release) {
  WeightTile weights[kStrips];
#pragma unroll
  for (int32_t i = 0; i < kStrips; ++i) weights[i] = LoadStageTile(layout, stage, warp * kStrips + i, lane);
#pragma unroll
  for (int32_t step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int32_t i = 0; i < kStrips; ++i) Dequantize<T>(a[step % 2][i], weights[i], step);
    if constexpr (kPreScale) {
      ColumnScales const scales = LoadColumnScales(args, unit, step, lane);
#pragma unroll
      for (int32_t i = 0; i < kStrips; ++i) MultiplyColumns<T>(a[step % 2][i], scales);
    }
    StartMultiplying();
#pragma unroll
    for (int32_t i = 0; i < kStrips; ++i) MultiplyAsync<T>(acc[i], a[step % 2][i], stage + step * (kStepK * 2));
    CommitMultiplying();
    WaitMultiplying<1>();  // the step before has been multiplied
    if (step == 0) release();
  }
}

// The eight warps that multiply.
template <typename T, int kStrips, int kTokenTiles>
AWQ_DEVICE void MultiplyTiles(GemmArgs const& args, GemmPlan const& plan,
                              WgmmaStages<kStrips, kTokenTiles * kTokenTile> const& stages, int32_t warp,
                              int32_t lane) {
  WaitForPreviousKernel();  // which may still read what this one writes
  RingPlace place;
#pragma unroll 1
  for (Piece piece = FirstPiece(plan, BlockIndex()); IsPiece(plan, piece);
       piece = NextPiece(plan, BlockIndex(), piece.tile)) {
    Accumulators<kStrips, kTokenTiles> acc;
    ClearSums<kStrips, kTokenTiles>(acc);
    uint32_t a[2][kStrips][4];  // of the step that is multiplied, and of the next one
    int32_t used = 0;           // the stage that the unit before was in
#pragma unroll 1
    for (int32_t unit = piece.begin; unit < piece.end; ++unit) {
      Shared const stage = stages.Stage(place.stage);
      AwaitPhase(stages.Full(place.stage), place.parity);
      auto release = [&] {  // the stage of the unit before: its last step has been multiplied
        if (unit > piece.begin && lane == 0) Arrive(stages.Empty(used));
      };
      if (args.pre_scale == nullptr) {
        MultiplyUnit<T, false, kStrips, kTokenTiles>(args, acc, a, stages.layout, stage, unit, warp, lane, release);
      } else {
        MultiplyUnit<T, true, kStrips, kTokenTiles>(args, acc, a, stages.layout, stage, unit, warp, lane, release);
      }
      used = place.stage;
      place.Advance();
    }
    WaitMultiplying<0>();
#pragma unroll
    for (int32_t i = 0; i < kStrips; ++i) Settle(acc[i]);
    if (lane == 0) Arrive(stages.Empty(used));
    FinishPiece<T, kConsumerWarps, kStrips, kTokenTiles>(args, plan, piece.tile, acc, stages.Scratch(),
                                                         ThreadIndex() - kWarpgroup);
  }
}

template <typename T, int kStrips, int kTokenTiles>
AWQ_KERNEL(kWgmmaThreads, 1)
WgmmaKernel(GemmArgs const args, GemmPlan const plan, AWQ_GRID_CONSTANT WgmmaMaps const maps) {
  AWQ_SHARED Barrier barriers[2 * kWgmmaStages];
  int32_t const warp = ThreadIndex() / kWarp, lane = ThreadIndex() % kWarp;
  WgmmaStages<kStrips, kTokenTiles * kTokenTile> stages;
  stages.ring = AlignShared(DynamicShared(), kSwizzleBytes);
  stages.full = SharedOf(barriers);
  stages.empty = stages.Full(kWgmmaStages);
  if (ThreadIndex() == 0) {
    for (int32_t i = 0; i < kWgmmaStages; ++i) {
      InitBarrier(stages.Full(i), 1 + kWarp);
      InitBarrier(stages.Empty(i), kConsumerWarps);
    }
    PublishBarriers();
  }
  PrepareZeros(args, stages.layout, stages.ring, kWgmmaStages, stages.stage_bytes, stages.kTileStrips, kWgmmaThreads);
  SyncThreads();
  LetNextKernelStart();
  if (warp < kWarpgroup / kWarp) {
    GiveRegisters<kProducerRegisters>();
    if (warp == 0 && lane == 0) CopyTiles(plan, maps, stages);
    if (warp == 1) CopyAllScales(args, plan, stages, lane);
  } else {
    TakeRegisters<kConsumerRegisters>();
    MultiplyTiles<T, kStrips, kTokenTiles>(args, plan, stages, warp - kWarpgroup / kWarp, lane);
  }
}

using WgmmaFunction = void (*)(GemmArgs, GemmPlan, WgmmaMaps);

// nullptr where `tile` is not for these kernels.
template <typename T>
WgmmaFunction WgmmaKernelFor(GemmTile const& tile) {
  if (!tile.wgmma || tile.warps != kConsumerWarps) return nullptr;
  if (tile.strips == 1) return tile.tokens == 128 ? WgmmaKernel<T, 1, 16> : nullptr;
  return tile.tokens == 64 ? WgmmaKernel<T, 2, 8> : WgmmaKernel<T, 2, 16>;
}
inline WgmmaFunction WgmmaKernelFor(ActivationType type, GemmTile const& tile) {
  return type == ActivationType::kHalf ? WgmmaKernelFor<Half>(tile) : WgmmaKernelFor<Bfloat16>(tile);
}

}  // namespace awq_trt
