"""Packed matrix products, routed experts, attention and concurrent reads on the CPU, in C++.

Knows formats, files and threads; knows no models.
"""

from flashmoe.native.attention import attend
from flashmoe.native.experts import Activation, NativeExperts, expert_forward, experts
from flashmoe.native.fit import fit_groups
from flashmoe.native.loader import available, isa, set_threads, threads, use_isa
from flashmoe.native.matrix import Matrix, covers, covers_floats, matmul, matrix

__all__ = [
    "Activation",
    "Matrix",
    "NativeExperts",
    "attend",
    "available",
    "covers",
    "covers_floats",
    "expert_forward",
    "experts",
    "fit_groups",
    "isa",
    "matmul",
    "matrix",
    "set_threads",
    "threads",
    "use_isa",
]
