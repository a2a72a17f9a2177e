// Sums that say how far a quantized tensor is from its original: cosine distance, mean magnitude error.
//
// Purpose  what bit-widths and learning-rate factors are decided by, at refreshes
// Shapes   x (rows, columns) float32, bfloat16 or float16, contiguous; planes (planes, rows, pitch) int8, scales
// (planes, maps)
//          float32, zeros (planes, maps) int32 or null; sums (blocks, 5) float64: x x, x e, e e, |x|, |x + e| with e
//          the error
// Tile     four columns a thread, see columns.cuh; blocks write rows of their own, so that adding them up has one order
// Entry    error_sums_f32, error_sums_bf16, error_sums_f16
// Twin     tests/test_kernels_reductions.py: equal to a named tolerance, as float64 sums in another order are
#include "columns.cuh"

constexpr int SUMS = 5;

struct ErrorSums {
  Columns matrix;
  int plane_count, pitch;
  i64 plane_bytes;
  const void* x;
  const i8* planes;
  const float* scales;
  const int* zeros;  // null: symmetric range
  double* sums;
};

__device__ __forceinline__ double dequantized(const ErrorSums& e, i64 offset, int map) {
  double total = 0.0;
  for (int p = 0; p < e.plane_count; p++) {
    const int zero = e.zeros ? e.zeros[p * e.matrix.maps + map] : 0;
    const int digit = e.planes[p * e.plane_bytes + offset] - zero;
    total += static_cast<double>(digit) * e.scales[p * e.matrix.maps + map];
  }
  return static_cast<float>(total);  // numerics.dequantize: summed in float64, a float32 in the end
}

template <class Format>
__device__ __forceinline__ void error_sums(const ErrorSums& e) {
  const Columns& matrix = e.matrix;
  double sums[SUMS] = {};
  walk_down<Format>(matrix, e.x, [&](int row, const float (&values)[4], int count) {
    const int column = matrix.first_column();
    for (int i = 0; i < count; i++) {
      const int map = matrix.map_axis == PER_ROW      ? row / matrix.rows_per_map
                      : matrix.map_axis == PER_COLUMN ? column + i
                                                      : 0;
      const double x = values[i], made = dequantized(e, static_cast<i64>(row) * e.pitch + column + i, map);
      const double error = made - x;
      sums[0] += x * x;
      sums[1] += x * error;
      sums[2] += error * error;
      sums[3] += fabs(x);
      sums[4] += fabs(made);
    }
  });

  DYNAMIC_SHARED(shared);
  double* warps = reinterpret_cast<double*>(shared);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
#pragma unroll
  for (int s = 0; s < SUMS; s++) {
    for (int mask = 16; mask; mask /= 2) sums[s] += __shfl_xor_sync(~0u, sums[s], mask);
    if (thread % 32 == 0) warps[thread / 32 * SUMS + s] = sums[s];
  }
  __syncthreads();
  if (thread >= SUMS) return;
  double total = 0.0;
  for (int w = 0; w < threads / 32; w++) total += warps[w * SUMS + thread];
  e.sums[(static_cast<i64>(blockIdx.y) * gridDim.x + blockIdx.x) * SUMS + thread] = total;
}

extern "C" __global__ void __launch_bounds__(256) error_sums_f32(const ErrorSums e) { error_sums<F32>(e); }
extern "C" __global__ void __launch_bounds__(256) error_sums_bf16(const ErrorSums e) { error_sums<BF16>(e); }
extern "C" __global__ void __launch_bounds__(256) error_sums_f16(const ErrorSums e) { error_sums<F16>(e); }
