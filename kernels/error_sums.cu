// Sums that say how far a tensor would be from its original at up to three widths: cosine distance, mean magnitude
// error, saturation.
//
// Purpose  what bit-widths and learning-rate factors are decided by, at refreshes: one read, whatever the widths
// Shapes   x (rows, columns) float32, bfloat16 or float16, contiguous; clip_values (widths, maps), or (widths, 2, maps)
//          with a zero point; sums (blocks, widths, 6) float64: x x, x e, e e, |x|, |x + e|, beyond, with e the error
//          of rounding to nearest and "beyond" the number of elements outside the range
// Tile     four columns a thread, see columns.cuh; blocks write rows of their own, so that adding them up has one order
// Entry    error_sums_f32, error_sums_bf16, error_sums_f16
// Twin     lightning_int8.measures.quantization_error: equal to a named tolerance, as float64 sums in another order are
#include "columns.cuh"
#include "width.cuh"

constexpr int SUMS = 6, MOST_WIDTHS = 3;

struct ErrorSums {
  Columns matrix;
  int affine, count;  // of widths
  Width widths[MOST_WIDTHS];
  const void* x;
  const float* clip_values;
  double* sums;
};

__device__ __forceinline__ RangeMap range_map(const ErrorSums& e, int width, int map) {
  const float* clip_value = e.clip_values + width * (e.affine ? 2 : 1) * e.matrix.maps + map;
  return RangeMap(clip_value, e.affine ? clip_value + e.matrix.maps : nullptr, e.widths[width].largest());
}

__device__ __forceinline__ void add(double (&sums)[SUMS], float value, const Width& width, const RangeMap& map) {
  const int integer = width.integer_of(value, map, [](float steps) { return rintf(steps); });
  const double x = value, made = width.value_of(integer, map), error = made - x;
  sums[0] += x * x;
  sums[1] += x * error;
  sums[2] += error * error;
  sums[3] += fabs(x);
  sums[4] += fabs(made);
  sums[5] += value < map.low || value > map.high ? 1.0 : 0.0;
}

template <class Format>
__device__ __forceinline__ void error_sums(const ErrorSums& e) {
  const Columns& matrix = e.matrix;
  double sums[MOST_WIDTHS][SUMS] = {};
  walk_down<Format>(matrix, e.x, [&](int row, const float (&values)[4], int count) {
#pragma unroll
    for (int w = 0; w < MOST_WIDTHS; w++) {
      if (w >= e.count || count < 1) continue;
      RangeMap map = range_map(e, w, matrix.map_axis == PER_ROW ? row / matrix.rows_per_map : 0);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (i >= count) continue;
        if (matrix.map_axis == PER_COLUMN) map = range_map(e, w, matrix.first_column() + i);
        add(sums[w], values[i], e.widths[w], map);
      }
    }
  });

  DYNAMIC_SHARED(shared);
  double* warps = reinterpret_cast<double*>(shared);  // (warps, MOST_WIDTHS * SUMS)
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
#pragma unroll
  for (int s = 0; s < MOST_WIDTHS * SUMS; s++) {
    double& sum = sums[s / SUMS][s % SUMS];
    for (int mask = 16; mask; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
    if (thread % 32 == 0) warps[thread / 32 * MOST_WIDTHS * SUMS + s] = sum;
  }
  __syncthreads();
  const int wanted = e.count * SUMS;
  if (thread >= wanted) return;
  double total = 0.0;
  for (int w = 0; w < threads / 32; w++) total += warps[w * MOST_WIDTHS * SUMS + thread];
  e.sums[(static_cast<i64>(blockIdx.y) * gridDim.x + blockIdx.x) * wanted + thread] = total;
}

extern "C" __global__ void __launch_bounds__(256) error_sums_f32(const ErrorSums e) { error_sums<F32>(e); }
extern "C" __global__ void __launch_bounds__(256) error_sums_bf16(const ErrorSums e) { error_sums<BF16>(e); }
extern "C" __global__ void __launch_bounds__(256) error_sums_f16(const ErrorSums e) { error_sums<F16>(e); }
