// The float -> integer map of a clip value: lightning_int8.numerics.affine_map, bit for bit.
#pragma once
#include "primitives.cuh"

constexpr float MIN_CLIP_VALUE = 0x1p-96f;  // numerics.MIN_CLIP_VALUE

struct RangeMap {
  float low, high, inverse, zero, scale;  // scale: NaN where the clip value is not finite

  // `other_side`: where an affine range has the magnitude of its largest value; null for a symmetric range.
  __device__ __forceinline__ RangeMap(const float* clip_value, const float* other_side, float largest) {
    float span, steps;
    if (other_side) {
      low = -*clip_value;
      high = *other_side;
      span = at_least_min(__fsub_rn(high, low));
      steps = 2.0f * largest;
    } else {
      high = at_least_min(*clip_value);
      low = -high;
      span = high;
      steps = largest;
    }
    inverse = __fdiv_rn(steps, span);
    const bool finite = __fsub_rn(span, span) == 0.0f;
    scale = finite ? __fdiv_rn(span, steps) : __uint_as_float(0x7FC00000);
    zero = 0.0f;
    if (other_side) {
      const float unclamped = __fsub_rn(rintf(__fmul_rn(-low, inverse)), largest);
      zero = unclamped == unclamped ? fminf(fmaxf(unclamped, -largest), largest) : 0.0f;
    }
  }

  // clamp(x) in steps; 0 where that is not a number.
  __device__ __forceinline__ float steps_of(float x) const {
    float clamped = x < low ? low : x;
    clamped = clamped > high ? high : clamped;
    const float steps = __fmul_rn(clamped, inverse);
    return steps == steps ? steps : 0.0f;
  }

 private:
  static __device__ __forceinline__ float at_least_min(float v) { return v < MIN_CLIP_VALUE ? MIN_CLIP_VALUE : v; }
};
