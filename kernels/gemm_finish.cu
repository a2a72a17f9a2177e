// The end of a matrix product whose sums were split: slabs added, zero points off, scales on.
//
// Purpose  second pass after gemm_*.cu where the summed index was cut into slices: long sums, small results
// Shapes   slabs (slabs, m, n rounded up to 4) int32 -> out (m, n)
// Tile     four neighbouring columns a thread
// Entry    gemm_finish
// Twin     lightning_int8.backends.reference, as gemm_*.cu
#include "gemm_parameters.cuh"

extern "C" __global__ void __launch_bounds__(256) gemm_finish(const Gemm g) {
  finish_split(g.split, g.epilogue, [&](int row, int column) { return matrix_place(row, column, g.n); });
}
