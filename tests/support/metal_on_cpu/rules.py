"""What Metal's compiler refuses and a C++ compiler does not."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.support.metal_on_cpu.faults import CompileFault

_SPACES = re.compile(r"\b(device|constant|threadgroup|thread)\b")
_ABSENT = re.compile(
    r"\b(double|goto|virtual|dynamic_cast|typeid|new|delete|throw|try|asm|thread_local|std::\w+)\b"
)
_FUNCTION = re.compile(r"(?P<name>\w+)\s*\((?P<parameters>[^(){};]*)\)\s*(?:thread\s*|const\s*)*\{")
_LOCAL = re.compile(
    r"(?<=[;{}])\s*(?P<declaration>(?:const\s+)?(?!return\b)[A-Za-z_][\w:]*(?:<[^;<>]*>)?"
    r"(?:\s+const)?\s*[*&]\s*(?:const\s+)?[A-Za-z_]\w*)\s*=(?!=)"
)
_CAST = re.compile(
    r"(?:_cast<\s*|(?<![\w>])\(\s*)(?P<type>(?:const\s+)?[A-Za-z_][\w:]*(?:<[^;<>]*>)?\s*[*&])\s*[>)]"
)
_VARIABLE = re.compile(
    r"(?P<declaration>(?:(?:static|const|constexpr|inline)\s+)*[A-Za-z_][\w:]*(?:<[^;<>]*>)?"
    r"\s+(?P<name>\w+)\s*(?:\[[^\]]*\]\s*)*)(?==|$)"
)
_NOT_VARIABLES = re.compile(r"\b(using|typedef|template|struct|enum|namespace|extern|return)\b")


def check_rules(text: str) -> None:
    """Raises CompileFault at the first thing in the text (which has no comments) not allowed."""
    code = re.sub(
        r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", lambda m: "\n" * m[0].count("\n"), text, flags=re.M
    )
    code = re.sub(r'"[^"\n]*"', '""', code)
    for found in _ABSENT.finditer(code):
        _refuse(code, found.start(), f"Metal has no {found[1]}")
    for function in _FUNCTION.finditer(code):
        if function["name"] in ("if", "while", "for", "switch"):
            continue
        for parameter in _split(function["parameters"]):
            if re.search(r"[*&]", parameter) and not _SPACES.search(parameter):
                _refuse(
                    code,
                    function.start("parameters"),
                    f"the parameter {parameter.strip()} has no address space",
                )
    for local in _LOCAL.finditer(code):
        _refuse(code, local.start("declaration"), f"{local['declaration']} has no address space")
    for cast in _CAST.finditer(code):
        _refuse(code, cast.start(), f"a cast to {cast['type']} has no address space")
    for start, statement in _program_scope(code):
        variable = _VARIABLE.match(statement)
        if variable and not _SPACES.search(statement) and not _NOT_VARIABLES.search(statement):
            _refuse(
                code, start, f"the variable {variable['name']} of the program is not in constant"
            )


def _refuse(code: str, position: int, text: str) -> None:
    line = code.count("\n", 0, position) + 1
    raise CompileFault(f"line {line}: {text}")


def _split(parameters: str) -> list[str]:
    """The parameters, apart at the commas that no angle brackets enclose."""
    flat = re.sub(r"<[^<>]*>", lambda m: m[0].replace(",", " "), parameters)
    return flat.split(",")


def _program_scope(code: str) -> Iterator[tuple[int, str]]:
    """Statements outside every function and type, up to their `;`, with where they start."""
    depth = 0
    start = 0
    for at, letter in enumerate(code):
        if letter == "{":
            head = code[start:at]
            if depth == 0 and re.search(r"\bnamespace\b", head):
                start = at + 1
            else:
                depth += 1
        elif letter == "}":
            if depth == 0:
                start = at + 1
                continue
            depth -= 1
            # A function's body ends its statement; an initializer's does not.
            if depth == 0 and "=" not in code[start:at].split("{")[0].split("(")[0]:
                start = at + 1
        elif letter == ";" and depth == 0:
            lead = len(code[start:at]) - len(code[start:at].lstrip())
            yield start + lead, code[start:at].strip()
            start = at + 1
