// Many tokens on sm_90: a producer warpgroup and two that multiply.
//
// The producer's first lane has TMA bring X and the weights, its second warp brings scales and zeros;
// kWgmmaStages K-blocks are in flight, across the ends of tiles. In the other warpgroups each warp dequantizes 16 *
// kRowTiles features of its own in registers: they are the A operand of wgmma, X in shared memory is B. Operands are
// swapped, so that what is converted goes from registers to the tensor cores and never back to shared memory. While one
// step of 16 columns is multiplied, the next one is dequantized.
//
// A stage is full when the bytes of TMA and the copies of 32 lanes have come, and free when the 8 warps
// that multiply have said so.
#pragma once

#include "kernels/gemm_tiles.cuh"

namespace awq_trt {

constexpr int32_t kConsumerWarps = 8, kWgmmaThreads = kWarpgroup + kConsumerWarps * kWarp;
constexpr int32_t kProducerRegisters = 40, kConsumerRegisters = 232;  // of 168 for each at the start

struct WgmmaMaps {
  TensorMap x;  // [tokens, K], box of one K-block of a tile
  TensorMap q;  // [N16, 128 * K64] words, box of one K-block of a tile
};

template <int kRowTiles, int kTokens>
struct WgmmaStages {
  static constexpr int32_t kTileRowTiles = kConsumerWarps * kRowTiles;
  StageLayout layout{kTileRowTiles, kTokens};
  int32_t stage_bytes = CeilDiv(layout.bytes, kSwizzleBytes) * kSwizzleBytes;
  Shared ring, full, empty;

  AWQ_DEVICE Shared Stage(int32_t i) const { return ring + i * stage_bytes; }
  AWQ_DEVICE Shared Full(int32_t i) const { return full + i * static_cast<int32_t>(sizeof(Barrier)); }
  AWQ_DEVICE Shared Empty(int32_t i) const { return empty + i * static_cast<int32_t>(sizeof(Barrier)); }
  AWQ_DEVICE Shared Scratch() const { return Stage(kWgmmaStages); }
};

// The stage of a K-block in the ring, and the parity of how often the ring has been filled.
struct RingPlace {
  int32_t stage = 0;
  uint32_t parity = 0;
  AWQ_DEVICE void Advance() {
    if (++stage == kWgmmaStages) stage = 0, parity ^= 1;
  }
};

// The K-blocks of a block, one after the other.
struct KBlocks {
  Piece piece;  // the K-block is its `begin`
  TileAt at;

  AWQ_DEVICE explicit KBlocks(GemmSchedule const& schedule)
      : piece(FirstPiece(schedule, BlockIndex())), at(LocateTile(schedule, piece.tile)) {}
  AWQ_DEVICE bool more(GemmSchedule const& schedule) const { return IsPiece(schedule, piece); }
  AWQ_DEVICE void Advance(GemmSchedule const& schedule) {
    if (++piece.begin < piece.end) return;
    piece = NextPiece(schedule, BlockIndex(), piece.tile);
    at = LocateTile(schedule, piece.tile);
  }
};

// One lane: X and the weights. The first K-blocks' weights do not wait for the kernel before this one.
template <int kRowTiles, int kTokens>
AWQ_DEVICE void CopyTiles(GemmSchedule const& schedule, WgmmaMaps const& maps,
                          WgmmaStages<kRowTiles, kTokens> const& stages) {
  constexpr int32_t kBytes = kTokens * kTileK * 2 + stages.kTileRowTiles * kTileN * kTileK / 2;
  auto copy_weights = [&](KBlocks const& k_blocks, int32_t i) {
    ArriveExpecting(stages.Full(i), kBytes);
    CopyBox(stages.Stage(i) + stages.layout.q, maps.q, k_blocks.piece.begin * (kWarp * kSteps),
            k_blocks.at.row * stages.kTileRowTiles, stages.Full(i));
  };
  PrefetchMap(maps.q);
  PrefetchMap(maps.x);
  KBlocks ahead(schedule);
  for (int32_t i = 0; i < kWgmmaStages && ahead.more(schedule); ++i, ahead.Advance(schedule)) copy_weights(ahead, i);
  WaitForPreviousKernel();
  RingPlace place;
  bool first_round = true;
#pragma unroll 1
  for (KBlocks k_blocks(schedule); k_blocks.more(schedule); k_blocks.Advance(schedule)) {
    if (!first_round) {
      AwaitPhase(stages.Empty(place.stage), place.parity ^ 1);
      copy_weights(k_blocks, place.stage);
    }
    CopyBox(stages.Stage(place.stage), maps.x, k_blocks.piece.begin * kTileK, k_blocks.at.token * kTokens,
            stages.Full(place.stage));
    place.Advance();
    if (place.stage == 0) first_round = false;
  }
}

// One warp: scales and zeros.
template <int kRowTiles, int kTokens>
AWQ_DEVICE void CopyAllScales(GemmArgs const& args, GemmSchedule const& schedule,
                              WgmmaStages<kRowTiles, kTokens> const& stages, int32_t lane) {
  RingPlace place;
#pragma unroll 1
  for (KBlocks k_blocks(schedule); k_blocks.more(schedule); k_blocks.Advance(schedule)) {
    AwaitPhase(stages.Empty(place.stage), place.parity ^ 1);  // at once in the first round
    if (lane < 2 * stages.kTileRowTiles) {
      CopyScales(args, stages.layout, stages.Stage(place.stage), k_blocks.at.row * stages.kTileRowTiles, lane / 2,
                 k_blocks.piece.begin, lane % 2);
    }
    ArriveAfterCopies(stages.Full(place.stage));
    place.Advance();
  }
}

// acc += the K-block in a stage; the last step is in flight when this returns. `release` is called once the K-block
// before has been multiplied.
template <typename T, bool kPreScale, int kRowTiles, int kTokenTiles, typename Release>
AWQ_DEVICE void MultiplyKBlock([[maybe_unused]] GemmArgs const& args, Accumulators<kRowTiles, kTokenTiles>& acc,
                               uint32_t (&a)[2][kRowTiles][4], StageLayout const& layout, Shared stage,
                               [[maybe_unused]] int32_t k_block, int32_t warp, int32_t lane, Release const& release) {
  WeightTile weights[kRowTiles];
#pragma unroll
  for (int32_t i = 0; i < kRowTiles; ++i) weights[i] = LoadStageTile(layout, stage, warp * kRowTiles + i, lane);
#pragma unroll
  for (int32_t step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int32_t i = 0; i < kRowTiles; ++i) Dequantize<T>(a[step % 2][i], weights[i], step);
    if constexpr (kPreScale) {
      ColumnScales const scales = LoadColumnScales(args, k_block, step, lane);
#pragma unroll
      for (int32_t i = 0; i < kRowTiles; ++i) MultiplyColumns<T>(a[step % 2][i], scales);
    }
    StartMultiplying();
#pragma unroll
    for (int32_t i = 0; i < kRowTiles; ++i) MultiplyAsync<T>(acc[i], a[step % 2][i], stage + step * (kStepK * 2));
    CommitMultiplying();
    WaitMultiplying<1>();  // the step before has been multiplied
    if (step == 0) release();
  }
}

// The eight warps that multiply.
template <typename T, int kRowTiles, int kTokenTiles>
AWQ_DEVICE void MultiplyTiles(GemmArgs const& args, GemmSchedule const& schedule,
                              WgmmaStages<kRowTiles, kTokenTiles * kTokenTile> const& stages, int32_t warp,
                              int32_t lane) {
  WaitForPreviousKernel();  // which may still read what this one writes
  RingPlace place;
#pragma unroll 1
  for (Piece piece = FirstPiece(schedule, BlockIndex()); IsPiece(schedule, piece);
       piece = NextPiece(schedule, BlockIndex(), piece.tile)) {
    Accumulators<kRowTiles, kTokenTiles> acc;
    ClearSums<kRowTiles, kTokenTiles>(acc);
    uint32_t a[2][kRowTiles][4];  // of the step that is multiplied, and of the next one
    int32_t used = 0;             // the stage that the K-block before was in
#pragma unroll 1
    for (int32_t k_block = piece.begin; k_block < piece.end; ++k_block) {
      Shared const stage = stages.Stage(place.stage);
      AwaitPhase(stages.Full(place.stage), place.parity);
      auto release = [&] {  // the stage of the K-block before: its last step has been multiplied
        if (k_block > piece.begin && lane == 0) Arrive(stages.Empty(used));
      };
      if (args.pre_scale == nullptr) {
        MultiplyKBlock<T, false, kRowTiles, kTokenTiles>(args, acc, a, stages.layout, stage, k_block, warp, lane,
                                                         release);
      } else {
        MultiplyKBlock<T, true, kRowTiles, kTokenTiles>(args, acc, a, stages.layout, stage, k_block, warp, lane,
                                                        release);
      }
      used = place.stage;
      place.Advance();
    }
    WaitMultiplying<0>();
#pragma unroll
    for (int32_t i = 0; i < kRowTiles; ++i) Settle(acc[i]);
    if (lane == 0) Arrive(stages.Empty(used));
    FinishPiece<T, kConsumerWarps, kRowTiles, kTokenTiles>(args, schedule, piece.tile, acc, stages.Scratch(),
                                                           ThreadIndex() - kWarpgroup);
  }
}

template <typename T, int kRowTiles, int kTokenTiles>
AWQ_KERNEL(kWgmmaThreads, 1)
WgmmaKernel(GemmArgs const args, GemmSchedule const schedule, AWQ_GRID_CONSTANT WgmmaMaps const maps) {
  AWQ_SHARED Barrier barriers[2 * kWgmmaStages];
  int32_t const warp = ThreadIndex() / kWarp, lane = ThreadIndex() % kWarp;
  WgmmaStages<kRowTiles, kTokenTiles * kTokenTile> stages;
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
  PrepareZeros(args, stages.layout, stages.ring, kWgmmaStages, stages.stage_bytes, stages.kTileRowTiles, kWgmmaThreads);
  SyncThreads();
  LetNextKernelStart();
  if (warp < kWarpgroup / kWarp) {
    GiveRegisters<kProducerRegisters>();
    if (warp == 0 && lane == 0) CopyTiles(schedule, maps, stages);
    if (warp == 1) CopyAllScales(args, schedule, stages, lane);
  } else {
    TakeRegisters<kConsumerRegisters>();
    MultiplyTiles<T, kRowTiles, kTokenTiles>(args, schedule, stages, warp - kWarpgroup / kWarp, lane);
  }
}

using WgmmaFunction = void (*)(GemmArgs, GemmSchedule, WgmmaMaps);

// nullptr where `tile` is not for these kernels.
template <typename T>
WgmmaFunction WgmmaKernelFor(GemmTile const& tile) {
  if (!tile.wgmma || tile.warps != kConsumerWarps) return nullptr;
  if (tile.row_tiles == 1) return tile.tokens == 128 ? WgmmaKernel<T, 1, 16> : nullptr;
  return tile.tokens == 64 ? WgmmaKernel<T, 2, 8> : WgmmaKernel<T, 2, 16>;
}
inline WgmmaFunction WgmmaKernelFor(ActivationType type, GemmTile const& tile) {
  return type == ActivationType::kHalf ? WgmmaKernelFor<Half>(tile) : WgmmaKernelFor<Bfloat16>(tile);
}

}  // namespace awq_trt
