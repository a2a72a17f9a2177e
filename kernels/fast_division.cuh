// Division by a number that is fixed at the launch: a multiplication, for dividends below 2^31.
#pragma once
#include "primitives.cuh"

// quotient = mulhi(n, multiplier) >> shift with multiplier = ceil(2^(31 + bits) / divisor), shift = bits - 1, where
// 2^bits >= divisor (Granlund and Montgomery, PLDI 1994); the host computes them, see kernels/parameters.py.
struct FastDivisor {
  u32 divisor, multiplier, shift;

  __device__ __forceinline__ int divide(int n) const {
    return divisor == 1 ? n : static_cast<int>(__umulhi(n, multiplier) >> shift);
  }
  // Returns the quotient and leaves the remainder in n.
  __device__ __forceinline__ int split(int& n) const {
    const int quotient = divide(n);
    n -= quotient * static_cast<int>(divisor);
    return quotient;
  }
};
