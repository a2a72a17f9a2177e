// Random bits for stochastic rounding: lightning_int8/generator.py, bit for bit.
#pragma once
#include "primitives.cuh"

__device__ __forceinline__ u64 splitmix64(u64 value) {
  value += 0x9E3779B97F4A7C15ull;
  value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9ull;
  value = (value ^ value >> 27) * 0x94D049BB133111EBull;
  return value ^ value >> 31;
}

struct RandomBits {
  u32 key0, key1;

  // key: (seed, rank, call), or null where no bits will be drawn
  __device__ explicit RandomBits(const i64* key) : key0(0), key1(0) {
    if (!key) return;
    u64 mixed = splitmix64(key[0]);
    mixed = splitmix64(mixed ^ static_cast<u64>(key[1]));
    mixed = splitmix64(mixed ^ static_cast<u64>(key[2]));
    key0 = static_cast<u32>(mixed);
    key1 = static_cast<u32>(mixed >> 32);
  }

  __device__ __forceinline__ u32 hash(u32 pair) const {
    u32 h = pair ^ key0;
    h ^= h >> 16;
    h *= 0x7FEB352Du;
    h ^= h >> 15;
    h += key1;
    h *= 0x846CA68Bu;
    return h ^ h >> 16;
  }

  // 16 bits each for elements index .. index + 3; a word feeds an even element and the odd one after it.
  __device__ __forceinline__ void four(u32 (&bits)[4], u64 index) const {
    const u32 pair = static_cast<u32>(index >> 1);
    u32 low = hash(pair), high = hash(pair + 1);
    if (index & 1) {
      const u32 last = hash(pair + 2);
      low = low >> 16 | high << 16;
      high = high >> 16 | last << 16;
    }
    bits[0] = low & 0xFFFF;
    bits[1] = low >> 16;
    bits[2] = high & 0xFFFF;
    bits[3] = high >> 16;
  }
};
