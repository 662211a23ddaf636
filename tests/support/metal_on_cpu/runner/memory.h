// Every byte that a kernel may touch, and what has happened to it so far.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace metal_on_cpu {

enum class Role { input, output, threadgroup };

// The thread that touches memory, and how many barriers order its accesses after others'.
struct Actor {
  uint32_t id;           // in the launch, from 1
  uint32_t group;        // its threadgroup, from 1
  uint32_t simd;         // its SIMD group in the threadgroup
  uint32_t shared_time;  // threadgroup barriers for threadgroup memory passed
  uint32_t device_time;  // threadgroup barriers for device memory passed
  uint32_t simd_time;    // SIMD-group barriers for threadgroup memory passed
};

struct Access {
  Actor by{};  // id 0: none
};

// Per byte: who wrote it last, and up to two threads that have read it since.
struct History {
  Access write;
  Access reads[2];
};

struct Region {
  std::string name;
  Role role;
  char* base;
  size_t bytes;
  // Addresses this far from the region, on either side, are taken for it.
  size_t reach;
  std::vector<History> history;
};

class Memory {
 public:
  // Adds a buffer whose address is `offset` bytes past a page.
  char* add_buffer(const std::string& name, Role role, size_t bytes, size_t offset);
  // Marks an output as written by nobody in particular, before the launch.
  void initialise(size_t buffer);

  // The variable of that name in the threadgroup that is running, made on first use.
  char* threadgroup_variable(const std::string& name, size_t bytes, size_t alignment);
  void start_threadgroup();

  // Ends the run where the access is a fault.
  void touch(const void* address, size_t bytes, bool write, const Actor& actor, const void* pc);

  // Reports the outputs that were not written, if any.
  void check_outputs() const;

 private:
  void touch_output(Region& region, size_t at, size_t bytes, bool write, const Actor& actor,
                    const void* pc);
  void touch_shared(Region& region, size_t at, size_t bytes, bool write, const Actor& actor,
                    const void* pc);
  std::vector<Region> buffers_;
  std::vector<Region> shared_;
  char* arena_ = nullptr;
  size_t arena_used_ = 0;
  size_t shared_bytes_ = 0;
};

extern Memory memory;

}  // namespace metal_on_cpu
