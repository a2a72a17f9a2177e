// An operand tile in shared memory and the way from there into the registers of mma_m16n8k32.
#pragma once
#include "pieces.cuh"

template <Order ORDER, int ROWS, int DEPTH>
struct ImmaTile {
  static constexpr int BYTES = ROWS * DEPTH;
  static_assert(DEPTH == 64 && (ROWS == 64 || ROWS % 128 == 0), "the swizzles below are for these");

  // Byte offset of the piece at (row, k). Pieces are permuted within lines of 128 bytes, all 32 banks, so that the
  // eight rows that ldmatrix reads at once never meet in a bank.
  static __device__ __forceinline__ int offset(int row, int k) {
    if (ORDER == K_CONTIGUOUS) {  // two rows a line
      const int piece = k / 16;
      return row / 2 * 128 + row % 2 * 64 + (piece ^ row / 2 % 4) * 16;
    }
    const int piece = row / 16;
    if (ROWS == 64) return k / 2 * 128 + k % 2 * 64 + (piece ^ k / 4 % 4) * 16;  // two k a line
    return k * ROWS + piece / 8 * 128 + (piece % 8 ^ (k & 1 | k >> 1 & 6)) * 16;
  }

  // 16 rows x 32 k into the four registers of the product's left operand. In mma's own order register 0 is row g
  // (g = lane / 4) at the lower 16 k, 1 row g + 8, 2 and 3 the same at the upper 16 k.
  //
  // ROW_CONTIGUOUS: ldmatrix transposes pairs of bytes, so a lane gets two neighbouring rows at two k; a byte
  // permutation of two such registers gives four k of row 2g and of row 2g + 1. Rows thus arrive as 2g, 2g + 1 instead
  // of g, g + 8, and row_of() undoes it when the sums are written. The k of ldmatrix's rows are chosen so that k is in
  // order.
  static __device__ __forceinline__ void load_left(u32 (&fragment)[4], const char* tile, int row, int k, int lane) {
    if (ORDER == K_CONTIGUOUS) {
      load_matrices<false>(fragment, tile + offset(row + lane % 16, k + lane / 16 * 16));
      return;
    }
    const int i = lane % 8, matrix = lane / 8;
    u32 pairs[4];
    load_matrices<true>(pairs, tile + offset(row, k + i / 2 * 4 + i % 2 + matrix % 2 * 2 + matrix / 2 * 16));
    fragment[0] = __byte_perm(pairs[0], pairs[1], 0x6420);
    fragment[1] = __byte_perm(pairs[0], pairs[1], 0x7531);
    fragment[2] = __byte_perm(pairs[2], pairs[3], 0x6420);
    fragment[3] = __byte_perm(pairs[2], pairs[3], 0x7531);
  }

  // The same 16 rows as two right operands of 8 rows, {lower, upper} k each. The two registers of an operand must be
  // neighbours, or the assembler copies them: hence another order of the matrices than on the left.
  static __device__ __forceinline__ void load_right(u32 (&first)[2], u32 (&second)[2], const char* tile, int row, int k,
                                                    int lane) {
    u32 f[4];
    if (ORDER == K_CONTIGUOUS) {
      load_matrices<false>(f, tile + offset(row + lane % 8 + lane / 16 * 8, k + lane / 8 % 2 * 16));
      first[0] = f[0], first[1] = f[1], second[0] = f[2], second[1] = f[3];
    } else {
      load_left(f, tile, row, k, lane);
      first[0] = f[0], first[1] = f[2], second[0] = f[1], second[1] = f[3];
    }
  }

  // Row, of the 16 that load_left took, of a sum's upper (half 0) or lower (half 1) element.
  static __device__ __forceinline__ int row_of(int lane, int half) {
    return ORDER == K_CONTIGUOUS ? lane / 4 + 8 * half : lane / 4 * 2 + half;
  }
  // Row, of the 16 that load_right took, of element `e` of a sum whose operand was first (0) or second (1).
  static __device__ __forceinline__ int column_of(int lane, int operand, int e) {
    return ORDER == K_CONTIGUOUS ? operand * 8 + lane % 4 * 2 + e : lane % 4 * 4 + e * 2 + operand;
  }
};
