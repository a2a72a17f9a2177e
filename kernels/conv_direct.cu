// Grouped convolutions with narrow groups, depthwise ones above all: one result a thread, no tiles.
//
// Purpose  output, grad_input and grad_weight where a group's channels are not multiples of 16, so that their pieces
// are not
//          aligned; with so few products a result these are bound by memory. sm_61 and newer
// Shapes   as in conv_imma.cu
// Tile     256 threads; output and grad_input: neighbouring threads are neighbouring channels; grad_weight: 32 output
// channels
//          across, 8 positions down, sums go into slabs (conv_finish.cu)
// Entry    conv_output, conv_grad_input, conv_grad_weight
// Twin     lightning_int8.backends.reference, sums and one-plane results bit for bit
#include "conv_sources.cuh"

struct Direct {
  Conv conv;
  // Taken off each factor, so the epilogue has none; null: symmetric. Outside the image lies 0.
  const int* left_zero;
  const int* right_zero;
};

__device__ __forceinline__ int zero_at(const int* zeros, int step, int index) {
  return zeros ? zeros[step * index] : 0;
}

__device__ __forceinline__ void store_one(const Conv& c, Place place, i64 sum) {
  place.count = 1;
  c.epilogue.store(place, &sum);
}

// Row and channel (over all groups) of this thread's result; neighbouring threads have neighbouring channels.
__device__ __forceinline__ bool result_of_thread(const Conv& c, int channels, int& m, int& channel) {
  const i64 index = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  m = static_cast<int>(index / channels);
  channel = static_cast<int>(index % channels);
  return m < c.m;
}

// Sum over taps and `depth` channels of left[pixel + tap][channel ..] times right(tap, i).
template <class Right>
__device__ __forceinline__ i64 sum_over_window(const Conv& c, int position, int channel, int depth, int left_zero,
                                               const Right& right) {
  const Image& image = c.image;
  const Pixel origin = place_of(image.grid, position);
  i64 sum = 0;
  const int taps = image.channels.divide(c.k);
  for (int t = 0; t < taps; t++) {
    const Tap tap(image, t * static_cast<int>(image.channels.divisor));
    Pixel pixel = origin;
#pragma unroll
    for (int d = 0; d < 3; d++) pixel.at[d] = pixel.at[d] * image.stride[d] + image.origin[d] + tap.shift[d];
    if (!inside(image, pixel)) continue;
    const i8* left = image.data + (pixel.index(image.size) * image.pitch + channel);
    for (int i = 0; i < depth; i++) sum += static_cast<i64>(left[i] - left_zero) * right(t, i);
  }
  return sum;
}

extern "C" __global__ void __launch_bounds__(256) conv_output(const Direct d) {
  const Conv& c = d.conv;
  int m, channel;
  if (!result_of_thread(c, c.target.channels, m, channel)) return;
  const int group = channel / c.n, depth = c.target.group_channels;
  const i8* weights = c.matrix.data + static_cast<i64>(channel) * c.matrix.pitch;
  const int zero = zero_at(d.right_zero, c.epilogue.right_step, channel);
  const i64 sum = sum_over_window(c, m, group * depth, depth, zero_at(d.left_zero, 0, 0), [&](int tap, int i) {
    return weights[tap * static_cast<int>(c.image.channels.divisor) + i] - zero;
  });
  store_one(c, OutputPlace{c}(group, m, channel - group * c.n), sum);
}

extern "C" __global__ void __launch_bounds__(256) conv_grad_input(const Direct d) {
  const Conv& c = d.conv;
  int m, channel;
  if (!result_of_thread(c, c.target.channels, m, channel)) return;
  const int group = channel / c.n, in_group = channel - group * c.n, depth = c.weight.group_outputs;
  const i8* weights = c.weight.data + static_cast<i64>(group * depth) * c.weight.pitch + c.weight.first + in_group;
  const int zero = zero_at(d.right_zero, c.epilogue.right_step, in_group);
  const i64 sum = sum_over_window(c, m, group * depth, depth, zero_at(d.left_zero, 0, 0), [&](int tap, int i) {
    const int row = c.weight.taps[2].split(tap), depth_tap = c.weight.taps[1].divide(row);
    const int height = row - depth_tap * static_cast<int>(c.weight.taps[1].divisor);
    const int at = depth_tap * c.weight.step[0] + height * c.weight.step[1] + tap * c.weight.step[2];
    return weights[static_cast<i64>(i) * c.weight.pitch + at] - zero;
  });
  store_one(c, GradInputPlace{c}(group, m, in_group), sum);
}

extern "C" __global__ void __launch_bounds__(256) conv_grad_weight(const Direct d) {
  const Conv& c = d.conv;
  const int outputs = c.target.channels, chunks = (outputs + 31) / 32;
  const int output = blockIdx.x % chunks * 32 + threadIdx.x;
  const int weight = blockIdx.x / chunks, channels = c.target.group_channels;
  const int tap_index = weight / channels, channel = weight % channels;
  if (output >= outputs) return;
  const Tap tap(c.image, tap_index * static_cast<int>(c.image.channels.divisor));
  const int x_channel = output / c.m * channels + channel;
  const int left_zero = zero_at(d.left_zero, c.epilogue.left_step, output);
  const int right_zero = zero_at(d.right_zero, c.epilogue.right_step, x_channel);

  const int first = blockIdx.y * c.split.depth, last = min(c.k, first + c.split.depth);
  int sum = 0;
  for (int position = first + threadIdx.y; position < last; position += blockDim.y) {
    Pixel pixel = place_of(c.image.grid, position);
#pragma unroll
    for (int i = 0; i < 3; i++) pixel.at[i] = pixel.at[i] * c.image.stride[i] + c.image.origin[i] + tap.shift[i];
    if (!inside(c.image, pixel)) continue;
    const int left = c.matrix.data[position * c.matrix.pitch + output];
    sum += (left - left_zero) * (c.image.data[pixel.index(c.image.size) * c.image.pitch + x_channel] - right_zero);
  }
  const int slab = blockIdx.y / c.split.slices_per_slab;
  const i64 column = tap_index * static_cast<int>(c.image.channels.divisor) + channel;
  atomicAdd(c.split.slabs + slab * c.split.slab_elements + static_cast<i64>(output) * c.split.columns + column, sum);
}
