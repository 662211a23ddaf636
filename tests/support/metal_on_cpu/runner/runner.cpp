// runner KERNEL: reads a launch from standard input, runs it, writes the outputs to standard output.
//
// The launch is lines of words, then the buffers' bytes in their order:
//   grid X Y Z
//   threadgroup X Y Z
//   buffer NAME input|output|initialised BYTES OFFSET
//   end
// The answer is a line "done" and the outputs' bytes, or one line that tells a fault.
#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "fault.h"
#include "lockstep.h"
#include "memory.h"

namespace metal_on_cpu {

namespace {

struct Buffer {
  char* base;
  size_t bytes;
  bool filled;
  bool output;
};
std::vector<Buffer> buffers;

Position read_position(std::istringstream& words) {
  Position p{};
  words >> p.x >> p.y >> p.z;
  return p;
}

void read_buffer(std::istringstream& words) {
  std::string name, role;
  size_t bytes, offset;
  words >> name >> role >> bytes >> offset;
  bool output = role != "input";
  char* base = memory.add_buffer(name, output ? Role::output : Role::input, bytes, offset);
  if (role == "initialised") memory.initialise(buffers.size());
  buffers.push_back({base, bytes, role != "output", output});
}

Launch read_launch() {
  Launch launch{};
  for (std::string line; std::getline(std::cin, line) && line != "end";) {
    std::istringstream words(line);
    std::string key;
    words >> key;
    if (key == "grid") launch.grid = read_position(words);
    if (key == "threadgroup") launch.threadgroup = read_position(words);
    if (key == "buffer") read_buffer(words);
  }
  for (const Buffer& buffer : buffers)
    if (buffer.filled) std::cin.read(buffer.base, std::streamsize(buffer.bytes));
  return launch;
}

}  // namespace

void fault(const char* kind, const std::string& text, int line, const void* pc) {
  std::string who = name_of_running();
  uintptr_t offset = 0;
  Dl_info found;
  if (pc && dladdr(pc, &found))
    offset = reinterpret_cast<uintptr_t>(pc) - reinterpret_cast<uintptr_t>(found.dli_fbase);
  std::printf("fault\t%s\t%s\t%d\t%llx\n", kind,
              (who.empty() ? text : who + " " + text).c_str(), line,
              static_cast<unsigned long long>(offset));
  std::fflush(stdout);
  _exit(0);
}

}  // namespace metal_on_cpu

using namespace metal_on_cpu;

extern "C" void* metal_on_cpu_buffer(int index) { return buffers.at(size_t(index)).base; }

int main(int count, char** arguments) {
  std::ios::sync_with_stdio(false);
  void* library = count == 2 ? dlopen(arguments[1], RTLD_NOW) : nullptr;
  void* entry = library ? dlsym(library, "metal_on_cpu_entry") : nullptr;
  if (!entry) {
    std::fprintf(stderr, "%s\n", count == 2 ? dlerror() : "usage: runner KERNEL");
    return 2;
  }
  Launch launch = read_launch();
  launch.entry = reinterpret_cast<void (*)()>(entry);
  run_launch(launch);
  memory.check_outputs();
  std::fputs("done\n", stdout);
  for (const Buffer& buffer : buffers)
    if (buffer.output) std::fwrite(buffer.base, 1, buffer.bytes, stdout);
  return 0;
}
