// How the threads of a block share out the copy of an operand tile: ROWS of the operand by DEPTH of the summed index k.
//
// Operands come in two orders. K_CONTIGUOUS: the summed index is the fast one in memory, a 16-byte piece is one row and
// 16 k. ROW_CONTIGUOUS: the row index is the fast one, a piece is 16 rows and one k. Every class here says which piece
// number i of a thread is; sources.cuh and conv_sources.cuh say where it lies in memory.
#pragma once
#include "primitives.cuh"

enum Order { K_CONTIGUOUS, ROW_CONTIGUOUS };

__device__ __forceinline__ int4 load_piece(const i8* piece) {
  return piece ? *reinterpret_cast<const int4*>(piece) : make_int4(0, 0, 0, 0);
}

template <Order ORDER_, int ROWS_, int DEPTH_, int THREADS>
struct Pieces {
  static constexpr Order ORDER = ORDER_;
  static constexpr int ROWS = ROWS_, DEPTH = DEPTH_;
  static constexpr int ACROSS = (ORDER == K_CONTIGUOUS ? DEPTH : ROWS) / 16;
  static constexpr int STEP = THREADS / ACROSS;  // rows (or k) between a thread's pieces
  static constexpr int COUNT = (ORDER == K_CONTIGUOUS ? ROWS : DEPTH) / STEP;
  static_assert(THREADS % ACROSS == 0 && COUNT * STEP == (ORDER == K_CONTIGUOUS ? ROWS : DEPTH), "uneven shares");

  // Distance of piece i from piece 0: in rows where K_CONTIGUOUS, in k where ROW_CONTIGUOUS.
  static __device__ __forceinline__ constexpr int distance(int i) { return i * STEP; }
  // Row and k of piece 0 within the tile.
  static __device__ __forceinline__ int first_row() {
    return ORDER == K_CONTIGUOUS ? threadIdx.x / ACROSS : threadIdx.x % ACROSS * 16;
  }
  static __device__ __forceinline__ int first_k() {
    return ORDER == K_CONTIGUOUS ? threadIdx.x % ACROSS * 16 : threadIdx.x / ACROSS;
  }
};

// ROW_CONTIGUOUS pieces that go through registers and are transposed there: WIDTH rows at each of four neighbouring k.
// Of the lanes of a warp, runs of NEIGHBOURS take neighbouring rows.
template <int ROWS_, int DEPTH_, int THREADS, int WIDTH, int NEIGHBOURS>
struct Quads {
  static constexpr Order ORDER = ROW_CONTIGUOUS;
  static constexpr int ROWS = ROWS_, DEPTH = DEPTH_;
  static constexpr int ACROSS = ROWS / WIDTH, DOWN = THREADS / ACROSS;
  static constexpr int STEP = 4 * DOWN, ROUNDS = DEPTH / STEP, COUNT = 4 * ROUNDS;
  static_assert(THREADS % ACROSS == 0 && ROUNDS * STEP == DEPTH && ACROSS % NEIGHBOURS == 0, "uneven shares");

  static __device__ __forceinline__ constexpr int distance(int i) { return i / 4 * STEP + i % 4; }
  static __device__ __forceinline__ int first_row() {
    return (threadIdx.x / (NEIGHBOURS * DOWN) * NEIGHBOURS + threadIdx.x % NEIGHBOURS) * WIDTH;
  }
  static __device__ __forceinline__ int first_k() { return threadIdx.x / NEIGHBOURS % DOWN * 4; }
};
