#include "memory.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstring>
#include <unordered_set>

#include "fault.h"
#include "interface.h"
#include "lockstep.h"

namespace metal_on_cpu {

Memory memory;

namespace {

constexpr size_t kReach = size_t(64) << 20;
constexpr size_t kArena = size_t(4) << 20;
constexpr size_t kGap = 4096;
constexpr size_t kThreadgroupLimit = 32768;
constexpr unsigned char kPoison = 0xfe;

char* reserve(size_t bytes) {
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) fault("no memory", "the runner could not map a buffer", 0, nullptr);
  return static_cast<char*>(at);
}

std::string number(long long value) { return std::to_string(value); }

std::string bytes_at(const Region& region, long long offset, size_t bytes) {
  return number(bytes) + " bytes at offset " + number(offset) + " of " + region.name + " (" +
         number(region.bytes) + " bytes)";
}

// Whether nothing orders what `a` did before what `b` does now in threadgroup memory.
bool races_in_threadgroup(const Actor& a, const Actor& b) {
  if (a.id == 0 || a.id == b.id || a.shared_time != b.shared_time) return false;
  return a.simd != b.simd || a.simd_time == b.simd_time;
}

bool races_in_device(const Actor& a, const Actor& b) {
  if (a.id == 0 || a.id == b.id) return false;
  return a.group != b.group || a.device_time == b.device_time;
}

}  // namespace

char* Memory::add_buffer(const std::string& name, Role role, size_t bytes, size_t offset) {
  char* base = reserve(2 * kReach + bytes + offset) + kReach + offset;
  Region region{name, role, base, bytes, kReach / 2, {}};
  if (role == Role::output) {
    std::memset(base, kPoison, bytes);
    region.history.resize(bytes);
  }
  buffers_.push_back(std::move(region));
  return base;
}

void Memory::initialise(size_t buffer) {
  for (History& byte : buffers_[buffer].history) byte.write.by.group = ~0u;
}

char* Memory::threadgroup_variable(const std::string& name, size_t bytes, size_t alignment) {
  for (Region& region : shared_)
    if (region.name == name) return region.base;
  if (arena_ == nullptr) arena_ = reserve(kArena);
  shared_bytes_ = (shared_bytes_ + alignment - 1) / alignment * alignment + bytes;
  if (shared_bytes_ > kThreadgroupLimit)
    fault("threadgroup memory", number(shared_bytes_) + " bytes are declared, and Metal gives " +
          number(kThreadgroupLimit), 0, nullptr);
  char* base = arena_ + arena_used_ + kGap;
  arena_used_ += kGap + (bytes + kGap - 1) / kGap * kGap + kGap;
  std::memset(base, kPoison, bytes);
  shared_.push_back({name, Role::threadgroup, base, bytes, kGap, std::vector<History>(bytes)});
  return base;
}

void Memory::start_threadgroup() {
  for (Region& region : shared_) {
    std::memset(region.base, kPoison, region.bytes);
    std::memset(static_cast<void*>(region.history.data()), 0, region.bytes * sizeof(History));
  }
}

void Memory::touch(const void* address, size_t bytes, bool write, const Actor& actor,
                   const void* pc) {
  const char* at = static_cast<const char*>(address);
  for (std::vector<Region>* regions : {&buffers_, &shared_}) {
    for (Region& region : *regions) {
      if (at < region.base - region.reach || at >= region.base + region.bytes + region.reach)
        continue;
      long long offset = at - region.base;
      if (offset < 0 || size_t(offset) + bytes > region.bytes)
        fault("out of bounds", (write ? "writes " : "reads ") + bytes_at(region, offset, bytes),
              0, pc);
      if (region.role == Role::input && write)
        fault("input written", "writes " + bytes_at(region, offset, bytes), 0, pc);
      if (region.role == Role::output) touch_output(region, offset, bytes, write, actor, pc);
      if (region.role == Role::threadgroup) touch_shared(region, offset, bytes, write, actor, pc);
      return;
    }
  }
  // What is left that may be read is the kernel's own constants.
  static std::unordered_set<uintptr_t> constant_pages;
  uintptr_t page = reinterpret_cast<uintptr_t>(address) >> 12;
  if (!write) {
    if (constant_pages.count(page)) return;
    Dl_info here, there;
    if (dladdr(address, &there) && dladdr(pc, &here) && here.dli_fbase == there.dli_fbase) {
      constant_pages.insert(page);
      return;
    }
  }
  fault("out of bounds",
        std::string(write ? "writes " : "reads ") + number(bytes) + " bytes far from any buffer",
        0, pc);
}

void Memory::touch_output(Region& region, size_t at, size_t bytes, bool write, const Actor& actor,
                          const void* pc) {
  for (size_t i = at; i < at + bytes; ++i) {
    History& byte = region.history[i];
    const Actor& writer = byte.write.by;
    if (races_in_device(writer, actor))
      fault("output race", std::string(write ? "writes" : "reads") + " byte " + number(i) +
            " of " + region.name + ", which " + name_of_thread(writer.id) + " wrote", 0, pc);
    if (!write && writer.group == 0)
      fault("unwritten output", "reads byte " + number(i) + " of " + region.name +
            ", which nobody has written", 0, pc);
    if (write) byte.write.by = actor;
  }
}

void Memory::touch_shared(Region& region, size_t at, size_t bytes, bool write, const Actor& actor,
                          const void* pc) {
  for (size_t i = at; i < at + bytes; ++i) {
    History& byte = region.history[i];
    auto race = [&](const Actor& other, const char* did) {
      if (races_in_threadgroup(other, actor))
        fault("threadgroup race", std::string(write ? "writes" : "reads") + " byte " + number(i) +
              " of " + region.name + ", which " + name_of_thread(other.id) + " " + did +
              " with no barrier between", 0, pc);
    };
    if (!write && byte.write.by.id == 0)
      fault("unwritten threadgroup memory", "reads byte " + number(i) + " of " + region.name +
            ", which no thread of this threadgroup has written", 0, pc);
    race(byte.write.by, "wrote");
    if (write) {
      race(byte.reads[0].by, "read");
      race(byte.reads[1].by, "read");
      byte.write.by = actor;
      continue;
    }
    // Two readers that no barrier separates stand for all: a writer races with one of them.
    Access& first = byte.reads[0];
    Access& second = byte.reads[1];
    if (!races_in_threadgroup(first.by, actor)) {
      first.by = actor;
    } else if (!races_in_threadgroup(second.by, actor) || first.by.simd == second.by.simd) {
      second.by = actor;
    }
  }
}

void Memory::check_outputs() const {
  for (const Region& region : buffers_) {
    if (region.role != Role::output) continue;
    size_t count = 0, first = 0;
    for (size_t i = region.bytes; i-- > 0;)
      if (region.history[i].write.by.group == 0) ++count, first = i;
    if (count)
      fault("output not written", number(count) + " of " + number(region.bytes) + " bytes of " +
            region.name + " were not written, the first at offset " + number(first), 0, nullptr);
  }
}

}  // namespace metal_on_cpu
