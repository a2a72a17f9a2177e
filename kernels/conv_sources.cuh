// Where the pieces of a convolution's operands lie: the same interface as in sources.cuh, nothing is ever unfolded.
#pragma once
#include "conv_parameters.cuh"

// One tap of the window and a channel of the group.
struct Tap {
  int shift[3];  // of the coordinates
  int channel;

  // index: (tap, channel)
  __device__ __forceinline__ Tap(const Image& image, int index) : channel(index) {
    int tap = image.channels.split(channel);
    const int row = image.taps[2].split(tap);
    shift[2] = tap * image.dilation[2];
    tap = row;
    shift[0] = image.taps[1].split(tap) * image.dilation[0];
    shift[1] = tap * image.dilation[1];
  }
};

__device__ __forceinline__ bool inside(const Image& image, const Pixel& pixel) {
  return static_cast<u32>(pixel.at[0]) < static_cast<u32>(image.size[0]) &&
         static_cast<u32>(pixel.at[1]) < static_cast<u32>(image.size[1]) &&
         static_cast<u32>(pixel.at[2]) < static_cast<u32>(image.size[2]);
}

// The byte at a pixel and a channel, or what is outside the image there.
__device__ __forceinline__ const i8* pixel_or_fill(const Image& image, const Pixel& pixel, int channel) {
  if (inside(image, pixel)) return image.data + (pixel.index(image.size) * image.pitch + channel);
  return image.fill ? image.fill + channel : nullptr;
}

// Image with the index pair (tap, channel) summed over: rows are positions. For output and grad_input.
template <class P>
struct PixelRows {
  typedef P Pieces;
  static_assert(P::ORDER == K_CONTIGUOUS, "");
  const Image& image;
  const int& length;  // of the summed index; a slice ends there or where its tiles do
  Pixel origins[P::COUNT];
  int group_channel, k;

  __device__ PixelRows(const Image& i, const int& length, int group, int first_row, int first_k)
      : image(i), length(length), group_channel(group * i.channels.divisor), k(first_k + P::first_k()) {
#pragma unroll
    for (int p = 0; p < P::COUNT; p++) origins[p] = origin(first_row + P::first_row() + P::distance(p));
  }

  __device__ __forceinline__ const i8* piece(int i) const {
    if (k >= length) return nullptr;
    const Tap tap(image, k);  // the same for every piece; not kept from tile to tile, where registers are dear
    Pixel pixel = origins[i];
#pragma unroll
    for (int d = 0; d < 3; d++) pixel.at[d] += tap.shift[d];
    return pixel_or_fill(image, pixel, group_channel + tap.channel);
  }
  __device__ __forceinline__ void advance() { k += P::DEPTH; }

 private:
  __device__ __forceinline__ Pixel origin(int position) const {
    // A row beyond the last is computed and not stored.
    Pixel pixel = place_of(image.grid, min(position, image.positions - 1));
#pragma unroll
    for (int d = 0; d < 3; d++) pixel.at[d] = pixel.at[d] * image.stride[d] + image.origin[d];
    return pixel;
  }
};

// Image with positions summed over: rows are pairs (tap, channel). For grad_weight.
template <class P>
struct PixelLines {
  typedef P Pieces;
  static_assert(P::ORDER == ROW_CONTIGUOUS, "");
  const Image& image;
  int group_channel, k, last_k;
  Tap tap;

  __device__ PixelLines(const Image& i, int group, int rows, int first_row, int first_k, int last_k)
      : image(i),
        group_channel(group * i.channels.divisor),
        k(first_k + P::first_k()),
        last_k(first_row + P::first_row() < rows ? last_k : 0),
        tap(i, first_row + P::first_row()) {}

  __device__ __forceinline__ const i8* piece(int i) const {
    const int position = k + P::distance(i);
    if (position >= last_k) return nullptr;
    Pixel pixel = place_of(image.grid, position);
#pragma unroll
    for (int d = 0; d < 3; d++) pixel.at[d] = pixel.at[d] * image.stride[d] + image.origin[d] + tap.shift[d];
    return pixel_or_fill(image, pixel, group_channel + tap.channel);
  }
  __device__ __forceinline__ void advance() { k += P::DEPTH; }
};

// Weight with the index pair (tap, output channel) summed over: rows are input channels of the group. For grad_input.
template <class P>
struct TapLines {
  typedef P Pieces;
  static_assert(P::ORDER == ROW_CONTIGUOUS, "");
  const TapMatrix& weight;
  int offset;  // of the group's first output channel, and of the rows
  int k, last_k;

  __device__ TapLines(const TapMatrix& w, int group, int rows, int first_row, int first_k, int last_k)
      : weight(w),
        offset(group * w.group_outputs * w.pitch + w.first + first_row + P::first_row()),
        k(first_k + P::first_k()),
        last_k(first_row + P::first_row() < rows ? last_k : 0) {}

  __device__ __forceinline__ const i8* piece(int i) const {
    int output = k + P::distance(i);
    if (output >= last_k) return nullptr;
    int w = weight.outputs.split(output);
    if (output >= weight.group_outputs) return nullptr;  // the gradient's padding has nothing to meet
    int h = weight.taps[2].split(w);
    const int d = weight.taps[1].split(h);
    const int tap = d * weight.step[0] + h * weight.step[1] + w * weight.step[2];
    return weight.data + (offset + output * weight.pitch + tap);
  }
  __device__ __forceinline__ void advance() { k += P::DEPTH; }
};
