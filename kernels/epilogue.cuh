// From integer sums to the result: zero points off, scales on, earlier planes and bias added, in the format asked for.
//
// The contract of lightning_int8.backends.base.Backend: fl(fl(fl(sum) * left scale) * right scale) in float32, then
// + addend (the plane pairs before this one), then + bias; each step rounded, none fused.
#pragma once
#include "float_formats.cuh"

enum OutFormat { OUT_F32, OUT_BF16, OUT_F16, OUT_SUMS };  // OUT_SUMS: int64, zero points taken off, no scale

// Where four neighbouring columns of the product belong.
struct Place {
  i64 offset;       // of the first in the result, in elements
  int row, column;  // of the product, over all groups: where left_sums and right_sums have its sums
  int left, right;  // indices of its scales; those of the four columns follow each other
  int count;        // how many of the four are part of the result
};

// The result is the product itself.
__device__ __forceinline__ Place matrix_place(int m, int n, int columns) {
  return {static_cast<i64>(m) * columns + n, m, n, m, n, min(4, columns - n)};
}

struct Epilogue {
  const float* left_scale;
  const float* right_scale;
  const int* left_zero;  // null: symmetric
  const int* right_zero;
  const i64* left_sums;  // sum of each row of the left operand; null unless the right one has a zero point
  const i64* right_sums;
  const float* addend;
  const float* bias;  // by column
  void* out;
  int left_step, right_step;  // 1: a scale (and zero point) for each index, 0: one for all
  int products;               // how many products a sum has
  int format;

  // sums (a - za)(b - zb) = sums ab - zb sums a - za sums b + K za zb
  __device__ __forceinline__ i64 centred(i64 sum, const Place& p, int i) const {
    const i64 za = left_zero ? left_zero[p.left * left_step] : 0;
    const i64 zb = right_zero ? right_zero[(p.right + i) * right_step] : 0;
    if (right_zero) sum -= zb * left_sums[p.row];
    if (left_zero) sum -= za * right_sums[p.column + i];
    return sum + za * zb * products;
  }

  template <class Sum>
  __device__ __forceinline__ float scaled(Sum sum, const Place& p, int i) const {
    float value = left_zero || right_zero ? __ll2float_rn(centred(sum, p, i)) : to_float(sum);
    value = __fmul_rn(value, left_scale[p.left * left_step]);
    value = __fmul_rn(value, right_scale[(p.right + i) * right_step]);
    if (addend) value = __fadd_rn(addend[p.offset + i], value);
    return bias ? __fadd_rn(value, bias[p.right + i]) : value;
  }
  static __device__ __forceinline__ float to_float(int sum) { return __int2float_rn(sum); }
  static __device__ __forceinline__ float to_float(i64 sum) { return __ll2float_rn(sum); }

  // sums: of the four columns, in shared memory or registers
  template <class Sum>
  __device__ __forceinline__ void store(const Place& p, const Sum* sums) const {
    if (format == OUT_SUMS) {
      for (int i = 0; i < p.count; i++) static_cast<i64*>(out)[p.offset + i] = centred(sums[i], p, i);
      return;
    }
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; i++) values[i] = i < p.count ? scaled(sums[i], p, i) : 0.0f;
    if (format == OUT_F32) store_four<F32>(static_cast<float*>(out) + p.offset, values, p.count);
    if (format == OUT_BF16) store_four<BF16>(static_cast<u16*>(out) + p.offset, values, p.count);
    if (format == OUT_F16) store_four<F16>(static_cast<u16*>(out) + p.offset, values, p.count);
  }
};
