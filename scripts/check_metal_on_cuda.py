"""The Metal kernels on an NVIDIA GPU: correctness against float64, and GB/s beside its copies.

The sources in metal/ are compiled with nvcc through scripts/metal_on_cuda/words, for sm_80, sm_90
and the GPUs at hand, and called as flashmoe calls them. Where there is no GPU they are compiled,
and what was not run is said. How fast they are there tells nothing about Apple GPUs; that they
read each byte once, in an order that a GPU's memory likes, carries over.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from tests.support.metal_on_cuda.check import main

if __name__ == "__main__":
    sys.exit(main())
