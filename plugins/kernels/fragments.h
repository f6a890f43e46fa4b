// The packed layout, and how a lane turns it into the A fragment of mma.m16n8k16. The reference is awq_trt/layout.py.
//
// Weights are the A operand (16 rows: output features n; 16 columns: k), tokens the 8 columns of B. A tile is
// 16 n x 64 k = 512 bytes, one 16-byte load per lane; tiles run along K first.
//
//   qweight[tn, tk, lane, step]   one word: k-step `step` (16 columns) of the tile, as lane `lane` needs it
//                                 g = lane / 4, t = lane % 4, n0 = 16 tn, k0 = 64 tk + 16 step
//
//     bit 31 ........................... 16  15 ............................ 0
//         |  a7  |  a5  |  a3  |  a1  |      |  a6  |  a4  |  a2  |  a0  |
//
//     a0, a1 : row n0+g    columns k0+2t, k0+2t+1        register 0 of the A fragment
//     a2, a3 : row n0+g+8  columns k0+2t, k0+2t+1        register 1
//     a4, a5 : row n0+g    columns k0+2t+8, k0+2t+9      register 2
//     a6, a7 : row n0+g+8  columns k0+2t+8, k0+2t+9      register 3
//
//   scales[tn, group, i, h] = scale of row n0 + i + 8h          a lane's two rows in one 4-byte load, i = lane / 4
//   zeros [tn, group, i]    = zero(n0 + i) | zero(n0 + i + 8) << 4, one byte
//
// B fragment: b0 = columns k0+2t, +1 of token lane / 4; b1 = the same 8 columns on.
// Accumulators: d0, d1 = row n0+g, tokens 2t, 2t+1; d2, d3 = row n0+g+8, the same tokens.
// Padding (rows n >= N, columns k >= K) is q = 0, scale = 0, zero = 0; X is read as 0 for k >= K.
#pragma once

#include "kernels/device.h"
#include "plan/problem.h"

namespace awq_trt {

constexpr int32_t kStepK = 16, kSteps = kTileK / kStepK;

// What one lane holds of a tile of weights. A group covers at least 32 columns, so a tile has at most two.
struct WeightTile {
  Words q;
  uint32_t scales[2];  // [half of the tile]: scale of row g | of row g + 8 << 16
  uint32_t zeros[2];   // [half of the tile]: zero of row g | of row g + 8 << 4
};

AWQ_DEVICE int32_t GroupOf(GemmArgs const& args, int32_t column) {
  int32_t const group = column >> args.group_shift;
  return group < args.groups ? group : args.groups - 1;
}

AWQ_DEVICE WeightTile LoadWeightTile(GemmArgs const& args, int32_t tile_n, int32_t tile_k, int32_t lane) {
  int32_t const k_tiles = CeilDiv(args.k, kTileK);
  WeightTile tile;
  tile.q = LoadStreaming(args.qweight + (static_cast<int64_t>(tile_n) * k_tiles + tile_k) * (kWarp * kSteps) +
                         lane * kSteps);
#pragma unroll
  for (int32_t half = 0; half < 2; ++half) {
    int32_t const group = GroupOf(args, tile_k * kTileK + half * (kTileK / 2));
    int64_t const row = (static_cast<int64_t>(tile_n) * args.groups + group) * 8 + lane / 4;
    tile.scales[half] = Load32(args.scales + 2 * row);
    tile.zeros[half] = args.zeros != nullptr ? Load8(args.zeros + row) : 0x88u;
  }
  return tile;
}

// A pair of equal elements from the low or the high half of a word.
AWQ_DEVICE uint32_t Broadcast(uint32_t pair, int32_t high) {
  uint32_t const one = high != 0 ? pair >> 16 : pair & 0xffffu;
  return one | one << 16;
}

// The A fragment of one k-step as integers: q - zero, exact. `minus_zero` is -(kOffset + zero), see MinusZeros.
template <typename T>
AWQ_DEVICE void IntegerFragment(uint32_t (&a)[4], uint32_t word, uint32_t const (&minus_zero)[2]) {
  if constexpr (T::kMantissaBits >= 8) {  // a nibble at bit 4 still is mantissa: 1024 + 16 q, divided by the same FMA
#pragma unroll
    for (int32_t j = 0; j < 4; j += 2) {
      a[j] = Fma2<T>(AndOr(word, 0x000f000fu, T::kExponent), T::kOne, minus_zero[0]);
      a[j + 1] = Fma2<T>(AndOr(word, 0x00f000f0u, T::kExponent), T::kSixteenth, minus_zero[1]);
      word >>= 8;
    }
  } else {
#pragma unroll
    for (int32_t j = 0; j < 4; ++j) {
      a[j] = Fma2<T>(AndOr(word, 0x000f000fu, T::kExponent), T::kOne, minus_zero[j & 1]);
      word >>= 4;
    }
  }
}

// What IntegerFragment adds for rows g and g + 8; `zeros` holds the zero of row g and, shifted by 4, of row g + 8.
template <typename T>
AWQ_DEVICE void MinusZeros(uint32_t (&minus_zero)[2], uint32_t zeros) {
  uint32_t const both = zeros | zeros << 16;
  minus_zero[0] = AndOr(both, 0x000f000fu, T::kExponent | kSignBits);
  if constexpr (T::kMantissaBits >= 8) {  // -(64 + zero): one in the last place is 1/16
    minus_zero[1] = AndOr(both, 0x00f000f0u, T::kExponentOver16 | kSignBits);
  } else {
    minus_zero[1] = AndOr(both >> 4, 0x000f000fu, T::kExponent | kSignBits);
  }
}

// The A fragment of one k-step: the exact integers times their scale, rounded once.
template <typename T>
AWQ_DEVICE void Dequantize(uint32_t (&a)[4], WeightTile const& tile, int32_t step) {
  int32_t const half = step / 2;
  uint32_t minus_zero[2];
  MinusZeros<T>(minus_zero, tile.zeros[half]);
  IntegerFragment<T>(a, tile.q.w[step], minus_zero);
#pragma unroll
  for (int32_t j = 0; j < 4; ++j) a[j] = Fma2<T>(a[j], Broadcast(tile.scales[half], j & 1), kSignBits);
}

// Where row n goes: the output it belongs to, at token 0, and how far the next token is.
struct Output {
  uint16_t* y;
  int32_t stride;
};
AWQ_DEVICE Output OutputOf(GemmArgs const& args, int32_t n) {
  uint16_t* y = args.y[0];
  int32_t begin = 0, end = args.ends[0];
#pragma unroll
  for (int32_t i = 1; i < kMaxOutputs; ++i) {
    if (n >= args.ends[i - 1]) y = args.y[i], begin = args.ends[i - 1], end = args.ends[i];
  }
  return {y + (n - begin), end - begin};
}

// Columns `column` and the next of pre_scale; 0 beyond the last column.
AWQ_DEVICE uint32_t LoadPreScale(GemmArgs const& args, int32_t column) {
  return column < args.k ? Load32(args.pre_scale + column) : 0u;
}

// X * pre_scale, rounded to the element type.
template <typename T>
AWQ_DEVICE uint32_t Multiply(uint32_t x, uint32_t pre_scale) {
  return Fma2<T>(x, pre_scale, kSignBits);
}

}  // namespace awq_trt
