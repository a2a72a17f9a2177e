// A block's tile of an integer matrix product by warpgroups: wgmma on int8, sm_90a.
//
// Four warps fill STAGES buffers in shared memory, tiles 128 deep; two warpgroups of four warps multiply, 64 rows and
// all columns each. A buffer goes back and forth between them by two barriers: `full` counts producer threads, `empty`
// consumer warps. Copies are cp.async and not TMA: only so can the sources of the other families, with their gaps and
// gathered pixels, serve here.
//
// An operand whose rows are the fast index is transposed by the producers, not stored twice by quantize.cu: an unfolded
// image cannot be. At 128 x 256 a tile takes the tensor cores 1024 cycles (by the data sheet), and a scheduler has its
// producer warp and two consumer warps to issue for: 372 (nt), 775 (nn) or 998 (tn) instructions of the one and twice
// 120 of the others, counted in the machine code. So tn, and it alone, should be bound by what it issues.
#pragma once
#include "warp_slab.cuh"
#include "wgmma_tile.cuh"

#ifndef BLOCK_M
#define BLOCK_M 128
#define BLOCK_N 128
#endif
#ifndef STAGES
#define STAGES 4
#endif

constexpr int BLOCK_K = 128;
constexpr int PRODUCERS = 128, CONSUMERS = BLOCK_M / 64 * 128;
constexpr int THREADS = PRODUCERS + CONSUMERS;
constexpr int MIN_BLOCKS = 1;

template <Order LEFT, Order RIGHT>
class TileProduct {
  typedef WgmmaFill<LEFT, BLOCK_M, BLOCK_K, PRODUCERS> LeftFill;
  typedef WgmmaFill<RIGHT, BLOCK_N, BLOCK_K, PRODUCERS> RightFill;

 public:
  typedef typename LeftFill::P LeftPieces;
  typedef typename RightFill::P RightPieces;

  // Sums over k_tiles tiles of both operands.
  template <class Left, class Right>
  __device__ __forceinline__ void run(Left& left, Right& right, int k_tiles, char* shared) {
    u64* full = reinterpret_cast<u64*>(shared + STAGES * STAGE_BYTES);
    u64* empty = full + STAGES;
    if (threadIdx.x == 0)
      for (int s = 0; s < STAGES; s++) {
        barrier_init(full + s, PRODUCERS);
        barrier_init(empty + s, CONSUMERS / 32);
      }
    __syncthreads();
    if (threadIdx.x < PRODUCERS)
      produce(left, right, k_tiles, shared, full, empty);
    else
      consume(k_tiles, shared, full, empty);
    __syncthreads();  // the buffers are free for drain()
  }

  // Calls store(row, column, sums) for every four neighbouring columns of the tile.
  template <class Store>
  __device__ __forceinline__ void drain(char* shared, const Store& store) const {
    typedef WarpSlab<PRODUCT_N> Slab;
    static_assert(Slab::BYTES * (CONSUMERS / 32) <= STAGES * STAGE_BYTES, "the slabs must fit into the buffers");
    if (threadIdx.x < PRODUCERS) return;
    const int warp = (threadIdx.x - PRODUCERS) / 32, lane = threadIdx.x % 32;
    Slab slab(shared, warp);
#pragma unroll
    for (int j = 0; j < TILES_N; j++) {
#pragma unroll
      for (int i = 0; i < PRODUCT_N / 2; i++)
        slab.put(lane / 4 + i / 2 % 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2, sums[j][i]);
      slab.drain(warp * 16, j * PRODUCT_N, store);
    }
  }

 private:
  static constexpr int PRODUCT_N = BLOCK_N < 128 ? BLOCK_N : 128, TILES_N = BLOCK_N / PRODUCT_N;
  static constexpr int LEFT_BYTES = BLOCK_M * BLOCK_K, STAGE_BYTES = LEFT_BYTES + BLOCK_N * BLOCK_K;
  // Tiles that a producer leaves under way before it waits for the oldest. Consumers give a buffer back one tile late,
  // so two of the buffers are not at its disposal. What went through registers is there at once.
  static constexpr int UNDER_WAY = LEFT == ROW_CONTIGUOUS && RIGHT == ROW_CONTIGUOUS ? 0 : STAGES - 2;

  int sums[TILES_N][PRODUCT_N / 2];

  template <class Left, class Right>
  static __device__ __forceinline__ void produce(Left& left, Right& right, int k_tiles, char* shared, u64* full,
                                                 u64* empty) {
    LeftFill left_fill;
    RightFill right_fill;
    for (int tile = 0; tile < k_tiles + UNDER_WAY; tile++) {
      if (tile < k_tiles) {
        left_fill.fetch(left);
        right_fill.fetch(right);
        char* stage = shared + tile % STAGES * STAGE_BYTES;
        barrier_wait(empty + tile % STAGES, tile / STAGES + 1 & 1);  // given back as often as it was filled
        left_fill.keep(stage, left);
        right_fill.keep(stage + LEFT_BYTES, right);
      }
      commit_copies();  // an empty group too: waiting counts groups
      if (tile < UNDER_WAY) continue;
      wait_for_copies<UNDER_WAY>();
      fence_operands();
      barrier_arrive(full + (tile - UNDER_WAY) % STAGES);
    }
  }

  __device__ __forceinline__ void consume(int k_tiles, const char* shared, u64* full, u64* empty) {
#pragma unroll
    for (int j = 0; j < TILES_N; j++)
#pragma unroll
      for (int i = 0; i < PRODUCT_N / 2; i++) sums[j][i] = 0;
    pin_all_sums();
    for (int tile = 0; tile < k_tiles; tile++) {
      barrier_wait(full + tile % STAGES, tile / STAGES & 1);
      multiply(shared + tile % STAGES * STAGE_BYTES);
      wait_for_products<1>();  // the tile before this one has been read
      if (tile > 0 && threadIdx.x % 32 == 0) barrier_arrive(empty + (tile - 1) % STAGES);
    }
    wait_for_products<0>();
    pin_all_sums();
  }

  __device__ __forceinline__ void pin_all_sums() {
#pragma unroll
    for (int j = 0; j < TILES_N; j++) pin_sums(sums[j]);
  }

  __device__ __forceinline__ void multiply(const char* stage) {
    const int row = (threadIdx.x - PRODUCERS) / 128 * 64;
    fence_sums();
#pragma unroll
    for (int k = 0; k < BLOCK_K; k += 32)
#pragma unroll
      for (int j = 0; j < TILES_N; j++)
        wgmma_s8(sums[j], WgmmaTile::descriptor(stage, row, k),
                 WgmmaTile::descriptor(stage + LEFT_BYTES, j * PRODUCT_N, k));
    commit_products();
  }
};
