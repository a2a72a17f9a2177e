// An operand tile in shared memory as wgmma reads it, how it is described to wgmma, and how it is filled.
#pragma once
#include "byte_transpose.cuh"
#include "hopper_primitives.cuh"
#include "pieces.cuh"

// The 128-byte swizzle of the PTX ISA ("Shared Memory Matrix Layout"), k the fast index: rows of 128 k lie 128 bytes
// apart in groups of eight, and the 16-byte pieces of row r are permuted by r % 8, so that eight rows of a piece meet
// in no bank. int8 has no other order: the transposing modes of wgmma are for 16-bit types.
struct WgmmaTile {
  static constexpr int ROW_BYTES = 128, GROUP_BYTES = 8 * ROW_BYTES;

  // Byte offset of (row, k).
  static __device__ __forceinline__ int offset(int row, int k) {
    return row * ROW_BYTES + (k / 16 ^ row % 8) * 16 + k % 16;
  }

  // Of the operand whose first row is `row`, a multiple of 8, and whose first k is `k`, a multiple of 32. The tile
  // starts at a multiple of GROUP_BYTES, because the hardware permutes by bits of the address; for the same reason the
  // start of a k step is its place in row 0 before the permutation.
  static __device__ __forceinline__ u64 descriptor(const char* tile, int row, int k) {
    constexpr u64 LEADING = 1;                // bits 16-29: not used where rows are 128 bytes
    constexpr u64 STRIDE = GROUP_BYTES / 16;  // bits 32-45: between groups of eight rows, 16-byte units
    constexpr u64 SWIZZLE_128 = 1;            // bits 62-63
    const u64 start = shared_address(tile) + row * ROW_BYTES + k;  // bits 0-13, 16-byte units of 18 bits
    return (start & 0x3FFFF) >> 4 | LEADING << 16 | STRIDE << 32 | SWIZZLE_128 << 62;
  }
};

// One producer's part in filling a tile of ROWS x DEPTH: fetch() the next pieces into registers if they have to go that
// way, then keep() them in the tile.
template <Order ORDER, int ROWS, int DEPTH, int PRODUCERS>
struct WgmmaFill;

// As it lies in memory, by cp.async.
template <int ROWS, int DEPTH, int PRODUCERS>
struct WgmmaFill<K_CONTIGUOUS, ROWS, DEPTH, PRODUCERS> {
  typedef Pieces<K_CONTIGUOUS, ROWS, DEPTH, PRODUCERS> P;

  template <class Source>
  __device__ __forceinline__ void fetch(Source&) {}

  template <class Source>
  __device__ __forceinline__ void keep(char* tile, Source& source) {
#pragma unroll
    for (int i = 0; i < P::COUNT; i++) {
      const i8* piece = source.piece(i);
      copy16_async(tile + WgmmaTile::offset(P::first_row() + P::distance(i), P::first_k()), piece, piece != nullptr);
    }
    source.advance();
  }
};

// Transposed in registers. Two lanes take 32 neighbouring rows, a whole sector of memory, the others of a warp other k:
// the words that they store meet in a bank twice (ROWS 128), not eight times.
template <int ROWS, int DEPTH, int PRODUCERS>
struct WgmmaFill<ROW_CONTIGUOUS, ROWS, DEPTH, PRODUCERS> {
  typedef Quads<ROWS, DEPTH, PRODUCERS, 16, 2> P;
  int4 pieces[P::COUNT];

  template <class Source>
  __device__ __forceinline__ void fetch(Source& source) {
#pragma unroll
    for (int i = 0; i < P::COUNT; i++) pieces[i] = load_piece(source.piece(i));
    source.advance();
  }

  template <class Source>
  __device__ __forceinline__ void keep(char* tile, Source&) {
#pragma unroll
    for (int i = 0; i < P::COUNT; i += 4) {
      const int4* p = pieces + i;
      const int k = P::first_k() + P::distance(i);
      keep_rows(tile, 0, k, transpose_bytes(p[0].x, p[1].x, p[2].x, p[3].x));
      keep_rows(tile, 4, k, transpose_bytes(p[0].y, p[1].y, p[2].y, p[3].y));
      keep_rows(tile, 8, k, transpose_bytes(p[0].z, p[1].z, p[2].z, p[3].z));
      keep_rows(tile, 12, k, transpose_bytes(p[0].w, p[1].w, p[2].w, p[3].w));
    }
  }

 private:
  // Four k of each of four rows.
  static __device__ __forceinline__ void keep_rows(char* tile, int row, int k, const int4& words) {
    const int first = P::first_row() + row;
    store_operand(tile + WgmmaTile::offset(first, k), words.x);
    store_operand(tile + WgmmaTile::offset(first + 1, k), words.y);
    store_operand(tile + WgmmaTile::offset(first + 2, k), words.z);
    store_operand(tile + WgmmaTile::offset(first + 3, k), words.w);
  }
};
