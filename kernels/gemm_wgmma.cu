// Matrix products by warpgroups of tensor cores: int8 x int8 -> int32 -> float, scales in the same pass.
//
// Purpose  output (nt), grad_input (nn) and grad_weight (tn) of a linear layer, and of a 1x1 convolution, on sm_90a
//
// Shapes   as in gemm_imma.cu; an operand whose rows are the fast index is transposed on its way into shared memory
//
// Tile     BLOCK_M x BLOCK_N x 128 a block, half of the rows a warpgroup; variants.py chooses by architecture and shape
//
// Entry    gemm_nt, gemm_nn, gemm_tn
//
// Twin     lightning_int8.backends.reference, sums and one-plane results bit for bit
#include "wgmma.cuh"
// The family first: the others are written in its terms.
#include "gemm.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) gemm_nt(const Gemm g) {
  gemm<K_CONTIGUOUS, K_CONTIGUOUS>(g);
}
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) gemm_nn(const Gemm g) {
  gemm<K_CONTIGUOUS, ROW_CONTIGUOUS>(g);
}
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) gemm_tn(const Gemm g) {
  gemm<ROW_CONTIGUOUS, ROW_CONTIGUOUS>(g);
}
