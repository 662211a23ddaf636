"""Building for other machines: the words that reach the compiler, and the reader of the result."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from flashmoe import native
from flashmoe.native import build, loader
from tests.support import cross, macho
from tests.support.cross import CheckFailed, MissingTool

# A compiler that notes its words and writes a file.
COMPILER = """
import json, pathlib, sys
words = sys.argv[2:]
with open(sys.argv[1], "a") as log:
    log.write(json.dumps(words) + chr(10))
pathlib.Path(words[words.index("-o") + 1]).write_text("made")
"""


def commands(folder: Path, **options: object) -> list[list[str]]:
    """What a build asks of its compiler, the link last."""
    script, log = folder / "compiler.py", folder / "log"
    script.write_text(COMPILER)
    target = folder / "library.so"
    build.build_library(target, compiler=[sys.executable, str(script), str(log)], **options)
    assert target.read_text() == "made"
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "arm64", "riscv64"])
def test_words_of_the_compiler(machine: str, tmp_path: Path) -> None:
    extra = tmp_path / "more.cpp"
    *compilations, link = commands(
        tmp_path, machine=machine, flags=["-Ours"], link_flags=["-Link"], extra=[extra]
    )
    names = {Path(words[words.index("-c") + 1]).name: words for words in compilations}
    wanted = build.sources(machine)
    assert set(names) == {*wanted, "more.cpp"}
    for name, words in names.items():
        assert set(build.FLAGS) | set(wanted.get(name, ())) | {"-Ours"} <= set(words)
        assert "-Link" not in words
        assert any(word.startswith("-mavx") for word in words) == ("avx" in name)
    assert ("kernels_neon.cpp" in names) == (machine in ("aarch64", "arm64"))
    assert {"-shared", "-Ours", "-Link"} <= set(link)
    assert sum(word.endswith(".o") for word in link) == len(names)


def test_a_program_is_not_shared(tmp_path: Path) -> None:
    assert "-shared" not in commands(tmp_path, shared=False)[-1]


# --- Mach-O files -------------------------------------------------------------------------------


def trie(names: Sequence[str]) -> bytes:
    """An export trie: a root with an edge for each name, addresses of two bytes."""
    size = 2 + sum(len(name) + 3 for name in names)
    edges = nodes = b""
    for i, name in enumerate(names):
        child = size + 5 * i
        edges += name.encode() + b"\0" + bytes([child & 127 | 128, child >> 7])
        nodes += b"\x03\x00\x80\x20\x00"
    return bytes([0, len(names)]) + edges + nodes


def dylib(
    exports: bytes,
    imports: Sequence[str],
    *,
    modern: bool = True,
    platform: int = macho.PLATFORM_MACOS,
    cpu: int = 0x0100000C,
    kind: int = macho.DYLIB,
) -> bytes:
    """A library with one symbol of its own, a debugging entry, and imports."""
    names = ["_own", "/debug.o", *imports]
    kinds = [0x0F, 0x64, *[0x01] * len(imports)]
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in names)
    places = [strings.index(b"\0" + name.encode() + b"\0") + 1 for name in names]
    symbols = b"".join(
        struct.pack("<IBBHQ", place, kind, 0, 0, 0)
        for place, kind in zip(places, kinds, strict=True)
    )
    export_size = 16 if modern else 48
    start = 32 + 24 + 24 + export_size
    version = struct.pack("<6I", macho.LC_BUILD_VERSION, 24, platform, 13 << 16 | 2 << 8, 0, 0)
    after = start + len(exports)
    table = struct.pack(
        "<6I", macho.LC_SYMTAB, 24, after, len(names), after + len(symbols), len(strings)
    )
    if modern:
        trie = struct.pack("<4I", macho.LC_DYLD_EXPORTS_TRIE, 16, start, len(exports))
    else:
        trie = struct.pack("<12I", macho.LC_DYLD_INFO_ONLY, 48, *[0] * 8, start, len(exports))
    commands = version + table + trie
    head = struct.pack("<8I", macho.MAGIC_64, cpu, 0, kind, 3, len(commands), 0, 0)
    return head + commands + exports + symbols + strings


@pytest.mark.parametrize("modern", [True, False])
def test_what_a_library_says(modern: bool) -> None:
    found = macho.read_library(
        dylib(trie(["_fm_a", "_fm_b"]), ["_memcpy", "__Znwm"], modern=modern)
    )
    assert found == macho.Library(
        "arm64", "13.2", frozenset({"_fm_a", "_fm_b"}), frozenset({"_memcpy", "__Znwm"})
    )


def test_names_that_share_a_beginning() -> None:
    # root -"_fm_"-> no name -"is"-> a name -"a"-> a name; -"x"-> a name
    shared = b"\x00\x01_fm_\x00\x08" + b"\x00\x02is\x00\x11x\x00\x18"
    shared += b"\x02\x00\x10\x01a\x00\x18" + b"\x02\x00\x10\x00"
    assert macho.read_library(dylib(shared, [])).exports == {"_fm_is", "_fm_isa", "_fm_x"}


def test_nothing_exported_or_imported() -> None:
    found = macho.read_library(dylib(b"", []))
    assert (found.exports, found.imports) == (frozenset(), frozenset())


def test_damage() -> None:
    whole = dylib(trie(["_fm_a"]), ["_memcpy"])
    for size in range(len(whole)):
        with pytest.raises(ValueError, match=r"Mach-O"):
            macho.read_library(whole[:size])
    with pytest.raises(ValueError, match="not a Mach-O library: magic 0x464c457f"):
        macho.read_library(b"\x7fELF" + bytes(60))
    with pytest.raises(ValueError, match="type 2"):
        macho.read_library(dylib(b"", [], kind=2))
    with pytest.raises(ValueError, match="cpu 0xc"):
        macho.read_library(dylib(b"", [], cpu=12))
    with pytest.raises(ValueError, match="for platform 2, not macOS"):
        macho.read_library(dylib(b"", [], platform=2))
    with pytest.raises(ValueError, match="cycle"):
        macho.read_library(dylib(b"\x00\x01a\x00\x00", []))


# --- the checks ---------------------------------------------------------------------------------

SYSTEM = {"_memcpy", "_pthread_create"}
LIBCXX = [
    "__ZNSt3__16threadD1Ev",
    "__ZNKSt3__16locale9use_facetERNS0_2idE",
    "__ZNSt11logic_errorC2EPKc",
    "__ZSt9terminatev",
    "__ZTISt9exception",
    "__ZTVSt12length_error",
    "__ZTVN10__cxxabiv117__class_type_infoE",
    "__Znwm",
    "__ZdlPvm",
    "___cxa_throw",
    "___gxx_personality_v0",
]


def interface() -> list[str]:
    return [f"_{name}" for name in cross.declared()]


def library(exports: Sequence[str], imports: Sequence[str]) -> macho.Library:
    return macho.Library("arm64", "13.0", frozenset(exports), frozenset(imports))


def test_the_interface_is_what_the_library_has() -> None:
    assert {"fm_matmul", "fm_isa", "fm_use_isa", "fm_version"} <= cross.declared()
    if native.available() is None:
        for name in cross.declared():
            assert getattr(loader.loaded(), name)


def test_symbols() -> None:
    exports = [*interface(), "___dso_handle"]
    cross.check_symbols(library(exports, [*SYSTEM, *LIBCXX]), SYSTEM)
    with pytest.raises(CheckFailed, match=r"does not export _fm_matmul$"):
        cross.check_symbols(library(set(exports) - {"_fm_matmul"}, []), SYSTEM)
    with pytest.raises(CheckFailed, match=r"no header declares: __Znwm$"):
        cross.check_symbols(library([*exports, "__Znwm"], []), SYSTEM)
    for name in ("_io_uring_setup", "__ZN8flashmoe7kernelsEv", "___cpu_model"):
        with pytest.raises(CheckFailed, match=f"neither libSystem nor libc\\+\\+: {name}$"):
            cross.check_symbols(library(exports, ["_memcpy", name]), SYSTEM)


def missing() -> Path:
    raise MissingTool("zig is not installed")


def test_missing_tools(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cross, "find_zig", missing)
    assert cross.main([]) == 1
    assert cross.main(["--where-possible"]) == 0
    said = [f"{target}: not run, zig is not installed" for target in cross.CHECKS]
    assert capsys.readouterr().out.splitlines() == 2 * said


def test_no_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross.shutil, "which", lambda name: None)
    monkeypatch.setattr(cross.platform, "machine", lambda: "x86_64")
    with pytest.raises(MissingTool, match="qemu-aarch64 is not installed"):
        cross.find_emulator()
    monkeypatch.setattr(cross.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(cross.platform, "system", lambda: "Linux")
    assert cross.find_emulator() == []


@pytest.mark.parametrize("flags", [[], ["--where-possible"]])
def test_what_fails_is_never_forgiven(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(target: str) -> str:
        raise build.CompilationError(f"c++ failed for {target}")

    monkeypatch.setattr(cross, "CHECKS", {"here": fails, "there": str.upper})
    assert cross.main(flags) == 1
    assert capsys.readouterr().out == "here: failed, c++ failed for here\nthere: THERE\n"
