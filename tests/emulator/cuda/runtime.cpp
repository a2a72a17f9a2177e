// Scheduler of the emulated machine: fibers, barriers, the exchange of words within a warp, deferred copies.
#include "runtime.h"

#include <algorithm>
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "asynchronous.h"
#include "fiber.h"

namespace emulator {
namespace {

constexpr unsigned WARP_LANES = 32;
constexpr unsigned POLLS_BEFORE_DEADLOCK = 200000;

struct Barrier {
  unsigned arrived = 0;
  unsigned generation = 0;
  char order[2];  // what ThreadSanitizer orders by, in turn
};

struct Warp {
  Barrier barrier;
  unsigned threads = 0;
  Posted posted[2][WARP_LANES];  // in turn, so that one barrier an exchange is enough
};

struct Worker : Thread {
  Fiber fiber;
  bool finished = false;
  Barrier* waits_at = nullptr;
  unsigned waits_for_generation = 0;
  unsigned polls = 0;
  unsigned exchange_turn = 0;
  const MemoryBarrier* waits_for_phase = nullptr;
  unsigned awaited_parity = 0;
  Queue<AsyncCopy> copies;
  Queue<Product> products;
  bool product_group_open = false;
  std::vector<Range> unfenced;
};

struct Machine {
  LaunchConfig config;
  Kernel kernel;
  void** arguments;
  std::vector<Worker> workers;
  std::vector<Warp> warps;
  Barrier block_barrier;
  std::mt19937 random;
  std::string error;
  Fiber scheduler;
  std::vector<void*> shared;  // of every block of the launch
  std::vector<Remains> ended;
  char launch_order, end_order;
};

Machine machine;

Worker& self() { return *static_cast<Worker*>(thread); }

void give_up_turn() { switch_fiber(self().fiber, machine.scheduler); }

void run_thread() {
  enter_fiber(machine.scheduler);
  acquire(&machine.launch_order);
  machine.kernel(machine.arguments);
  release(&machine.end_order);
  // By the thread that filled them: ThreadSanitizer watches memory, too.
  std::vector<AsyncCopy>().swap(self().copies.operations);
  std::vector<Product>().swap(self().products.operations);
  std::vector<Range>().swap(self().unfenced);
  self().finished = true;
  leave_fiber(self().fiber, machine.scheduler);
}

void wait_at(Barrier& barrier, unsigned threads) {
  Worker& me = self();
  const unsigned generation = barrier.generation;
  release(&barrier.order[generation & 1]);
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    barrier.generation++;
    if (machine.config.schedule >= 2) give_up_turn();  // the last to arrive need not be the first to go on
  } else {
    me.waits_at = &barrier;
    me.waits_for_generation = generation;
    give_up_turn();
  }
  acquire(&barrier.order[generation & 1]);
}

bool has_ended(const MemoryBarrier& barrier, unsigned parity) { return (barrier.phase & 1) != parity; }

bool can_run(const Worker& w) {
  if (w.waits_for_phase && !has_ended(*w.waits_for_phase, w.awaited_parity)) return false;
  return !w.finished && !(w.waits_at && w.waits_at->generation == w.waits_for_generation);
}

// Memory that starts as noise, in an allocation of its own of exactly its size: AddressSanitizer sees its end, and
// ThreadSanitizer no race with the block before.
char* noise(unsigned bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, SHARED_ALIGNMENT, std::max(1u, bytes))) abort();
  machine.shared.push_back(memory);
  std::generate_n(static_cast<unsigned*>(memory), bytes / sizeof(unsigned), std::ref(machine.random));
  return static_cast<char*>(memory);
}

void prepare_block(const dim3& index) {
  const unsigned* size = machine.config.block;
  const unsigned threads = size[0] * size[1] * size[2];
  block.index = index;
  machine.block_barrier = Barrier();
  for (Warp& warp : machine.warps) {
    warp.barrier = Barrier();
    warp.threads = 0;
  }
  for (unsigned i = 0; i < threads; i++) {
    Worker& w = machine.workers[i] = Worker();
    w.linear = i;
    w.lane = i % WARP_LANES;
    w.warp = i / WARP_LANES;
    w.index = {i % size[0], i / size[0] % size[1], i / (size[0] * size[1])};
    machine.warps[w.warp].threads++;
    start_fiber(w.fiber, i, run_thread);
  }
  block.shared = noise(block.shared_bytes);
  block.operands = nullptr;
  // Threads come after this line and before the end of the launch, but no block after another: a race of blocks is
  // seen.
  release(&machine.launch_order);
}

// One turn for each thread, round after round, until all have finished.
void run_block() {
  std::vector<unsigned> order(machine.workers.size());
  for (unsigned i = 0; i < order.size(); i++) order[i] = machine.config.schedule == 1 ? order.size() - 1 - i : i;
  for (size_t left = order.size(); left && machine.error.empty();) {
    if (machine.config.schedule >= 2) std::shuffle(order.begin(), order.end(), machine.random);
    bool progress = false;
    for (unsigned i : order) {
      Worker& w = machine.workers[i];
      if (!can_run(w)) continue;
      progress = true;
      w.waits_at = nullptr;
      w.waits_for_phase = nullptr;
      thread = &w;
      switch_fiber(machine.scheduler, w.fiber);
      if (w.finished) left--;
      if (!machine.error.empty()) break;
    }
    if (!progress)
      machine.error = "deadlock: " + std::to_string(left) + " threads wait at a barrier that the others never reach";
  }
}

void finish_block() {
  for (const Worker& w : machine.workers) machine.ended.push_back({w.fiber.sanitizer, w.fiber.context.uc_stack.ss_sp});
}

void finish_grid() {
  acquire(&machine.end_order);
  for (void* shared : machine.shared) free(shared);
  machine.shared.clear();
  for (const Remains& remains : machine.ended) forget(remains);
  machine.ended.clear();
}

}  // namespace

Thread* thread;
Block block;

void barrier_block() { wait_at(machine.block_barrier, machine.workers.size()); }

void barrier_warp() {
  Warp& warp = machine.warps[self().warp];
  wait_at(warp.barrier, warp.threads);
}

Posted* exchange(const uint64_t* words, int count) {
  Worker& me = self();
  Posted* slots = machine.warps[me.warp].posted[me.exchange_turn ^= 1];
  for (int i = 0; i < count; i++) slots[me.lane][i] = words[i];
  barrier_warp();
  return slots;
}

bool takes_effect_now() {
  if (machine.config.copy_timing == RANDOM) return machine.random() & 1;
  return machine.config.copy_timing == EARLY;
}

void defer_copy(const AsyncCopy& copy) { self().copies.defer(copy); }
void close_copy_group() { self().copies.group++; }
bool next_due_copy(int groups_that_may_stay, AsyncCopy* due) {
  return self().copies.next_due(groups_that_may_stay, due);
}

void open_product_group() { self().product_group_open = true; }
void check_product_group() {
  // The ISA asks for it where other instructions touched the sums; here it is asked for at every group.
  if (!self().product_group_open) fail("wgmma: no wgmma.fence since the last group of products");
}
void defer_product(const Product& product) { self().products.defer(product); }
void close_product_group() {
  self().product_group_open = false;
  self().products.group++;
}
bool next_due_product(int groups_that_may_stay, Product* due) {
  return self().products.next_due(groups_that_may_stay, due);
}

void wrote_operand(void* at, int bytes) {
  if (block.operands) self().unfenced.push_back({at, bytes});
}
bool next_unfenced(Range* range) {
  std::vector<Range>& unfenced = self().unfenced;
  if (unfenced.empty()) return false;
  *range = unfenced.back();
  unfenced.pop_back();
  return true;
}

MemoryBarrier& at_barrier(void* barrier) {
  if (static_cast<MemoryBarrier*>(barrier)->magic != MemoryBarrier::MAGIC) fail("mbarrier: it was not set up");
  return *static_cast<MemoryBarrier*>(barrier);
}
void barrier_init(void* barrier, unsigned arrivals) {
  *static_cast<MemoryBarrier*>(barrier) = {MemoryBarrier::MAGIC, static_cast<uint16_t>(arrivals),
                                           static_cast<uint16_t>(arrivals), 0};
  if (!block.operands) block.operands = noise(block.shared_bytes);
}
void barrier_arrive(void* barrier) {
  MemoryBarrier& b = at_barrier(barrier);
  release(barrier);
  if (--b.pending) return;
  b.pending = b.arrivals;
  b.phase++;
}
void barrier_wait(void* barrier, unsigned parity) {
  const MemoryBarrier& b = at_barrier(barrier);
  if (!has_ended(b, parity)) {
    self().waits_for_phase = &b;
    self().awaited_parity = parity;
    give_up_turn();
  }
  acquire(barrier);
}

void fail(const char* what) {
  machine.error = what;
  for (;;) give_up_turn();
}

void yield(const char* waiting_for) {
  if (++self().polls > POLLS_BEFORE_DEADLOCK) fail((std::string("waits for ever: ") + waiting_for).c_str());
  give_up_turn();
}

int run_grid(const LaunchConfig& config, Kernel kernel, void** arguments, char* error, int error_bytes) {
  machine.config = config;
  machine.kernel = kernel;
  machine.arguments = arguments;
  machine.error.clear();
  machine.random.seed(config.schedule);
  adopt_current(machine.scheduler);
  block.size = {config.block[0], config.block[1], config.block[2]};
  block.grid = {config.grid[0], config.grid[1], config.grid[2]};
  block.shared_bytes = config.shared_bytes;
  const unsigned threads = config.block[0] * config.block[1] * config.block[2];
  machine.workers.resize(threads);
  // Threads add to it: were it to grow then, ThreadSanitizer would take that for a race of theirs.
  machine.shared.reserve(2 * config.grid[0] * config.grid[1] * config.grid[2]);
  machine.warps.resize((threads + WARP_LANES - 1) / WARP_LANES);
  for (unsigned z = 0; z < config.grid[2]; z++)
    for (unsigned y = 0; y < config.grid[1]; y++)
      for (unsigned x = 0; x < config.grid[0] && machine.error.empty(); x++) {
        prepare_block({x, y, z});
        run_block();
        finish_block();
      }
  finish_grid();
  if (machine.error.empty()) return 0;
  const dim3& at = block.index;
  snprintf(error, error_bytes, "block (%u, %u, %u): %s", at.x, at.y, at.z, machine.error.c_str());
  return 1;
}

}  // namespace emulator
