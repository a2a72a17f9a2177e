// Quantize: float (rows, columns) -> int8 planes, their scales and zero points, in one read.
//
// Purpose  planes of one operand of a contraction, from a clip value and a random key that stay on the device
// Shapes   x (rows, columns) float32, bfloat16 or float16, contiguous; planes (planes, rows, pitch) int8, pitch a
//          multiple of 16, the bytes behind `columns` set to 0; scales (planes, maps) float32, zeroed by the caller; zeros
//          likewise int32 or null
// Tile     a thread keeps four neighbouring columns and walks down the rows; blockDim.x threads across, .y down
// Entry    quantize_f32, quantize_bf16, quantize_f16
// Twin     lightning_int8.numerics.quantize, bit for bit
#include "columns.cuh"
#include "random_bits.cuh"
#include "width.cuh"

struct Quantize {
  Columns matrix;
  int pitch;
  Width width;
  const void* x;
  const float* clip_values;  // (maps,), or (2, maps) with a zero point
  const i64* key;            // (seed, rank, call); null rounds to nearest
  i8* planes;
  float* scales;
  int* zeros;  // null: symmetric range
  i64 plane_bytes;
};

__device__ __forceinline__ RangeMap range_map(const Quantize& q, int map) {
  const float* clip_value = q.clip_values + map;
  return RangeMap(clip_value, q.zeros ? clip_value + q.matrix.maps : nullptr, q.width.largest());
}

// The first block writes scales and zero points. Scales are positive, so their bit patterns are ordered as they are,
// and a NaN is above them all: whichever block finds a non-finite element has the last word without any order of
// blocks.
__device__ void write_maps(const Quantize& q) {
  for (int map = threadIdx.y * blockDim.x + threadIdx.x; map < q.matrix.maps; map += blockDim.x * blockDim.y) {
    const RangeMap m = range_map(q, map);
    int zero = static_cast<int>(m.zero);
    for (int p = q.width.planes() - 1; p >= 0; p--) {
      const float scale = __fmul_rn(m.scale, q.width.plane_weight(p));
      atomicMax(reinterpret_cast<u32*>(q.scales + p * q.matrix.maps + map), __float_as_uint(scale));
      if (q.zeros) q.zeros[p * q.matrix.maps + map] = p ? split_digit(zero) : zero;
    }
  }
}

__device__ void write_nan_scales(const Quantize& q) {
  for (int i = 0; i < q.width.planes() * q.matrix.maps; i++)
    atomicMax(reinterpret_cast<u32*>(q.scales + i), 0x7FC00000u);
}

// To nearest, ties to even; or, with 16 random bits, up with a probability equal to the fraction.
__device__ __forceinline__ float rounded(float steps, bool stochastic, u32 bits) {
  if (!stochastic) return rintf(steps);
  const float below = floorf(steps);
  const bool up = static_cast<float>(bits) < __fmul_rn(__fsub_rn(steps, below), 65536.0f);
  return up ? __fadd_rn(below, 1.0f) : below;
}

template <class Format>
__device__ __forceinline__ void quantize(const Quantize& q) {
  const Columns& matrix = q.matrix;
  const int column = matrix.first_column(), planes = q.width.planes();
  const RandomBits random(q.key);

  // One map for each of the four columns; equal ones unless the scale is per column.
  RangeMap maps[4] = {range_map(q, 0), range_map(q, 0), range_map(q, 0), range_map(q, 0)};
  if (matrix.map_axis == PER_COLUMN)
#pragma unroll
    for (int i = 0; i < 4; i++) maps[i] = range_map(q, min(column + i, matrix.columns - 1));

  bool finite = true;
  walk_down<Format>(matrix, q.x, [&](int row, const float (&values)[4], int count) {
    if (row >= matrix.rows || column >= q.pitch) return;
    if (matrix.map_axis == PER_ROW) {
      const RangeMap of_row = range_map(q, row / matrix.rows_per_map);
#pragma unroll
      for (int i = 0; i < 4; i++) maps[i] = of_row;
    }
    u32 bits[4] = {};
    if (q.key) random.four(bits, static_cast<u64>(row) * matrix.columns + column);

    u32 words[3] = {};  // one byte an element, one word a plane, the lowest plane first
#pragma unroll
    for (int i = 0; i < 4; i++) {
      finite &= __fsub_rn(values[i], values[i]) == 0.0f;
      const auto round = [&](float steps) { return rounded(steps, q.key, bits[i]); };
      int integer = i < count ? q.width.integer_of(values[i], maps[i], round) : 0;
#pragma unroll
      for (int p = 0; p < 3; p++) {
        if (p >= planes) continue;
        const int digit = p + 1 < planes ? split_digit(integer) : integer;
        words[p] |= static_cast<u32>(digit & 255) << 8 * i;
      }
    }
    i8* out = q.planes + static_cast<i64>(row) * q.pitch + column;
#pragma unroll
    for (int p = 0; p < 3; p++)
      if (p < planes) *reinterpret_cast<u32*>(out + (planes - 1 - p) * q.plane_bytes) = words[p];
  });
  if (!finite) write_nan_scales(q);
  if (blockIdx.x == 0 && blockIdx.y == 0) write_maps(q);
}

extern "C" __global__ void __launch_bounds__(256) quantize_f32(const Quantize q) { quantize<F32>(q); }
extern "C" __global__ void __launch_bounds__(256) quantize_bf16(const Quantize q) { quantize<BF16>(q); }
extern "C" __global__ void __launch_bounds__(256) quantize_f16(const Quantize q) { quantize<F16>(q); }
