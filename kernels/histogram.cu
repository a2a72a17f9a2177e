// Histogram of magnitudes by their bit patterns: 2048 bins an octave, 23 octaves down from that of the largest
// magnitude.
//
// Purpose  range rules that look for a clip value: one read, then any candidate can be judged from the counts
// Shapes   x (rows, columns) float32, bfloat16 or float16, contiguous; largest () float32, its largest magnitude;
// counts
//          (23 * 2048,) int32, zeroed by the caller
// Tile     four columns a thread, see columns.cuh
// Entry    histogram_f32, histogram_bf16, histogram_f16
// Twin     lightning_int8.magnitudes.Statistics.histogram, exactly
//
// Bin b of octave o holds magnitudes 2^(e - 22 + o) * [1 + b / 2048, 1 + (b + 1) / 2048), e the exponent of the
// largest. Smaller ones, zeros among them, are in the first bin; elements that are not finite are in none.
#include "columns.cuh"

constexpr int OCTAVES = 23, BINS_BITS = 11;  // magnitudes.OCTAVES, MANTISSA_BITS

struct Histogram {
  Columns matrix;
  const void* x;
  const float* largest;
  int* counts;
};

template <class Format>
__device__ __forceinline__ void histogram(const Histogram& h) {
  const u32 largest = __float_as_uint(*h.largest) & 0x7FFFFFFF;
  const int first = (static_cast<int>(largest >> 23) - (OCTAVES - 1)) << BINS_BITS;
  int in_first_bin = 0;  // kept here: half of all elements after a ReLU would meet in one address
  walk_down<Format>(h.matrix, h.x, [&](int, const float (&values)[4], int count) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 magnitude = __float_as_uint(values[i]) & 0x7FFFFFFF;
      if (i >= count || magnitude >= 0x7F800000) continue;
      const int bin = static_cast<int>(magnitude >> (23 - BINS_BITS)) - first;
      if (bin <= 0)
        in_first_bin++;
      else
        atomicAdd(h.counts + min(bin, (OCTAVES << BINS_BITS) - 1), 1);
    }
  });
  if (in_first_bin) atomicAdd(h.counts, in_first_bin);
}

extern "C" __global__ void __launch_bounds__(256) histogram_f32(const Histogram h) { histogram<F32>(h); }
extern "C" __global__ void __launch_bounds__(256) histogram_bf16(const Histogram h) { histogram<BF16>(h); }
extern "C" __global__ void __launch_bounds__(256) histogram_f16(const Histogram h) { histogram<F16>(h); }
