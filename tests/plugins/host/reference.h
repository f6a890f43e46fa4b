// Random layers, packed from the drawing in fragments.h (not by the kernels' code), and their product in double.
#pragma once

#include <cstdint>
#include <vector>

#include "numbers.h"
#include "plan/problem.h"

namespace awq_trt {

inline Format const& FormatOf(ActivationType type) {
  return type == ActivationType::kHalf ? kHalfFormat : kBfloat16Format;
}

// A layer with its inputs as the operator takes them.
struct RandomLayer {
  LayerConfig config;
  ActivationType type;
  int32_t tokens;
  std::vector<uint8_t> q;       // [N, K], not packed
  std::vector<uint8_t> zero;    // [N, G], not packed; 8 where the layer has none
  std::vector<uint16_t> scale;  // [N, G], not packed

  std::vector<uint16_t> x;          // [tokens, K]
  std::vector<uint32_t> qweight;    // packed
  std::vector<uint16_t> scales;     // packed
  std::vector<uint8_t> zeros;       // packed, empty where there are none
  std::vector<uint16_t> bias;       // [N] or empty
  std::vector<uint16_t> pre_scale;  // [K] or empty
};

RandomLayer MakeRandomLayer(LayerConfig const& config, ActivationType type, int32_t tokens, uint64_t seed);

// What Y should be, and how far a kernel with fp32 accumulation, and weights rounded to 16 bits or not, may be from it.
struct Expected {
  double value;
  double tolerance;
};
class Reference {
 public:
  explicit Reference(RandomLayer const& layer);
  Expected At(int32_t token, int32_t n) const;

 private:
  RandomLayer const& layer_;
  std::vector<double> x_;  // X * pre_scale, rounded
  std::vector<double> w_;  // [N, K], exact
};

}  // namespace awq_trt
