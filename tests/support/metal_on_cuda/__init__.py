"""The Metal kernels on an NVIDIA GPU: the sources in `metal/` as nvcc takes them, and their launch.

`words/` gives Metal's words their CUDA meaning. What is launched, with which inputs, template
arguments and grid, is recorded from flashmoe's own calls (`requests`), so nothing of it is
repeated here. Not the harness of the tests (`tests/support/metal_on_cpu`), which watches every
access on a CPU and knows no speed.
"""
