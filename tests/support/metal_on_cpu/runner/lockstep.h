// The threads of a threadgroup as fibers that meet at barriers and at SIMD-group functions.
#pragma once

#include <cstdint>
#include <string>

#include "interface.h"
#include "memory.h"

namespace metal_on_cpu {

struct Launch {
  Position grid;
  Position threadgroup;
  void (*entry)();
};

// Runs every threadgroup of the launch, one after the other.
void run_launch(const Launch& launch);

// The running thread, or null while none runs.
struct Fiber;
extern Fiber* running;

// Whether an address lies on the running thread's stack.
bool on_stack(const void* address);
const Actor& actor();

// Entering and leaving a function, so that one call in the source has one place.
void enter_function(const void* caller);
void leave_function();

// A thread of the launch in words, by its id.
std::string name_of_thread(uint32_t id);
// The running thread in words; empty while none runs.
std::string name_of_running();

}  // namespace metal_on_cpu
