// macOS has its contexts behind these names.
#ifdef __APPLE__
#define _XOPEN_SOURCE 600
#define _DARWIN_C_SOURCE
#endif

#include "lockstep.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "fault.h"

namespace metal_on_cpu {

namespace {

constexpr uint32_t kLanes = 32;
constexpr size_t kStack = 64 << 10;
constexpr size_t kPage = 16 << 10;
constexpr size_t kValue = 64;

enum class State { ready, simd, barrier, finished };

}  // namespace

struct Fiber {
  Thread values{};
  Actor who{};
  State state = State::finished;
  // Where it waits: the operation, its line, and the calls that led there.
  const char* operation = "";
  int line = 0;
  uint64_t place = 0;
  int flags = 0;
  std::vector<uint64_t> calls;
  uint32_t turn = 0;
  char* stack = nullptr;
  ucontext_t first{};
  jmp_buf at;
  bool started = false;
};

Fiber* running = nullptr;

namespace {

Launch launch;
std::vector<std::unique_ptr<Fiber>> fibers;
uint32_t live = 0;  // threads of the threadgroup that is running
ucontext_t scheduler_first;
jmp_buf scheduler;
// Values on offer, two per lane: a lane may be one operation ahead of the one that still reads.
char offers[2][1024][kValue];

Position group_counts() {
  auto count = [](uint32_t grid, uint32_t group) { return (grid + group - 1) / group; };
  return {count(launch.grid.x, launch.threadgroup.x), count(launch.grid.y, launch.threadgroup.y),
          count(launch.grid.z, launch.threadgroup.z)};
}

std::string triple(const Position& p) {
  return "(" + std::to_string(p.x) + ", " + std::to_string(p.y) + ", " + std::to_string(p.z) + ")";
}

void body() {
  for (;;) {
    launch.entry();
    running->state = State::finished;
    if (!_setjmp(running->at)) _longjmp(scheduler, 1);
  }
}

void make_stack(Fiber& fiber) {
  void* at = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                  -1, 0);
  if (at == MAP_FAILED) fault("no memory", "the runner could not map a stack", 0, nullptr);
  mprotect(at, kPage, PROT_NONE);
  fiber.stack = static_cast<char*>(at) + kPage;
}

void resume(Fiber& fiber) {
  running = &fiber;
  if (!_setjmp(scheduler)) {
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    make_stack(fiber);
    getcontext(&fiber.first);
    fiber.first.uc_stack.ss_sp = fiber.stack;
    fiber.first.uc_stack.ss_size = kStack;
    fiber.first.uc_link = &scheduler_first;
    makecontext(&fiber.first, body, 0);
    setcontext(&fiber.first);
  }
  running = nullptr;
}

void wait(State state, const char* operation, int line, int flags, const void* pc) {
  Fiber& fiber = *running;
  fiber.state = state;
  fiber.operation = operation;
  fiber.line = line;
  fiber.flags = flags;
  fiber.place = (fiber.calls.empty() ? 0 : fiber.calls.back()) * 1099511628211u ^
                reinterpret_cast<uintptr_t>(pc);
  if (!_setjmp(fiber.at)) _longjmp(scheduler, 1);
}

std::string where(const Fiber& fiber) {
  std::string who = "thread " + triple(fiber.values.thread_position_in_threadgroup);
  if (fiber.state == State::finished) return who + " has returned";
  return who + " is at " + fiber.operation + " (line " + std::to_string(fiber.line) + ")";
}

std::string in_group(const Fiber& fiber) {
  return " in threadgroup " + triple(fiber.values.threadgroup_position_in_grid);
}

// Lets a SIMD group go on whose lanes have all come to one operation.
bool release_simd_group(uint32_t first, uint32_t end) {
  Fiber* waiting = nullptr;
  for (uint32_t i = first; i < end; ++i)
    if (fibers[i]->state == State::simd && !waiting) waiting = fibers[i].get();
  if (!waiting) return false;
  for (uint32_t i = first; i < end; ++i) {
    Fiber& other = *fibers[i];
    bool together = other.state == State::simd && other.place == waiting->place &&
                    other.line == waiting->line && other.flags == waiting->flags &&
                    std::strcmp(other.operation, waiting->operation) == 0;
    if (!together)
      fault("SIMD divergence", "the lanes of SIMD group " + std::to_string(first / kLanes) +
            in_group(*waiting) + " are at different operations: " + where(*waiting) + ", " +
            where(other) + (other.state == State::simd && other.line == waiting->line
                            ? ", reached by other calls" : ""), waiting->line, nullptr);
  }
  for (uint32_t i = first; i < end; ++i) {
    fibers[i]->state = State::ready;
    if (fibers[i]->flags & 2) ++fibers[i]->who.simd_time;
  }
  return true;
}

// Lets the threadgroup go on when all its threads are at one barrier; false when all are done.
bool release_barrier() {
  Fiber* waiting = nullptr;
  for (uint32_t i = 0; i < live; ++i)
    if (fibers[i]->state == State::barrier && !waiting) waiting = fibers[i].get();
  if (!waiting) return false;
  for (uint32_t i = 0; i < live; ++i) {
    Fiber& other = *fibers[i];
    if (other.state != State::barrier || other.place != waiting->place ||
        other.line != waiting->line)
      fault("barrier divergence", "not all threads" + in_group(*waiting) +
            " are at one barrier: " + where(*waiting) + ", " + where(other), waiting->line,
            nullptr);
  }
  for (uint32_t i = 0; i < live; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.state = State::ready;
    if (fiber.flags & 2) ++fiber.who.shared_time;
    if (fiber.flags & 1) ++fiber.who.device_time;
  }
  return true;
}

void run_threadgroup() {
  for (;;) {
    for (uint32_t i = 0; i < live; ++i)
      if (fibers[i]->state == State::ready) resume(*fibers[i]);
    bool released = false;
    for (uint32_t first = 0; first < live; first += kLanes)
      released |= release_simd_group(first, std::min(first + kLanes, live));
    if (!released && !release_barrier()) return;
  }
}

void place_threads(const Position& group, uint32_t group_index) {
  auto size = [](uint32_t grid, uint32_t nominal, uint32_t at) {
    return std::min(nominal, grid - at * nominal);
  };
  const Position nominal = launch.threadgroup, grid = launch.grid;
  const Position here = {size(grid.x, nominal.x, group.x), size(grid.y, nominal.y, group.y),
                         size(grid.z, nominal.z, group.z)};
  auto per = [](const Position& p, uint32_t lanes) {
    return (p.x * p.y * p.z + lanes - 1) / lanes;
  };
  live = here.x * here.y * here.z;
  while (fibers.size() < live) fibers.push_back(std::make_unique<Fiber>());
  for (uint32_t i = 0; i < live; ++i) {
    Fiber& fiber = *fibers[i];
    const Position in = {i % here.x, i / here.x % here.y, i / here.x / here.y};
    Thread& t = fiber.values;
    t = Thread{};
    t.dispatch_threads_per_threadgroup = nominal;
    t.grid_size = t.threads_per_grid = grid;
    t.thread_position_in_grid = {group.x * nominal.x + in.x, group.y * nominal.y + in.y,
                                 group.z * nominal.z + in.z};
    t.thread_position_in_threadgroup = in;
    t.threadgroup_position_in_grid = group;
    t.threadgroups_per_grid = group_counts();
    t.threads_per_threadgroup = here;
    t.dispatch_quadgroups_per_threadgroup = per(nominal, 4);
    t.dispatch_simdgroups_per_threadgroup = per(nominal, kLanes);
    t.quadgroup_index_in_threadgroup = i / 4;
    t.quadgroups_per_threadgroup = per(here, 4);
    t.simdgroup_index_in_threadgroup = i / kLanes;
    t.simdgroups_per_threadgroup = per(here, kLanes);
    t.thread_execution_width = t.threads_per_simdgroup = kLanes;
    t.thread_index_in_quadgroup = i % 4;
    t.thread_index_in_simdgroup = i % kLanes;
    t.thread_index_in_threadgroup = i;
    uint32_t id = (t.thread_position_in_grid.z * grid.y + t.thread_position_in_grid.y) * grid.x +
                  t.thread_position_in_grid.x + 1;
    fiber.who = {id, group_index + 1, i / kLanes, 0, 0, 0};
    fiber.state = State::ready;
    fiber.calls.clear();
    fiber.turn = 0;
  }
}

// The slot of a lane's offer, after all lanes of its SIMD group have made theirs.
char (*exchange(const char* operation, int line, const void* value, size_t bytes,
                const void* pc))[kValue] {
  Fiber& fiber = *running;
  if (bytes > kValue)
    fault("SIMD value", std::string(operation) + " of a value too large", line, nullptr);
  uint32_t turn = fiber.turn++ % 2;
  std::memcpy(offers[turn][fiber.values.thread_index_in_threadgroup], value, bytes);
  wait(State::simd, operation, line, 0, pc);
  return &offers[turn][fiber.values.simdgroup_index_in_threadgroup * kLanes];
}

int lanes_of(const Fiber& fiber) {
  return int(std::min(kLanes, live - fiber.values.simdgroup_index_in_threadgroup * kLanes));
}

}  // namespace

void run_launch(const Launch& asked) {
  launch = asked;
  const Position counts = group_counts();
  uint32_t index = 0;
  for (uint32_t z = 0; z < counts.z; ++z)
    for (uint32_t y = 0; y < counts.y; ++y)
      for (uint32_t x = 0; x < counts.x; ++x) {
        memory.start_threadgroup();
        place_threads({x, y, z}, index++);
        run_threadgroup();
      }
}

bool on_stack(const void* address) {
  const char* at = static_cast<const char*>(address);
  return at >= running->stack && at < running->stack + kStack;
}

const Actor& actor() { return running->who; }

void enter_function(const void* caller) {
  std::vector<uint64_t>& calls = running->calls;
  uint64_t above = calls.empty() ? 0 : calls.back();
  calls.push_back(above * 1099511628211u ^ reinterpret_cast<uintptr_t>(caller));
}

void leave_function() {
  if (!running->calls.empty()) running->calls.pop_back();
}

std::string name_of_thread(uint32_t id) {
  const Position& grid = launch.grid;
  uint32_t i = id - 1;
  return "thread " + triple({i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y}) +
         " of the grid";
}

std::string name_of_running() {
  if (!running) return "";
  return "thread " + triple(running->values.thread_position_in_threadgroup) + in_group(*running);
}

}  // namespace metal_on_cpu

using namespace metal_on_cpu;

extern "C" {

void metal_on_cpu_thread(Thread* values) { *values = running->values; }

void metal_on_cpu_threadgroup_barrier(int flags, int line) {
  wait(State::barrier, "threadgroup_barrier", line, flags, __builtin_return_address(0));
}

void metal_on_cpu_simdgroup_barrier(int flags, int line) {
  wait(State::simd, "simdgroup_barrier", line, flags, __builtin_return_address(0));
}

int metal_on_cpu_lane() { return int(running->values.thread_index_in_simdgroup); }

int metal_on_cpu_gather(const char* operation, int line, const void* value, size_t bytes,
                        void* lanes) {
  auto offered = exchange(operation, line, value, bytes, __builtin_return_address(0));
  int count = lanes_of(*running);
  for (int i = 0; i < count; ++i)
    std::memcpy(static_cast<char*>(lanes) + i * bytes, offered[i], bytes);
  return count;
}

void metal_on_cpu_shuffle(const char* operation, int line, const void* value, size_t bytes,
                          int lane, void* result) {
  auto offered = exchange(operation, line, value, bytes, __builtin_return_address(0));
  if (lane < 0 || lane >= lanes_of(*running))
    fault("SIMD lane", std::string(operation) + " asks for lane " + std::to_string(lane) +
          " of a SIMD group of " + std::to_string(lanes_of(*running)) + " threads", line, nullptr);
  std::memcpy(result, offered[lane], bytes);
}

void* metal_on_cpu_threadgroup_variable(const char* name, size_t bytes, size_t alignment) {
  return memory.threadgroup_variable(name, bytes, alignment);
}
}
