// The three contractions of a convolution as matrix products with gathered operands (implicit GEMM).
//
// Blocks: x the tiles of one group's result, y the slices of the summed index, z the groups.
#pragma once
#include "conv_sources.cuh"
#include "raster.cuh"

template <class Product, class Left, class Right, class PlaceOf>
__device__ __forceinline__ void convolve(const Conv& c, const TileOrigin& tile, const Slice& slice, Left& left,
                                         Right& right, const PlaceOf& place) {
  DYNAMIC_SHARED(shared);
  Product product;
  product.run(left, right, slice.tiles(), shared);
  product.drain(shared, [&](int row, int column, const int* sums) {
    const int group = blockIdx.z, m = tile.m + row, n = tile.n + column;
    if (m >= c.m || n >= c.n) return;
    if (c.split.slabs)
      add_to_slab(c.split, slice.index, static_cast<i64>(group) * c.m + m, n, sums);
    else
      c.epilogue.store(place(group, m, n), sums);
  });
}

// x through the window . weight rows
__device__ __forceinline__ void convolve_output(const Conv& c) {
  typedef TileProduct<K_CONTIGUOUS, K_CONTIGUOUS> Product;
  const TileOrigin tile(c.m, c.n);
  const Slice slice(c.split, c.k);
  const int group = blockIdx.z, outputs = group * c.n;
  PixelRows<typename Product::LeftPieces> left(c.image, c.k, group, tile.m, slice.first_k);
  MatrixRows<typename Product::RightPieces> right(c.matrix, outputs + c.n, outputs + tile.n, slice.first_k,
                                                  slice.last_k);
  convolve<Product>(c, tile, slice, left, right, OutputPlace{c});
}

// gradient through the taps that reach a residue . weight lines of those taps
__device__ __forceinline__ void convolve_grad_input(const Conv& c) {
  typedef TileProduct<K_CONTIGUOUS, ROW_CONTIGUOUS> Product;
  const TileOrigin tile(c.m, c.n);
  const Slice slice(c.split, c.k);
  const int group = blockIdx.z;
  PixelRows<typename Product::LeftPieces> left(c.image, c.k, group, tile.m, slice.first_k);
  TapLines<typename Product::RightPieces> right(c.weight, group, c.n, tile.n, slice.first_k, slice.last_k);
  convolve<Product>(c, tile, slice, left, right, GradInputPlace{c});
}

// gradient lines . x through the window
__device__ __forceinline__ void convolve_grad_weight(const Conv& c) {
  typedef TileProduct<ROW_CONTIGUOUS, ROW_CONTIGUOUS> Product;
  const TileOrigin tile(c.m, c.n);
  const Slice slice(c.split, c.k);
  const int group = blockIdx.z, outputs = group * c.m;
  MatrixLines<typename Product::LeftPieces> left(c.matrix, outputs + c.m, outputs + tile.m, slice.first_k,
                                                 slice.last_k);
  PixelLines<typename Product::RightPieces> right(c.image, group, c.n, tile.n, slice.first_k, slice.last_k);
  convolve<Product>(c, tile, slice, left, right, GradWeightPlace{c});
}
