"""Metal kernels on the CPU: a stand-in for `mx.fast.metal_kernel` that runs them under watch.

The kernel's source is the one that MLX writes. It is compiled by the system's C++ compiler with
headers that give Metal's words their meaning (`include/`), and every access of every thread is
looked at as it happens (`runner/`).
"""

from metal_on_cpu.build import find_compiler
from metal_on_cpu.faults import CompileFault, KernelFault
from metal_on_cpu.kernel import metal_kernel

__all__ = ["CompileFault", "KernelFault", "find_compiler", "metal_kernel"]
