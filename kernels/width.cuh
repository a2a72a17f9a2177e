// Widths of an operand: 8, 16 or 24 bits, a plane each, or the flag format; lightning_int8.numerics, bit for bit.
#pragma once
#include "range_map.cuh"

constexpr int FLAG_BITS = 9;          // numerics.FLAG_BITS: a coarse and a fine plane, one of them 0 at each element
constexpr float FLAG_STEPS = 128.0f;  // numerics.FLAG_STEPS: fine steps per coarse step

struct Width {
  int bits;

  __device__ __forceinline__ bool flag_format() const { return bits == FLAG_BITS; }
  __device__ __forceinline__ int planes() const { return flag_format() ? 2 : bits / 8; }
  // Largest integer whose top plane stays within 127.
  __device__ __forceinline__ float largest() const { return bits < 16 ? 127 : bits < 24 ? 127 * 257 : 127 * 65793; }
  // Scale of plane p is the scale of one step times this.
  __device__ __forceinline__ float plane_weight(int p) const {
    if (flag_format()) return p ? 1.0f / FLAG_STEPS : 1.0f;
    return static_cast<float>(1 << 8 * (planes() - 1 - p));
  }

  // `round` turns steps into a whole number. Clamped after that: a range's largest element may be rounded beyond it.
  // In the flag format a multiple of 256 is coarse and the rest is fine, so that the digits are the two planes there
  // too.
  template <class Round>
  __device__ __forceinline__ int integer_of(float value, const RangeMap& map, const Round& round) const {
    float steps = map.steps_of(value);
    const bool fine = flag_format() && fabsf(steps) < 1.0f;
    if (fine) steps = __fmul_rn(steps, FLAG_STEPS);
    const float integer = fminf(fmaxf(__fadd_rn(round(steps), map.zero), -largest()), largest());
    return static_cast<int>(integer) * (flag_format() && !fine ? 256 : 1);
  }

  // The value that an integer stands for: exact in float64, then rounded.
  __device__ __forceinline__ float value_of(int integer, const RangeMap& map) const {
    double steps = static_cast<double>(integer) - map.zero;
    if (flag_format()) steps /= integer % 256 ? static_cast<double>(FLAG_STEPS) : 256.0;
    return static_cast<float>(steps * map.scale);
  }
};

// Splits off the lowest base-256 digit, balanced in [-128, 127].
__device__ __forceinline__ int split_digit(int& integer) {
  const int digit = ((integer + 128) & 255) - 128;
  integer = (integer - digit) >> 8;
  return digit;
}
