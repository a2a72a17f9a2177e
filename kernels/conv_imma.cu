// Convolutions and their derivatives on tensor cores: int8 x int8 -> int32 -> float, scales in the same pass.
//
// Purpose  output, grad_input and grad_weight of a convolution of one to three dimensions on sm_75 and newer: any
// stride,
//          padding and dilation; groups whose channels are multiples of 16, else conv_direct.cu. grad_input is launched
//          once for each residue of the stride and touches the taps that reach it, nothing else
// Shapes   x (N, D, H, W, C), gradient (N, D', H', W', Co), weight (Co, taps, C / groups), channels last and a multiple
// of
//          16 bytes apart, padding 0
// Tile     as in gemm_imma.cu; rows are positions (output, grad_input) or output channels (grad_weight)
// Entry    conv_output, conv_grad_input, conv_grad_weight
// Twin     lightning_int8.backends.reference, sums and one-plane results bit for bit
#include "imma.cuh"
// The family first: the others are written in its terms.
#include "conv.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) conv_output(const Conv c) { convolve_output(c); }
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) conv_grad_input(const Conv c) {
  convolve_grad_input(c);
}
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) conv_grad_weight(const Conv c) {
  convolve_grad_weight(c);
}
