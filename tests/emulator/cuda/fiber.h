// Fibers of the emulated machine, told to the sanitizer where there is one.
//
// Without a sanitizer a switch is _setjmp and _longjmp after one makecontext: no system call. Sanitizers must be told
// of every switch, and there swapcontext will do.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdlib>

#if defined(EMULATOR_THREAD_SANITIZER)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#elif defined(EMULATOR_ADDRESS_SANITIZER)
extern "C" {
void __sanitizer_start_switch_fiber(void** save, const void* stack, size_t bytes);
void __sanitizer_finish_switch_fiber(void* save, const void** old_stack, size_t* old_bytes);
}
#endif

namespace emulator {

constexpr size_t SHARED_ALIGNMENT = 1024;
#if defined(EMULATOR_THREAD_SANITIZER) || defined(EMULATOR_ADDRESS_SANITIZER)
constexpr size_t STACK_BYTES = 256 << 10;
#else
constexpr size_t STACK_BYTES = 64 << 10;
#endif

struct Fiber {
  ucontext_t context;
  jmp_buf resume_here;
  bool started = false;
  void* sanitizer = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
};

// What is left of a fiber after its block; ThreadSanitizer needs it to the end of the grid, where the memory or the
// handle of a fiber that has taken the place of another would pass for those of the same thread.
struct Remains {
  void* sanitizer;
  void* stack;
};

inline char* stack_of(unsigned thread) {
#if defined(EMULATOR_THREAD_SANITIZER)
  (void)thread;
  return static_cast<char*>(malloc(STACK_BYTES));
#else  // stacks outlive blocks and launches: thousands of blocks would otherwise map and unmap them
  constexpr unsigned MOST_THREADS = 1024;
  static char* stacks[MOST_THREADS];
  if (!stacks[thread]) stacks[thread] = static_cast<char*>(malloc(STACK_BYTES));
  return stacks[thread];
#endif
}

inline void start_fiber(Fiber& fiber, unsigned thread, void (*body)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack_of(thread);
  fiber.context.uc_stack.ss_size = STACK_BYTES;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, body, 0);
  fiber.stack = fiber.context.uc_stack.ss_sp;
  fiber.stack_bytes = STACK_BYTES;
#if defined(EMULATOR_THREAD_SANITIZER)
  fiber.sanitizer = __tsan_create_fiber(0);
#endif
}

#if defined(EMULATOR_THREAD_SANITIZER)

constexpr unsigned NO_ORDER_IMPLIED = 1;  // a switch says nothing about memory; only barriers do
inline void acquire(void* at) { __tsan_acquire(at); }
inline void release(void* at) { __tsan_release(at); }
inline void adopt_current(Fiber& fiber) { fiber.sanitizer = __tsan_get_current_fiber(); }
inline void forget(const Remains& remains) {
  __tsan_destroy_fiber(remains.sanitizer);
  free(remains.stack);
}
inline void enter_fiber(Fiber&) {}
inline void switch_fiber(Fiber& from, Fiber& to) {
  __tsan_switch_to_fiber(to.sanitizer, NO_ORDER_IMPLIED);
  swapcontext(&from.context, &to.context);
}
inline void leave_fiber(Fiber& from, Fiber& to) { switch_fiber(from, to); }

#elif defined(EMULATOR_ADDRESS_SANITIZER)

inline void acquire(void*) {}
inline void release(void*) {}
inline void adopt_current(Fiber&) {}
inline void forget(const Remains&) {}
inline void enter_fiber(Fiber& scheduler) {  // learns the scheduler's own stack on the way
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_bytes);
}
inline void switch_fiber(Fiber& from, Fiber& to) {
  __sanitizer_start_switch_fiber(&from.sanitizer, to.stack, to.stack_bytes);
  swapcontext(&from.context, &to.context);
  __sanitizer_finish_switch_fiber(from.sanitizer, nullptr, nullptr);
}
inline void leave_fiber(Fiber& from, Fiber& to) {
  __sanitizer_start_switch_fiber(nullptr, to.stack, to.stack_bytes);
  swapcontext(&from.context, &to.context);
}

#else

inline void acquire(void*) {}
inline void release(void*) {}
inline void adopt_current(Fiber& fiber) { fiber.started = true; }
inline void forget(const Remains&) {}
inline void enter_fiber(Fiber&) {}
inline void switch_fiber(Fiber& from, Fiber& to) {
  if (_setjmp(from.resume_here)) return;
  if (to.started) _longjmp(to.resume_here, 1);
  to.started = true;
  setcontext(&to.context);
}
inline void leave_fiber(Fiber& from, Fiber& to) { switch_fiber(from, to); }

#endif

}  // namespace emulator
