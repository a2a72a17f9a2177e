// float32, bfloat16 and float16 in memory, float32 in registers; rounding to nearest, ties to even.
#pragma once
#include "primitives.cuh"

struct F32 {
  typedef float Stored;
  static __device__ __forceinline__ float load(Stored bits) { return bits; }
  static __device__ __forceinline__ Stored store(float value) { return value; }
};

struct F16 {
  typedef u16 Stored;
  static __device__ __forceinline__ float load(Stored bits) { return f16_to_f32(bits); }
  static __device__ __forceinline__ Stored store(float value) { return f32_to_f16(value); }
};

struct BF16 {
  typedef u16 Stored;
  static __device__ __forceinline__ float load(Stored bits) { return __uint_as_float(static_cast<u32>(bits) << 16); }
  // By integer arithmetic: the instruction exists from sm_80 on only.
  static __device__ __forceinline__ Stored store(float value) {
    const u32 bits = __float_as_uint(value);
    if (value != value) return static_cast<Stored>(bits >> 16 | 0x40);  // a NaN stays one whatever its payload
    return static_cast<Stored>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
};

// `count` (1 to 4) neighbouring elements; four at once where the address allows it.
template <class Format>
__device__ __forceinline__ void load_four(float (&values)[4], const typename Format::Stored* at, int count) {
  typedef typename Format::Stored Stored;
  struct __align__(4 * sizeof(Stored)) Four {
    Stored items[4];
  };
  if (count == 4 && reinterpret_cast<u64>(at) % sizeof(Four) == 0) {
    const Four four = *reinterpret_cast<const Four*>(at);
#pragma unroll
    for (int i = 0; i < 4; i++) values[i] = Format::load(four.items[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) values[i] = i < count ? Format::load(at[i]) : 0.0f;
  }
}

template <class Format>
__device__ __forceinline__ void store_four(typename Format::Stored* at, const float (&values)[4], int count) {
  typedef typename Format::Stored Stored;
  struct __align__(4 * sizeof(Stored)) Four {
    Stored items[4];
  };
  Four four;
#pragma unroll
  for (int i = 0; i < 4; i++) four.items[i] = Format::store(values[i]);
  if (count == 4 && reinterpret_cast<u64>(at) % sizeof(Four) == 0) {
    *reinterpret_cast<Four*>(at) = four;
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (i < count) at[i] = four.items[i];
  }
}
