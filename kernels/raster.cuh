// Which tile of the result a block computes, over which slice of the sums; included after a family, which has sizes.
#pragma once
#include "split_sums.cuh"

// Blocks that run at the same time should share operands in the L2 cache: tiles are walked in bands of BAND rows,
// column by column within a band, so that a wave of blocks covers a near-square of the result.
struct TileOrigin {
  int m, n;

  __device__ __forceinline__ TileOrigin(int rows, int columns) {
    constexpr int BAND = 8;
    const int tiles_m = (rows + BLOCK_M - 1) / BLOCK_M, tiles_n = (columns + BLOCK_N - 1) / BLOCK_N;
    const int in_band = BAND * tiles_n, band = blockIdx.x / in_band, rest = blockIdx.x % in_band;
    const int height = min(BAND, tiles_m - band * BAND);
    m = (band * BAND + rest % height) * BLOCK_M;
    n = rest / height * BLOCK_N;
  }
};

// The part of the summed index that falls to a block; blocks are sliced along y.
struct Slice {
  int index, first_k, last_k;

  __device__ __forceinline__ Slice(const Split& split, int k)
      : index(blockIdx.y), first_k(index * split.depth), last_k(min(k, first_k + split.depth)) {}
  __device__ __forceinline__ int tiles() const { return max(0, last_k - first_k + BLOCK_K - 1) / BLOCK_K; }
};
