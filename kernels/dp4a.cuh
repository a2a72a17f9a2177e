// A block's tile of an integer matrix product by DP4A, four products an instruction: sm_61 and newer.
//
// Each thread owns 8 x 8 sums. Operand tiles, 32 deep, lie in two buffers in shared memory as words of four k, word k /
// 4 of every row side by side, so that a thread reads four rows at once. The next tile travels through registers while
// this one is multiplied; an operand whose rows are the fast index is transposed there, four bytes by four.
#pragma once
#include "byte_transpose.cuh"
#include "pieces.cuh"

#ifndef BLOCK_M
#define BLOCK_M 128
#define BLOCK_N 128
#endif

constexpr int BLOCK_K = 32;
constexpr int THREADS = BLOCK_M / 8 * (BLOCK_N / 8);
constexpr int MIN_BLOCKS = THREADS == 256 ? 2 : 4;
constexpr int WORDS = BLOCK_K / 4;

// An operand tile on its way from global memory to shared memory: words[k / 4][row].
template <Order ORDER, int ROWS>
struct Dp4aTile;

template <int ROWS>
struct Dp4aTile<K_CONTIGUOUS, ROWS> {
  typedef Pieces<K_CONTIGUOUS, ROWS, BLOCK_K, THREADS> P;
  int4 pieces[P::COUNT];

  template <class Source>
  __device__ __forceinline__ void fetch(Source& source) {
#pragma unroll
    for (int i = 0; i < P::COUNT; i++) pieces[i] = load_piece(source.piece(i));
    source.advance();
  }
  __device__ __forceinline__ void keep(int* words, int pitch) const {
#pragma unroll
    for (int i = 0; i < P::COUNT; i++) {
      int* at = words + P::first_k() / 4 * pitch + P::first_row() + P::distance(i);
      at[0] = pieces[i].x, at[pitch] = pieces[i].y, at[2 * pitch] = pieces[i].z, at[3 * pitch] = pieces[i].w;
    }
  }
};

template <int ROWS>
struct Dp4aTile<ROW_CONTIGUOUS, ROWS> {
  typedef Quads<ROWS, BLOCK_K, THREADS, 4, ROWS / 4> P;
  u32 lines[P::COUNT];

  template <class Source>
  __device__ __forceinline__ void fetch(Source& source) {
#pragma unroll
    for (int i = 0; i < P::COUNT; i++) {
      const i8* piece = source.piece(i);
      lines[i] = piece ? *reinterpret_cast<const u32*>(piece) : 0;
    }
    source.advance();
  }
  __device__ __forceinline__ void keep(int* words, int pitch) const {
#pragma unroll
    for (int round = 0; round < P::ROUNDS; round++) {
      const u32* k = lines + 4 * round;
      int* at = words + (P::first_k() + round * P::STEP) / 4 * pitch + P::first_row();
      *reinterpret_cast<int4*>(at) = transpose_bytes(k[0], k[1], k[2], k[3]);
    }
  }
};

template <Order LEFT, Order RIGHT>
class TileProduct {
 public:
  typedef typename Dp4aTile<LEFT, BLOCK_M>::P LeftPieces;
  typedef typename Dp4aTile<RIGHT, BLOCK_N>::P RightPieces;

  // Sums over k_tiles tiles of both operands.
  template <class Left, class Right>
  __device__ __forceinline__ void run(Left& left, Right& right, int k_tiles, char* shared) {
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int j = 0; j < 8; j++) sums[i][j] = 0;
    Dp4aTile<LEFT, BLOCK_M> left_tile;
    Dp4aTile<RIGHT, BLOCK_N> right_tile;
    int* buffers = reinterpret_cast<int*>(shared);
    const auto fetch = [&] {
      left_tile.fetch(left);
      right_tile.fetch(right);
    };
    const auto keep = [&](int tile) {
      int* buffer = buffers + tile % 2 * BUFFER_WORDS;
      left_tile.keep(buffer, LEFT_PITCH);
      right_tile.keep(buffer + WORDS * LEFT_PITCH, RIGHT_PITCH);
    };
    if (k_tiles > 0) {
      fetch();
      keep(0);
    }
    for (int tile = 0; tile < k_tiles; tile++) {
      __syncthreads();  // this tile is there, and everyone is done with the one before
      const bool more = tile + 1 < k_tiles;
      if (more) fetch();
      multiply(buffers + tile % 2 * BUFFER_WORDS);
      if (more) keep(tile + 1);
    }
    __syncthreads();  // the buffers are free for drain()
  }

  // Calls store(row, column, sums) for every four neighbouring columns of the tile. Sums go through shared memory, two
  // of a thread's rows at a time: not for the order, which is right, but for four copies of store's code instead of 16.
  template <class Store>
  __device__ __forceinline__ void drain(char* shared, const Store& store) const {
    constexpr int FOURS = BLOCK_N / 4;  // in a row
    constexpr int WARP_FOURS = 32 / ACROSS * 2 * FOURS;
    static_assert(THREADS / 32 * WARP_FOURS * 16 <= 2 * BUFFER_WORDS * 4, "the slabs must fit into the buffers");
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int4* slab = reinterpret_cast<int4*>(shared) + warp * WARP_FOURS;
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
#pragma unroll
      for (int next = 0; next < 2; next++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const int* four = sums[i + next] + 4 * j;
          slab[(lane / ACROSS * 2 + next) * FOURS + j * FOURS / 2 + lane % ACROSS] =
              make_int4(four[0], four[1], four[2], four[3]);
        }
      __syncwarp();
#pragma unroll 1
      for (int item = lane; item < WARP_FOURS; item += 32) {
        const int row = item / FOURS, owner = warp * (32 / ACROSS) + row / 2;
        store(i / 4 * (BLOCK_M / 2) + owner * 4 + i % 4 + row % 2, item % FOURS * 4,
              reinterpret_cast<const int*>(slab + item));
      }
      __syncwarp();
    }
  }

 private:
  // Four words more than rows: neighbouring k of a row then fall into different banks when a piece is kept.
  static constexpr int LEFT_PITCH = BLOCK_M + 4, RIGHT_PITCH = BLOCK_N + 4;
  static constexpr int BUFFER_WORDS = WORDS * (LEFT_PITCH + RIGHT_PITCH);

  static constexpr int ACROSS = BLOCK_N / 8;  // threads side by side

  int sums[8][8];  // rows and columns 0-3 are in the upper (left) half of the tile, 4-7 in the other

  static __device__ __forceinline__ int thread_row() { return threadIdx.x / ACROSS * 4; }
  static __device__ __forceinline__ int thread_column() { return threadIdx.x % ACROSS * 4; }

  static __device__ __forceinline__ void load_eight(int (&words)[8], const int* at, int half) {
    const int4 first = *reinterpret_cast<const int4*>(at), second = *reinterpret_cast<const int4*>(at + half);
    words[0] = first.x, words[1] = first.y, words[2] = first.z, words[3] = first.w;
    words[4] = second.x, words[5] = second.y, words[6] = second.z, words[7] = second.w;
  }

  __device__ __forceinline__ void multiply(const int* buffer) {
    const int* left = buffer + thread_row();
    const int* right = buffer + WORDS * LEFT_PITCH + thread_column();
#pragma unroll
    for (int word = 0; word < WORDS; word++) {
      int a[8], b[8];
      load_eight(a, left + word * LEFT_PITCH, BLOCK_M / 2);
      load_eight(b, right + word * RIGHT_PITCH, BLOCK_N / 2);
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) sums[i][j] = __dp4a(a[i], b[j], sums[i][j]);
    }
  }
};
