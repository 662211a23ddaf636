// What a kernel calls in the runner, and what the runner calls in a kernel.
#pragma once

#include <cstddef>
#include <cstdint>

namespace metal_on_cpu {

struct Position {
  uint32_t x, y, z;
};

// One thread's values of the Metal attributes that mx.fast.metal_kernel knows.
struct Thread {
  Position dispatch_threads_per_threadgroup;
  Position grid_origin;
  Position grid_size;
  Position thread_position_in_grid;
  Position thread_position_in_threadgroup;
  Position threadgroup_position_in_grid;
  Position threadgroups_per_grid;
  Position threads_per_grid;
  Position threads_per_threadgroup;
  uint32_t dispatch_quadgroups_per_threadgroup;
  uint32_t dispatch_simdgroups_per_threadgroup;
  uint32_t quadgroup_index_in_threadgroup;
  uint32_t quadgroups_per_threadgroup;
  uint32_t simdgroup_index_in_threadgroup;
  uint32_t simdgroups_per_threadgroup;
  uint32_t thread_execution_width;
  uint32_t thread_index_in_quadgroup;
  uint32_t thread_index_in_simdgroup;
  uint32_t thread_index_in_threadgroup;
  uint32_t threads_per_simdgroup;
};

}  // namespace metal_on_cpu

extern "C" {

// In the runner. `line` is the line of the call in the kernel's source.
void metal_on_cpu_thread(metal_on_cpu::Thread* thread_values);
void* metal_on_cpu_buffer(int index);
void* metal_on_cpu_threadgroup_variable(const char* name, size_t bytes, size_t alignment);
void metal_on_cpu_threadgroup_barrier(int flags, int line);
void metal_on_cpu_simdgroup_barrier(int flags, int line);
int metal_on_cpu_lane();
// Fills `lanes` with the value of every lane and returns how many there are.
int metal_on_cpu_gather(const char* operation, int line, const void* value, size_t bytes,
                        void* lanes);
void metal_on_cpu_shuffle(const char* operation, int line, const void* value, size_t bytes,
                          int lane, void* result);

// In the kernel: runs one thread.
void metal_on_cpu_entry();
}
