// How a fault is told: one line to standard output, and the run ends.
#pragma once

#include <cstdint>
#include <string>

namespace metal_on_cpu {

// `line` is a line of the kernel's source, 0 where only the return address `pc` is known.
[[noreturn]] void fault(const char* kind, const std::string& text, int line, const void* pc);

}  // namespace metal_on_cpu
