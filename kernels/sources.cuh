// Where the pieces of a matrix operand lie. Rows are `pitch` bytes apart, pitch a multiple of 16, and the bytes between
// the end of a row and the pitch are 0: a piece is there as a whole or not at all, and padding adds nothing to a sum.
//
// A source is one thread's view of an operand: piece(i) is the address of its i-th piece of the current k tile, null
// where there is nothing but zeros; advance() goes to the next k tile. Offsets are 32 bits wide to spare registers, so
// an operand is smaller than 2 GiB.
#pragma once
#include "pieces.cuh"

struct Matrix {
  const i8* data;
  int pitch;
};

// data[row][k]
template <class P>
struct MatrixRows {
  typedef P Pieces;
  static_assert(P::ORDER == K_CONTIGUOUS, "");
  const Matrix& matrix;  // of the launch parameters: a reference costs no register
  int offset, rows_left, k_left;

  __device__ MatrixRows(const Matrix& m, int rows, int first_row, int first_k, int last_k)
      : matrix(m),
        offset((first_row + P::first_row()) * m.pitch + first_k + P::first_k()),
        rows_left(rows - first_row - P::first_row()),
        k_left(last_k - first_k - P::first_k()) {}

  __device__ __forceinline__ const i8* piece(int i) const {
    const bool there = P::distance(i) < rows_left && k_left > 0;
    return there ? matrix.data + (offset + P::distance(i) * matrix.pitch) : nullptr;
  }
  __device__ __forceinline__ void advance() {
    offset += P::DEPTH;
    k_left -= P::DEPTH;
  }
};

// data[k][row]
template <class P>
struct MatrixLines {
  typedef P Pieces;
  static_assert(P::ORDER == ROW_CONTIGUOUS, "");
  const Matrix& matrix;
  int offset;
  int k_left;  // none for a piece beyond the last row

  __device__ MatrixLines(const Matrix& m, int rows, int first_row, int first_k, int last_k)
      : matrix(m),
        offset((first_k + P::first_k()) * m.pitch + first_row + P::first_row()),
        k_left(first_row + P::first_row() < rows ? last_k - first_k - P::first_k() : 0) {}

  __device__ __forceinline__ const i8* piece(int i) const {
    const bool there = P::distance(i) < k_left;
    return there ? matrix.data + (offset + P::distance(i) * matrix.pitch) : nullptr;
  }
  __device__ __forceinline__ void advance() {
    offset += P::DEPTH * matrix.pitch;
    k_left -= P::DEPTH;
  }
};
