"""The CUDA source of the kernels' variants: the Metal source as it stands, and a function for
each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx

from flashmoe.kernels.metal_source import KernelSource
from tests.support.metal_on_cuda.requests import Request

TYPES = {
    mx.float32: "float",
    mx.float16: "half",
    mx.bfloat16: "bfloat",
    mx.int32: "int32_t",
    mx.uint32: "uint32_t",
    mx.uint8: "uint8_t",
}

# In the body of a kernel, `threadgroup` declares what the threads share; elsewhere it says where
# a pointer points, for which CUDA has no word.
_SHARED = "\n#undef threadgroup\n#define threadgroup __shared__\n\n"


@dataclass(frozen=True)
class Variant:
    """What one function is compiled for."""

    kernel: KernelSource
    template: tuple[tuple[str, int | bool], ...]
    input_types: tuple[str, ...]
    output_type: str
    threads: int

    @classmethod
    def of(cls, request: Request) -> Variant:
        width, *others = request.threadgroup
        assert others == [1, 1], "the place in a threadgroup is taken from x alone"
        types = tuple(TYPES[array.dtype] for array in request.inputs)
        output_type = TYPES[request.output_dtype]
        return cls(request.kernel, request.template, types, output_type, width)

    def __str__(self) -> str:
        values = " ".join(f"{key} {value:d}" for key, value in self.template)
        inputs = zip(self.kernel.inputs, self.input_types, strict=True)
        types = " ".join(f"{name} {type_}" for name, type_ in inputs)
        return f"{self.kernel.name}: {values}, {types} to {self.output_type}"

    @property
    def name(self) -> str:
        """Of the function: the same for the same source."""
        content = f"{self.kernel.header()}{self!r}".encode()
        return f"{self.kernel.name}_{hashlib.sha256(content).hexdigest()[:12]}"

    @property
    def text(self) -> str:
        """The function, and `address_of_NAME`, which the host can call."""
        name = self.name
        inputs = zip(self.input_types, self.kernel.inputs, strict=True)
        (output,) = self.kernel.outputs
        parameters = [f"const {type_}* {input_}" for type_, input_ in inputs]
        parameters.append(f"{self.output_type}* {output}")
        constants = "".join(
            f"constexpr {type(value).__name__} {key} = {str(value).lower()};\n"
            for key, value in self.template
        )
        return (
            f'extern "C" __global__ void __launch_bounds__({self.threads}) {name}(\n'
            f"{', '.join(parameters)}) {{\n{constants}{self.kernel.body}\n}}\n"
            f'extern "C" const void* address_of_{name}() {{\n'
            f"return reinterpret_cast<const void*>(&{name});\n}}\n\n"
        )


def sources(requests: Iterable[Request], parts: int) -> list[str]:
    """Texts that may be compiled side by side, at most `parts` of each kernel."""
    variants = list(dict.fromkeys(map(Variant.of, requests)))
    texts = []
    for kernel in dict.fromkeys(variant.kernel for variant in variants):
        mine = [variant.text for variant in variants if variant.kernel == kernel]
        dealt = [mine[start::parts] for start in range(min(parts, len(mine)))]
        texts += [kernel.header() + _SHARED + "".join(part) for part in dealt]
    return texts
