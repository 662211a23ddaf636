"""Metal kernels on the CPU: a stand-in for `mx.fast.metal_kernel` that runs them under watch.

MLX writes the kernel's whole source from its inputs, as it does on a Mac. Clang, where it is
installed, checks it with address spaces as types (`spaces/`). The system's C++ compiler compiles
it with headers that give Metal's words their meaning (`words/`), and the runner (`runner/`) looks
at every access of every thread as it happens. A test may put `metal_kernel` in the place of
`mx.fast.metal_kernel` and run the code that launches kernels as it stands.

Not seen: an index that is wrong but inside its buffer or inside a thread's own stack, registers,
timing, and how Metal itself rounds exp, tanh and division.
"""

from tests.support.metal_on_cpu.build import compiled
from tests.support.metal_on_cpu.faults import CompileFault, KernelFault
from tests.support.metal_on_cpu.kernel import metal_kernel

__all__ = ["CompileFault", "KernelFault", "compiled", "metal_kernel"]
