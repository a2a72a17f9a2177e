// CUDA C++ for g++: qualifiers, vector types and the built-in functions that the kernels use, with the device's
// results.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define threadIdx (emulator::thread->index)
#define blockIdx (emulator::block.index)
#define blockDim (emulator::block.size)
#define gridDim (emulator::block.grid)

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline void __syncthreads() { emulator::barrier_block(); }
inline void __syncwarp() { emulator::barrier_warp(); }
inline void __threadfence() {}

// --- values of other lanes; every kernel calls these with all 32 lanes ---

template <class T>
T shuffle(T value, unsigned from_lane) {
  static_assert(sizeof(T) <= 8);
  uint64_t word = 0;
  memcpy(&word, &value, sizeof value);
  const uint64_t answer = emulator::exchange(&word, 1)[from_lane % 32][0];
  memcpy(&value, &answer, sizeof value);
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned mask) {
  return shuffle(value, emulator::thread->lane ^ mask);
}
inline int __any_sync(unsigned, int predicate) {
  const uint64_t word = predicate != 0;
  const emulator::Posted* all = emulator::exchange(&word, 1);
  return std::any_of(all, all + 32, [](const emulator::Posted& posted) { return posted[0]; });
}

// --- atomics: ThreadSanitizer knows these builtins ---

inline int atomicAdd(int* at, int value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned* at, unsigned value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }
inline unsigned atomicMax(unsigned* at, unsigned value) {
  unsigned old = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange_n(at, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

// --- arithmetic; g++ gets -ffp-contract=off, so these round where the device rounds ---

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline float __ll2float_rn(long long a) { return static_cast<float>(a); }
inline int __float2int_rn(float a) { return static_cast<int>(nearbyintf(a)); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<uint64_t>(a) * b >> 32; }
inline int __clz(int a) { return a ? __builtin_clz(a) : 32; }
inline int min(int a, int b) { return std::min(a, b); }
inline int max(int a, int b) { return std::max(a, b); }

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float a) { return same_bits<unsigned>(a); }
inline float __uint_as_float(unsigned a) { return same_bits<float>(a); }

inline int __dp4a(int a, int b, int sum) {
  unsigned wrapping = sum;
  for (int i = 0; i < 32; i += 8) wrapping += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return wrapping;
}

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned nibble = selector >> 4 * i & 15;
    unsigned byte = bytes >> 8 * (nibble & 7) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;  // replicate the sign
    result |= byte << 8 * i;
  }
  return result;
}
