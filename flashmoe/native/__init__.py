"""Matrix products over packed weights on the CPU, and concurrent reads, in C++.

Knows formats, files and threads; knows no experts and no models.
"""

from flashmoe.native.loader import available, isa, set_threads, threads, use_isa
from flashmoe.native.matrix import Matrix, covers, covers_floats, matmul, matrix

__all__ = [
    "Matrix",
    "available",
    "covers",
    "covers_floats",
    "isa",
    "matmul",
    "matrix",
    "set_threads",
    "threads",
    "use_isa",
]
