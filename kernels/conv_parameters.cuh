// What a convolution is launched with; kernels/convolution.py fills it in. Spatial dimensions are depth, height, width;
// a convolution of fewer has leading ones.
#pragma once
#include "fast_division.cuh"
#include "sources.cuh"
#include "split_sums.cuh"

// An image tensor (N, D, H, W, channels) seen through a window: a position is a place of the window, a tap one of its
// holes. grad_input sees the gradient through the taps that reach one residue of the input (geometry.ResidueDim).
struct Image {
  const i8* data;
  const i8* fill;  // what lies outside, one pixel: the zero points; null for zeros
  int pitch;       // bytes of a pixel
  int size[3];
  int positions;                          // N times the grid
  FastDivisor grid[3];                    // positions of the window
  int stride[3], origin[3], dilation[3];  // coordinate = position * stride + origin + tap * dilation
  FastDivisor taps[3];
  FastDivisor channels;  // of a group, rounded up to 16
};

// A weight tensor (outputs, taps, channels) with the index pair (tap, output) summed over, for grad_input.
struct TapMatrix {
  const i8* data;
  int pitch;           // bytes of an output channel
  int first, step[3];  // byte offset of tap j: first + j * step
  FastDivisor taps[3];
  FastDivisor outputs;  // of a group, rounded up to 16
  int group_outputs;
};

// The result tensor, seen from the product.
struct Target {
  int size[3], stride[3], first[3];  // grad_input: position t of the window is input position first + t * stride
  int channels, group_channels;      // grad_weight: group_channels are those of a weight
  FastDivisor padded_channels;       // grad_weight: of a group, rounded up to 16
};

struct Conv {
  Image image;
  Matrix matrix;     // the weight of output, the gradient of grad_weight
  TapMatrix weight;  // of grad_input
  Target target;
  int m, n, k;  // of one group
  Split split;
  Epilogue epilogue;
};

struct Pixel {
  int sample, at[3];

  __device__ __forceinline__ int index(const int (&size)[3]) const {
    return ((sample * size[0] + at[0]) * size[1] + at[1]) * size[2] + at[2];
  }
};

// The position-th place of a window on its grid.
__device__ __forceinline__ Pixel place_of(const FastDivisor (&grid)[3], int position) {
  Pixel pixel;
  pixel.at[2] = position;
  pixel.at[1] = grid[2].split(pixel.at[2]);
  pixel.at[0] = grid[1].split(pixel.at[1]);
  pixel.sample = grid[0].split(pixel.at[0]);
  return pixel;
}

// --- where four neighbouring columns of the product belong (epilogue.cuh) ---

struct OutputPlace {  // rows: positions; columns: output channels of the group
  const Conv& c;
  __device__ __forceinline__ Place operator()(int group, int m, int n) const {
    const int channel = group * c.n + n;
    return {static_cast<i64>(m) * c.target.channels + channel, group * c.m + m, channel, 0, channel, min(4, c.n - n)};
  }
};

struct GradInputPlace {  // rows: positions of a residue; columns: input channels of the group
  const Conv& c;
  __device__ __forceinline__ Place operator()(int group, int m, int n) const {
    const Target& t = c.target;
    Pixel pixel = place_of(c.image.grid, m);
#pragma unroll
    for (int d = 0; d < 3; d++) pixel.at[d] = t.first[d] + pixel.at[d] * t.stride[d];
    const i64 offset = static_cast<i64>(pixel.index(t.size)) * t.channels + group * c.n + n;
    return {offset, group * c.m + m, group * c.n + n, 0, n, min(4, c.n - n)};
  }
};

struct GradWeightPlace {  // rows: output channels of the group; columns: (tap, input channel of the group, padded)
  const Conv& c;
  __device__ __forceinline__ Place operator()(int group, int m, int n) const {
    const Target& t = c.target;
    const int output = group * c.m + m, taps = c.n / static_cast<int>(t.padded_channels.divisor);
    int channel = n;
    const int tap = t.padded_channels.split(channel);
    const i64 offset = (static_cast<i64>(output) * taps + tap) * t.group_channels + channel;
    return {offset,
            output,
            group * c.n + n,
            output,
            group * t.group_channels + channel,
            min(4, t.group_channels - channel)};
  }
};
