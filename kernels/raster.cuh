// Which tile of the result a block computes.
#pragma once
#include "primitives.cuh"

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
