"""Compile the native library for machines that are not here, and run what an emulator can run.

The compiler is zig's clang (`ziglang` on PyPI), which brings the headers of every system. For
macOS the library is compiled and linked, and what it exports and imports is read from the file.
For Linux on ARM `tests/native/native_check.cpp` is run by qemu: the NEON kernels against float64.
A tool that is missing is an error, or just a line with --where-possible.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from tests.support.cross import main

if __name__ == "__main__":
    sys.exit(main())
