// Convolutions and their derivatives by warpgroups of tensor cores: int8 x int8 -> int32 -> float, scales in the same
// pass.
//
// Purpose  as conv_imma.cu, on sm_90a
//
// Shapes   as in conv_imma.cu
//
// Tile     as in gemm_wgmma.cu; rows are positions (output, grad_input) or output channels (grad_weight)
//
// Entry    conv_output, conv_grad_input, conv_grad_weight
//
// Twin     lightning_int8.backends.reference, sums and one-plane results bit for bit
#include "wgmma.cuh"
// The family first: the others are written in its terms.
#include "conv.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) conv_output(const Conv c) { convolve_output(c); }
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) conv_grad_input(const Conv c) {
  convolve_grad_input(c);
}
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) conv_grad_weight(const Conv c) {
  convolve_grad_weight(c);
}
