"""The source that MLX compiles for a kernel, and what a C++ compiler needs of it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from tests.support.metal_on_cpu.faults import CompileFault
from tests.support.metal_on_cpu.rules import check_rules

# Kept from before a test puts this package's `metal_kernel` in its place.
_mlx_kernel = mx.fast.metal_kernel

_VARIABLE = re.compile(r"\bthreadgroup\s+(?P<type>[\w:<>,\s]*[\w>])\s+(?P<name>\w+)(?=\s*[\[;])")
_BUFFER = re.compile(r"(?P<name>\w+) \[\[buffer\((?P<index>\d+)\)\]\]")
_ATTRIBUTE = re.compile(r"\w+ (?P<name>\w+) \[\[(?P=name)\]\]")


@dataclass(frozen=True)
class Parameter:
    """One parameter of the kernel: a buffer (a pointer or a reference) or an attribute."""

    name: str
    text: str
    index: int | None

    @property
    def is_reference(self) -> bool:
        return "&" in self.text


@dataclass(frozen=True)
class KernelSource:
    """MLX's source for one kernel: its whole text, its function and that one's parameters."""

    text: str
    function: str
    parameters: tuple[Parameter, ...]


def mlx_source(definition: dict[str, Any], call: dict[str, Any]) -> KernelSource:
    """The source that MLX writes, given what `metal_kernel` and the kernel were called with.

    MLX has it in the file of an exported function, which it also writes where it has no Metal.
    """
    inputs = [mx.array(value) for value in call["inputs"]]

    def launch(*arrays: mx.array) -> list[mx.array]:
        return _mlx_kernel(**definition)(**{**call, "inputs": list(arrays)}, stream=mx.gpu)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.mlxfn"
        mx.export_function(str(path), launch, *inputs)
        text = _string_around(path.read_bytes(), b"[[kernel]] void custom_kernel_")
    start = text.index("[[kernel]] void custom_kernel_")
    function = text[start:].split("(", 1)[0].split()[-1]
    listed = text[text.index("(", start) + 1 : text.index(") {\n", start)]
    if template := re.search(rf"decltype\(({re.escape(function)}<.*>)\)", text[start:]):
        function = template[1]
    return KernelSource(text, function, tuple(map(_parameter, listed.strip().split(",\n"))))


def _string_around(content: bytes, marker: bytes) -> str:
    """The string, stored after its length in 8 bytes, that the marker is part of."""
    at = content.index(marker)
    for start in range(at, 7, -1):
        length = int.from_bytes(content[start - 8 : start], "little")
        if at < start + length <= len(content):
            return content[start : start + length].decode()
    raise AssertionError("MLX's exported function holds no kernel")


def _parameter(text: str) -> Parameter:
    if buffer := _BUFFER.search(text):
        return Parameter(buffer["name"], text, int(buffer["index"]))
    attribute = _ATTRIBUTE.search(text)
    assert attribute, text
    return Parameter(attribute["name"], text, None)


def compilable(source: KernelSource) -> tuple[str, str]:
    """The source with the entry that the runner calls; its lines keep their numbers.

    Raises CompileFault where Metal's compiler would refuse what a C++ compiler takes.
    """
    arguments = []
    for parameter in source.parameters:
        if parameter.index is None:
            arguments.append(f"metal_on_cpu::position(thread_values.{parameter.name})")
            continue
        kind = parameter.text.split("[[")[0].replace("constant", "").replace("device", "")
        pointer = kind.strip().removesuffix(parameter.name).replace("&", "*").strip()
        argument = f"static_cast<{pointer}>(metal_on_cpu_buffer({parameter.index}))"
        arguments.append(f"*{argument}" if parameter.is_reference else argument)
    entry = (
        'extern "C" void metal_on_cpu_entry() {\n'
        "  metal_on_cpu::Thread thread_values;\n"
        "  metal_on_cpu_thread(&thread_values);\n"
        f"  {source.function}({', '.join(arguments)});\n"
        "}\n"
    )
    text = without_comments(source.text)
    check_rules(text)
    # Clang knows no attributes at the place where MLX instantiates its template.
    text = re.sub(r"\btemplate( \[\[[^\]]*\]\])+ decltype", "template decltype", text)
    return share_variables(text), entry


def share_variables(text: str) -> str:
    """The text with each threadgroup variable taken from the runner instead of the stack."""
    parts: list[str] = []
    end = 0
    for found in _VARIABLE.finditer(text):
        closing = text.find(";", found.end())
        dimensions = text[found.end() : closing].strip()
        line = text.count("\n", 0, found.start()) + 1
        if dimensions and not re.fullmatch(r"(\[[^\]]*\]\s*)+", dimensions):
            raise CompileFault(f"line {line}: one threadgroup variable per declaration, no value")
        if not _in_kernel(text, found.start()):
            raise CompileFault(
                f"line {line}: the threadgroup variable {found['name']} is declared outside a "
                "kernel function, which Metal refuses"
            )
        name, type_ = found["name"], found["type"]
        lines = "\n" * text.count("\n", found.start(), closing)
        parts += (
            text[end : found.start()],
            f"typedef {type_} {name}_type{dimensions}; "
            f"threadgroup {name}_type& {name} = "
            f'metal_on_cpu::threadgroup_variable<{name}_type>("{name}"){lines}',
        )
        end = closing
    return "".join(parts) + text[end:]


def _in_kernel(text: str, position: int) -> bool:
    """Whether a block that is open at the position belongs to a kernel function."""
    depth = 0
    for at in range(position - 1, -1, -1):
        if text[at] == "}":
            depth += 1
        elif text[at] == "{":
            depth -= 1
            if depth < 0:
                depth = 0
                head = re.split(r"[;{}]", text[:at])[-1]
                if re.search(r"\bkernel\b", head):
                    return True
    return False


def without_comments(text: str) -> str:
    """The text with blanks in the place of comments, line by line."""

    def blank(found: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", found[0])

    return re.sub(r"//[^\n]*|/\*.*?\*/", blank, text, flags=re.DOTALL)


def names(parameters: Sequence[Parameter]) -> list[str]:
    """The buffers' names in the order of their indices."""
    return [parameter.name for parameter in parameters if parameter.index is not None]
