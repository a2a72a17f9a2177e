// Matrix products on tensor cores: int8 x int8 -> int32 -> float, scales in the same pass.
//
// Purpose  output (nt), grad_input (nn) and grad_weight (tn) of a linear layer, and of a 1x1 convolution, on sm_75 and
// newer Shapes   out (m, n) = sums over k; nt: left (m, k), right (n, k); nn: left (m, k), right (k, n); tn: left (k,
// m),
//          right (k, n); int8, rows a multiple of 16 bytes apart, padding 0; no transposed copy of anything
// Tile     BLOCK_M x BLOCK_N x 64 a block, WARP_M x WARP_N a warp; families.py chooses by architecture and shape
// Entry    gemm_nt, gemm_nn, gemm_tn
// Twin     lightning_int8.backends.reference, sums and one-plane results bit for bit
#include "imma.cuh"
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
