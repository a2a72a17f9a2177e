// Host bodies of kernels/primitives.cuh: the same functions, by the definitions of the PTX ISA.
//
// The guard is the one of kernels/primitives.cuh, so a kernel that includes it after this gets these bodies and is
// otherwise compiled as it stands.
#ifndef LIGHTNING_INT8_PRIMITIVES
#define LIGHTNING_INT8_PRIMITIVES
#include "language.h"

using i8 = int8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using i64 = long long;
using u64 = unsigned long long;

#define DYNAMIC_SHARED(name) char* name = emulator::block.shared

inline u32 shared_address(const void* pointer) {
  return static_cast<u32>(static_cast<const char*>(pointer) - emulator::block.shared);
}

// --- 16-bit floats ---

inline float f16_to_f32(u16 bits) { return static_cast<float>(same_bits<_Float16>(bits)); }
inline u16 f32_to_f16(float value) { return same_bits<u16>(static_cast<_Float16>(value)); }

// --- tensor cores ---

// PTX ISA, mma.m16n8k32: lane 4g + t holds A rows g and g + 8 and B column g, at k = 4t .. 4t+3 and 16 more; and
// C rows g and g + 8, columns 2t and 2t + 1.
inline void mma_m16n8k32(int (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  const uint64_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const emulator::Posted* lanes = emulator::exchange(words, 6);
  const unsigned g = emulator::thread->lane / 4, t = emulator::thread->lane % 4;
  for (unsigned i = 0; i < 4; i++) {
    const unsigned row = g + 8 * (i / 2), column = 2 * t + i % 2;
    for (unsigned k = 0; k < 32; k += 4) {
      const unsigned lane_k = k % 16 / 4, half = k / 16;
      c[i] = __dp4a(lanes[row % 8 * 4 + lane_k][row / 8 + 2 * half], lanes[column * 4 + lane_k][4 + half], c[i]);
    }
  }
}

// PTX ISA, ldmatrix: lanes 8m .. 8m+7 name the rows of matrix m, 8 x 16 bytes; lane 4g + t receives the pair t of row
// g, or of column g where transposed.
template <bool TRANSPOSED>
void load_matrices(u32 (&registers)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("ldmatrix: row is not aligned to 16 bytes");
  const uint64_t word = reinterpret_cast<uintptr_t>(row);
  const emulator::Posted* lanes = emulator::exchange(&word, 1);
  const unsigned g = emulator::thread->lane / 4, t = emulator::thread->lane % 4;
  const auto pair = [&](unsigned matrix, unsigned matrix_row, unsigned index) {
    return reinterpret_cast<const u16*>(lanes[8 * matrix + matrix_row][0])[index];
  };
  for (unsigned m = 0; m < 4; m++) {
    const u32 low = TRANSPOSED ? pair(m, 2 * t, g) : pair(m, g, 2 * t);
    const u32 high = TRANSPOSED ? pair(m, 2 * t + 1, g) : pair(m, g, 2 * t + 1);
    registers[m] = low | high << 16;
  }
}

// --- asynchronous copies ---

namespace emulator {
inline void perform(const AsyncCopy& copy) {  // compiled with the kernel: a sanitizer sees the accesses
  for (int i = 0; i < copy.bytes; i++)
    static_cast<char*>(copy.to)[i] = copy.valid ? static_cast<const char*>(copy.from)[i] : 0;
  wrote_operand(copy.to, copy.bytes);
}
}  // namespace emulator

inline void copy16_async(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16) emulator::fail("cp.async: destination is not aligned to 16 bytes");
  if (valid && reinterpret_cast<uintptr_t>(global) % 16) emulator::fail("cp.async: source is not aligned to 16 bytes");
  const emulator::AsyncCopy copy{shared, global, 16, valid, 0};
  if (emulator::takes_effect_now())
    emulator::perform(copy);
  else
    emulator::defer_copy(copy);
}
inline void commit_copies() { emulator::close_copy_group(); }
template <int GROUPS_THAT_MAY_STAY>
void wait_for_copies() {
  emulator::AsyncCopy due;
  while (emulator::next_due_copy(GROUPS_THAT_MAY_STAY, &due)) emulator::perform(due);
}

#endif
