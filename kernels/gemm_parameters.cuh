// What a matrix product is launched with; kernels/gemm.py fills it in.
#pragma once
#include "sources.cuh"
#include "split_sums.cuh"

struct Gemm {
  Matrix left, right;
  int m, n, k;
  Split split;
  Epilogue epilogue;
};
