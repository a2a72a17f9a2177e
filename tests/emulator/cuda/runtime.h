// The machine on which kernels run when there is no GPU: what kernel code, compiled by g++, asks of it.
//
// One host thread runs everything. Each CUDA thread is a fiber; blocks run one after another; a thread runs until it
// waits for others. The scheduler (runtime.cpp) is compiled once and never instrumented; kernels are compiled with a
// sanitizer on demand, so that reports speak of kernel lines alone.
#pragma once
#include <cstdint>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace emulator {

// When an asynchronous copy (or matrix product) takes effect. Early shows memory overwritten while it is still read;
// late shows data used before it was waited for.
enum CopyTiming : unsigned { EARLY = 0, LATE = 1, RANDOM = 2 };

struct LaunchConfig {
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_bytes;
  unsigned schedule;  // 0: threads take turns in order, 1: in reverse; others: shuffled every round, by this seed
  unsigned copy_timing;
};

struct Thread {  // the part of a CUDA thread that kernel code sees
  dim3 index;
  unsigned linear, lane, warp;
};

struct Block {
  dim3 index, size, grid;
  char* shared;
  unsigned shared_bytes;
  char* operands;  // shared memory as wgmma sees it: what writers have fenced. Null until a barrier is set up
};

struct AsyncCopy {
  void* to;
  const void* from;
  int bytes;
  bool valid;  // false: fill with zeros
  int group;
};

struct Product {  // by a warpgroup; each thread computes its own sums
  int* sums;
  int columns;
  uint64_t left, right;  // descriptors
  int group;
};

struct Range {  // of shared memory
  void* at;
  int bytes;
};

constexpr int EXCHANGE_WORDS = 8;
using Posted = uint64_t[EXCHANGE_WORDS];

extern Thread* thread;  // the running one
extern Block block;

void barrier_block();
void barrier_warp();
Posted* exchange(const uint64_t* words, int count);  // post words; returns what all 32 lanes of the warp posted
bool takes_effect_now();                             // of an asynchronous operation issued here
void defer_copy(const AsyncCopy& copy);
void close_copy_group();
bool next_due_copy(int groups_that_may_stay, AsyncCopy* due);
void open_product_group();
void check_product_group();  // fails unless it is open
void defer_product(const Product& product);
void close_product_group();
bool next_due_product(int groups_that_may_stay, Product* due);
void wrote_operand(void* at,
                   int bytes);  // by this thread, not fenced yet; kernels without barriers have no such reader
bool next_unfenced(Range* range);

// mbarrier: 8 bytes of shared memory
void barrier_init(void* barrier, unsigned arrivals);
void barrier_arrive(void* barrier);
void barrier_wait(void* barrier, unsigned parity);
void fail(const char* what);          // ends the launch with an error; the thread goes no further
void yield(const char* waiting_for);  // let others run: for a thread that polls memory

using Kernel = void (*)(void** arguments);
int run_grid(const LaunchConfig& config, Kernel kernel, void** arguments, char* error, int error_bytes);

}  // namespace emulator
