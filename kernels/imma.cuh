// A block's tile of an integer matrix product by tensor cores: mma.sync on int8, sm_75 and newer.
//
// Each warp owns WARP_M x WARP_N sums in registers. Operand tiles, 64 deep, travel through STAGES buffers in shared
// memory: by cp.async while earlier ones are multiplied, or (REGISTER_STAGING, sm_75, two buffers) by way of registers.
#pragma once
#include "imma_tile.cuh"
#include "warp_slab.cuh"

#ifndef BLOCK_M
#define BLOCK_M 128
#define BLOCK_N 128
#define WARP_M 64
#define WARP_N 64
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef REGISTER_STAGING
#define REGISTER_STAGING 0
#endif

constexpr int BLOCK_K = 64;
constexpr int WARPS_N = BLOCK_N / WARP_N;
constexpr int THREADS = BLOCK_M / WARP_M * WARPS_N * 32;
constexpr int MIN_BLOCKS = 1;

template <Order LEFT, Order RIGHT>
class TileProduct {
 public:
  typedef Pieces<LEFT, BLOCK_M, BLOCK_K, THREADS> LeftPieces;
  typedef Pieces<RIGHT, BLOCK_N, BLOCK_K, THREADS> RightPieces;

  // Sums over k_tiles tiles of both operands.
  template <class Left, class Right>
  __device__ __forceinline__ void run(Left& left, Right& right, int k_tiles, char* shared) {
#pragma unroll
    for (int i = 0; i < TILES_M; i++)
#pragma unroll
      for (int j = 0; j < TILES_N; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) sums[i][j][e] = 0;
    if (REGISTER_STAGING)
      run_through_registers(left, right, k_tiles, shared);
    else
      run_asynchronously(left, right, k_tiles, shared);
    __syncthreads();  // the buffers are free for drain()
  }

  // Calls store(row, column, sums) for every four neighbouring columns of the tile.
  template <class Store>
  __device__ __forceinline__ void drain(char* shared, const Store& store) const {
    typedef WarpSlab<WARP_N> Slab;
    static_assert(Slab::BYTES * (THREADS / 32) <= STAGES * STAGE_BYTES, "the slabs must fit into the buffers");
    Slab slab(shared, warp());
#pragma unroll
    for (int i = 0; i < TILES_M; i++) {
#pragma unroll
      for (int j = 0; j < TILES_N; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          slab.put(LeftTile::row_of(lane(), e / 2), j / 2 * 16 + RightTile::column_of(lane(), j % 2, e % 2),
                   sums[i][j][e]);
      slab.drain(warp_row() + i * 16, warp_column(), store);
    }
  }

 private:
  typedef ImmaTile<LEFT, BLOCK_M, BLOCK_K> LeftTile;
  typedef ImmaTile<RIGHT, BLOCK_N, BLOCK_K> RightTile;
  static constexpr int TILES_M = WARP_M / 16, TILES_N = WARP_N / 8;
  static constexpr int STAGE_BYTES = LeftTile::BYTES + RightTile::BYTES;

  int sums[TILES_M][TILES_N][4];

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }
  static __device__ __forceinline__ int warp_row() { return warp() / WARPS_N * WARP_M; }
  static __device__ __forceinline__ int warp_column() { return warp() % WARPS_N * WARP_N; }

  template <class Tile, class P>
  static __device__ __forceinline__ char* place(char* tile, int i) {
    const int row = P::first_row() + (P::ORDER == K_CONTIGUOUS ? P::distance(i) : 0);
    const int k = P::first_k() + (P::ORDER == K_CONTIGUOUS ? 0 : P::distance(i));
    return tile + Tile::offset(row, k);
  }

  template <class Left, class Right>
  __device__ __forceinline__ void run_asynchronously(Left& left, Right& right, int k_tiles, char* shared) {
    int issued = 0;
    const auto issue = [&] {
      if (issued < k_tiles) {
        char* stage = shared + issued % STAGES * STAGE_BYTES;
        copy_async<LeftTile>(stage, left);
        copy_async<RightTile>(stage + LeftTile::BYTES, right);
      }
      commit_copies();  // an empty group too: waiting counts groups
      issued++;
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) issue();
    for (int tile = 0; tile < k_tiles; tile++) {
      wait_for_copies<STAGES - 2>();
      __syncthreads();  // everyone's part of this tile is there, and everyone is done with the one before
      issue();
      multiply(shared + tile % STAGES * STAGE_BYTES);
    }
    wait_for_copies<0>();
  }

  template <class Tile, class Source>
  static __device__ __forceinline__ void copy_async(char* tile, Source& source) {
    typedef typename Source::Pieces P;
#pragma unroll
    for (int i = 0; i < P::COUNT; i++) {
      const i8* piece = source.piece(i);
      copy16_async(place<Tile, P>(tile, i), piece, piece != nullptr);
    }
    source.advance();
  }

  template <class Left, class Right>
  __device__ __forceinline__ void run_through_registers(Left& left, Right& right, int k_tiles, char* shared) {
    int4 left_pieces[LeftPieces::COUNT], right_pieces[RightPieces::COUNT];
    const auto fetch = [&] {
      load_pieces(left_pieces, left);
      load_pieces(right_pieces, right);
    };
    const auto keep = [&](int tile) {
      char* stage = shared + tile % 2 * STAGE_BYTES;
      store_pieces<LeftTile, LeftPieces>(stage, left_pieces);
      store_pieces<RightTile, RightPieces>(stage + LeftTile::BYTES, right_pieces);
    };
    if (k_tiles > 0) {
      fetch();
      keep(0);
    }
    for (int tile = 0; tile < k_tiles; tile++) {
      __syncthreads();
      const bool more = tile + 1 < k_tiles;
      if (more) fetch();  // under way while the tensor cores work
      multiply(shared + tile % 2 * STAGE_BYTES);
      if (more) keep(tile + 1);
    }
  }

  template <int COUNT, class Source>
  static __device__ __forceinline__ void load_pieces(int4 (&pieces)[COUNT], Source& source) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) pieces[i] = load_piece(source.piece(i));
    source.advance();
  }

  template <class Tile, class P>
  static __device__ __forceinline__ void store_pieces(char* tile, const int4 (&pieces)[P::COUNT]) {
#pragma unroll
    for (int i = 0; i < P::COUNT; i++) *reinterpret_cast<int4*>(place<Tile, P>(tile, i)) = pieces[i];
  }

  __device__ __forceinline__ void multiply(const char* stage) {
#pragma unroll
    for (int k = 0; k < BLOCK_K; k += 32) {
      u32 left[TILES_M][4], right[TILES_N][2];
#pragma unroll
      for (int i = 0; i < TILES_M; i++) LeftTile::load_left(left[i], stage, warp_row() + i * 16, k, lane());
#pragma unroll
      for (int j = 0; j < TILES_N; j += 2)
        RightTile::load_right(right[j], right[j + 1], stage + LeftTile::BYTES, warp_column() + j * 8, k, lane());
#pragma unroll
      for (int i = 0; i < TILES_M; i++)
#pragma unroll
        for (int j = 0; j < TILES_N; j++) mma_m16n8k32(sums[i][j], left[i], right[j]);
    }
  }
};
