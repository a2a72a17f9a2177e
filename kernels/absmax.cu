// Largest magnitudes of a tensor, of its rows or of its columns; of negative and positive elements apart where asked
// for.
//
// Purpose  the clip value of range rules, and the two sides of an affine range
// Shapes   x (rows, columns) float32, bfloat16 or float16, contiguous; out (maps,) or (2, maps) float32, zeroed by the
// caller;
//          NaN where a NaN is
// Tile     four columns a thread, see columns.cuh
// Entry    absmax_f32, absmax_bf16, absmax_f16
// Twin     lightning_int8.numerics.absmax, bit for bit
#include "columns.cuh"

struct AbsMax {
  Columns matrix;
  int side_step;  // distance of out[positive] from out[negative]: 0 where both are one
  const void* x;
  float* out;
};

// Bit patterns of magnitudes are ordered as the magnitudes are, NaN above them all.
struct Sides {
  u32 negative, positive;

  __device__ __forceinline__ void include(float value) {
    const u32 bits = __float_as_uint(value), magnitude = bits & 0x7FFFFFFF;
    const bool nan = magnitude > 0x7F800000;
    if (bits >> 31 || nan) negative = larger(negative, magnitude);
    if (!(bits >> 31) || nan) positive = larger(positive, magnitude);
  }
  // The largest of `lanes` neighbouring lanes, a power of two.
  __device__ __forceinline__ void join_lanes(int lanes) {
    for (int mask = lanes / 2; mask; mask /= 2) {
      negative = larger(negative, __shfl_xor_sync(~0u, negative, mask));
      positive = larger(positive, __shfl_xor_sync(~0u, positive, mask));
    }
  }
  __device__ __forceinline__ void write(const AbsMax& a, int map) const {
    u32* out = reinterpret_cast<u32*>(a.out) + map;
    atomicMax(out, negative);
    atomicMax(out + a.side_step, positive);
  }
  static __device__ __forceinline__ u32 larger(u32 a, u32 b) { return a > b ? a : b; }
};

template <class Format>
__device__ __forceinline__ void absmax(const AbsMax& a) {
  const Columns& matrix = a.matrix;
  Sides columns[4] = {};
  walk_down<Format>(matrix, a.x, [&](int row, const float (&values)[4], int count) {
    Sides of_row = {};
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (i < count) (matrix.map_axis == PER_ROW ? of_row : columns[i]).include(values[i]);
    if (matrix.map_axis != PER_ROW) return;
    of_row.join_lanes(blockDim.x);
    if (threadIdx.x == 0 && row < matrix.rows) of_row.write(a, row / matrix.rows_per_map);
  });
  if (matrix.map_axis == PER_COLUMN) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (i < matrix.count()) columns[i].write(a, matrix.first_column() + i);
  } else if (matrix.map_axis == PER_TENSOR) {
    Sides all = columns[0];
#pragma unroll
    for (int i = 1; i < 4; i++) {
      all.negative = Sides::larger(all.negative, columns[i].negative);
      all.positive = Sides::larger(all.positive, columns[i].positive);
    }
    all.join_lanes(32);
    if ((threadIdx.y * blockDim.x + threadIdx.x) % 32 == 0) all.write(a, 0);
  }
}

extern "C" __global__ void __launch_bounds__(256) absmax_f32(const AbsMax a) { absmax<F32>(a); }
extern "C" __global__ void __launch_bounds__(256) absmax_bf16(const AbsMax a) { absmax<BF16>(a); }
extern "C" __global__ void __launch_bounds__(256) absmax_f16(const AbsMax a) { absmax<F16>(a); }
