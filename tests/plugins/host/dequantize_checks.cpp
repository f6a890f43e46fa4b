#include "dequantize_checks.h"

#include <algorithm>
#include <cstdio>
#include <random>
#include <vector>

#include "kernels/device.h"
#include "plan/kernels.h"
#include "reference.h"

namespace awq_trt {
namespace {

constexpr uint16_t kPoison = 0xffff;
constexpr int64_t kGuard = 64;  // elements around W that must not change

// The weights of a layer, from what was packed.
std::vector<uint16_t> PlainWeights(RandomLayer const& layer) {
  Format const& format = FormatOf(layer.type);
  int32_t const k = layer.config.in_features, group_size = layer.config.group_size;
  std::vector<uint16_t> w;
  w.reserve(layer.q.size());
  for (size_t i = 0; i < layer.q.size(); ++i) {
    size_t const entry = i / k * (k / group_size) + i % k / group_size;
    uint16_t value = Encode(format, (layer.q[i] - layer.zero[entry]) * Decode(format, layer.scale[entry]));
    if (layer.config.has_pre_scale) {
      value = Encode(format, Decode(format, value) * Decode(format, layer.pre_scale[i % k]));
    }
    w.push_back(value);
  }
  return w;
}

GemmArgs ArgsOf(RandomLayer const& layer) {
  GemmArgs args = MakeArgs(layer.config);
  args.qweight = layer.qweight.data();
  args.scales = layer.scales.data();
  args.zeros = layer.config.has_zeros ? layer.zeros.data() : nullptr;
  args.pre_scale = layer.config.has_pre_scale ? layer.pre_scale.data() : nullptr;
  return args;
}

template <typename V>
void Register(std::vector<V> const& v) {
  if (!v.empty()) emulator::RegisterMemory(v.data(), sizeof(V) * v.size(), emulator::Memory::kConstant);
}

// Nothing, or what is wrong with these row tiles of W.
std::string WrongIn(RandomLayer const& layer, std::vector<uint16_t> const& expected, int32_t first_row_tile,
                    int32_t row_tiles) {
  int32_t const n = layer.config.out_features, k = layer.config.in_features;
  int64_t const begin = static_cast<int64_t>(first_row_tile) * kTileN * k;
  int64_t const size = static_cast<int64_t>(std::min(n, (first_row_tile + row_tiles) * kTileN)) * k - begin;
  std::vector<Words> memory((size + 2 * kGuard) / 8);  // 16-byte aligned
  uint16_t* const buffer = reinterpret_cast<uint16_t*>(memory.data());
  std::fill(buffer, buffer + size + 2 * kGuard, kPoison);
  emulator::ForgetMemory();
  Register(layer.qweight), Register(layer.scales), Register(layer.zeros), Register(layer.pre_scale);
  emulator::RegisterMemory(buffer + kGuard, 2 * size, emulator::Memory::kWritable);
  cudaError_t const error =
      LaunchDequantize(ArgsOf(layer), layer.type, first_row_tile, row_tiles, buffer + kGuard, nullptr);
  emulator::ForgetMemory();
  if (error != cudaSuccess) return "error " + std::to_string(error);
  for (int64_t i = 0; i < size; ++i) {
    if (buffer[kGuard + i] == expected[begin + i]) continue;
    char text[160];
    std::snprintf(text, sizeof(text), "W[%d, %d] is %04x, should be %04x", static_cast<int>((begin + i) / k),
                  static_cast<int>((begin + i) % k), buffer[kGuard + i], expected[begin + i]);
    return text;
  }
  return "";
}

void CheckWeights(LayerConfig const& config, ActivationType type, uint64_t seed, Report& report) {
  RandomLayer const layer = MakeRandomLayer(config, type, 0, seed);
  std::vector<uint16_t> const expected = PlainWeights(layer);
  int32_t const all = CeilDiv(config.out_features, kTileN);
  std::string problem = WrongIn(layer, expected, 0, all);
  for (int32_t first : {all / 3, all - 1}) {  // row tiles in the middle, and the last one alone
    if (problem.empty()) problem = WrongIn(layer, expected, first, CeilDiv(all - first, 2));
  }
  char name[160];
  std::snprintf(name, sizeof(name), "weights n=%d k=%d group=%d zeros=%d pre_scale=%d %s", config.out_features,
                config.in_features, config.group_size, config.has_zeros, config.has_pre_scale,
                type == ActivationType::kHalf ? "fp16" : "bf16");
  report.Check(name, problem.empty(), problem.empty() ? "" : "\"problem\": " + Quote(problem));
}

}  // namespace

void CheckDequantize(uint64_t seed, Report& report) {
  // every group size, with and without zeros and pre_scale, tails of N (8 rows) and of K (32 columns), K of one column
  // of tiles and of more than a warp or a block has
  std::vector<LayerConfig> layers{{8, 32, 32, true, false, false},     {24, 96, 32, true, false, true},
                                  {48, 96, 96, false, false, false},   {72, 64, 64, false, false, true},
                                  {136, 192, 64, true, false, false},  {40, 352, 352, true, false, true},
                                  {64, 1024, 128, false, false, true}, {56, 160, 32, false, false, false},
                                  {24, 2944, 128, true, false, true},  {32, 256, 256, true, false, false}};
  std::mt19937_64 random(seed);
  auto below = [&random](int32_t bound) { return static_cast<int32_t>(random() % bound); };
  for (int32_t i = 0; i < 12; ++i) {
    int32_t const group = 32 << below(3), k = group * (1 + below(6));
    bool const row = below(6) == 0;
    layers.push_back({8 * (1 + below(20)), k, row ? k : group, below(2) != 0, false, below(2) != 0});
  }
  for (LayerConfig const& layer : layers) {
    for (ActivationType type : {ActivationType::kHalf, ActivationType::kBfloat16}) {
      CheckWeights(layer, type, ++seed, report);
    }
  }

  RandomLayer const layer = MakeRandomLayer({40, 64, 32, false, false, false}, ActivationType::kHalf, 0, seed);
  std::vector<Words> memory(40 * 64 / 8);
  uint16_t* const w = reinterpret_cast<uint16_t*>(memory.data());
  auto launch = [&](int32_t first, int32_t row_tiles, uint16_t* p) {
    return LaunchDequantize(ArgsOf(layer), layer.type, first, row_tiles, p, nullptr);
  };
  report.Check("weights: only row tiles that exist, into aligned memory",
               launch(0, 4, w) == cudaErrorInvalidValue && launch(2, 2, w) == cudaErrorInvalidValue &&
                   launch(-1, 1, w) == cudaErrorInvalidValue && launch(0, -1, w) == cudaErrorInvalidValue &&
                   launch(0, 1, w + 4) == cudaErrorInvalidValue && launch(0, 1, nullptr) == cudaErrorInvalidValue &&
                   launch(3, 0, w) == cudaSuccess);
}

}  // namespace awq_trt
