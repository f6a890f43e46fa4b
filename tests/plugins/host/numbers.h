// fp16 and bf16 on a CPU, from their definitions: used by the emulator and by the reference, not by the kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace awq_trt {

// A 16-bit float: sign, exponent, `mantissa_bits` of mantissa.
struct Format {
  int mantissa_bits;
  int min_exponent;  // of the smallest normal number
  int max_exponent;  // of the largest
};
constexpr Format kHalfFormat{10, -14, 15};
constexpr Format kBfloat16Format{7, -126, 127};

// 2^exponent, of a normal double.
inline double PowerOfTwo(int exponent) {
  uint64_t const bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline double Decode(Format const& f, uint16_t bits) {
  int const exponent_bits = 15 - f.mantissa_bits;
  int const exponent = bits >> f.mantissa_bits & ((1 << exponent_bits) - 1);
  int const mantissa = bits & ((1 << f.mantissa_bits) - 1);
  double value;
  if (exponent == (1 << exponent_bits) - 1) {
    value = mantissa == 0 ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  } else if (exponent == 0) {
    value = mantissa * PowerOfTwo(f.min_exponent - f.mantissa_bits);
  } else {
    value = (mantissa + (1 << f.mantissa_bits)) * PowerOfTwo(exponent - 1 + f.min_exponent - f.mantissa_bits);
  }
  return bits >> 15 ? -value : value;
}

// Round to nearest, ties to even; too large becomes infinity.
inline uint16_t Encode(Format const& f, double value) {
  uint16_t const sign = std::signbit(value) ? 0x8000 : 0;
  uint16_t const infinity = static_cast<uint16_t>(((1 << (15 - f.mantissa_bits)) - 1) << f.mantissa_bits);
  if (std::isnan(value)) return sign | infinity | 1;
  if (std::isinf(value)) return sign | infinity;
  if (value == 0) return sign;
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  int exponent = static_cast<int>(bits >> 52 & 0x7ff) - 1023;
  if (exponent < f.min_exponent) exponent = f.min_exponent;
  // in units of the last place: a whole number once rounded, 2^mantissa_bits or more for a normal number
  double const units = std::nearbyint(std::fabs(value) * PowerOfTwo(f.mantissa_bits - exponent));
  if (units * PowerOfTwo(exponent - f.mantissa_bits) >= PowerOfTwo(f.max_exponent) * 2) return sign | infinity;
  int const biased = exponent - f.min_exponent;  // a carry into the exponent is what adding does
  return sign | static_cast<uint16_t>((biased << f.mantissa_bits) + static_cast<int>(units));
}

}  // namespace awq_trt
