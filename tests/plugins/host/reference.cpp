#include "reference.h"

#include <cmath>
#include <random>

namespace awq_trt {

RandomLayer MakeRandomLayer(LayerConfig const& config, ActivationType type, int32_t tokens, uint64_t seed) {
  int32_t const n = config.out_features, k = config.in_features, groups = k / config.group_size;
  int32_t const tiles_n = (n + 15) / 16, tiles_k = (k + 63) / 64;
  Format const& format = FormatOf(type);
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> uniform(0.5, 2.0);

  RandomLayer layer{config, type, tokens, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  layer.q.resize(static_cast<size_t>(n) * k);
  layer.zero.assign(static_cast<size_t>(n) * groups, 8);
  layer.scale.resize(static_cast<size_t>(n) * groups);
  layer.x.resize(static_cast<size_t>(tokens) * k);
  for (uint8_t& q : layer.q) q = random() & 15;
  if (config.has_zeros) {
    for (uint8_t& zero : layer.zero) zero = random() & 15;
  }
  for (uint16_t& scale : layer.scale) scale = Encode(format, 0.01 * uniform(random));
  for (uint16_t& x : layer.x) x = Encode(format, normal(random));
  if (config.has_bias) {
    for (int32_t i = 0; i < n; ++i) layer.bias.push_back(Encode(format, normal(random)));
  }
  if (config.has_pre_scale) {
    for (int32_t i = 0; i < k; ++i) layer.pre_scale.push_back(Encode(format, uniform(random)));
  }

  layer.qweight.assign(static_cast<size_t>(tiles_n) * tiles_k * 128, 0);
  for (int32_t row = 0; row < n; ++row) {
    for (int32_t column = 0; column < k; ++column) {
      int32_t const tile = row / 16 * tiles_k + column / 64, step = column % 64 / 16;
      int32_t const lane = row % 8 * 4 + column % 8 / 2;
      int32_t const reg = row % 16 / 8 + 2 * (column % 16 / 8), high = column % 2;
      layer.qweight[(static_cast<size_t>(tile) * 32 + lane) * 4 + step] |=
          static_cast<uint32_t>(layer.q[static_cast<size_t>(row) * k + column]) << (4 * reg + 16 * high);
    }
  }
  layer.scales.assign(static_cast<size_t>(tiles_n) * groups * 16, 0);
  if (config.has_zeros) layer.zeros.assign(static_cast<size_t>(tiles_n) * groups * 8, 0);
  for (int32_t row = 0; row < n; ++row) {
    for (int32_t group = 0; group < groups; ++group) {
      size_t const from = static_cast<size_t>(row) * groups + group;
      size_t const entry = (static_cast<size_t>(row / 16) * groups + group) * 8 + row % 8;
      layer.scales[2 * entry + row % 16 / 8] = layer.scale[from];
      if (config.has_zeros) layer.zeros[entry] |= layer.zero[from] << (4 * (row % 16 / 8));
    }
  }
  return layer;
}

Reference::Reference(RandomLayer const& layer) : layer_(layer) {
  Format const& format = FormatOf(layer.type);
  int32_t const k = layer.config.in_features, group_size = layer.config.group_size, groups = k / group_size;
  for (size_t i = 0; i < layer.x.size(); ++i) {
    double const x = Decode(format, layer.x[i]);
    bool const scaled = layer.config.has_pre_scale;
    x_.push_back(scaled ? Decode(format, Encode(format, x * Decode(format, layer.pre_scale[i % k]))) : x);
  }
  for (size_t i = 0; i < layer.q.size(); ++i) {
    size_t const entry = i / k * groups + i % k / group_size;
    double const integer = layer.q[i] - layer.zero[entry];
    w_.push_back(integer * Decode(format, layer.scale[entry]));
  }
}

Expected Reference::At(int32_t token, int32_t n) const {
  Format const& format = FormatOf(layer_.type);
  int32_t const k = layer_.config.in_features;
  double const *x = &x_[static_cast<size_t>(token) * k], *w = &w_[static_cast<size_t>(n) * k];
  double const bias = layer_.config.has_bias ? Decode(format, layer_.bias[n]) : 0.0;
  double sum = bias, magnitude = std::fabs(bias), squares = 0;
  for (int32_t i = 0; i < k; ++i) {
    sum += x[i] * w[i];
    magnitude += std::fabs(x[i] * w[i]);
    squares += x[i] * x[i] * w[i] * w[i];
  }
  // fp32 sums of k / 16 steps, any order, truncation allowed; weights rounded at random, half a unit at most each, so
  // five times the root of the sum of squares is nearly nine deviations; then Y is rounded to nearest once
  double const half_unit = std::ldexp(1.0, -format.mantissa_bits - 1);
  double const accumulation = (k / 16 + 32) * std::ldexp(1.0, -24) * magnitude + 5 * half_unit * std::sqrt(squares);
  double const rounding =
      half_unit * (std::fabs(sum) + accumulation) + std::ldexp(1.0, format.min_exponent - format.mantissa_bits);
  return {sum, accumulation + rounding};
}

}  // namespace awq_trt
