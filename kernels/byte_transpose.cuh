// Bytes of a register tile, rows for columns.
#pragma once
#include "primitives.cuh"

// Four words of four bytes: byte i of word j becomes byte j of word i.
__device__ __forceinline__ int4 transpose_bytes(u32 a, u32 b, u32 c, u32 d) {
  const u32 low_ab = __byte_perm(a, b, 0x5140), low_cd = __byte_perm(c, d, 0x5140);
  const u32 high_ab = __byte_perm(a, b, 0x7362), high_cd = __byte_perm(c, d, 0x7362);
  return make_int4(__byte_perm(low_ab, low_cd, 0x5410), __byte_perm(low_ab, low_cd, 0x7632),
                   __byte_perm(high_ab, high_cd, 0x5410), __byte_perm(high_ab, high_cd, 0x7632));
}
