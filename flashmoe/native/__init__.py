"""Matrix products over packed weights on the CPU, in C++.

Knows formats and threads; knows no experts and no models.
"""

from flashmoe.native.library import available, isa, set_threads, threads, use_isa
from flashmoe.native.matrix import Matrix, matmul, matrix

__all__ = [
    "Matrix",
    "available",
    "isa",
    "matmul",
    "matrix",
    "set_threads",
    "threads",
    "use_isa",
]
