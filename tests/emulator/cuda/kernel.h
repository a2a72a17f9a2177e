// Included before every kernel source that is compiled for the emulated machine.
#pragma once
#include <tuple>
#include <type_traits>
#include <utility>

#include "hopper_primitives.h"
#include "primitives.h"

namespace emulator {

template <class... Parameters>
struct Signature {
  template <void (*KERNEL)(Parameters...)>
  static void call(void** arguments) {
    call_with<KERNEL>(arguments, std::index_sequence_for<Parameters...>());
  }
  template <void (*KERNEL)(Parameters...), size_t... I>
  static void call_with(void** arguments, std::index_sequence<I...>) {
    KERNEL(*static_cast<std::decay_t<Parameters>*>(arguments[I])...);
  }
  static int sizes(int* bytes) {
    int count = 0;
    ((bytes[count++] = sizeof(Parameters)), ...);
    return count;
  }
};
template <class... Parameters>
Signature<Parameters...> signature_of(void (*)(Parameters...));

}  // namespace emulator

// What the Python side calls: the launch, and the sizes of the parameters in bytes (returns how many there are).
#define EMULATOR_ENTRY(kernel)                                                                           \
  extern "C" int launch_##kernel(const emulator::LaunchConfig* config_, void** arguments_, char* error_, \
                                 int capacity_) {                                                        \
    using Parameters_ = decltype(emulator::signature_of(kernel));                                        \
    return emulator::run_grid(*config_, Parameters_::call<kernel>, arguments_, error_, capacity_);       \
  }                                                                                                      \
  extern "C" int sizes_##kernel(int* sizes_) { return decltype(emulator::signature_of(kernel))::sizes(sizes_); }
