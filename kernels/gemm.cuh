// A matrix product out of its parts: a source for each operand, the tile product of a family, the epilogue.
//
// Blocks: x the tiles of the result, y the slices of the summed index.
#pragma once
#include "gemm_parameters.cuh"
#include "raster.cuh"

template <Order LEFT>
struct MatrixSource;
template <>
struct MatrixSource<K_CONTIGUOUS> {
  template <class P>
  using Of = MatrixRows<P>;
};
template <>
struct MatrixSource<ROW_CONTIGUOUS> {
  template <class P>
  using Of = MatrixLines<P>;
};

template <Order LEFT, Order RIGHT>
__device__ __forceinline__ void gemm(const Gemm& g) {
  DYNAMIC_SHARED(shared);
  typedef TileProduct<LEFT, RIGHT> Product;
  const TileOrigin tile(g.m, g.n);
  const Slice slice(g.split, g.k);

  typedef typename MatrixSource<LEFT>::template Of<typename Product::LeftPieces> Left;
  typedef typename MatrixSource<RIGHT>::template Of<typename Product::RightPieces> Right;
  Left left(g.left, g.m, tile.m, slice.first_k, slice.last_k);
  Right right(g.right, g.n, tile.n, slice.first_k, slice.last_k);
  Product product;
  product.run(left, right, slice.tiles(), shared);

  product.drain(shared, [&](int row, int column, const int* sums) {
    const int m = tile.m + row, n = tile.n + column;
    if (m >= g.m || n >= g.n) return;
    if (g.split.slabs)
      add_to_slab(g.split, slice.index, m, n, sums);
    else
      g.epilogue.store(matrix_place(m, n, g.n), sums);
  });
}
