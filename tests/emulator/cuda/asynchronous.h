// What a thread leaves to be done, and what threads wait for in memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulator {

// Asynchronous operations of a thread, by the groups in which they are waited for.
template <class Operation>
struct Queue {
  std::vector<Operation> operations;
  int group = 0;

  void defer(const Operation& operation) {
    operations.push_back(operation);
    operations.back().group = group;
  }
  bool next_due(int groups_that_may_stay, Operation* due) {
    for (size_t i = 0; i < operations.size(); i++) {
      if (operations[i].group >= group - groups_that_may_stay) continue;
      *due = operations[i];
      operations.erase(operations.begin() + i);
      return true;
    }
    return false;
  }
};

struct MemoryBarrier {  // mbarrier; its bits are opaque to kernels
  uint16_t magic, arrivals, pending, phase;
  static constexpr uint16_t MAGIC = 0x5ba7;
};
static_assert(sizeof(MemoryBarrier) == 8);

}  // namespace emulator
