// Few tokens: every weight is read once and used a handful of times, so speed is that of memory, which must never be
// idle.
//
// A warp streams its K-blocks of weights (decode_schedule.h) through a ring of its own in shared memory, kDecodeStages
// deep and filled by cp.async: no barrier between the first K-block and the last. X is small and read by every warp, so
// the block's slice of it is brought to shared memory once. Weights do not depend on the kernel before this one, X
// does: the rings are filled before that kernel has ended.
//
// Scales are applied to sums, not to weights: within a group the products are (q - zero) * x with q - zero an exact
// integer, and every group's sum is multiplied by its scale in fp32. That is one fused multiply-add per weight pair
// less than a scaled weight, and one rounding per weight less.
#pragma once

#include <type_traits>

#include "kernels/fragments.h"
#include "plan/decode_schedule.h"

namespace awq_trt {

constexpr int32_t kMaxSums = 8;  // of a lane: packed rows times tiles of tokens

// Four floats of a lane for 16 features and one tile of tokens: accumulators as in fragments.h. Sums of a row tile are
// [row of 16 features][tile of tokens].
struct Sums {
  float v[4];
};
AWQ_DEVICE Words WordsOf(Sums const& s) { return {{BitsOf(s.v[0]), BitsOf(s.v[1]), BitsOf(s.v[2]), BitsOf(s.v[3])}}; }
AWQ_DEVICE void Add(Sums& sum, Words const& part) {
#pragma unroll
  for (int32_t e = 0; e < 4; ++e) sum.v[e] += FloatOf(part.w[e]);
}

// The copies that a lane starts next. Two lanes copy the scales of a part, the first of them also its zeros: 32 and 8
// bytes of `entry` in the layer's scales and zeros. Parts beyond K are not copied; they keep what PrepareRing has put
// there.
template <int kPackedRows>
struct Fetch {
  static constexpr uint32_t kSecondTile = 1, kScales = 2, kZeros = 4;
  static constexpr int32_t kLast = 3;
  int32_t left;  // K-blocks of the row tile, in the block's rectangle
  int32_t rows;  // packed rows from the row tile on
  uint32_t tile, entry;
  uint32_t roles;  // in any K-block; in the last one of a row tile, shifted by kLast
  char const* q;   // of this lane in tile 0

  // Begins with `k_block` of `row_tile`; the rectangle ends before end_k_block.
  AWQ_DEVICE Fetch(GemmArgs const& args, DecodeSchedule const& schedule, int32_t row_tile, int32_t k_block,
                   int32_t end_k_block, int32_t lane)
      : left(end_k_block - k_block),
        rows(CeilDiv(args.n, kTileN) - row_tile * kPackedRows),
        tile(row_tile * kPackedRows * CeilDiv(args.k, kTileK) + k_block * kBlockKTiles),
        entry(row_tile * kPackedRows * args.groups + k_block * schedule.part_step + lane / 2),
        q(Opaque(reinterpret_cast<char const*>(args.qweight) + lane * 16)) {
    int32_t const part = lane / 2;
    uint32_t const copies = lane % 2 == 0 && args.zeros != nullptr ? kScales | kZeros : kScales;
    uint32_t const any = kSecondTile | (part < kBlockKMaxGroups >> schedule.part_shift ? copies : 0);
    uint32_t const second = CeilDiv(args.k, kTileK) % kBlockKTiles == 0 ? kSecondTile : 0;
    uint32_t const last =
        end_k_block <= schedule.last_k_block ? any : second | (part < schedule.last_parts ? copies : 0);
    roles = Opaque(any | last << kLast);
  }

  // Start the copy of a K-block into a stage and go on to the next one. `lane_stage` is the stage's address + lane *
  // 16, `k_blocks` those of a row tile in the rectangle.
  AWQ_DEVICE void Fill(GemmArgs const& args, DecodeSchedule const& schedule, Shared lane_stage, int32_t k_blocks,
                       int32_t lane) {
    uint32_t const now = left == 1 ? roles >> kLast : roles;
#pragma unroll
    for (int32_t row = 0; row < kPackedRows; ++row, lane_stage += kStageBytes) {
      bool const there = row == 0 || row < rows;
      uint32_t const row_tile = tile + row * CeilDiv(args.k, kTileK), row_entry = entry + row * args.groups;
      char const* const source = q + static_cast<uint64_t>(row_tile) * kTileBytes;
      CopyAsync(lane_stage, source, there);
      CopyAsync(lane_stage + kTileBytes, source + kTileBytes, there && (now & kSecondTile) != 0);
      uint64_t const half = 2 * row_entry + lane % 2;
      if (there && (now & kScales) != 0) CopyAsync(lane_stage + kStageScales, args.scales + half * 8, true);
      if (there && (now & kZeros) != 0) {
        CopyAsync8(lane_stage + kStageZeros, args.zeros + static_cast<uint64_t>(row_entry) * 8);
      }
    }
    tile += kBlockKTiles, entry += schedule.part_step;
    if (--left > 0) return;
    left = k_blocks, rows -= kPackedRows;
    tile += kPackedRows * CeilDiv(args.k, kTileK) - k_blocks * kBlockKTiles;
    entry += kPackedRows * args.groups - k_blocks * schedule.part_step;
  }
};

// Scales of 0 for parts that are never copied (times sums of 0; whatever was there might be NaN), and the zero 8 of
// layers that have none.
template <int kPackedRows>
AWQ_DEVICE void PrepareRing(GemmArgs const& args, Shared ring, int32_t lane) {
  uint32_t const fill = lane % 16 >= 8 && args.zeros == nullptr ? 0x88888888u : 0u;
#pragma unroll
  for (int32_t stage = lane / 16; stage < kDecodeStages * kPackedRows; stage += 2) {
    StoreShared(ring + stage * kStageBytes + kStageScales + lane % 16 * 16, {{fill, fill, fill, fill}});
  }
  SyncWarp();
}

// Scales and zero points of one part of a K-block, for the two rows of a lane.
template <typename T>
struct PartScale {
  float low = 0, high = 0;  // of rows g and g + 8
  uint32_t minus_zero[2] = {};

  PartScale() = default;
  AWQ_DEVICE PartScale(Shared stage, int32_t part, int32_t lane) {
    uint32_t const scales = LoadShared32(stage + kStageScales + part * 32 + lane / 4 * 4);
    low = ToFloat<T>(static_cast<uint16_t>(scales)), high = ToFloat<T>(static_cast<uint16_t>(scales >> 16));
    MinusZeros<T>(minus_zero, LoadShared8(stage + kStageZeros + part * 32 + lane / 4));
  }
};

// sums += 32 columns, two k-steps, of integers times X, of 16 features. `b[j]`: X of tile j of tokens.
template <typename T, int kTokenTiles>
AWQ_DEVICE void MultiplyQuarter(Sums* sums, uint32_t q0, uint32_t q1, uint32_t const (&minus_zero)[2],
                                uint32_t const (&b)[kTokenTiles][4]) {
  uint32_t a[2][4];
  IntegerFragment<T>(a[0], q0, minus_zero);
  IntegerFragment<T>(a[1], q1, minus_zero);
#pragma unroll
  for (int32_t j = 0; j < kTokenTiles; ++j) {
    Mma<T>(sums[j].v, a[0], b[j][0], b[j][1]);
    Mma<T>(sums[j].v, a[1], b[j][2], b[j][3]);
  }
}

// acc += sums * scale; and sums begin anew.
template <typename T, int kTokenTiles>
AWQ_DEVICE void AddScaled(Sums* acc, Sums* sums, PartScale<T> const& scale) {
#pragma unroll
  for (int32_t j = 0; j < kTokenTiles; ++j) {
#pragma unroll
    for (int32_t e = 0; e < 4; ++e) acc[j].v[e] += sums[j].v[e] * (e < 2 ? scale.low : scale.high);
    sums[j] = {};
  }
}

// acc += K-block * X, scaled in parts of 32 << kPartShift columns. `x_rows[j]` is where this lane reads X for ldmatrix.
template <typename T, int32_t kPartShift, int kTokenTiles>
AWQ_DEVICE void MultiplyKBlock(Sums* acc, Shared stage, Shared const (&x_rows)[kTokenTiles], int32_t lane) {
  constexpr int32_t kPackedRows = PackedRows(kTokenTiles), kParts = kBlockKMaxGroups >> kPartShift;
  [[maybe_unused]] constexpr int32_t kAtOnce = kTokenTiles == 1 && kPartShift == 2 ? kBlockKTiles : 1;  // registers
  Sums sums[kPackedRows * kTokenTiles] = {};
  PartScale<T> scale[kPackedRows];
  auto begin_part = [&](int32_t row, int32_t part) { scale[row] = {stage + row * kStageBytes, part, lane}; };
  auto end_part = [&](int32_t row) {
    AddScaled<T, kTokenTiles>(acc + row * kTokenTiles, sums + row * kTokenTiles, scale[row]);
  };
  if constexpr (kParts == 1) {
#pragma unroll
    for (int32_t row = 0; row < kPackedRows; ++row) begin_part(row, 0);
  }
#pragma unroll kAtOnce
  for (int32_t tile = 0; tile < kBlockKTiles; ++tile) {
    Words q[kPackedRows];
#pragma unroll
    for (int32_t row = 0; row < kPackedRows; ++row) {
      q[row] = LoadShared(stage + row * kStageBytes + tile * kTileBytes + lane * 16);
    }
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {  // of a tile: 32 columns
      uint32_t b[kTokenTiles][4];
#pragma unroll
      for (int32_t j = 0; j < kTokenTiles; ++j) LoadMatrices(b[j], x_rows[j] + tile * 128 + half * 64);
#pragma unroll
      for (int32_t row = 0; row < kPackedRows; ++row) {
        if (kParts == 4 || (kParts == 2 && half == 0)) begin_part(row, tile * kParts / 2 + half * kParts / 4);
        MultiplyQuarter<T>(sums + row * kTokenTiles, q[row].w[2 * half], q[row].w[2 * half + 1], scale[row].minus_zero,
                           b);
        if (kParts == 4 || (kParts == 2 && half == 1)) end_part(row);
      }
    }
  }
  if constexpr (kParts == 1) {
#pragma unroll
    for (int32_t row = 0; row < kPackedRows; ++row) end_part(row);
  }
}

// 8 columns of a token, times pre_scale; 0 beyond the last column.
template <typename T>
AWQ_DEVICE Words LoadTokenChunk(GemmArgs const& args, int32_t token, int32_t column) {
  Words chunk = {};
  if (column >= args.k) return chunk;
  uint16_t const* p = args.x + static_cast<int64_t>(token) * args.k + column;
  if (args.x_aligned) {
    chunk = LoadWords(p);
  } else {
#pragma unroll
    for (int32_t e = 0; e < 8; ++e) chunk.w[e / 2] |= static_cast<uint32_t>(Load16(p + e)) << (16 * (e % 2));
  }
  if (args.pre_scale != nullptr) {
    Words const scale = LoadStreaming(args.pre_scale + column);
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) chunk.w[i] = Multiply<T>(chunk.w[i], scale.w[i]);
  }
  return chunk;
}

// Bring the slice of X to shared memory: row `token` at token * row_bytes. Loads are issued four at a time.
template <typename T>
AWQ_DEVICE void StageTokens(GemmArgs const& args, DecodeSchedule const& schedule, Shared x, int32_t first_column,
                            int32_t k_blocks) {
  constexpr int32_t kBatch = 4;
  int32_t const chunks = k_blocks * (kBlockK / 8), threads = BlockThreads();
  int32_t const token_step = threads / chunks, chunk_step = threads % chunks;
  int32_t token = ThreadIndex() / chunks, chunk = ThreadIndex() % chunks;
  while (token < args.tokens) {
    Words loaded[kBatch];
    Shared targets[kBatch];
    bool valid[kBatch];
#pragma unroll
    for (int32_t i = 0; i < kBatch; ++i) {
      targets[i] = x + token * schedule.row_bytes + chunk * 16;
      valid[i] = token < args.tokens;
      if (valid[i]) loaded[i] = LoadTokenChunk<T>(args, token, first_column + chunk * 8);
      token += token_step, chunk += chunk_step;
      if (chunk >= chunks) chunk -= chunks, ++token;
    }
#pragma unroll
    for (int32_t i = 0; i < kBatch; ++i) {
      if (valid[i]) StoreShared(targets[i], loaded[i]);
    }
  }
}

// Y of 16 features, `row` of them, and one tile of tokens. It goes through `scratch`, kSumsBytes of shared memory of
// this warp, so that 16 lanes write the 16 features of a token.
template <typename T>
AWQ_DEVICE void StoreSums(GemmArgs const& args, Sums const& sums, Shared scratch, int32_t row, int32_t token_tile,
                          int32_t lane) {
  StoreShared(scratch + lane * 16, WordsOf(sums));
  SyncWarp();
  int32_t const i = lane % kTileN, n = row * kTileN + i;
#pragma unroll 1
  for (int32_t j = lane / kTileN; j < kTokenTile && n < args.n; j += kWarp / kTileN) {
    int32_t const token = token_tile * kTokenTile + j;
    if (token >= args.tokens) break;
    Shared const sum = scratch + (i % 8 * 4 + j / 2) * 16 + (i / 8 * 2 + j % 2) * 4;  // as in fragments.h
    float const bias = args.bias != nullptr ? ToFloat<T>(Load16(args.bias + n)) : 0.0f;
    Output const output = OutputOf(args, n);
    Store16(output.y + token * output.stride, FromFloat<T>(FloatOf(LoadShared32(sum)) + bias));
  }
  SyncWarp();
}

AWQ_DEVICE int32_t BlockSlice() { return BlockIndex(); }
AWQ_DEVICE int32_t BlockRange() { return BlockRow(); }

// Where a slice leaves its sums of 16 features and a tile of tokens in the workspace.
AWQ_DEVICE Words* PartialSums(GemmArgs const& args, DecodeSchedule const& schedule, int32_t slice, int32_t row,
                              int32_t token_tile, int32_t lane) {
  int64_t const tile = static_cast<int64_t>(slice) * CeilDiv(args.n, kTileN) + row;
  return static_cast<Words*>(args.workspace) + (tile * schedule.token_tiles + token_tile) * kWarp + lane;
}

// The sums of a slice are complete: they are Y if it is the only one. The last row tile may have a row that is not
// there.
template <typename T>
AWQ_DEVICE void StoreSlice(GemmArgs const& args, DecodeSchedule const& schedule, Sums const& sums, Shared scratch,
                           int32_t row, int32_t token_tile, int32_t lane) {
  if (row * kTileN >= args.n) return;
  if (schedule.slices == 1) {
    StoreSums<T>(args, sums, scratch, row, token_tile, lane);
  } else {
    StoreWords(PartialSums(args, schedule, BlockSlice(), row, token_tile, lane), WordsOf(sums));
  }
}

// The part of a layer that a block computes: row tiles from first_row_tile on, of each the K-blocks from first_k_block
// on.
struct Rectangle {
  int32_t first_row_tile, row_tiles, first_k_block, k_blocks;
  uint32_t reciprocal;  // of K-blocks
};
AWQ_DEVICE Rectangle RectangleOf(DecodeSchedule const& schedule, int32_t range, int32_t slice) {
  bool const larger = slice < schedule.k_blocks_of_slice.extra;
  return {schedule.row_tiles_of_range.Begin(range), schedule.row_tiles_of_range.Size(range),
          schedule.k_blocks_of_slice.Begin(slice), schedule.k_blocks_of_slice.Size(slice),
          larger ? schedule.larger_reciprocal : schedule.reciprocal};
}
// How its K-blocks, row tile after row tile, are cut into one segment for each warp.
AWQ_DEVICE Cut SegmentsOf(DecodeSchedule const& schedule, Rectangle const& block) {
  int32_t const total = block.row_tiles * block.k_blocks;
  return {total >> schedule.warp_shift, total & (schedule.warps() - 1)};
}
// position / block.units
AWQ_DEVICE int32_t RowTileOf(Rectangle const& block, int32_t position) {
  return block.k_blocks == 1 ? position : static_cast<int32_t>(MultiplyHigh(position, block.reciprocal));
}

// Shared memory of a block: the rings, sums that could not be stored, X. A segment that ends inside a row tile leaves
// the sums of its last one, its tail, where the ring was. One that begins inside a row tile and completes it keeps
// those sums, its head, until all tails are there.
template <int kTokenTiles>
struct SharedLayout {
  static constexpr int32_t kPackedRows = PackedRows(kTokenTiles), kSums = kPackedRows * kTokenTiles;
  static constexpr int32_t kRingBytes = kDecodeStages * kPackedRows * kStageBytes;
  Shared rings, heads, x;
  AWQ_DEVICE explicit SharedLayout(DecodeSchedule const& schedule)
      : rings(DynamicShared()),
        heads(rings + (kRingBytes << schedule.warp_shift)),
        x(heads + (kSums * kSumsBytes << schedule.warp_shift)) {}
  AWQ_DEVICE Shared Ring(int32_t warp) const { return rings + warp * kRingBytes; }
  AWQ_DEVICE Shared Head(int32_t warp, int32_t i) const { return heads + (warp * kSums + i) * kSumsBytes; }
  AWQ_DEVICE Shared Tail(int32_t warp, int32_t i) const { return Ring(warp) + i * kSumsBytes; }
  AWQ_DEVICE Shared Scratch(int32_t warp) const { return Tail(warp, kMaxSums); }  // once the ring is free
};

// A warp that has completed a row tile which began in segments before adds their tails, nearest first, and stores it.
template <typename T, int kTokenTiles>
AWQ_DEVICE void AddTails(GemmArgs const& args, DecodeSchedule const& schedule) {
  int32_t const warp = ThreadIndex() / kWarp, lane = ThreadIndex() % kWarp;
  Rectangle const block = RectangleOf(schedule, Opaque(BlockRange()), Opaque(BlockSlice()));
  Cut const segments = SegmentsOf(schedule, block);
  int32_t const begin = segments.Begin(warp), row_tile = RowTileOf(block, begin),
                row_tile_begin = row_tile * block.k_blocks;
  if (begin == row_tile_begin || segments.Begin(warp + 1) < row_tile_begin + block.k_blocks) return;
  SharedLayout<kTokenTiles> const shared(schedule);
  int32_t const first_row = (block.first_row_tile + row_tile) * PackedRows(kTokenTiles);
#pragma unroll 1
  for (int32_t i = 0; i < shared.kSums; ++i) {
    Sums sums = {};
    Add(sums, LoadShared(shared.Head(warp, i) + lane * 16));
#pragma unroll 2
    for (int32_t w = warp - 1; segments.Begin(w + 1) > row_tile_begin; --w) {
      Add(sums, LoadShared(shared.Tail(w, i) + lane * 16));
    }
    StoreSlice<T>(args, schedule, sums, shared.Scratch(warp), first_row + i / kTokenTiles, i % kTokenTiles, lane);
  }
}

// The block that is the last one of its range to come here adds the sums of all slices, in their order.
template <typename T, int kTokenTiles>
AWQ_DEVICE void AddSlices(GemmArgs const& args, DecodeSchedule const& schedule) {
  AWQ_SHARED uint32_t arrived;
  int32_t const warp = ThreadIndex() / kWarp, lane = ThreadIndex() % kWarp, range = BlockRange();
  SyncThreads();  // all sums of this block are in the workspace
  if (ThreadIndex() == 0) arrived = CountArrival(args.counters + range);
  SyncThreads();
  if (arrived + 1 != static_cast<uint32_t>(schedule.slices)) return;
  if (ThreadIndex() == 0) Store32(args.counters + range, 0);  // for the next call
  int32_t const first_row = schedule.row_tiles_of_range.Begin(range) * PackedRows(kTokenTiles);
  int32_t const rows = schedule.row_tiles_of_range.Size(range) * PackedRows(kTokenTiles);
#pragma unroll 1
  for (int32_t item = warp; item < rows * kTokenTiles; item += schedule.warps()) {
    int32_t const row = first_row + item / kTokenTiles, token_tile = item % kTokenTiles;
    if (row * kTileN >= args.n) break;
    Sums sums = {};
#pragma unroll 4
    for (int32_t i = 0; i < schedule.slices; ++i)
      Add(sums, LoadWords(PartialSums(args, schedule, i, row, token_tile, lane)));
    StoreSums<T>(args, sums, SharedLayout<kTokenTiles>(schedule).Scratch(warp), row, token_tile, lane);
  }
}

// The work of a warp: `count` consecutive K-blocks; the first is K-block `from` (in the rectangle) of `row_tile`.
template <int kPackedRows>
struct Segment {
  Fetch<kPackedRows> fetch;
  Shared ring;
  int32_t count, row_tile, from, k_blocks;  // K-blocks: of a row tile in the rectangle

  // Of the ring, for the K-block after which `left` are left: counted down, so that one register does for both.
  AWQ_DEVICE Shared Stage(int32_t left) const { return ring + left % kDecodeStages * (kPackedRows * kStageBytes); }
};

// All K-blocks of a segment; what is left in `acc` is its tail. kDecodeStages - 1 K-blocks are in flight. x_rows: where
// this lane reads X for ldmatrix, at the first K-block's columns.
template <typename T, int32_t kPartShift, int kTokenTiles>
AWQ_DEVICE void StreamKBlocks(Sums* acc, GemmArgs const& args, DecodeSchedule const& schedule,
                              Segment<PackedRows(kTokenTiles)>& segment, Shared (&x_rows)[kTokenTiles], int32_t lane) {
  bool from_start = segment.from == 0;  // of the row tile
  int32_t k_block = segment.from, row_tile = segment.row_tile;
#pragma unroll 1
  for (uint32_t left = segment.count; left > 0; --left) {
    WaitCopies<kDecodeStages - 2>();
    SyncWarp();  // every lane's copies have arrived, and every lane has used the stage that is filled next
    if (left >= kDecodeStages) {
      segment.fetch.Fill(args, schedule, segment.Stage(left - (kDecodeStages - 1)) + lane * 16, segment.k_blocks, lane);
    }
    CommitCopies();
    Shared const stage = segment.Stage(left);
    MultiplyKBlock<T, kPartShift>(acc, stage, x_rows, lane);
    ++k_block;
#pragma unroll
    for (int32_t j = 0; j < kTokenTiles; ++j) x_rows[j] += kBlockK * 2;
    if (k_block < segment.k_blocks) continue;
    // the row tile is complete: stored here, or, if it began in segments before, by AddTails
#pragma unroll
    for (int32_t i = 0; i < PackedRows(kTokenTiles) * kTokenTiles; ++i) {
      if (from_start) {
        int32_t const row = row_tile * PackedRows(kTokenTiles) + i / kTokenTiles;
        StoreSlice<T>(args, schedule, acc[i], stage, row, i % kTokenTiles, lane);
      } else {
        StoreShared(SharedLayout<kTokenTiles>(schedule).Head(ThreadIndex() / kWarp, i) + lane * 16, WordsOf(acc[i]));
      }
      acc[i] = {};
    }
#pragma unroll
    for (int32_t j = 0; j < kTokenTiles; ++j) x_rows[j] -= segment.k_blocks * (kBlockK * 2);
    k_block = 0, ++row_tile, from_start = true;
  }
}

template <typename T, int kTokenTiles>
AWQ_KERNEL(kDecodeMaxWarps* kWarp / PackedRows(kTokenTiles), kTokenTiles == 1 ? 2 : 1)
DecodeKernel(GemmArgs const args, DecodeSchedule const schedule) {
  int32_t const warp = ThreadIndex() / kWarp, lane = ThreadIndex() % kWarp;
  Rectangle const block = RectangleOf(schedule, BlockRange(), BlockSlice());
  Cut const segments = SegmentsOf(schedule, block);
  constexpr int32_t kPackedRows = PackedRows(kTokenTiles);
  SharedLayout<kTokenTiles> const shared(schedule);
  int32_t const begin = segments.Begin(warp), row_tiles = RowTileOf(block, begin),
                from = begin - row_tiles * block.k_blocks;
  int32_t const row_tile = block.first_row_tile + row_tiles;
  Segment<kPackedRows> segment{Fetch<kPackedRows>(args, schedule, row_tile, block.first_k_block + from,
                                                  block.first_k_block + block.k_blocks, lane),
                               shared.Ring(warp),
                               Opaque(segments.Size(warp)),
                               row_tile,
                               from,
                               Opaque(block.k_blocks)};
  PrepareRing<kPackedRows>(args, segment.ring, lane);
#pragma unroll
  for (int32_t i = 0; i < kDecodeStages - 1; ++i) {
    Shared const lane_stage = segment.Stage(segment.count + kDecodeStages - i) + lane * 16;
    if (i < segment.count) segment.fetch.Fill(args, schedule, lane_stage, segment.k_blocks, lane);
    CommitCopies();
  }
  LetNextKernelStart();
  WaitForPreviousKernel();
  StageTokens<T>(args, schedule, shared.x, block.first_k_block * kBlockK, block.k_blocks);
  SyncThreads();

  // ldmatrix: lanes 8i .. 8i + 7 read 8 columns of 8 tokens each, 8i columns on; missing tokens repeat the last one
  Shared x_rows[kTokenTiles];
#pragma unroll
  for (int32_t j = 0; j < kTokenTiles; ++j) {
    int32_t const token = j * kTokenTile + lane % 8;
    x_rows[j] = shared.x + (token < args.tokens ? token : args.tokens - 1) * schedule.row_bytes + lane / 8 * 16 +
                from * (kBlockK * 2);
  }
  Sums acc[shared.kSums] = {};
  if (schedule.part_shift == 2) {
    StreamKBlocks<T, 2>(acc, args, schedule, segment, x_rows, lane);
  } else if (schedule.part_shift == 1) {
    StreamKBlocks<T, 1>(acc, args, schedule, segment, x_rows, lane);
  } else {
    StreamKBlocks<T, 0>(acc, args, schedule, segment, x_rows, lane);
  }
  SyncWarp();  // no lane needs the ring any more
#pragma unroll
  for (int32_t i = 0; i < shared.kSums; ++i) {
    StoreShared(SharedLayout<kTokenTiles>(schedule).Tail(ThreadIndex() / kWarp, i) + lane * 16, WordsOf(acc[i]));
  }
  SyncThreads();
  AddTails<T, kTokenTiles>(args, schedule);
  if (schedule.slices > 1) AddSlices<T, kTokenTiles>(args, schedule);
}

using DecodeFunction = void (*)(GemmArgs, DecodeSchedule);

// The kernel for tokens of up to 8 * token_tiles.
template <typename T>
DecodeFunction DecodeKernelFor(int32_t token_tiles) {
  switch (token_tiles) {
    case 1:
      return DecodeKernel<T, 1>;
    case 2:
      return DecodeKernel<T, 2>;
    case 3:
      return DecodeKernel<T, 3>;
    default:
      return DecodeKernel<T, kDecodeMaxTokenTiles>;
  }
}
inline DecodeFunction DecodeKernelFor(ActivationType type, int32_t token_tiles) {
  return type == ActivationType::kHalf ? DecodeKernelFor<Half>(token_tiles) : DecodeKernelFor<Bfloat16>(token_tiles);
}

}  // namespace awq_trt
