// The end of a convolution whose sums were split: slabs added, zero points off, scales on.
//
// Purpose  second pass after conv_*.cu where the summed index was cut into slices: grad_weight above all
// Shapes   slabs (slabs, groups, m, n rounded up to 4) int32 -> the result tensor
// Tile     four neighbouring columns a thread
// Entry    conv_output_finish, conv_grad_input_finish, conv_grad_weight_finish
// Twin     lightning_int8.backends.reference, as conv_*.cu
#include "conv_parameters.cuh"

template <class PlaceOf>
__device__ __forceinline__ void finish(const Conv& c) {
  const PlaceOf place{c};
  finish_split(c.split, c.epilogue, [&](int row, int column) { return place(row / c.m, row % c.m, column); });
}

extern "C" __global__ void __launch_bounds__(256) conv_output_finish(const Conv c) { finish<OutputPlace>(c); }
extern "C" __global__ void __launch_bounds__(256) conv_grad_input_finish(const Conv c) { finish<GradInputPlace>(c); }
extern "C" __global__ void __launch_bounds__(256) conv_grad_weight_finish(const Conv c) { finish<GradWeightPlace>(c); }
