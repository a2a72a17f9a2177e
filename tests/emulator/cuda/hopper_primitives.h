// Host bodies of kernels/hopper_primitives.cuh, by the definitions of the PTX ISA.
#ifndef LIGHTNING_INT8_HOPPER_PRIMITIVES
#define LIGHTNING_INT8_HOPPER_PRIMITIVES
#include "primitives.h"

inline void barrier_init(u64* barrier, int arrivals) { emulator::barrier_init(barrier, arrivals); }
inline void barrier_arrive(u64* barrier) { emulator::barrier_arrive(barrier); }
inline void barrier_wait(u64* barrier, u32 parity) { emulator::barrier_wait(barrier, parity); }

// --- shared memory that wgmma reads: a second copy, into which a fence takes what its thread has written ---

inline void store_operand(void* shared, u32 word) {
  *static_cast<u32*>(shared) = word;
  emulator::wrote_operand(shared, sizeof word);
}
inline void fence_operands() {
  emulator::Range range;
  while (emulator::next_unfenced(&range))
    memcpy(emulator::block.operands + shared_address(range.at), range.at, range.bytes);
}

// --- warpgroup products ---

namespace emulator {

// PTX ISA, "Matrix Descriptor Format" and "Shared Memory Matrix Layout", k the fast index, 128-byte swizzle: rows of
// 128 bytes in groups of eight; bits 4-6 of an address are those of the unpermuted place, exclusive-or its bits 7-9.
struct Descriptor {
  uint64_t bits;
  unsigned field(unsigned low, unsigned width) const { return bits >> low & ((1u << width) - 1); }
  unsigned place(unsigned row, unsigned k) const {
    const unsigned start = field(0, 14) << 4, stride = field(32, 14) << 4;
    const unsigned at = start + row / 8 * stride + row % 8 * 128 + k;
    return at ^ (at >> 3 & 0x70);
  }
  u32 word(unsigned row, unsigned k) const {
    if (place(row, k) + 4 > block.shared_bytes) fail("wgmma: an operand lies outside shared memory");
    const u32 fenced = *reinterpret_cast<const u32*>(block.operands + place(row, k));
    const u32 written = *reinterpret_cast<const u32*>(block.shared + place(row, k));
    return fenced == written ? fenced : 0x9e3779b9 * (fenced ^ written);  // written over and not fenced: noise
  }
  void check() const {
    if (field(62, 2) != 1) fail("wgmma: the emulated machine knows the 128-byte swizzle alone");
    if (field(49, 3)) fail("wgmma: the emulated machine knows operands that start at 1024 bytes alone");
  }
};

// PTX ISA, wgmma.m64nNk32: lane 4g + t of warp w of the warpgroup has rows 16w + g and 16w + g + 8, columns 8j + 2t and
// 8j + 2t + 1.
inline void perform(const Product& product) {
  const Descriptor left{product.left}, right{product.right};
  const unsigned first_row = thread->warp % 4 * 16 + thread->lane / 4, first_column = thread->lane % 4 * 2;
  for (unsigned k = 0; k < 32; k += 4) {
    const u32 rows[2] = {left.word(first_row, k), left.word(first_row + 8, k)};
    for (int i = 0; i < product.columns / 2; i++) {
      const u32 column = right.word(first_column + i / 4 * 8 + i % 2, k);
      product.sums[i] = __dp4a(rows[i / 2 % 2], column, product.sums[i]);
    }
  }
}

inline void multiply(int* sums, int columns, u64 left, u64 right) {
  check_product_group();
  if (!block.operands) fail("wgmma: nothing was ever fenced for it");
  Descriptor{left}.check();
  Descriptor{right}.check();
  const uint64_t descriptors[2] = {left, right};
  const Posted* lanes = exchange(descriptors, 2);
  if (lanes[0][0] != left || lanes[0][1] != right) fail("wgmma: lanes disagree about the operands");
  const Product product{sums, columns, left, right, 0};
  if (takes_effect_now())
    perform(product);
  else
    defer_product(product);
}

}  // namespace emulator

inline void fence_sums() { emulator::open_product_group(); }
inline void commit_products() { emulator::close_product_group(); }
template <int GROUPS_THAT_MAY_STAY>
void wait_for_products() {
  emulator::Product due;
  while (emulator::next_due_product(GROUPS_THAT_MAY_STAY, &due)) emulator::perform(due);
  emulator::barrier_warp();  // one instruction of the warp: no lane goes on before the others
}

template <int COUNT>
void pin_sums(int (&)[COUNT]) {}

inline void wgmma_s8(int (&c)[32], u64 a, u64 b) { emulator::multiply(c, 64, a, b); }
inline void wgmma_s8(int (&c)[64], u64 a, u64 b) { emulator::multiply(c, 128, a, b); }

#endif
