// Kernels in which a thread keeps four neighbouring columns of a matrix and walks down the rows (kernels/columns.py).
//
// Blocks are blockDim.x threads across and .y down; blockDim.x is a power of two up to 32, so that the threads of a row
// are neighbouring lanes of a warp.
#pragma once
#include "float_formats.cuh"

enum MapAxis { PER_TENSOR, PER_ROW, PER_COLUMN };  // what has a scale, or a statistic, of its own

struct Columns {
  int rows, columns;
  int map_axis, maps;
  int rows_per_map;  // PER_ROW: neighbouring rows that share a map

  __device__ __forceinline__ int first_column() const { return 4 * (blockIdx.x * blockDim.x + threadIdx.x); }
  // How many of the thread's four columns there are; less than 1 in the padding.
  __device__ __forceinline__ int count() const { return min(4, columns - first_column()); }
};

// Calls visit(row, values, count) down the rows of this thread, with count < 1 beyond the last row: every thread of the
// block makes as many calls, so that lanes can exchange values in there.
template <class Format, class Visit>
__device__ __forceinline__ void walk_down(const Columns& c, const void* x, const Visit& visit) {
  const typename Format::Stored* elements = static_cast<const typename Format::Stored*>(x);
  for (int base = blockIdx.y * blockDim.y; base < c.rows; base += gridDim.y * blockDim.y) {
    const int row = base + threadIdx.y, count = row < c.rows ? c.count() : 0;
    float values[4] = {};
    if (count > 0) load_four<Format>(values, elements + static_cast<i64>(row) * c.columns + c.first_column(), count);
    visit(row, values, count);
  }
}
