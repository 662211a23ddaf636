"""`metal_kernel`: what `mx.fast.metal_kernel` is, on the CPU."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from tests.support.metal_on_cpu.build import build_kernel, build_runner
from tests.support.metal_on_cpu.faults import KernelFault
from tests.support.metal_on_cpu.source import KernelSource, compilable, mlx_source

_SECONDS = 120
_MOST_THREADS = 1024
Size = tuple[int, int, int]


@dataclass(frozen=True)
class _Buffer:
    name: str
    role: str
    bytes_: int
    content: bytes


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: object | None = None,
    *,
    offsets: Mapping[str, int] | None = None,
) -> Callable[..., list[mx.array]]:
    """A kernel with the call of MLX's own, which runs it on the CPU and returns its outputs.

    `offsets` puts named buffers that many bytes past a page, as a slice of an array lies.
    The kernel raises KernelFault where it does what Metal forbids or leaves undefined.
    """
    assert ensure_row_contiguous, "strided inputs are not built"
    assert not atomic_outputs, "atomic outputs are not built"
    definition: dict[str, Any] = {
        "name": name,
        "input_names": list(input_names),
        "output_names": list(output_names),
        "source": source,
        "header": header,
        "compile_options": compile_options,
    }
    libraries: dict[object, tuple[KernelSource, Path]] = {}

    def kernel(
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Size,
        threadgroup: Size,
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: object | None = None,
    ) -> list[mx.array]:
        arrays = [mx.array(value) for value in inputs]
        call = {
            "inputs": arrays,
            "output_shapes": output_shapes,
            "output_dtypes": output_dtypes,
            "grid": grid,
            "threadgroup": threadgroup,
            "template": template,
            "init_value": init_value,
        }
        # What the text depends on: MLX passes arrays of fewer than 8 elements another way.
        kind = (
            tuple((str(array.dtype), array.ndim == 0, array.size < 8) for array in arrays),
            tuple(map(str, output_dtypes)),
            str(template),
        )
        if kind not in libraries:
            text = mlx_source(definition, call)
            libraries[kind] = text, build_kernel(*compilable(text))
        text, library = libraries[kind]
        values = _input_values(input_names, arrays)
        outputs = [
            _output(*of, init_value)
            for of in zip(output_names, output_shapes, output_dtypes, strict=True)
        ]
        written = {buffer.name: buffer for buffer in outputs}
        buffers = [
            written.get(parameter.name) or _input(parameter.name, values[parameter.name])
            for parameter in text.parameters
            if parameter.index is not None
        ]
        request = _request(grid, threadgroup, buffers, offsets or {})
        answer = _run(name, library, request)
        return _arrays(answer, outputs, output_shapes, output_dtypes)

    return kernel


def _bytes(array: mx.array) -> bytes:
    if array.dtype == mx.bool_:
        return np.asarray(array).tobytes()
    return np.asarray(array.reshape(-1).view(mx.uint8)).tobytes()


def _input_values(names: Sequence[str], arrays: Sequence[mx.array]) -> dict[str, bytes]:
    """The bytes of every buffer that MLX may pass for the inputs."""
    values = {}
    for name, array in zip(names, arrays, strict=True):
        shape = np.array(array.shape, np.int32)
        steps = [int(np.prod(shape[i + 1 :])) for i in range(array.ndim)]
        values[name] = _bytes(array)
        values[f"{name}_shape"] = shape.tobytes()
        values[f"{name}_strides"] = np.array(steps, np.int64).tobytes()
        values[f"{name}_ndim"] = np.int32(array.ndim).tobytes()
    return values


def _input(name: str, content: bytes) -> _Buffer:
    return _Buffer(name, "input", len(content), content)


def _output(name: str, shape: Sequence[int], dtype: mx.Dtype, value: float | None) -> _Buffer:
    size = int(np.prod(shape)) * dtype.size
    if value is None:
        return _Buffer(name, "output", size, b"")
    return _Buffer(name, "initialised", size, _bytes(mx.full(shape, value, dtype)))


def _request(
    grid: Size, threadgroup: Size, buffers: Sequence[_Buffer], offsets: Mapping[str, int]
) -> bytes:
    group = tuple(min(pair) for pair in zip(grid, threadgroup, strict=True))
    if not 0 < int(np.prod(group)) <= _MOST_THREADS:
        raise KernelFault("threads", f"threadgroups of {group} threads; Metal allows 1 to 1024")
    lines = [
        "grid {} {} {}".format(*grid),
        "threadgroup {} {} {}".format(*group),
        *(f"buffer {b.name} {b.role} {b.bytes_} {offsets.get(b.name, 0)}" for b in buffers),
        "end\n",
    ]
    return "\n".join(lines).encode() + b"".join(buffer.content for buffer in buffers)


def _run(name: str, library: Path, request: bytes) -> bytes:
    """The outputs' bytes. Raises KernelFault."""
    command = [build_runner(), library]
    try:
        done = subprocess.run(
            command, input=request, capture_output=True, check=False, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise KernelFault("endless", f"{name} did not end in {_SECONDS} s") from None
    first, _, rest = done.stdout.partition(b"\n")
    if first == b"done":
        return rest
    if not first.startswith(b"fault\t"):
        said = done.stderr.decode(errors="replace").strip()
        raise KernelFault("crash", f"{name} ended the runner ({done.returncode}) {said}")
    _, kind, text, line, offset = first.decode().split("\t")
    number = int(line) or _line_of(library, int(offset, 16))
    place = ""
    if number:
        lines = library.with_suffix(".cpp").read_text().splitlines()
        place = f" at line {number}: {lines[number - 1].strip()}"
    raise KernelFault(kind, f"{name}: {kind}: {text}{place}")


def _line_of(library: Path, offset: int) -> int:
    """The line of the source that the code before the offset came from, 0 if unknown."""
    tool = shutil.which("addr2line")
    if not tool or not offset:
        return 0
    command = [tool, "-i", "-e", library, hex(offset - 1)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for place in done.stdout.splitlines():
        path, _, line = place.partition(":")
        if Path(path).name == library.with_suffix(".cpp").name:
            return int(line.split()[0]) if line.split()[0].isdigit() else 0
    return 0


def _arrays(
    answer: bytes,
    outputs: Sequence[_Buffer],
    shapes: Sequence[Sequence[int]],
    dtypes: Sequence[mx.Dtype],
) -> list[mx.array]:
    arrays = []
    start = 0
    for buffer, shape, dtype in zip(outputs, shapes, dtypes, strict=True):
        part = np.frombuffer(answer, np.uint8, buffer.bytes_, start)
        start += buffer.bytes_
        arrays.append(mx.array(part).view(dtype).reshape(shape))
    return arrays
