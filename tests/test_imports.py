"""The order of the house: imports go downwards only, and some things live in one place."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flashmoe

PACKAGE = Path(flashmoe.__file__).parent

# Parts of one floor may not import each other; those of the ground floor may.
FLOORS = [
    {"base", "demo", "native"},
    {"store", "checkpoint", "io", "kernels"},
    {"bank", "repacking"},
    {"memory", "streaming", "probe"},
    {"model", "generation"},
    {"engine"},
    {"bench"},
    {"cli"},
]
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}


def tree_of(module):
    return ast.parse(MODULES[module].read_text())


def imported_names(node):
    """Dotted names that an import statement names; `from a import b` gives a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert node.level == 0, "imports are absolute here"
    return [f"{node.module}.{alias.name}" for alias in node.names]


def imports(tree):
    """Every import anywhere in a module, functions and type checking included."""
    return [
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in imported_names(node)
    ]


def imports_at_load(nodes):
    """Imports that run when the module is loaded."""
    found = []
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found += imported_names(node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            found += imports_at_load(ast.iter_child_nodes(node))
    return found


def names_used(tree):
    """Every bare name and attribute name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name


def part_of(module):
    return module.split(".")[0]


def test_modules_are_found():
    assert len(MODULES) > 30
    assert {"base.errors", "store", "store.layout", "bank.bank", "engine.api"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards(module):
    own = part_of(module)
    assert own in FLOOR_OF, f"{module} has no floor"
    for name in imports(tree_of(module)):
        top, _, rest = name.partition(".")
        if top != "flashmoe":
            continue
        other = part_of(rest)
        if other in ("", "__version__", *flashmoe.__all__):
            assert own in ("bench", "cli"), f"{module} imports the public names"
            continue
        assert other in FLOOR_OF, f"{module} imports {name}, which has no floor"
        down = FLOOR_OF[other] < FLOOR_OF[own] or FLOOR_OF[other] == FLOOR_OF[own] == 0
        assert other == own or down, f"{module} imports {name}"


@pytest.mark.parametrize("module", [m for m in MODULES if part_of(m) != "cli"])
def test_only_the_cli_prints(module):
    tree = tree_of(module)
    assert not {part_of(name) for name in imports(tree)} & {"rich", "typer", "click"}
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert "print" not in [call.id for call in calls if isinstance(call, ast.Name)]


@pytest.mark.parametrize("module", MODULES)
def test_no_environment_variables(module):
    names = {"environ", "environb", "getenv", "getenvb", "putenv"}
    assert not names & set(names_used(tree_of(module)))


@pytest.mark.parametrize("module", [m for m in MODULES if part_of(m) != "io"])
def test_only_io_reads_records(module):
    assert not {"pread", "preadv", "readv"} & set(names_used(tree_of(module)))


def test_io_reads_records():
    assert "preadv" in names_used(tree_of("io.threads"))


@pytest.mark.parametrize("module", [m for m in MODULES if part_of(m) not in ("engine", "cli")])
def test_transformers_is_imported_late(module):
    assert "transformers" not in map(part_of, imports_at_load(tree_of(module).body))


@pytest.mark.parametrize("statement", ["import flashmoe", "import flashmoe.cli.main"])
def test_importing_costs_nothing(statement):
    code = f"import sys; {statement}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    loaded = set(done.stdout.split())
    assert "flashmoe" in loaded
    assert not loaded & {"mlx", "mlx_lm", "transformers", "huggingface_hub"}


def test_public_names():
    assert flashmoe.__all__ == sorted(flashmoe.__all__)
    assert len(set(flashmoe.__all__)) == len(flashmoe.__all__)
    for name in flashmoe.__all__:
        assert getattr(flashmoe, name).__name__ == name


def test_unknown_names():
    with pytest.raises(AttributeError, match="module 'flashmoe' has no attribute 'nothing'"):
        _ = flashmoe.nothing
    with pytest.raises(ImportError):
        from flashmoe import nothing  # noqa: F401


def test_errors_are_one_tree():
    errors = [getattr(flashmoe, name) for name in flashmoe.__all__ if name.endswith("Error")]
    assert len(errors) == 8
    assert all(issubclass(error, flashmoe.FlashMoEError) for error in errors)
