// Sums that several blocks share, each with its slice of the summed index.
//
// Slices add their int32 sums into a slab, atomically: integer sums have no order. A slab takes as many slices as an
// int32 holds for certain; finish_split() adds the slabs in int64 and does what the epilogue does elsewhere.
#pragma once
#include "epilogue.cuh"

struct Split {
  int* slabs;  // (slabs, groups, m, columns), zeroed; null where every block has whole sums
  int depth;   // k of a slice, a multiple of the tile's; the whole length where nothing is split
  int slices_per_slab;
  int count;    // of slabs
  int columns;  // n rounded up to 4
  i64 slab_elements;
};

// row: of the product, over all groups
__device__ __forceinline__ void add_to_slab(const Split& split, int slice, i64 row, int column, const int* sums) {
  int* at = split.slabs + slice / split.slices_per_slab * split.slab_elements + row * split.columns + column;
#pragma unroll
  for (int i = 0; i < 4; i++) atomicAdd(at + i, sums[i]);
}

// One thread for each four columns of each row; place(row, column) says where they belong.
template <class PlaceOf>
__device__ __forceinline__ void finish_split(const Split& split, const Epilogue& epilogue, const PlaceOf& place) {
  const i64 first = 4 * (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x);
  if (first >= split.slab_elements) return;
  i64 sums[4] = {};
  for (int slab = 0; slab < split.count; slab++) {
    const int4 part = *reinterpret_cast<const int4*>(split.slabs + slab * split.slab_elements + first);
    sums[0] += part.x, sums[1] += part.y, sums[2] += part.z, sums[3] += part.w;
  }
  epilogue.store(place(static_cast<int>(first / split.columns), static_cast<int>(first % split.columns)), sums);
}
