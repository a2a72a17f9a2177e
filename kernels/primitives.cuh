// Instructions without a C++ spelling, one function each. No CUDA header is needed: NVRTC knows the built-in functions.
//
// tests/emulator has host bodies of the same functions, behind the same guard: kernels are compiled as they stand
// there.
#ifndef LIGHTNING_INT8_PRIMITIVES
#define LIGHTNING_INT8_PRIMITIVES

typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) char name[]

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// --- 16-bit floats ---

__device__ __forceinline__ float f16_to_f32(u16 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
__device__ __forceinline__ u16 f32_to_f16(float value) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// --- tensor cores ---

// c (16 x 8, s32) += a (16 x 32, s8, rows) . b (32 x 8, s8, columns), spread over the 32 lanes of a warp.
__device__ __forceinline__ void mma_m16n8k32(int (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else  // sm_75 has the 8 x 8 x 16 product alone; the same registers hold four of them
  const auto mma_m8n8k16 = [](int& c0, int& c1, u32 a, u32 b) {
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
                 : "+r"(c0), "+r"(c1)
                 : "r"(a), "r"(b));
  };
  mma_m8n8k16(c[0], c[1], a[0], b[0]);
  mma_m8n8k16(c[2], c[3], a[1], b[0]);
  mma_m8n8k16(c[0], c[1], a[2], b[1]);
  mma_m8n8k16(c[2], c[3], a[3], b[1]);
#endif
}

// Four matrices of 8 rows x 16 bytes from shared memory; lane 8m + r names row r of matrix m. TRANSPOSED moves pairs of
// bytes, the smallest thing that the hardware transposes.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(u32 (&registers)[4], const void* row) {
  if (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// --- asynchronous copies (sm_80+; the kernels stage through registers below that) ---

// 16 bytes from global to shared memory; zeros where not valid, and then the source is not read.
__device__ __forceinline__ void copy16_async(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
#endif
}
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int GROUPS_THAT_MAY_STAY>
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS_THAT_MAY_STAY) : "memory");
#endif
}

#endif
