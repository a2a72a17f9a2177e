// Sums of a warp on their way from tensor-core fragments to the result: 16 rows at a time through shared memory, so
// that neighbouring lanes write neighbouring addresses whatever order they were computed in.
#pragma once
#include "primitives.cuh"

template <int COLUMNS>
class WarpSlab {
 public:
  static constexpr int PITCH = COLUMNS + 8;
  static constexpr int BYTES = 16 * PITCH * 4;

  // shared: BYTES for each warp of the block
  __device__ __forceinline__ WarpSlab(char* shared, int warp) : sums(reinterpret_cast<int*>(shared + warp * BYTES)) {}

  __device__ __forceinline__ void put(int row, int column, int sum) { sums[row * PITCH + column] = sum; }

  // Calls store(row, column, sums) for every four neighbouring columns; row and column of the first are given.
  template <class Store>
  __device__ __forceinline__ void drain(int first_row, int first_column, const Store& store) {
    __syncwarp();
#pragma unroll 1
    for (int item = threadIdx.x % 32; item < 16 * COLUMNS / 4; item += 32) {
      const int row = item / (COLUMNS / 4), column = item % (COLUMNS / 4) * 4;
      store(first_row + row, first_column + column, sums + row * PITCH + column);
    }
    __syncwarp();
  }

 private:
  int* sums;
};
