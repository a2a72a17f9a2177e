// Instructions of sm_90a without a C++ spelling, one function each: barriers in memory, warpgroup products.
//
// tests/emulator has host bodies of the same functions, behind the same guard.
#include "primitives.cuh"
#ifndef LIGHTNING_INT8_HOPPER_PRIMITIVES
#define LIGHTNING_INT8_HOPPER_PRIMITIVES

// --- barriers in shared memory ---
//
// A barrier goes through phases; one ends when as many arrivals as it was set up for have come. wait() returns once the
// phase of the given parity has ended; of a new barrier, the phase of parity 1 counts as ended.

__device__ __forceinline__ void barrier_init(u64* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_wait(u64* barrier, u32 parity) {
  u32 ended = 0;
  while (!ended)
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
}

// --- shared memory that wgmma reads ---
//
// wgmma reads by way of the asynchronous proxy, threads and cp.async write by way of the generic one: each writer must
// fence its own finished writes before it tells anybody of them.

__device__ __forceinline__ void store_operand(void* shared, u32 word) { *static_cast<u32*>(shared) = word; }
__device__ __forceinline__ void fence_operands() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- warpgroup products: issued by all four warps of a warpgroup, finished when they are waited for ---

// Before the first product of a group: the registers of the sums are as the threads left them.
__device__ __forceinline__ void fence_sums() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int GROUPS_THAT_MAY_STAY>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS_THAT_MAY_STAY) : "memory");
}

// The compiler sees neither that products write sums after their instruction nor when: this keeps its own accesses to
// them on their side of the line.
template <int COUNT>
__device__ __forceinline__ void pin_sums(int (&sums)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+r"(sums[i])::"memory");
}

#define SUMS_8(c, i)                                                                                          \
  "+r"(c[i]), "+r"(c[i + 1]), "+r"(c[i + 2]), "+r"(c[i + 3]), "+r"(c[i + 4]), "+r"(c[i + 5]), "+r"(c[i + 6]), \
      "+r"(c[i + 7])
#define SUMS_32(c, i) SUMS_8(c, i), SUMS_8(c, i + 8), SUMS_8(c, i + 16), SUMS_8(c, i + 24)

// c (64 x 8 COUNT / 4, s32) += a (64 x 32, s8) . b^T (as many rows x 32, s8), operands by descriptor (wgmma_tile.cuh).
// Lane 4g + t of warp w has c at row 16w + g + 8 (i / 2 % 2) and column 8 (i / 4) + 2t + i % 2 in its register i.
__device__ __forceinline__ void wgmma_s8(int (&c)[32], u64 a, u64 b) {
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.eq.u32 add, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
      "%32, %33, add;\n"
      "}"
      : SUMS_32(c, 0)
      : "l"(a), "l"(b));
}
__device__ __forceinline__ void wgmma_s8(int (&c)[64], u64 a, u64 b) {
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.eq.u32 add, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
      "%64, %65, add;\n"
      "}"
      : SUMS_32(c, 0), SUMS_32(c, 32)
      : "l"(a), "l"(b));
}

#endif
